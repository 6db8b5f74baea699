"""A small deployment from folder to report: what happened is what the record says, and nothing stops it half-way."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from device.board.board import BoardPolicy
from device.simulation.live import LiveView
from device.simulation.record import ABSTAIN, RunRecord
from device.simulation.report import render
from device.simulation.simulate import GroundTruth, SimulateOptions, simulate
from device.state.codec import from_files
from device.state.store import Store
from edgeear.errors import DataError, DeviceError, FormatError, UsageError
from edgeear.samples import Samples
from edgeear.system import Rejected
from tests.device.simulation.test_report import parse
from tests.support import fakes

POLICY = BoardPolicy(probation=15, memory=60)
PER_CLASS = 50
ROOT = Path(__file__).resolve().parents[3]


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


def ran(given: SimulateOptions, quiet: bool = True) -> RunRecord:
    start = fakes.empty()
    return simulate(given, fakes.FakeEncoder(), quiet=quiet, policy=POLICY, system=start, now=lambda: 1e9)


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
    assert all(growth.validation_accuracy is not None for growth in record.growth)
    assert {(pair.known, pair.unknown) for pair in record.ood} == {
        (a, b) for a in record.domains for b in record.domains if a != b
    }
    assert {"test images", "stream", "encode", "search", "train", "memory", "evaluation"} <= set(record.timings)


def test_the_stream_is_recorded_sample_by_sample(run: Run) -> None:
    stream = run.record.stream
    assert stream.at == tuple(range(1, 331 - skipped(run)))
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
    told = " ".join(event.text for event in run.record.events)
    assert all(f"generation {number} is permanent" in told for number in numbers[1:])


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


def test_a_store_of_other_domains_or_another_encoder_is_refused(tmp_path: Path, run: Run) -> None:
    data = write(tmp_path, (("red", 0),), 5)
    with pytest.raises(UsageError, match=r"knows blue, green.*--order"):
        ran(options(data, store=run.folder / "store"))
    given = options(run.folder / "data", store=run.folder / "store")
    other = fakes.FakeEncoder()
    other.digest = "0" * 64
    with pytest.raises(FormatError, match=r"learned on encoder"):
        simulate(given, other, quiet=True, policy=POLICY, system=fakes.empty())


def test_a_finished_store_has_nothing_left_to_stream(run: Run, tmp_path: Path) -> None:
    given = options(run.folder / "data", order=run.record.domains, store=tmp_path / "store")
    shutil.copytree(run.folder / "store", tmp_path / "store")
    again = ran(given)
    assert again.accuracy_matrix == run.record.accuracy_matrix and again.stream.at == ()
    assert [event.text for event in again.events if event.kind == "resumed"] == [
        "generation 4 knows red, blue, green: no domain is left to stream"
    ]


STOPPED = """
import sys
from pathlib import Path
from tests.device.simulation.test_simulate import options, ran

record = ran(options(Path(sys.argv[1]), order=("red", "green"), store=Path(sys.argv[2])), quiet=False)
Path(sys.argv[2]).with_suffix(".json").write_text(record.to_json())
"""


def test_ctrl_c_keeps_what_was_confirmed_and_the_store_goes_on(tmp_path: Path) -> None:
    data, store = write(tmp_path / "data", (("red", 0), ("green", 1))), tmp_path / "store"
    command = [sys.executable, "-c", STOPPED, str(data), str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "confirmed" in line:
                running.send_signal(signal.SIGINT)
                break
        told = running.stderr.read()
    assert running.returncode == 0, told
    assert f"{store} keeps generation 2 (red): the same command goes on from there" in told
    stopped = RunRecord.from_json(store.with_suffix(".json").read_text())
    assert stopped.stopped_at == len(stopped.stream.at) < 220
    assert stopped.accuracy_matrix[0][0] is not None and stopped.accuracy_matrix[1] == (None, None)
    assert "stopped after sample" in render(stopped)
    record = ran(options(data, order=("red", "green"), store=store))
    assert "generation 2 knows red: going on with green" in [event.text for event in record.events]
    assert [growth.domain for growth in record.growth] == ["red", "green"]
    assert record.accuracy_matrix[0] == stopped.accuracy_matrix[0] and record.stopped_at is None
    assert set(record.stream.domain) == {"green"} and record.stream.at[0] == 1


def test_a_stop_without_a_store_says_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("device.simulation.simulate.Board.step", stop)
    record = ran(options(write(tmp_path, (("red", 0),), 5)))
    assert record.stopped_at == 0 and "without --store nothing" in record.events[-1].text


def test_a_stop_before_the_first_head_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object, phase: str, *at: int) -> None:
        if phase == "search":
            raise KeyboardInterrupt

    monkeypatch.setattr("device.simulation.simulate._Run._progress", stop)
    record = ran(options(write(tmp_path, (("red", 0), ("green", 1)), 20)))
    assert record.stopped_at and record.growth == () and record.facts[0].labels > 0
    assert record.accuracy_matrix == ((None, None),) * 2 and record.routing_accuracy == ((None,) * 3,) * 2
    assert (record.final_accuracy, record.bwt, record.forgetting) == (None, None, (None, None))
    assert [(row.without, row.after, row.labels) for row in record.worth()] == [(None, None, None)] * 2
    assert record.spent() == (None, None)
    text = io.StringIO()
    LiveView(Console(file=text), record.domains, 0, clock=lambda: 0.0).table(record)
    assert "0.0 %" not in text.getvalue()
    assert "With edgeear the classifier is right on" not in parse(render(record)).text


def test_small_data_is_named_as_such(tmp_path: Path) -> None:
    record = ran(options(write(tmp_path, (("red", 0), ("green", 1)), 8), samples=60))
    facts = {fact.domain: fact for fact in record.facts}
    assert facts["red"].frames == 60 > facts["red"].images and facts["red"].labelled == 40 > facts["red"].labels > 0
    told = parse(render(record)).text
    for words in (
        f"red has {facts['red'].images} different training images for 60 frames",
        f"red has {facts['red'].tests} test images, fewer than 30",
    ):
        assert words in " ".join(record.remarks()) and words in told
    warned = [event.text for event in record.events if event.kind == "data"]
    assert any("60 frames of each domain are fewer than 135" in text and "--samples 135" in text for text in warned)
    assert any("training images for 60 frames" in text for text in warned)


@pytest.mark.parametrize("images", [1, 12])
def test_one_class_or_one_image_makes_a_report(tmp_path: Path, images: int) -> None:
    frames = fakes.frames(0, fakes.CLASSES[:1], fakes.labels_of(images) * 0, seed=5)
    (tmp_path / "data/red/only").mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"data/red/only/{number}.png")
    record = ran(options(tmp_path / "data", labels=10, samples=60, report=tmp_path / "r.html"))
    assert any("only is the only class" in event.text for event in record.events)
    assert "fewer than 30" in (tmp_path / "r.html").read_text()


def test_classes_that_got_no_label_are_listed(tmp_path: Path) -> None:
    record = ran(options(write(tmp_path, (("red", 0),), 30), labels=5, samples=60))
    (fact,) = record.facts
    assert fact.labels == 5 and fact.unlabelled
    assert f"no image of these classes got a label: {', '.join(fact.unlabelled)}" in " ".join(record.remarks())


def test_frames_follow_the_labels_unless_you_say_how_many(tmp_path: Path) -> None:
    assert [options(tmp_path, labels=labels, samples=None).frames for labels in (200, 30, 0)] == [450, 280, 450]
    assert options(tmp_path, samples=60).frames == 60


def test_a_domain_with_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{ABSTAIN}.*rename"):
        ran(options(write(tmp_path, ((ABSTAIN, 0),), 5)))


def test_ground_truth_stays_within_its_budget_and_prefers_the_newest() -> None:
    truth = GroundTruth(2)
    truth.seen = [("a", "x"), ("b", "y"), ("b", "z")]
    assert truth.label([1, 2, 3]) == [None, "y", "z"]
    assert truth.label([3]) == ["z"]
    assert truth.domain([1, 2, 3]) == "b"
