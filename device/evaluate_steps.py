"""The class-incremental protocol: one domain, whose classes arrive a few at a time.

Rules of this file:

1. No exemplar is kept: a step's images update the domain's memory, and the head of all classes seen so far is refitted
   from that memory alone (edgeear/incremental.py).
2. A step keeps a memory and a calibration of its own as well, so that verdicts, routes and shifts are those of a system
   whose domains are the steps; whatever the route, the one refitted head answers.
3. A refitted head is another head, so old outputs are not bit-identical, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptors.archive import HeadArchive, pack
from adaptors.spec import cost
from device.engine import OrtEngine
from device.evaluate_data import I64, DomainData, EvalData, Progress
from device.evaluate_run import Clock, EvalOptions, Laps, Run, growth_figures, head_scores, named, predict
from edgeear.errors import DataError, UsageError
from edgeear.incremental import Readout, head_spec, readout
from edgeear.memory import DomainMemory, learn, merge
from edgeear.novelty import calibrate
from edgeear.system import HYPERVECTOR, Domain, System
from edgeear.types import Encoder


def learn_steps(options: EvalOptions, data: EvalData, encoder: Encoder, on_progress: Progress, clock: Clock) -> Run:
    """Learn the classes of the one domain step by step and predict every test image after each."""
    steps = class_steps(data, options.classes_per_step or 1, options.seed)
    data, engine = replace(data, domains=steps), OrtEngine(encoder)
    policy = replace(options.policy, memory_dimensions=min(options.step_dimensions, data.space.dimensions))
    system = System(encoder.digest, data.space, policy)
    memory: DomainMemory | None = None
    systems, predictions, growth = [], [], []
    for step in steps:
        laps = Laps(clock, step.name, on_progress, "memory")
        new = _learned(step, data.classes, policy.memory_dimensions)
        memory = new if memory is None else merge(memory, new)
        laps("train", 0, 1)
        fitted = readout(memory)
        head = pack(head_spec(), {HYPERVECTOR: (memory.m,)}, memory.classes, fitted.weights(), options.seed)
        laps("memory", 1, 2)
        system = _grown(system, step, new, head, fitted, options.seed)
        laps.finish()
        growth.append(growth_figures(system.domains[-1], step, laps.seconds))
        systems.append(system)
        predictions.append(tuple(predict(system, engine, data.classes, s)[0] for s in steps))
    return Run(
        data,
        encoder,
        tuple(systems),
        tuple(predictions),
        tuple(_within_step(system, engine, data.classes, s) for s in steps),
        tuple(predict(system, engine, data.classes, s)[1] for s in steps),
        tuple(growth),
        (),
        False,
    )


def class_steps(data: EvalData, per_step: int, seed: int) -> tuple[DomainData, ...]:
    """The domain's classes in a seeded order, `per_step` at a time, as domains called "step1: a+b".

    Raises `UsageError` unless there is exactly one domain, `DataError` for a step without a test image.
    """
    if len(data.domains) != 1:
        raise UsageError(f"{len(data.domains)} domains: classes come step by step on one, name it as the order")
    domain = data.domains[0]
    order = np.random.default_rng(seed).permutation(np.unique(domain.train_labels))
    steps: list[DomainData] = []
    for start in range(0, len(order), per_step):
        wanted = sorted(int(c) for c in order[start : start + per_step])
        name = f"step{len(steps) + 1}: {'+'.join(data.classes[c] for c in wanted)}"
        steps.append(domain.of_classes(name, wanted))
        if len(steps[-1].test_labels) == 0:
            raise DataError(f"{name} of domain {domain.name!r} has no test image: add some or take more classes a step")
    return tuple(steps)


def _learned(step: DomainData, classes: Sequence[str], m: int) -> DomainMemory:
    samples = step.samples(classes)
    return learn(step.train_h, samples.labels, samples.classes, m)


def _grown(
    system: System, step: DomainData, memory: DomainMemory, head: HeadArchive, fitted: Readout, seed: int
) -> System:
    """The system after a step: one domain more, and the new head in all of them."""
    m, h = memory.m, step.train_h
    labels = np.unique(step.train_labels, return_inverse=True)[1].astype(np.int64)
    calibration = calibrate(h, labels, memory.classes, m, seed=seed)
    kept = np.random.default_rng(seed).permutation(len(h))[: system.policy.codes]
    price = cost(head_spec(), {HYPERVECTOR: (m,)}, len(head.classes))
    growth: dict[str, object] = {
        "spec": head_spec().to_dict(),
        "explanation": f"refitted from the sums of {len(head.classes)} classes, no image kept",
        "parameters": price.parameters,
        "bytes": len(head.onnx),
        "macs": price.macs,
        "latency_ms_predicted": price.latency_ms,
        "specs_scored": 1,
        "validation_accuracy": None,
        "chosen_by": f"ridge strength {fitted.strength:g} by generalised cross-validation",
    }
    domain = Domain(step.name, head, memory, calibration, h[kept, :m].astype(np.float16), growth)
    grown = system.grown(domain)
    return replace(grown, domains=tuple(replace(d, head=head) for d in grown.domains))


def _within_step(system: System, engine: OrtEngine, classes: Sequence[str], step: DomainData) -> I64:
    """Predictions when it is known which step an image belongs to."""
    served = system.domain(step.name)
    index = named(classes, served)
    scores = head_scores(system, engine, served, step, np.arange(len(step.test_labels)))
    scores = np.where(np.isin(index, np.unique(step.train_labels)), scores, -np.inf)
    found: I64 = index[scores.argmax(axis=1)]
    return found
