"""The class-incremental protocol: one domain whose classes arrive a few at a time.

Rules of this file:

1. No image is kept: a step's images update the domain's memory, and the head of all classes so far is refitted from
   that memory alone (edgeear/incremental.py).
2. Each step also has its own memory and calibration, so that verdicts, routes and shifts are those of a system whose
   domains are the steps. Whatever the route, the refitted head answers.
3. A refitted head differs from the old one, so old outputs are not bit-identical, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptors.archive import HeadArchive
from adaptors.progress import Progress
from device.encoder.engine import OrtEngine
from device.evaluation.data import I64, DomainData, EvalData
from device.evaluation.run import Clock, EvalOptions, Laps, Run, growth_figures, head_scores, named, predict
from edgeear.errors import DataError, UsageError
from edgeear.incremental import refit
from edgeear.learned import learned
from edgeear.memory import DomainMemory, learn, merge
from edgeear.system import System
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
        head, fitted = refit(memory, options.seed)
        laps("memory", 1, 2)
        system = _grown(system, step, data.classes, head, fitted, options.seed)
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
        raise UsageError(f"{len(data.domains)} domains: steps of classes need exactly one; name it with `order`")
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
    system: System, step: DomainData, classes: Sequence[str], head: HeadArchive, growth: dict[str, object], seed: int
) -> System:
    """The system after a step: one more domain, and the new head in all domains."""
    own = step.samples(classes)
    domain = learned(system, step.name, step.train_h, own.labels, own.classes, head, growth, seed)
    grown = system.grown(domain)
    return replace(grown, domains=tuple(replace(d, head=head) for d in grown.domains))


def _within_step(system: System, engine: OrtEngine, classes: Sequence[str], step: DomainData) -> I64:
    """Predictions when the step of each image is known."""
    served = system.domain(step.name)
    index = named(classes, served)
    scores = head_scores(system, engine, served, step, np.arange(len(step.test_labels)))
    scores = np.where(np.isin(index, np.unique(step.train_labels)), scores, -np.inf)
    found: I64 = index[scores.argmax(axis=1)]
    return found
