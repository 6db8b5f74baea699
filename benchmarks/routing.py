"""Routing among 1, 8 and 50 real domains: accuracy, and time of a sample beside the encoder's.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.routing --pacs DIR --digits DIR --json FILE

The fifty are ten folders of images (four of PACS, six of handwritten and printed digits), each plain, turned, blurred,
noisy and faded. A domain has 60 images to learn and 30 to test, drawn anew for every variant; all of it by one seed.
Two of the folders, mnist and mnist_5k, show the same images: five pairs are twins, which no router can tell apart.
Times are medians on one thread, encoder and routing alternating in one process, a sample at a time as on a board.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from device.encoder.export import default_encoder_path
from device.encoder.session import OnnxEncoder, pooled_taps
from device.evaluation.data import CACHE_BYTES
from device.files import cache_dir, write_whole
from device.images.dataset import read_folder, split
from device.images.feature_cache import FeatureCache
from device.images.featurise import featurise
from device.provenance import machine, versions
from edgeear.flow import judge
from edgeear.incremental import refit
from edgeear.learned import learned
from edgeear.memory import learn, rounded
from edgeear.recognition import recognise
from edgeear.space import HypervectorSpace
from edgeear.system import System
from edgeear.types import F32

COUNTS = (1, 8, 50)
IMAGES, TESTED = 90, 1 / 3
TESTED_IMAGES = "about 30 a domain"
SIDE = 192
REPEATS = 5
"""Random choices of the domains at each count."""
ROUNDS = 300
BAR = 0.10
"""Routing and verdict together may take this share of the encoder's time."""

Picture = Image.Image


def _noisy(picture: Picture, rng: np.random.Generator) -> Picture:
    pixels = np.asarray(picture, np.float32)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 35, pixels.shape), 0, 255).astype(np.uint8))


VARIANTS: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "plain": lambda picture, _: picture,
    "turned": lambda picture, _: picture.transpose(Image.Transpose.ROTATE_90),
    "blurred": lambda picture, _: picture.filter(ImageFilter.GaussianBlur(3)),
    "noisy": _noisy,
    "faded": lambda picture, _: ImageEnhance.Contrast(picture).enhance(0.35),
}


def write_domains(sources: list[Path], target: Path, seed: int) -> None:
    """The fifty folders `target/FOLDER-VARIANT/CLASS/*.jpg`, `IMAGES` pictures each; those that are there are kept."""
    for root in sources:
        data = read_folder(root)
        for name in data.domains:
            for k, (variant, change) in enumerate(VARIANTS.items()):
                folder = target / f"{name}-{variant}"
                if folder.exists():
                    continue
                rng = np.random.default_rng([seed, k, *name.encode()])
                items = data.items[name]
                for place in rng.permutation(len(items))[:IMAGES]:
                    with Image.open(items[place].path) as opened:
                        picture = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                    path = folder.with_suffix(".partial") / data.classes[items[place].label] / items[place].path.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    change(picture, rng).save(path.with_suffix(".jpg"), quality=92)
                folder.with_suffix(".partial").rename(folder)


def grown(folder: Path, encoder: OnnxEncoder, seed: int) -> tuple[System, list[F32]]:
    """A system without domains, the domains, and the test hypervectors of each; put together by `chosen`."""
    data = read_folder(folder)
    space = HypervectorSpace(pooled_taps(encoder))
    empty = System(encoder.digest, space)
    m, taps, tests = empty.policy.memory_dimensions, [t.name for t in space.taps], []
    domains = []
    cache = FeatureCache(cache_dir() / "features", CACHE_BYTES)
    for name in data.domains:
        train, test = split(data.items[name], TESTED)
        h = space.encode(featurise(train, encoder, taps, cache=cache))
        tests.append(space.encode(featurise(test, encoder, taps, cache=cache)))
        own, labels = np.unique([item.label for item in train], return_inverse=True)
        classes = tuple(data.classes[c] for c in own)
        head, growth = refit(rounded(learn(h, labels, classes, m)))
        domains.append(learned(empty, name, h, labels, classes, head, growth, seed))
    return System(encoder.digest, space, empty.policy, tuple(domains)), tests


def accuracy(system: System, tests: list[F32]) -> dict[str, float]:
    """Shares of the test images: routed to their domain, to it or its twin, and called foreign."""
    origins = np.array([_origin(name) for name in system.names])
    verdicts = [judge(system, h) for h in tests]
    return {
        "routing_accuracy": float(np.mean([(v.route == k).mean() for k, v in enumerate(verdicts)])),
        "up_to_twins": float(np.mean([(origins[v.route] == origins[k]).mean() for k, v in enumerate(verdicts)])),
        "false_ood": float(np.mean([v.ood.mean() for v in verdicts])),
    }


def recognition(whole: System, tests: list[F32]) -> dict[str, Any]:
    """What `recognise` says of each domain's test images, with the domain learned and without it."""
    back, taken = 0, {}
    for k, (domain, h) in enumerate(zip(whole.domains, tests, strict=True)):
        found = recognise(whole, h)
        back += found is not None and _origin(found.domain) == _origin(domain.name)
        others = replace(whole, domains=tuple(d for i, d in enumerate(whole.domains) if i != k))
        known = recognise(others, h)
        if known is not None:
            taken[domain.name] = known.domain
    wrong = {new: old for new, old in taken.items() if _origin(new) != _origin(old)}
    twins = [d.name for d in whole.domains if sum(_origin(d.name) == _origin(n) for n in whole.names) > 1]
    found_twins = sum(name in taken and name not in wrong for name in twins)
    return {
        "images": TESTED_IMAGES,
        "recognised_when_back": back / len(whole.domains),
        "twins": len(twins),
        "twins_recognised": found_twins / max(len(twins), 1),
        "new_taken_for_known": wrong,
    }


def _origin(name: str) -> str:
    """The name with twins made one: mnist_5k is a part of MNIST."""
    return name.replace("mnist_5k-", "mnist-")


def _judged(system: System, flat: F32, order: NDArray[np.int64], i: int) -> object:
    return judge(system, flat[order[i % len(order)]][None])


def times(systems: dict[int, System], tests: list[F32], encoder: OnnxEncoder) -> dict[str, dict[str, float]]:
    """Quantiles of milliseconds of the encoder, the hypervector, and route and verdict at each count. The fastest tenth
    is what other work on the machine spoils least."""
    taps = [t.name for t in systems[COUNTS[0]].space.taps]
    frames = np.random.default_rng(0).integers(0, 256, (16, 1, *encoder.input_size, 3), dtype=np.uint8)
    features = encoder.encode(frames[0], taps)
    flat = np.concatenate(tests)
    order = np.random.default_rng(1).permutation(len(flat))
    calls: dict[str, Callable[[int], object]] = {
        "encoder": lambda i: encoder.encode(frames[i % 16], taps),
        "hypervector": lambda _: systems[COUNTS[0]].space.encode(features),
    }
    for count, system in systems.items():
        calls[str(count)] = partial(_judged, system, flat, order)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-10, ROUNDS):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(i)
            if i >= 0:
                spent[name].append(1e3 * (time.perf_counter() - begun))
    quantiles = {"p10": 0.1, "p50": 0.5, "p99": 0.99}
    return {name: {q: float(np.quantile(found, at)) for q, at in quantiles.items()} for name, found in spent.items()}


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """The whole record."""
    encoder = OnnxEncoder(default_encoder_path(cache_dir()))
    whole, tests = grown(folder, encoder, seed)
    if len(whole.domains) < max(COUNTS):
        raise SystemExit(f"{folder} has {len(whole.domains)} domains, {max(COUNTS)} are needed: give other folders")
    rng, rows, timed = np.random.default_rng(seed), [], {}
    for count in COUNTS:
        found = []
        for _ in range(REPEATS if count < len(whole.domains) else 1):
            picked = np.sort(rng.permutation(len(whole.domains))[:count])
            system = System(whole.encoder_digest, whole.space, whole.policy, tuple(whole.domains[k] for k in picked))
            found.append(accuracy(system, [tests[k] for k in picked]))
        timed[count] = system
        rows.append({"domains": count, **{k: float(np.mean([f[k] for f in found])) for k in found[0]}})
    clocked = times(timed, tests, encoder)
    for row in rows:
        took = clocked[str(row["domains"])]
        row |= {f"route_ms_{q}": took[q] for q in took}
        row["share_of_encoder"] = max(took[q] / clocked["encoder"][q] for q in ("p10", "p50"))
    return {
        "command": "make bench-routing",
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        **{f"{name}_ms_{q}": clocked[name][q] for name in ("encoder", "hypervector") for q in ("p10", "p50")},
        "rows": rows,
        "bar": f"route and verdict under {BAR:.0%} of the encoder",
        "met": all(row["share_of_encoder"] < BAR for row in rows),
        "recognition": recognition(whole, tests),
        "domains": list(whole.names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pacs", type=Path, required=True, help="folder DOMAIN/CLASS/files")
    parser.add_argument("--digits", type=Path, required=True, help="folder DOMAIN/CLASS/files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    folder = cache_dir() / f"routing-seed{given.seed}"
    write_domains([given.pacs, given.digits], folder, given.seed)
    write_whole(given.json, (json.dumps(measure(folder, given.seed), indent=2) + "\n").encode())
    print(given.json)


if __name__ == "__main__":
    main()
