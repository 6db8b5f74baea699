"""Make the pictures that the other examples and the README use: `photos/`, `held_out/`, `more/` and `photo.jpg`.

They are noise of different brightness, in colour by day and grey by night. A folder that is there is left as it is."""

from pathlib import Path

import numpy as np
from PIL import Image

LEVELS = {"cat": 90, "dog": 160}
CHANNELS = {"day": 3, "night": 1}


def make(folder: Path, levels: dict[str, int], channels: int, count: int, seed: int) -> None:
    """Write `folder/CLASS/NN.jpg`, `count` pictures for each class and level."""
    if folder.exists():
        print(f"{folder} is there already")
        return
    noise = np.random.default_rng(seed)
    for label, level in levels.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = noise.normal(level, 30, (64, 64, channels)).clip(0, 255).astype(np.uint8)
            Image.fromarray(np.repeat(pixels, 3 // channels, axis=2)).save(folder / label / f"{number:02}.jpg")
    print(f"{folder}: {count} pictures of each of {', '.join(levels)}")


for seed, (domain, channels) in enumerate(CHANNELS.items()):
    make(Path("photos", domain), LEVELS, channels, 25, seed)
    make(Path("held_out", domain), LEVELS, channels, 25, 10 + seed)
make(Path("more/day"), {"bird": 220}, 3, 12, 20)
if not Path("photo.jpg").exists():
    Path("photo.jpg").write_bytes(Path("held_out/day/cat/00.jpg").read_bytes())
