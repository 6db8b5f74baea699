"""A small deployment from folder to report: what happened is what the record says, and nothing stops it half-way."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from device.board.board import BoardPolicy
from device.simulation.record import ABSTAIN, RunRecord
from device.simulation.simulate import GroundTruth, SimulateOptions, simulate
from device.state.codec import from_files
from device.state.store import Store
from edgeear.errors import DataError, DeviceError, UsageError
from edgeear.samples import Samples
from edgeear.system import Rejected
from tests.support import fakes

POLICY = BoardPolicy(probation=15, memory=60)
PER_CLASS = 50


def write(root: Path, domains: Sequence[tuple[str, int]], per_class: int = PER_CLASS) -> Path:
    """Folders `root/DOMAIN/CLASS/NNN.png` of fake frames; each domain is a name and a background."""
    for name, background in domains:
        labels = fakes.labels_of(len(fakes.CLASSES) * per_class)
        for number, frame in enumerate(fakes.frames(background, fakes.CLASSES, labels, seed=5)):
            folder = root / name / fakes.CLASSES[int(labels[number])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(folder / f"{number:03}.png")
    return root


def options(data: Path, **changes: object) -> SimulateOptions:
    small = SimulateOptions(data, labels=40, samples=110, tests=20, specs=12, title="small")
    return replace(small, **changes)  # type: ignore[arg-type]


def ran(given: SimulateOptions) -> RunRecord:
    start = fakes.empty()
    return simulate(given, fakes.FakeEncoder(), quiet=True, policy=POLICY, system=start, now=lambda: 1e9)


@dataclass(frozen=True)
class Run:
    record: RunRecord
    folder: Path
    report: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = write(folder / "data", (("red", 0), ("green", 1), ("blue", 2)))
    (data / "green" / fakes.CLASSES[0] / "broken.png").write_bytes(b"no picture")
    given = options(
        data,
        order=("red", "blue", "green"),
        report=folder / "made/report.html",
        json=folder / "run.json",
        store=folder / "store",
    )
    return Run(ran(given), folder, (folder / "made/report.html").read_text())


def test_every_shift_is_noticed_and_nothing_is_forgotten(run: Run) -> None:
    record = run.record
    assert record.domains == ("red", "blue", "green")
    assert [(s.from_, s.to, s.detected) for s in record.shift] == [("red", "blue", True), ("blue", "green", True)]
    assert all(s.at is not None and s.onset is not None and s.delay_samples == s.at - s.onset for s in record.shift)
    assert [s.onset for s in record.shift] == [110, 220]
    assert record.forgetting == (0, 0, 0) and record.bwt == 0
    assert record.final_accuracy is not None and record.final_accuracy > 0.9
    assert record.oracle_route_accuracy is not None and record.oracle_route_accuracy > 0.9


def test_matrices_and_growth_cover_every_domain(run: Run) -> None:
    record = run.record
    assert [len(row) for row in record.accuracy_matrix] == [3, 3, 3]
    assert [len(row) for row in record.routing_accuracy] == [4, 4, 4]
    assert all((row[i] or 0) > 0.9 for i, row in enumerate(record.routing_accuracy))
    assert [growth.domain for growth in record.growth] == ["red", "blue", "green"]
    assert all(sum(point.chosen for point in growth.candidates) == 1 for growth in record.growth)
    assert {(pair.known, pair.unknown) for pair in record.ood} == {
        (a, b) for a in record.domains for b in record.domains if a != b
    }
    assert {"test images", "stream", "encode", "search", "train", "memory", "evaluation"} <= set(record.timings)


def test_the_stream_is_recorded_sample_by_sample(run: Run) -> None:
    stream = run.record.stream
    assert stream.at == tuple(range(330 - skipped(run)))
    assert stream.domain[0] == "red" and stream.domain[-1] == "green"
    assert stream.route[0] == ABSTAIN and stream.novelty[0] is None


def skipped(run: Run) -> int:
    return sum(event.kind == "skipped" and event.at > 0 for event in run.record.events)


def test_a_broken_image_is_reported_and_passed_over(run: Run) -> None:
    told = [event.text for event in run.record.events if event.kind == "skipped"]
    assert told and all("broken.png" in text for text in told)


def test_json_and_report_are_the_record(run: Run) -> None:
    assert RunRecord.from_json((run.folder / "run.json").read_text()) == run.record
    for word in ("small", "red", "green", "blue"):
        assert word in run.report


def test_the_store_holds_every_generation(run: Run) -> None:
    with Store.open(run.folder / "store") as store:
        numbers = [manifest.number for manifest in store.generations()]
        assert len(numbers) == 4 and store.confirmed == store.live == numbers[-1]
        names = [from_files(store.read(number)).names for number in numbers]
    assert names == [(), ("red",), ("red", "blue"), ("red", "blue", "green")]


def test_the_same_seed_gives_the_same_record(tmp_path: Path) -> None:
    given = options(write(tmp_path, (("red", 0), ("green", 1)), 20), samples=80)
    first, second = ran(given), ran(given)
    untimed = {"timings", "growth"}
    assert first.model_dump(exclude=untimed) == second.model_dump(exclude=untimed)
    assert [growth.spec for growth in first.growth] == [growth.spec for growth in second.growth]


def test_a_step_that_nobody_can_see_is_recorded_as_missed(tmp_path: Path) -> None:
    record = ran(options(write(tmp_path, (("one", 0), ("same", 0)), 20), samples=80))
    assert [(s.to, s.detected, s.at, s.onset) for s in record.shift] == [("same", False, None, 80)]
    assert [growth.domain for growth in record.growth] == ["one"]
    assert record.oracle_route_accuracy is None
    assert record.accuracy_matrix[1][1] is not None and record.accuracy_matrix[1][1] > 0.9


def test_a_rejected_domain_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeear import flow

    def picky(*args: object) -> object:
        samples = args[1]
        assert isinstance(samples, Samples)
        return Rejected("green", ("steals",)) if samples.name == "green" else flow.adapt(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("device.board.learner.adapt", picky)
    record = ran(options(write(tmp_path, (("red", 0), ("green", 1), ("zinc", 2)), 20), order=("red", "green", "zinc")))
    assert [growth.domain for growth in record.growth] == ["red", "zinc"]
    assert any(event.kind == "rejected" and "steals" in event.text for event in record.events)
    assert not any(shift.false_alarm for shift in record.shift)


def test_progress_is_shown_unless_quiet(tmp_path: Path) -> None:
    data = write(tmp_path, (("red", 0),), 10)
    shown = {}
    for quiet in (False, True):
        text = io.StringIO()
        given = options(data, labels=10, samples=12)
        simulate(
            given, fakes.FakeEncoder(), console=Console(file=text), quiet=quiet, policy=POLICY, system=fakes.empty()
        )
        shown[quiet] = text.getvalue()
    assert "grown" in shown[False] and shown[True] == ""


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"labels": 4}, UsageError, "labels is 4"),
        ({"samples": 0}, UsageError, "samples is 0"),
        ({"fps": 0.0}, UsageError, "fps is 0"),
        ({"order": ("red", "gone")}, DataError, "no domain gone"),
        ({"report": Path("/proc/no/report.html")}, DeviceError, "cannot be made"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], complaint: str
) -> None:
    data = write(tmp_path, (("red", 0),), 5)
    with pytest.raises(error, match=complaint):
        ran(options(data, **changes))


def test_a_used_store_is_refused(tmp_path: Path, run: Run) -> None:
    data = write(tmp_path, (("red", 0),), 5)
    with pytest.raises(UsageError, match="already holds generations"):
        ran(options(data, store=run.folder / "store"))


def test_a_domain_with_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{ABSTAIN}.*rename"):
        ran(options(write(tmp_path, ((ABSTAIN, 0),), 5)))


def test_ground_truth_stays_within_its_budget_and_prefers_the_newest() -> None:
    truth = GroundTruth(2)
    truth.seen = [("a", "x"), ("b", "y"), ("b", "z")]
    assert truth.label([1, 2, 3]) == [None, "y", "z"]
    assert truth.label([3]) == ["z"]
    assert truth.domain([1, 2, 3]) == "b"
