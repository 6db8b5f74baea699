"""Follow a stream: answers, and a word when it leaves what is known and when it is back."""

from collections.abc import Iterator
from pathlib import Path

from edgeear import Ear, Prediction, Recognised, Shift


def camera() -> Iterator[Path]:
    """Stands for a camera: known pictures, then foreign ones, then known ones again. Yield arrays here just as well."""
    for folder in ("held_out/day", "held_out/night", "held_out/day"):
        yield from sorted(Path(folder).glob("*/*.jpg"))


ear = Ear()
print(ear.learn("photos/day"))

answers = 0
for item in ear.stream(camera()):
    match item:
        case Prediction():
            answers += 1
        case Shift():
            print(f"frame {item.at}: the stream left all that is known after about frame {item.onset}")
        case Recognised():
            print(f"frame {answers}: this is {item.domain} again")
print(f"{answers} frames answered")
