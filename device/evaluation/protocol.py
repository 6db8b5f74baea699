"""`edgeear eval`: the whole continual protocol on a folder of domains.

Rules of this file:

1. Domains are learned in the given order: adapt, then commit and confirm. If admission rejects a domain, the rejection
   is recorded and the protocol continues without that domain.
2. A domain's training images are used by its own adaptation only. Test images are never used for learning.
3. Every accuracy is routed by the router. Labels are matched by name: a head knows the classes of its own domain only.
4. The figures depend on the data, the options and the seed. Only times and memory sizes depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adaptors.progress import Progress
from adaptors.search_space import BUDGETS
from device.encoder.engine import OrtEngine
from device.evaluation.data import I64, DomainData, EvalData, open_encoder, read_domains
from device.evaluation.memory import inference_memory, peak_rss_mb
from device.evaluation.result import EvalResult, Memory, OodFigures, Rejection, WrongRoutes
from device.evaluation.run import (
    Clock,
    EvalOptions,
    Laps,
    Run,
    fingerprint,
    growth_figures,
    head_scores,
    named,
    predict,
)
from device.evaluation.steps import learn_steps
from device.evaluation.stream import false_alarms, shifts
from device.provenance import machine
from device.provenance import versions as installed_versions
from edgeear.errors import DataError, UsageError
from edgeear.flow import adapt, judge
from edgeear.memory import learn
from edgeear.metrics import auroc, bwt, confusion, forgetting, fpr95
from edgeear.novelty import calibrate, detector
from edgeear.samples import AdaptPolicy
from edgeear.system import Live, Rejected, System, SystemPolicy, commit, confirm
from edgeear.types import Encoder

FEW_TESTS = 30
"""Test sets below this size are named in the warnings."""


def evaluate(
    options: EvalOptions,
    on_progress: Progress = lambda *_: None,
    *,
    encoder: Encoder | None = None,
    clock: Clock = time.perf_counter,
) -> EvalResult:
    """Run the protocol and return every figure. `encoder` replaces the one that the options name.

    Raises `DataError` for images that cannot be used and for a domain of one class, `UsageError` for options that
    contradict the data, `EmptyBudget` when no head fits the budget.
    """
    started, path = clock(), None
    if encoder is None:
        encoder, path = open_encoder(options)
    data = read_domains(options, encoder, on_progress)
    _refuse_single_classes(data)
    featurised = clock()
    if options.classes_per_step is not None:
        run = learn_steps(options, data, encoder, on_progress, clock)
    else:
        run = learn_domains(options, data, encoder, on_progress, clock)
    learned = clock()
    result = _figures(options, run, path, on_progress)
    spent = {"features": featurised - started, "learning": learned - featurised, "figures": clock() - learned}
    return result.model_copy(update={"timings_s": spent})


def _refuse_single_classes(data: EvalData) -> None:
    for domain in data.domains:
        own = np.unique(domain.train_labels)
        if len(own) < 2:
            name = ", ".join(data.classes[c] for c in own)
            what = f"domain {domain.name!r} has one class ({name}), so any answer is right"
            raise DataError(f"{what}: add images of a second class or leave the domain out")


# -------------------------------------------------------------------------------------------------- learning


def learn_domains(options: EvalOptions, data: EvalData, encoder: Encoder, on_progress: Progress, clock: Clock) -> Run:
    """Learn every domain in order and predict every test image after each."""
    engine = OrtEngine(encoder)
    empty = System(encoder.digest, data.space, options.policy)
    live, policy = Live(empty, empty), _adapt_policy(options)
    systems, predictions, growth, rejected = [], [], [], []
    witnessed: dict[str, str] = {}
    for domain in data.domains:
        laps = Laps(clock, domain.name, on_progress, "search")
        outcome = adapt(live.serving, domain.samples(data.classes), policy, options.seed, laps)
        laps.finish()
        if isinstance(outcome, Rejected):
            rejected.append(Rejection(domain=outcome.domain, reasons=outcome.reasons))
        else:
            live = confirm(commit(live, outcome))
            grown = live.serving.domain(domain.name)
            growth.append(growth_figures(grown, domain, laps.seconds))
            witnessed[domain.name] = fingerprint(live.serving, OrtEngine(encoder), grown, domain)
        systems.append(live.serving)
        predictions.append(tuple(predict(live.serving, engine, data.classes, d)[0] for d in data.domains))
    final = live.serving
    now = {d.name: fingerprint(final, OrtEngine(encoder), final.domain(d.name), d) for d in known(final, data)}
    return Run(
        data,
        encoder,
        tuple(systems),
        tuple(predictions),
        tuple(_oracle(final, engine, data.classes, d) for d in data.domains),
        tuple(predict(final, engine, data.classes, d)[1] for d in data.domains),
        tuple(growth),
        tuple(rejected),
        now == witnessed,
    )


def known(system: System, data: EvalData) -> list[DomainData]:
    """The domains that the system has learned, in order."""
    return [d for d in data.domains if d.name in system.names]


def _adapt_policy(options: EvalOptions) -> AdaptPolicy:
    from adaptors.search import PREFERENCES, SearchPolicy

    if options.prefer not in PREFERENCES:
        raise UsageError(f"prefer is {options.prefer!r}: choose one of {', '.join(PREFERENCES)}")
    tie, price = PREFERENCES[options.prefer]
    search = SearchPolicy(specs=options.specs, seed=options.seed, tie=tie, price=price, halving=options.halving)
    return AdaptPolicy(
        budget=BUDGETS[options.budget], search=search, spatial=bool(options.spatial), latency=options.latency
    )


def _oracle(system: System, engine: OrtEngine, classes: Sequence[str], domain: DomainData) -> I64:
    """Predictions of the domain's own head, or routed ones where it has none."""
    if domain.name not in system.names:
        return predict(system, engine, classes, domain)[0]
    own = system.domain(domain.name)
    scores = head_scores(system, engine, own, domain, np.arange(len(domain.test_labels)))
    found: I64 = named(classes, own)[scores.argmax(axis=1)]
    return found


# --------------------------------------------------------------------------------------------------- figures


def _figures(options: EvalOptions, run: Run, path: Path | None, on_progress: Progress) -> EvalResult:
    data, domains, final = run.data, run.data.domains, run.systems[-1]
    truth = [d.test_labels for d in domains]
    matrix = np.array([[_accuracy(p, t) for p, t in zip(row, truth, strict=True)] for row in run.predictions])
    own = tuple(_accuracy(p, t) for p, t in zip(run.oracle, truth, strict=True))
    inference, reason = inference_memory(path, final, [d.test_paths[0] for d in domains])
    return EvalResult(
        domains=tuple(d.name for d in domains),
        classes=data.classes,
        seed=options.seed,
        shots=options.shots,
        accuracy_matrix=tuple(tuple(float(v) for v in row) for row in matrix),
        final_accuracy=float(matrix[-1].mean()),
        bwt=bwt(matrix),
        oracle_route_accuracy=float(np.mean(own)),
        routing_accuracy=_confusion(run),
        wrong_routes=wrong_routes(run),
        ood=separations(data, options.policy, options.seed, on_progress),
        shift=shifts(run.systems, domains, options.seed, on_progress),
        false_alarms_per_10k=false_alarms(final, known(final, data), options.seed, on_progress),
        growth=run.growth,
        old_outputs_bit_identical=run.bit_identical,
        peak_rss_mb=Memory(inference=inference, learning=peak_rss_mb(), inference_missing_because=reason),
        rejected=run.rejected,
        own_head_accuracy=own,
        forgetting=tuple(forgetting(matrix)),
        false_ood_rate=tuple(_false_ood(final, d) for d in domains),
        alpha=options.policy.alpha,
        training_samples=tuple(len(d.train_labels) for d in domains),
        test_samples=tuple(len(d.test_labels) for d in domains),
        encoder_digest=run.encoder.digest,
        budget=options.budget,
        spatial=bool(options.spatial),
        classes_per_step=options.classes_per_step,
        timings_s={},
        warnings=(*data.warnings, *_small_tests(domains)),
        date=options.date,
        machine=machine(),
        versions=installed_versions(),
    )


def _small_tests(domains: Sequence[DomainData]) -> list[str]:
    """The domains whose test images are too few for an accuracy to mean much."""
    return [
        f"domain {d.name}: {n} test images are fewer than {FEW_TESTS}: each moves its accuracy by {1 / n:.1%}"
        for d in domains
        if (n := len(d.test_labels)) < FEW_TESTS
    ]


def _accuracy(predicted: I64, truth: I64) -> float:
    return float((predicted == truth).mean())


def _confusion(run: Run) -> tuple[tuple[float, ...], ...]:
    """Rows = true domain, columns = the domain that served it; a rejected domain serves nothing."""
    names = [d.name for d in run.data.domains]
    place = np.array([names.index(n) for n in run.systems[-1].names], np.int64)
    routes = [place[r[r >= 0]] if len(place) else np.zeros(0, np.int64) for r in run.routes]
    return tuple(tuple(float(v) for v in row) for row in confusion(routes, len(names)))


def wrong_routes(run: Run) -> WrongRoutes:
    """What wrong routes cost in the end. Inputs that no head served do not count as wrong routes, and domains that were
    never learned are left out."""
    names, domains = run.systems[-1].names, run.data.domains
    learned = [j for j, d in enumerate(domains) if d.name in names]
    wrong = {j: (run.routes[j] >= 0) & (run.routes[j] != names.index(domains[j].name)) for j in learned}
    routed = [(run.predictions[-1][j] == domains[j].test_labels)[wrong[j]] for j in learned]
    own = [(run.oracle[j] == domains[j].test_labels)[wrong[j]] for j in learned]
    count, total = sum(int(w.sum()) for w in wrong.values()), sum(len(w) for w in wrong.values())
    return WrongRoutes(
        inputs=count,
        share=count / total if total else 0.0,
        accuracy_as_routed=float(np.concatenate(routed).mean()) if count else None,
        accuracy_of_own_head=float(np.concatenate(own).mean()) if count else None,
    )


def _false_ood(system: System, domain: DomainData) -> float:
    return float(judge(system, domain.test_h).ood.mean()) if system.domains else 1.0


def separations(data: EvalData, policy: SystemPolicy, seed: int, on_progress: Progress) -> tuple[OodFigures, ...]:
    """For every ordered pair of domains: learn the known one alone and score the test images of both."""
    found = []
    for done, a in enumerate(data.domains):
        on_progress("out of distribution", done, len(data.domains))
        s, m = a.samples(data.classes), policy.memory_dimensions
        calibration = calibrate(a.train_h, s.labels, s.classes, m, seed=seed)
        detect = detector(learn(a.train_h, s.labels, s.classes, m))
        inside = calibration.novelty(detect, a.test_h)
        for b in data.domains:
            if b is not a:
                outside = calibration.novelty(detect, b.test_h)
                figures = {"auroc": auroc(inside, outside), "fpr95": fpr95(inside, outside)}
                found.append(OodFigures(known=a.name, unknown=b.name, **figures))
    return tuple(found)
