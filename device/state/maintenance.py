"""Operations on the store of a stopped board: list it, merge two domains, forget a domain or a class.

Rules of this file:

1. A change is admitted, committed and confirmed, like every change. A rejection is a value and changes nothing.
2. It starts from the confirmed generation, as a board does at its start. One process at a time has the store open.
3. What is forgotten is gone from every generation of the store: there is no way back (generations.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.images.dataset import Item
from device.images.decode import SUFFIXES
from device.images.featurise import featurise
from device.state import generations
from device.state.codec import from_files
from device.state.store import CURRENT, Store
from edgeear.errors import DataError, UsageError
from edgeear.forgetting import forget_class, forget_domain
from edgeear.merging import HeadChoice, merge_domains
from edgeear.system import Candidate, Domain, Rejected, System
from edgeear.types import F32, Encoder


@dataclass(frozen=True)
class Changed:
    """`what` was done; the number of the new `generation` and its `domains`; `replay`: the share of each domain's codes
    that changed route; `removed`: numbers of removed generations."""

    what: str
    generation: int
    domains: tuple[str, ...]
    replay: dict[str, float]
    removed: tuple[int, ...] = ()


def listing(folder: Path) -> dict[str, object]:
    """All generations and the domains of the live one, JSON-able. Raises `UsageError` where there is no store, and
    `StoreBusy`."""
    with _open(folder) as store:
        live = store.live
        domains = [] if live is None else [facts(d) for d in from_files(store.read(live)).domains]
        kept = [
            {"generation": m.number, "parent": m.parent, "created": m.created, "note": m.note}
            for m in store.generations()
        ]
        return {"live": live, "confirmed": store.confirmed, "domains": domains, "generations": kept}


def merge(folder: Path, first: str, second: str, head: HeadChoice, now: float) -> Changed | Rejected:
    """Merge `second` into `first` (edgeear/merging.py). Raises as `listing` does; `UsageError` for unknown names."""
    with _open(folder) as store:
        outcome = merge_domains(_confirmed(store, folder), first, second, head)
        if isinstance(outcome, Rejected):
            return outcome
        what = f"merged {second} into {first}"
        system = generations.publish_confirmed(store, outcome.system, now, what)
        lost = {name: share for name, share in outcome.replay.items() if name in system.names}
        return Changed(what, system.generation, system.names, lost)


def forget(
    folder: Path, domain: str, label: str | None, now: float, images: tuple[Path, Encoder] | None = None
) -> Changed | Rejected:
    """Forget a domain, or its class `label` (edgeear/forgetting.py). Give `images`, the folder of all images that were
    learned of the class and the encoder, to forget the class exactly.

    Raises as `merge` does, and `FormatError` for another encoder."""
    with _open(folder) as store:
        system = _confirmed(store, folder)
        outcome: Candidate | Rejected
        if label is None:
            outcome = forget_domain(system, domain)
        else:
            seen = None if images is None else _encoded(system, *images)
            outcome = forget_class(system, domain, label, seen)
        if isinstance(outcome, Rejected):
            return outcome
        how = "from the sums alone" if images is None else "with its samples, exactly"
        what = f"forgot {domain}" if label is None else f"forgot {label} of {domain}, {how}"
        system, removed = generations.publish_alone(store, outcome.system, now, what)
        return Changed(what, system.generation, outcome.system.names, dict(outcome.replay), removed)


@contextmanager
def _open(folder: Path) -> Iterator[Store]:
    if not (folder / CURRENT).is_file():
        raise UsageError(
            f"{folder} is not a store: give a folder that `learn --store`, `simulate --store` or `Ear.save` wrote"
        )
    with Store.open(folder, keep=1) as store:
        yield store


def _confirmed(store: Store, folder: Path) -> System:
    system = generations.load(store)
    if system is None:
        raise UsageError(f"{folder} has no confirmed generation: there is nothing to change")
    return system


def facts(domain: Domain) -> dict[str, object]:
    """Name, samples by class, size and head of a domain, JSON-able."""
    counts = dict(zip(domain.memory.classes, domain.memory.counts.tolist(), strict=True))
    explanation = str(domain.growth.get("explanation", ""))
    return {"name": domain.name, "samples": counts, "bytes": domain.bytes, "head": explanation}


def _encoded(system: System, images: Path, encoder: Encoder) -> F32:
    """Hypervectors `(images, D)` of all images in a folder."""
    generations.require_encoder(system, encoder.digest)
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES) if images.is_dir() else []
    if not paths:
        raise DataError(f"{images} has no image: give the folder of all images that were learned of the class")
    taps = [tap.name for tap in system.space.taps]
    return system.space.encode(featurise([Item(p, p.name, 0) for p in paths], encoder, taps))
