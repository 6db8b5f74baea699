"""Label-free adaptation measured: doing nothing, alignment alone, ours, labels; and whether the gate ever hurts.

    python benchmarks/labelfree.py --data DIR [--domains a,b] [--seeds N] [--orders N] --json OUT

1. `targets`: a head is grown with labels on the first domain; every other domain comes without labels, alone.
   Accuracy on its test images, through the router. "ours" is what serves after the gate: where it refused, what served
   before.
2. `orders`: random orders of all domains. The first is learned with labels, the others come without, one after
   another; what was committed serves as a source for the next. Accuracy before and after every step, old domains too.
3. Frames are a seeded draw of at most `--frames` training images of a domain; nothing that adapts sees a test image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from adaptors.search import SearchPolicy
from device.encoder.engine import OrtEngine
from device.evaluation.data import DataOptions, EvalData, open_encoder, read_domains
from device.provenance import machine, versions
from edgeear import unlabelled
from edgeear.flow import adapt, judge
from edgeear.incremental import readout
from edgeear.samples import AdaptPolicy, Samples
from edgeear.system import HYPERVECTOR, Candidate, Domain, System
from edgeear.types import F32

POLICY = unlabelled.UnlabelledPolicy()
GATE = ("foreign", "agreement", "reverse", "confidence", "diversity", "structure")


class Bench:
    """The data, a machine to run heads on, and the heads that several parts share."""

    def __init__(self, data: EvalData, system: System, engine: OrtEngine, frames: int, specs: int) -> None:
        self.data, self.system, self.engine, self.frames = data, system, engine, frames
        self.policy = AdaptPolicy(search=SearchPolicy(specs=specs), spatial=False)
        self.by_name = {d.name: d for d in data.domains}
        self._labelled: dict[tuple[str, int, bool], Domain] = {}

    def drawn(self, name: str, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        n = len(self.by_name[name].train_labels)
        return np.random.default_rng([seed, self.data.domains.index(self.by_name[name])]).permutation(n)[: self.frames]

    def views(self, name: str, seed: int) -> list[dict[str, F32]]:
        rows = self.drawn(name, seed)
        return [{t: x[rows] for t, x in view.items()} for view in self.by_name[name].train]

    def labelled(self, name: str, seed: int, *, all_images: bool) -> Domain:
        """The domain learned with labels, from all its training images or from those that are drawn."""
        key = (name, seed, all_images)
        if key not in self._labelled:
            given = self.by_name[name].samples(self.data.classes)
            if not all_images:
                given = Samples(name, self.views(name, seed), given.labels[self.drawn(name, seed)], given.classes)
            outcome = adapt(self.system, given, self.policy, seed)
            assert isinstance(outcome, Candidate), outcome
            self._labelled[key] = outcome.system.domains[0]
        return self._labelled[key]

    def accuracy(self, system: System, name: str) -> float:
        """Routed accuracy on the test images of a domain."""
        d, right = self.by_name[name], 0
        route = judge(system, d.test_h).route
        for k in np.unique(route):
            rows, head = np.flatnonzero(route == k), system.domains[int(k)].head
            taps = {t: x[rows] for t, x in d.test.items()}
            taps[HYPERVECTOR] = d.test_h[rows, : system.policy.memory_dimensions]
            said = np.array(head.classes)[self.engine.scores(head, taps).argmax(axis=1)]
            right += int((said == np.array(self.data.classes)[d.test_labels[rows]]).sum())
        return right / len(d.test_labels)

    def step(self, system: System, name: str, seed: int) -> tuple[System, dict[str, Any]]:
        """One unlabelled domain: the system that serves afterwards, and what happened."""
        views, known = self.views(name, seed), system.names
        before = {d: self.accuracy(system, d) for d in (name, *known)}
        h = system.space.encode(views[0])
        found = unlabelled.label_frames(system, self.engine, views[0], h, POLICY, seed)
        truth = np.array(self.data.classes)[self.by_name[name].train_labels[self.drawn(name, seed)]]
        row: dict[str, Any] = {
            "target": name,
            "known": list(known),
            "self_label_accuracy": float((np.array(found.classes)[found.labels] == truth).mean()),
            "gate": {k: getattr(found.trust, k) for k in ("frames", *GATE, "changed")},
        }
        outcome = unlabelled.adapt_unlabelled(system, self.engine, name, views, POLICY, self.policy, seed)
        row["committed"] = isinstance(outcome, Candidate)
        if isinstance(outcome, Candidate):
            system = outcome.system
        else:
            row["refused_because"] = list(outcome.reasons)
        after = {d: self.accuracy(system, d) for d in (name, *known)}
        row["before"], row["after"] = before[name], after[name]
        row["old_domains_worst_change"] = min(after[d] - before[d] for d in known)
        return system, row

    def target(self, source: str, name: str, seed: int) -> dict[str, Any]:
        base = self.system.grown(self.labelled(source, seed, all_images=True))
        _, row = self.step(base, name, seed)
        row |= {"source": source, "seed": seed, "nothing": row["before"], "ours": row["after"]}
        row["alignment_only"] = self.alignment_only(base, name, seed)
        row["oracle"] = self.accuracy(self.system.grown(self.labelled(name, seed, all_images=False)), name)
        return row

    def alignment_only(self, base: System, name: str, seed: int) -> float:
        """The readout of the source's memory on hypervectors moved to the source's mean, and nothing else."""
        d, memory = self.by_name[name], base.domains[0].memory
        centre = base.space.encode(self.views(name, seed)[0]).mean(axis=0)
        moved = d.test_h[:, : memory.m] - centre[: memory.m] + memory.mean.astype(np.float32)
        said = np.array(memory.classes)[readout(memory).scores(moved).argmax(axis=1)]
        return float((said == np.array(self.data.classes)[d.test_labels]).mean())

    def order(self, seed: int) -> dict[str, Any]:
        names = [str(n) for n in np.random.default_rng([99, seed]).permutation([d.name for d in self.data.domains])]
        system, steps = self.system.grown(self.labelled(names[0], seed, all_images=False)), []
        for name in names[1:]:
            system, row = self.step(system, name, seed)
            steps.append(row)
        return {"seed": seed, "order": names, "steps": steps}


def summary(targets: list[dict[str, Any]], orders: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and targets; `worst_committed_change` over everything that was committed anywhere."""
    steps = [*targets, *(s for o in orders for s in o["steps"])]
    changes = [s["after"] - s["before"] for s in steps if s["committed"]]
    out: dict[str, Any] = {
        "steps": len(steps),
        "committed": len(changes),
        "worst_committed_change": min(changes, default=None),
        "mean_committed_change": float(np.mean(changes)) if changes else None,
        "worst_change_of_an_old_domain": min((s["old_domains_worst_change"] for s in steps), default=None),
    }
    if targets:
        out |= {k: float(np.mean([t[k] for t in targets])) for k in ("nothing", "alignment_only", "ours", "oracle")}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", help="by commas, the first is the labelled source of `targets`; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--specs", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    options = DataOptions(given.data, tuple(given.domains.split(",")) if given.domains else None)
    encoder, _ = open_encoder(options)
    data = read_domains(options, encoder, lambda *_: None)
    bench = Bench(data, System(encoder.digest, data.space), OrtEngine(encoder), given.frames, given.specs)
    started, source, others = time.monotonic(), data.domains[0], data.domains[1:]
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]).replace(str(Path.home()), "~"),
        "seeds": list(range(given.seeds)),
        "frames_at_most": given.frames,
        "policy": {k: getattr(POLICY, k) for k in ("frames", *GATE) if k != "reverse"},
    }
    targets: list[dict[str, Any]] = []
    orders: list[dict[str, Any]] = []
    for seed in range(max(given.seeds, given.orders)):
        if seed < given.seeds:
            targets += [bench.target(source.name, d.name, seed) for d in others]
        if seed < given.orders:
            orders.append(bench.order(seed))
        result |= {"summary": summary(targets, orders), "targets": targets, "orders": orders}
        given.json.write_text(json.dumps(result, indent=1) + "\n")  # whatever is done by now
        print(f"seed {seed}, {time.monotonic() - started:.0f} s: {result['summary']}", flush=True)


if __name__ == "__main__":
    main()
