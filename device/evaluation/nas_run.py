"""Input and output of `edgeear bench nas`: the images of one domain, and tables of trained heads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptors.latency import LatencyModel
from adaptors.progress import Progress
from adaptors.search_space import Budget, SearchSpace
from device.evaluation.data import DataOptions, open_encoder, read_domains
from device.evaluation.nas import bench_nas, fidelity, make_truth
from device.evaluation.nas_table import CHEAP, FULL, Images, Regime, Truth, from_json, to_json
from device.files import cache_dir, write_whole
from device.provenance import machine, versions
from edgeear.errors import DataError, UsageError
from edgeear.types import Encoder

SPATIAL_TAPS = 2
"""How many of the last spatial taps are in the space: earlier maps are large and tell little about classes."""


@dataclass(frozen=True)
class NasOptions:
    """Options of the command. `tables` None keeps no table and uses the built-in combination of proxies."""

    data: Path
    domain: str
    heads: int
    tables: Path | None
    only_table: bool
    fidelity: int
    specs: int
    encoder: Path | None
    budget: Budget
    latency: LatencyModel
    seed: int
    date: str | None


def run(options: NasOptions, on_progress: Progress) -> dict[str, Any]:
    """Every figure of the command. Raises DataError for unusable images or tables, UsageError for options that
    contradict each other."""
    if options.only_table and options.tables is None:
        raise UsageError("--only-table needs a folder for the table: name one with --tables")
    encoder, _ = open_encoder(DataOptions(options.data, encoder=options.encoder))
    cache, seeds = cache_dir() / "nas", tuple(range(options.seed, options.seed + 3))
    images = read_images(options, encoder, CHEAP, on_progress)
    space = SearchSpace(images.shapes, images.classes, options.latency)
    place = options.tables / f"heads-{options.domain}.json" if options.tables else None
    if place and place.exists():
        truth = read_table(place, encoder)
    else:
        truth = make_truth(
            options.domain,
            images,
            encoder.digest,
            space,
            options.budget,
            cache,
            heads=options.heads,
            seeds=seeds,
            on_progress=on_progress,
        )
        if place:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, (json.dumps(to_json(truth), separators=(",", ":")) + "\n").encode())
    facts = {"domain": options.domain, "date": options.date, "machine": machine(), "versions": versions()}
    if options.only_table:
        return {**facts, "heads": len(truth.specs), "best_accuracy": float(truth.mean.max())}
    others = [read_table(p, encoder) for p in sorted(place.parent.glob("heads-*.json")) if p != place] if place else []
    result = bench_nas(
        truth, others, images, space, options.budget, cache, seeds=seeds, specs=options.specs, on_progress=on_progress
    )
    if options.fidelity:
        full = read_images(options, encoder, FULL, on_progress)
        result["fidelity"] = fidelity(options.domain, truth, full, cache, options.fidelity, on_progress)
    return {**result, **facts}


def read_table(path: Path, encoder: Encoder) -> Truth:
    """A table of heads on this encoder. Raises DataError if the file is no table, or one of another encoder."""
    try:
        truth = from_json(json.loads(path.read_text()))
    except (ValueError, DataError) as error:
        raise DataError(f"{path}: {error}") from error
    if truth.encoder != encoder.digest:
        raise DataError(
            f"{path} is of encoder {truth.encoder[:12]}, but this one is {encoder.digest[:12]}: make it again"
        )
    return truth


def read_images(options: NasOptions, encoder: Encoder, regime: Regime, on_progress: Progress) -> Images:
    """The domain's images under the regime: images that are not trained on are test images."""
    asked = DataOptions(
        options.data,
        (options.domain,),
        shots=regime.shots,
        spatial=SPATIAL_TAPS,
        test_on_rest=regime.shots is not None,
        encoder=options.encoder,
    )
    read = read_domains(asked, encoder, on_progress)
    domain = read.domains[0]
    given = domain.samples(read.classes)
    own = [read.classes.index(name) for name in given.classes]
    keep = np.flatnonzero(np.isin(domain.test_labels, own))
    test = {tap: x[keep] for tap, x in domain.test.items()}
    labels = np.searchsorted(own, domain.test_labels[keep]).astype(np.int64)
    tested = [p.name for p in domain.test_paths]
    identity = f"{encoder.digest} {options.domain} {given.labels.tobytes().hex()} {tested}"
    return Images(given.views, given.labels, test, labels, len(own), identity)
