"""Stores of older formats open with the very same arrays, answer as they did, and go on.

`data/format2` was written by edgeear at format 2, from the synthetic domains of tests/support/fakes.py: a store of
three generations, frames, and what that version answered for them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from device.encoder.engine import OrtEngine
from device.state import generations
from device.state.codec import SYSTEM, from_files, to_files
from device.state.migrations import FORMAT, MIGRATIONS
from device.state.store import Store
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import System
from tests.support import fakes

DATA = Path(__file__).parent / "data"
FORMATS = sorted(MIGRATIONS)


@pytest.fixture(params=FORMATS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a former version left."""
    return Path(shutil.copytree(DATA / f"format{request.param}", tmp_path / "old"))


def digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def arrays(system: System) -> dict[str, dict[str, object]]:
    """Everything learned, to the last bit."""
    found: dict[str, dict[str, object]] = {}
    for d in system.domains:
        c, m = d.calibration, d.memory
        numbers = (c.angle_mean, c.angle_deviation, c.leverage_mean, c.leverage_deviation, c.delta, d.likeness)
        named: dict[str, NDArray[Any]] = {
            "counts": m.counts,
            "class_sums": m.class_sums,
            "gram": m.gram,
            "codes": d.codes,
            "values": c.values,
        }
        found[d.name] = {name: digest(array) for name, array in named.items()}
        found[d.name] |= {"head": hashlib.sha256(d.head.onnx).hexdigest(), "numbers": [x.hex() for x in numbers]}
    return found


def test_every_format_that_can_be_read_has_a_store_among_the_tests() -> None:
    assert list(range(FORMATS[0], FORMAT)) == FORMATS
    for version in FORMATS:
        stored = [json.loads(path.read_bytes()) for path in (DATA / f"format{version}/store").glob(f"*/{SYSTEM}")]
        assert stored and {structure["format"] for structure in stored} == {version}


def test_an_old_store_opens_bit_for_bit_and_answers_as_it_did(old: Path) -> None:
    expected = json.loads((old / "expected.json").read_text())
    with Store.open(old / "store") as store:
        assert store.recovered_from is None
        system = generations.load(store)
        assert system is not None and system.names == ("d0", "d1") and system.generation == store.live == 3
    assert arrays(system) == expected["arrays"]
    policy = {"own": system.policy.min_own_share, "steal": system.policy.max_stolen_share}
    assert policy == expected["policy"]
    engine = OrtEngine(fakes.FakeEncoder())
    for frame, wanted in zip(np.load(old / "frames.npy"), expected["answers"], strict=True):
        prediction, _, _ = infer(system, engine, ShiftState(), frame)
        assert (prediction.label, prediction.route, prediction.ood) == (wanted["label"], wanted["route"], wanted["ood"])
        assert (prediction.novelty, prediction.p) == pytest.approx((wanted["novelty"], wanted["p"]), rel=1e-5)
        assert prediction.scores.tolist() == pytest.approx(wanted["scores"], abs=1e-5)


def test_an_old_store_goes_on(old: Path) -> None:
    with Store.open(old / "store") as store:
        before = generations.load(store)
        assert before is not None
        undone, kept = before.grown(fakes.domain(2)), before.grown(fakes.domain(3))
        dropped = generations.publish(store, undone, 9.0, "on probation")
        generations.roll_back(store)
        again = generations.load(store)
        assert again is not None and arrays(again) == arrays(before)
        kept = generations.publish(store, kept, 9.0, "on probation")
        assert (dropped.generation, kept.generation) == (before.generation + 1, before.generation + 2)
        generations.confirm(store)
    with Store.open(old / "store") as store:
        found = generations.load(store)
        assert found is not None and to_files(found) == to_files(kept) and found.names == ("d0", "d1", "d3")
        assert [arrays(found)[name] for name in before.names] == list(arrays(before).values())


def test_what_is_read_of_an_old_format_is_written_in_the_new_one(old: Path) -> None:
    with Store.open(old / "store") as store:
        system = generations.load(store)
    assert system is not None
    files = to_files(system)
    assert json.loads(files[SYSTEM])["format"] == FORMAT and to_files(from_files(files)) == files
