"""A system is read exactly as it was written; anything else is refused with one family of exceptions."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from adaptors.spec import HeadSpec
from device.state.codec import SYSTEM, SystemFormatError, from_files, to_files
from device.state.migrations import FORMAT, MIGRATIONS
from edgeear.errors import EdgeearError
from edgeear.flow import judge
from edgeear.system import System
from tests.support import fakes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@lru_cache(maxsize=1)
def system() -> System:
    """Two domains with heads of different kinds."""
    fourier = HeadSpec(("a.mean", "b.mean"), "fourier", 1024, bandwidth=0.3, bits=8)
    return fakes.grown(0).grown(fakes.domain(1, spec=fourier))


@lru_cache(maxsize=1)
def stored() -> dict[str, bytes]:
    return to_files(system())


def changed(path: tuple[str | int, ...], value: object) -> dict[str, bytes]:
    """The stored files with one entry of the structure replaced."""
    structure = json.loads(stored()[SYSTEM])
    place = structure
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return stored() | {SYSTEM: json.dumps(structure).encode()}


def test_what_is_read_is_what_was_written() -> None:
    again = from_files(stored())
    assert to_files(again) == stored()
    assert (again.names, again.generation, again.policy) == (system().names, system().generation, system().policy)
    assert (again.encoder_digest, again.space.digest) == (system().encoder_digest, system().space.digest)
    h = fakes.space().encode(fakes.features(0, 20, seed=3))
    before, after = judge(system(), h), judge(again, h)
    for name in ("route", "novelty", "p", "conditional_p"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    for a, b in zip(system().domains, again.domains, strict=True):
        assert (a.head.spec, a.head.classes, a.head.onnx) == (b.head.spec, b.head.classes, b.head.onnx)
        assert a.codes.tobytes() == b.codes.tobytes() and dict(a.growth) == dict(b.growth)


def test_an_empty_system_is_read_as_it_was_written() -> None:
    assert from_files(to_files(fakes.empty())).domains == ()


def test_a_domain_keeps_its_files_while_others_are_learned() -> None:
    grown = to_files(system().grown(fakes.domain(2)))
    old = {name: data for name, data in stored().items() if name != SYSTEM}
    assert old.items() <= grown.items() and len(grown) == len(stored()) + 2


def test_an_unreadable_format_is_refused_with_a_remedy() -> None:
    with pytest.raises(SystemFormatError, match=rf"format {FORMAT + 1}.*update this board"):
        from_files(changed(("format",), FORMAT + 1))
    with pytest.raises(SystemFormatError, match="learn the domains again"):
        from_files(changed(("format",), min(MIGRATIONS) - 1))


@pytest.mark.parametrize("name", sorted(to_files(fakes.grown(0))))
def test_a_missing_file_is_named(name: str) -> None:
    files = to_files(fakes.grown(0))
    del files[name]
    with pytest.raises(SystemFormatError, match=name):
        from_files(files)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("domains",), 3),
        (("domains", 0, "files"), []),
        (("domains", 0, "classes"), ["left", "left", "top"]),
        (("domains", 0, "head", "spec", "width"), -1),
        (("policy", "alpha"), 7),
        (("policy", "unknown"), 1),
        (("policy", "shift", "stakes"), [2.0]),
        (("space", "policy", "dimensions"), 255),
        (("space", "taps"), [["a.mean", 12]]),
        (("space", "taps"), []),
    ],
)
def test_a_wrong_entry_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(EdgeearError):
        from_files(changed(path, value))


HUGE = 10**12


@pytest.mark.parametrize("value", [HUGE, -1, 0, 2**63, 10**30, 1.5, "9", None, [], True])
@pytest.mark.parametrize(
    "path",
    [
        ("domains", 0, "head", "spec", "width"),
        ("domains", 1, "head", "spec", "width"),
        ("domains", 1, "head", "spec", "depth"),
        ("domains", 0, "head", "shapes", "b.std", 0),
        ("domains", 1, "head", "shapes", "b.mean", 0),
        ("domains", 0, "head", "classes"),
        ("space", "policy", "levels"),
        ("space", "policy", "dimensions"),
        ("space", "taps", 0, 1, 0),
        ("space", "taps", 0, 1),
        ("space", "taps"),
    ],
)
def test_sizes_that_are_claimed_cost_nothing(path: tuple[str | int, ...], value: object) -> None:
    """Refused, or the system is read as it was where the value is what a depth or a size may be."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        read = from_files(changed(path, value))
    except EdgeearError as error:
        assert str(error)
    else:
        assert isinstance(read, System)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_many_taps_are_refused() -> None:
    taps = [[f"{i}.mean", [8000]] for i in range(100_000)]
    with pytest.raises(EdgeearError, match="channels"):
        from_files(changed(("space", "taps"), taps))


def renamed(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, bytes]:
    """The stored files with other arrays of the first domain, under the name that fits their bytes."""
    structure = json.loads(stored()[SYSTEM])
    tensors = save(arrays)
    name = structure["domains"][0]["files"]["memory"] = f"memory-{hashlib.sha256(tensors).hexdigest()[:16]}.safetensors"
    return stored() | {SYSTEM: json.dumps(structure).encode(), name: tensors}


@pytest.mark.parametrize("array", ["counts", "class_sums", "gram", "codes", "likeness"])
def test_arrays_of_other_shapes_are_refused_by_name(array: str) -> None:
    structure = json.loads(stored()[SYSTEM])
    arrays = load(stored()[structure["domains"][0]["files"]["memory"]])
    changed = np.resize(arrays[array], (3, 3, 3))
    with pytest.raises(SystemFormatError, match="array"):
        from_files(renamed(arrays | {array: changed}))
    del arrays[array]
    with pytest.raises(SystemFormatError, match=array):
        from_files(renamed(arrays))


def test_a_head_with_a_loop_or_with_weights_elsewhere_is_refused() -> None:
    """The digests fit: whoever wrote it could write a whole store."""
    structure = json.loads(stored()[SYSTEM])
    head = structure["domains"][0]["head"]
    name = structure["domains"][0]["files"]["head"]
    for spoil, word in ((_loop, "'Loop'"), (_elsewhere, "outside of the file")):
        built = onnx.load_from_string(stored()[name])
        spoil(built)
        content = bytes(built.SerializeToString())
        head["digest"] = hashlib.sha256(content).hexdigest()
        with pytest.raises(SystemFormatError, match=word):
            from_files(stored() | {SYSTEM: json.dumps(structure).encode(), name: content})


def _loop(built: onnx.ModelProto) -> None:
    built.graph.node.add(op_type="Loop")


def _elsewhere(built: onnx.ModelProto) -> None:
    built.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(SystemFormatError):
        from_files({SYSTEM: b"[" * 100_000})


@given(st.data())
def test_a_damaged_data_file_never_passes(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(set(stored()) - {SYSTEM})))
    content = bytearray(stored()[name])
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SystemFormatError):
        from_files(stored() | {name: bytes(content)})


@given(st.data())
def test_a_damaged_structure_raises_one_family_only(data: st.DataObject) -> None:
    content = bytearray(stored()[SYSTEM])
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = from_files(stored() | {SYSTEM: bytes(content)})
    except EdgeearError as error:
        assert str(error)
    else:
        assert isinstance(read, System)


@given(JSON)
def test_any_json_is_refused_with_one_family_only(value: object) -> None:
    with pytest.raises(EdgeearError):
        from_files(stored() | {SYSTEM: json.dumps(value).encode()})
