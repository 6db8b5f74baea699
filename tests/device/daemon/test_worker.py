"""The learning process: a real child learns what learning here would, and whatever else a child does is an outcome."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from adaptors.search import SearchPolicy
from adaptors.train import TrainPolicy
from device.board.board import Board, BoardPolicy
from device.board.learner import Failed, Job, LabelledJob, Outcome, UnlabelledJob, learn
from device.daemon.learning.snapshot import Inbox, domain_parts, job_of, job_parts, message, pack, system_of, unpack
from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder
from edgeear.errors import EdgeearError, FormatError, UsageError
from edgeear.flow import install
from edgeear.samples import AdaptPolicy
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Candidate, Live, Rejected, System
from edgeear.unlabelled import UnlabelledPolicy
from tests.support import fakes, tiny_models

QUICK = WorkerPolicy(specs=12, epochs=5, time_limit_s=120)
SAME = AdaptPolicy(search=SearchPolicy(specs=12), train=TrainPolicy(epochs=5))
"""What QUICK means to a learner in this process."""
SAYS = f"import os,sys,time; sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})\n"
"""How a made-up child begins."""
HANGS = "[os.read(0, 1)]"
SPEAKS = """
from device.daemon.learning.snapshot import message, pack
def say(kind, header): os.write(1, b"".join(message(kind, pack(header, {}))))
"""


@dataclass(frozen=True)
class World:
    path: Path
    encoder: OnnxEncoder
    empty: System
    one: System
    """Knows domain 0, learned in a child."""


def job(system: System, background: int, n: int = 60) -> LabelledJob:
    labels = fakes.labels_of(n)
    frames = tuple(fakes.frames(background, fakes.CLASSES, labels, 1))
    return LabelledJob(system, f"d{background}", frames, tuple(fakes.CLASSES[i] for i in labels), seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tiny_models.saved(tmp_path_factory.mktemp("encoder"), tiny_models.seeing())
    encoder = OnnxEncoder(path)
    policy = fakes.empty(recognise=3.0).policy
    empty = System(encoder.digest, HypervectorSpace(encoder.taps, SpacePolicy(dimensions=256, levels=fakes.M)), policy)
    outcome = learn(job(empty, 0), encoder, OrtEngine(encoder), SAME, lambda *_: None)
    assert isinstance(outcome, Candidate)
    return World(path, encoder, empty, outcome.system)


def outcome_of(learner: ProcessLearner, given_job: Job) -> Outcome:
    learner.start(given_job)
    learner.join(60)
    outcome = learner.poll()
    assert outcome is not None and learner.poll() is None
    return outcome


def failure(world: World, script: str, policy: WorkerPolicy = QUICK) -> str:
    """Why a child that runs `script` fails."""
    learner = ProcessLearner(world.path, policy, command=(sys.executable, "-c", SAYS + script))
    outcome = outcome_of(learner, job(world.one, 1, 6))
    assert isinstance(outcome, Failed)
    return outcome.reason


def gone(pid: int, timeout: float = 30) -> bool:
    """Whether a process ends, soon or already has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ a real child


def test_the_child_learns_what_learning_here_would_and_old_domains_stay_the_same_objects(world: World) -> None:
    told: list[tuple[str, int, int]] = []
    ready: list[bool] = []
    learner = ProcessLearner(
        world.path, QUICK, on_progress=lambda *step: told.append(step), on_ready=lambda: ready.append(True)
    )
    asked = job(world.one, 1)
    outcome = outcome_of(learner, asked)
    # Sums of floats depend on the number of threads that make them; the child has one.
    with threadpoolctl.threadpool_limits(QUICK.threads):
        here = learn(asked, world.encoder, OrtEngine(world.encoder), SAME, lambda *_: None)
    assert isinstance(outcome, Candidate) and isinstance(here, Candidate)
    assert outcome.base is world.one and outcome.system.space is world.one.space
    assert outcome.system.domains[0] is world.one.domains[0]
    there, mine = outcome.system.domain("d1"), here.system.domain("d1")
    assert there.head.digest == mine.head.digest
    assert (there.memory.gram == mine.memory.gram).all() and (there.codes == mine.codes).all()
    assert outcome.replay == here.replay
    assert told and ready == [True]


def test_a_board_learns_through_the_child_while_frames_stop_and_free_it(world: World) -> None:
    class Truth:
        def label(self, at: Sequence[int]) -> list[str]:
            return [fakes.CLASSES[(n - 1) % 3] for n in at]

        def domain(self, at: Sequence[int]) -> str:
            return "first"

    learner = ProcessLearner(world.path, QUICK)
    live = Live(world.empty, world.empty)
    board = Board(live, world.encoder, Truth(), lambda: 0.0, BoardPolicy(labels=40, memory=40), learner=learner)
    frames = fakes.frames(0, fakes.CLASSES, fakes.labels_of(40), 1)
    for frame in frames:
        board.step(frame)
    assert str(board.phase) == "learning"
    served = 0
    while board.phase == "learning":
        board.step(frames[0])
        learner.join(0.005)  # a frame every few milliseconds
        served += 1
    assert (str(board.phase), board.system.names) == ("probation", ("first",))
    assert served > 1


def test_a_job_without_labels_may_be_rejected_in_the_child(world: World) -> None:
    asked = UnlabelledJob(world.one, "d0", job(world.one, 0).frames, UnlabelledPolicy(frames=20), seed=3)
    outcome = outcome_of(ProcessLearner(world.path, QUICK), asked)
    assert isinstance(outcome, Rejected) and outcome.domain == "d0"
    assert any(reason.startswith("label-free: ") for reason in outcome.reasons)


def test_a_child_without_torch_says_what_to_install(world: World) -> None:
    script = "sys.modules['torch'] = None\nfrom device.daemon.learning.worker_child import main\nmain(sys.argv[1:])"
    assert "pip install -e '.[learn]'" in failure(world, script)


def test_another_encoder_than_the_board_serves_with_is_refused(world: World, tmp_path: Path) -> None:
    other = ProcessLearner(tiny_models.saved(tmp_path, tiny_models.sound()), QUICK)
    outcome = outcome_of(other, job(world.one, 1, 6))
    assert isinstance(outcome, Failed) and "another encoder" in outcome.reason


def test_the_child_dies_with_the_board(world: World) -> None:
    """Even stopped, when it cannot see that a pipe has closed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(world.path)], stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3]
    )
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        assert state(child) == "T"
        parent.kill()
    assert gone(child)


ORPHAN = """
import os
import signal
import sys
from pathlib import Path
import numpy as np
from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
from device.encoder.session import OnnxEncoder
from device.board.learner import LabelledJob
from edgeear.space import HypervectorSpace
from edgeear.system import System
path = Path(sys.argv[1])
encoder = OnnxEncoder(path)
told = []
learner = ProcessLearner(path, WorkerPolicy(specs=20000), on_progress=lambda *step: told.append(step))
frames = tuple(np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
learner.start(LabelledJob(System(encoder.digest, HypervectorSpace(encoder.taps)), "d", frames, ("a", "b") * 30))
while not told:
    learner.join(0.01)
    learner.poll()
pid = learner.pid
os.kill(pid, signal.SIGSTOP)
while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
    pass
print(pid, flush=True)
learner.join()
"""


def state(pid: int) -> str:
    """R, S, T (stopped), Z, ... as the kernel says."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ------------------------------------------------------------------------------------------------ children gone wrong


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("os.write(1, b'Traceback: nonsense')", "sent invalid data"),
        ("os.write(1, b'E')", "ended in the middle"),
        (SPEAKS + "os.write(1, b''.join(message('grown', [b'x' * 90]))[:50])", "ended in the middle"),
        (SPEAKS + "say('grown', {})", "the result is not a domain"),
        (SPEAKS + "say('failed', {})", "KeyError"),
        (SPEAKS + "say('progress', {'progress': [1]})", "learning failed"),
        (SPEAKS + "say('failed', {'reason': 'because'})", "because"),
        ("sys.exit('no such luck')", "exit code 1.*no such luck"),
        ("", "without an answer.*exit code 0"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("os.abort()", "killed by SIGABRT"),
        ("os.close(1); os.close(2); " + HANGS, "time limit of 0.5 s"),
        (HANGS, "time limit of 0.5 s"),
    ],
)
def test_what_a_child_does_wrong_is_an_outcome_with_its_reason(world: World, script: str, reason: str) -> None:
    limit = 0.5 if HANGS in script else 60.0
    assert re.search(reason, failure(world, script, replace(QUICK, time_limit_s=limit)))


def test_a_child_that_takes_too_much_memory_is_killed(world: World) -> None:
    policy = replace(QUICK, memory_limit_mb=150)
    assert "over its limit of 150 MB" in failure(world, f"x = b'x' * (200 << 20); {HANGS}", policy)


def test_a_real_child_feels_its_memory_limit(world: World) -> None:
    outcome = outcome_of(ProcessLearner(world.path, replace(QUICK, memory_limit_mb=120)), job(world.one, 1))
    assert isinstance(outcome, Failed) and "memory" in outcome.reason.lower()


def test_a_child_that_cannot_be_started_is_an_outcome(world: World) -> None:
    outcome = outcome_of(ProcessLearner(world.path, QUICK, command=("/no/such/python",)), job(world.one, 1, 6))
    assert isinstance(outcome, Failed) and "No such file" in outcome.reason


def test_a_result_for_another_job_is_refused(world: World) -> None:
    parts = b"".join(domain_parts(world.one, "d0"))
    with pytest.raises(FormatError, match="expected is 'd1'"):
        system_of(parts, "d1")
    found = system_of(parts, "d0")
    assert found.domains[0].head.digest == world.one.domains[0].head.digest
    refused = install(fakes.grown(0), found.domains[0], found.encoder_digest, found.space.digest)
    assert isinstance(refused, Rejected) and "made for encoder" in refused.reasons[0]


@pytest.fixture
def hanging(world: World) -> Iterator[ProcessLearner]:
    """A learner whose child has said something and now does nothing."""
    told: list[str] = []
    learner = ProcessLearner(
        world.path,
        QUICK,
        on_progress=lambda phase, *_: told.append(phase),
        command=(sys.executable, "-c", SAYS + SPEAKS + f"say('progress', {{'progress': ['hang', 1, 2]}}); {HANGS}"),
    )
    learner.start(job(world.one, 1, 6))
    while not told:
        learner.join(0.01)
        assert learner.poll() is None
    yield learner
    learner.cancel()
    for thread in threading.enumerate():
        if thread.name == "learner":
            thread.join(30)


def test_a_child_killed_from_outside_is_an_outcome(hanging: ProcessLearner) -> None:
    assert hanging.pid is not None
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.join(30)
    outcome = hanging.poll()
    assert isinstance(outcome, Failed) and "killed by SIGKILL" in outcome.reason


def test_a_cancelled_child_is_gone_and_reaped_and_the_next_job_may_start(hanging: ProcessLearner, world: World) -> None:
    pid, run = hanging.pid, hanging._run
    assert pid is not None and run is not None
    with pytest.raises(UsageError, match="running already"):
        hanging.start(job(world.one, 1, 6))
    hanging.cancel()
    assert hanging.poll() is None and hanging.pid is None
    hanging.start(job(world.one, 1, 6))
    run.thread.join(30)
    assert not run.thread.is_alive() and not Path(f"/proc/{pid}").exists()


def test_nothing_is_left_open(world: World) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    failure(world, "sys.exit(3)")
    assert sorted(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------------ bytes between


def test_a_job_is_read_as_it_was_written(world: World) -> None:
    labelled = job(world.one, 1)
    policy = UnlabelledPolicy(frames=33)
    for asked in (labelled, UnlabelledJob(world.one, "d1", labelled.frames, policy, views=("plain",), seed=3)):
        again, how = job_of(b"".join(job_parts(asked, {"nice": 7})))
        assert how == {"nice": 7}
        assert (type(again), again.name, again.views, again.seed) == (type(asked), "d1", asked.views, 3)
        if isinstance(again, LabelledJob):
            assert again.labels == labelled.labels
        else:
            assert again.policy == policy
        assert all((a == b).all() for a, b in zip(again.frames, asked.frames, strict=True))
        assert [d.head.digest for d in again.system.domains] == [d.head.digest for d in world.one.domains]


MESSAGES = st.lists(st.tuples(st.sampled_from(["progress", "grown", "rejected", "failed"]), st.binary(max_size=40)))


@given(MESSAGES, st.lists(st.integers(0, 200), max_size=20))
def test_messages_arrive_whole_however_the_bytes_are_cut(messages: list[tuple[str, bytes]], cuts: list[int]) -> None:
    stream = b"".join(b"".join(message(kind, [payload])) for kind, payload in messages)  # type: ignore[arg-type]
    inbox, found = Inbox(), []
    ends = sorted({min(c, len(stream)) for c in cuts} | {0, len(stream)})
    for start, end in pairwise(ends):
        found += inbox.feed(stream[start:end])
    assert found == messages and not inbox.partial


@given(st.binary(max_size=200))
def test_invalid_bytes_raise_one_exception_only(data: bytes) -> None:
    for read in (Inbox().feed, unpack, job_of):
        with contextlib.suppress(EdgeearError):
            read(data)


def test_packed_data_that_was_cut_off_is_refused() -> None:
    whole = b"".join(pack({"a": 1}, {"x": b"123", "y": b""}))
    header, blobs = unpack(whole)
    assert header == {"a": 1} and {k: bytes(v) for k, v in blobs.items()} == {"x": b"123", "y": b""}
    for end in range(len(whole)):
        with pytest.raises(FormatError):
            unpack(whole[:end])


@pytest.mark.parametrize(
    "wrong",
    [{"budget": "huge"}, {"specs": 0}, {"time_limit_s": 0}, {"memory_limit_mb": 0}, {"threads": 0}, {"nice": -1}],
)
def test_limits_are_checked_where_they_are_given(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is "):
        WorkerPolicy(**wrong)  # type: ignore[arg-type]
