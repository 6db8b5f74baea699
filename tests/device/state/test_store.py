"""The store writes whole generations or none, can always roll back, and finds and names damage."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from device.state import store as store_module
from device.state.store import (
    CorruptStore,
    NewerStore,
    NoGeneration,
    NotLive,
    Store,
    StoreBusy,
    StoreFull,
)
from edgeear.errors import DeviceError, UsageError
from tests.support.needs import need
from tests.support.store_faults import (
    SCRIPT,
    CountDisk,
    FailDisk,
    Folder,
    KillDisk,
    PowerDisk,
    Promised,
    after_outage,
    contents,
    in_child,
    perform,
)

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the exhaustive tests work, if the machine has it: they make thousands of files."""


@pytest.fixture
def ram() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        yield Path(folder)


def confirmed_store(root: Path, count: int, keep: int = 4) -> Store:
    """A store with `count` generations, each confirmed in turn."""
    store = Store.open(root, keep=keep, disk=CountDisk())
    for number in range(1, count + 1):
        store.commit(store.write(contents(number), created=float(number)))
        store.confirm(number)
    return store


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replaces a file by a changed copy, so that hard links to it stay as they were."""
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def newer(data: bytes) -> bytes:
    """A sealed file as a newer version would write it."""
    body = json.loads(data)
    del body["seal"]
    body["format"] += 1
    body["seal"] = store_module._seal(body)
    return json.dumps(body).encode()


# What a store is for


def test_a_generation_reads_back_what_was_written(tmp_path: Path) -> None:
    files = {"a.bin": b"\x00\xff" * 1000, "b-2.json": b"{}", "empty": b""}
    with Store.open(tmp_path / "new" / "store") as store:
        assert (store.live, store.confirmed, store.generations()) == (None, None, ())
        number = store.write(files, created=12.5, note="d\u00e9j\u00e0 vu\n")
        assert store.live is None
    with Store.open(tmp_path / "new" / "store") as store:
        assert store.read(number) == files
        (manifest,) = store.generations()
    assert (manifest.number, manifest.parent, manifest.created) == (number, None, 12.5)
    assert manifest.note == "d\u00e9j\u00e0 vu\n"
    assert [(entry.name, entry.size) for entry in manifest.files] == [
        ("a.bin", 2000),
        ("b-2.json", 2),
        ("empty", 0),
    ]


def test_commit_is_on_probation_until_confirmed_and_rollback_undoes_it(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 1) as store:
        second = store.write(contents(2), created=2.0)
        store.commit(second)
        assert (store.live, store.confirmed) == (second, 1)
        assert store.rollback() == 1
        assert (store.live, store.confirmed) == (1, 1)
        third = store.write(contents(3), created=3.0)
        assert third > second
        assert store.manifest(third).parent == 1
        store.commit(third)
        store.confirm(third)
        assert store.rollback() == third


@pytest.mark.parametrize("confirmed", [0, 1])
def test_an_unconfirmed_generation_survives_a_restart_but_not_a_reboot(tmp_path: Path, confirmed: int) -> None:
    with confirmed_store(tmp_path, confirmed) as store:
        number = store.write(contents(7), created=2.0)
        store.commit(number)
    with Store.open(tmp_path) as store:
        assert store.live == number
        assert store.recover() == (confirmed or None)
    with Store.open(tmp_path) as store:
        assert (store.live, store.confirmed) == (confirmed or None, confirmed or None)
        assert store.recovered_from is None


def test_invalid_calls_are_refused_and_change_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(NoGeneration, match="none to roll back to"):
            store.rollback()
        number = store.write(contents(1), created=1.0)
        with pytest.raises(NotLive, match=f"generation {number} .* None is live"):
            store.confirm(number)
        for act in (store.read, store.commit, store.manifest):
            with pytest.raises(NoGeneration, match="no generation 5"):
                act(5)
        with pytest.raises(UsageError, match="created=nan"):
            store.write({}, created=float("nan"))
        store.commit(number)
        store.confirm(number)
        with pytest.raises(UsageError, match="confirmed already"):
            store.commit(number)
        assert (store.live, store.confirmed, len(store.generations())) == (number, number, 1)
    with pytest.raises(UsageError, match="closed"):
        store.write({}, created=1.0)
    with pytest.raises(UsageError, match="keep=0"):
        Store.open(tmp_path, keep=0)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc", ".confirmed", "-x", "a\n", "manifest.json"]
)
def test_bad_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(UsageError, match="file name"):
            store.write({name: b""}, created=0.0)
        assert store.generations() == ()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12) | st.from_regex(r"[A-Za-z0-9._/\\-]{1,12}", fullmatch=True), st.binary(max_size=64))
def test_any_file_name_is_refused_or_stays_inside_its_generation(name: str, data: bytes) -> None:
    with (
        tempfile.TemporaryDirectory(dir=RAM) as folder,
        Store.open(Path(folder) / "store", disk=CountDisk()) as store,
    ):
        try:
            number = store.write({name: data}, created=0.0)
        except UsageError:
            assert sorted(os.listdir(folder)) == ["store"]
            assert sorted(os.listdir(Path(folder) / "store")) == ["CURRENT", "LOCK"]
        else:
            assert os.listdir(folder) == ["store"]
            assert sorted(os.listdir(Path(folder) / "store" / f"{number:08d}")) == sorted([name, "manifest.json"])
            assert store.read(number) == {name: data}


# Hard links


def inode(root: Path, number: int, name: str) -> int:
    return (root / f"{number:08d}" / name).stat().st_ino


def test_unchanged_files_are_shared_with_the_parent(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 2):
        assert inode(tmp_path, 1, "head.onnx") == inode(tmp_path, 2, "head.onnx")
        assert inode(tmp_path, 1, "memory.bin") != inode(tmp_path, 2, "memory.bin")


def test_damage_of_the_parent_is_not_inherited(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 1) as store:
        damage(tmp_path / "00000001" / "head.onnx", flip(3))
        second = store.write(contents(2), created=2.0)
        assert store.read(second) == contents(2)
        damage(tmp_path / "00000001" / "manifest.json", flip(3))
        third = store.write(contents(3), created=3.0)
        assert store.read(third) == contents(3)


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path) -> None:
    confirmed_store(tmp_path, 1).close()
    with Store.open(tmp_path, disk=FailDisk(0, errno.EPERM, frozenset({"link"}))) as store:
        second = store.write(contents(2), created=2.0)
        assert store.read(second) == contents(2)
        assert inode(tmp_path, 1, "head.onnx") != inode(tmp_path, second, "head.onnx")


# Kill and power loss


def survives(root: Path, promised: Promised) -> None:
    """The store in `root` opens, serves what was promised, holds only whole generations, and goes on."""
    with Store.open(root, keep=1, disk=CountDisk()) as store:
        assert store.live in promised.live
        number = store.recover()
        assert number in promised.confirmed
        assert (store.live, store.confirmed, store.recovered_from) == (number, number, None)
        assert not [name for name in os.listdir(root) if name.startswith(".partial")]
        whole = {int(name) for name in os.listdir(root) if name.isdigit()}
        assert {number, promised.highest} - {None, 0} <= whole
        assert all(store.read(found) == contents(found) for found in whole)
        new = store.write(contents(99), created=99.0)
        assert new > promised.highest
        store.commit(new)
        store.confirm(new)
        assert store.read(new) == contents(99)


def test_the_script_runs_as_written(tmp_path: Path) -> None:
    with Store.open(tmp_path, keep=1, disk=CountDisk()) as store:
        results = [do(store) for _, _, do in SCRIPT]
        assert [number for (act, *_), number in zip(SCRIPT, results, strict=True) if act == "write"] == [
            1,
            2,
            3,
            4,
            5,
        ]
        assert (store.live, store.confirmed) == (5, 4)
        assert [manifest.number for manifest in store.generations()] == [3, 4, 5]


def test_kill_before_any_operation_leaves_the_confirmed_generation(ram: Path) -> None:
    need("many processes")
    status, at = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        root, diary = ram / f"store{at}", ram / f"diary{at}"

        def work(root: Path = root, diary: Path = diary, at: int = at) -> None:
            with diary.open("w", buffering=1) as lines:
                disk = KillDisk(at)
                perform(Store.open(root, keep=1, disk=disk), lambda *said: print(*said, file=lines))

        status = in_child(work)
        promised = Promised()
        for line in diary.read_text().splitlines():
            when, act, number = line.split()
            promised.tell(when, act, int(number))
        survives(root, promised)
        shutil.rmtree(root)
        at += 1
    assert status == 0
    assert at > 150


def half_done(root: Path, broken: bool) -> None:
    """Two confirmed generations, a third on probation, stale work; with `broken`, the third is damaged."""
    with confirmed_store(root, 2) as store:
        store.commit(store.write(contents(3), created=3.0))
    (root / ".partial-00000004").mkdir()
    (root / ".partial-00000004" / "memory.bin").write_bytes(b"half")
    (root / ".partial-CURRENT").write_bytes(b"{")
    (root / "00000002" / ".confirmed").unlink()
    if broken:
        damage(root / "00000003" / "memory.bin", flip(0))


@pytest.mark.parametrize("broken", [False, True])
def test_kill_while_recovering_is_recovered_from(ram: Path, broken: bool) -> None:
    status, at = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        root = ram / f"store{at}"
        half_done(root, broken)

        def work(root: Path = root, at: int = at) -> None:
            Store.open(root, disk=KillDisk(at)).recover()

        status = in_child(work)
        with Store.open(root) as store:
            assert store.recover() == 2
            assert store.read(2) == contents(2)
            assert store.write({}, created=0.0) == 4
        at += 1
    assert status == 0
    assert at > 8


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_power_loss_before_any_operation_leaves_the_confirmed_generation(ram: Path, seed: int | None) -> None:
    base = ram / "live"
    base.mkdir()
    promised, outages = Promised(), 0
    dice = None if seed is None else random.Random(seed)

    def outage(top: Folder) -> None:
        nonlocal outages
        outages += 1
        rest = ram / "rest"
        rest.mkdir()
        after_outage(top, rest, dice)
        survives(rest / "store", promised)
        shutil.rmtree(rest)

    disk = PowerDisk(base, outage)
    with Store.open(base / "store", keep=1, disk=disk) as store:
        perform(store, promised.tell)
    outage(disk.top)
    assert outages > 150


# A full disk


def operations() -> int:
    """How many disk operations the script takes."""
    disk = CountDisk()
    with tempfile.TemporaryDirectory(dir=RAM) as folder, Store.open(Path(folder), keep=1, disk=disk) as store:
        perform(store, lambda *said: None)
    return disk.count


def again_when_full(root: Path, store: Store, act: str, do: Callable[[Store], object]) -> None:
    """Does it; when the disk is full, checks that a write left nothing and all is served, and repeats it."""
    before = sorted(os.listdir(root))
    try:
        do(store)
    except StoreFull:
        assert act != "write" or sorted(os.listdir(root)) == before
        if store.confirmed is not None:
            assert store.read(store.confirmed) == contents(store.confirmed)
        do(store)


def test_a_disk_that_is_full_once_costs_one_repetition(ram: Path) -> None:
    total = operations()
    for at in range(total):
        root, disk, promised = ram / str(at), FailDisk(at, errno.ENOSPC), Promised()
        root.mkdir()
        try:
            store = Store.open(root, keep=1, disk=disk)
        except StoreFull:
            store = Store.open(root, keep=1, disk=disk)
        with store:
            for act, number, do in SCRIPT:
                again_when_full(root, store, act, do)
                promised.tell("end", act, number)
                if disk.failed:
                    break
        assert disk.failed
        survives(root, promised)
        shutil.rmtree(root)
    assert total > 150


GROWING = frozenset({"create", "write", "mkdir", "link"})


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_stays_full_allows_rollback_and_nothing_new(tmp_path: Path, error: int) -> None:
    with confirmed_store(tmp_path, 1) as store:
        store.commit(store.write(contents(2), created=2.0))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with Store.open(tmp_path, disk=FailDisk(0, error, GROWING)) as store:
        with pytest.raises(StoreFull, match="free space"):
            store.write(contents(3), created=3.0)
        with pytest.raises(StoreFull):
            store.confirm(2)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        assert (store.live, store.confirmed) == (2, 1)
        assert store.rollback() == 1
    with Store.open(tmp_path) as store:
        assert (store.live, store.confirmed) == (1, 1)


def test_other_failures_of_the_disk_are_device_errors(tmp_path: Path) -> None:
    with Store.open(tmp_path, disk=FailDisk(8, errno.EIO)) as store:
        with pytest.raises(DeviceError, match="check the disk") as caught:
            store.write(contents(1), created=1.0)
        assert not isinstance(caught.value, StoreFull)
        assert store.generations() == ()


class UnsyncedDisk(PowerDisk):
    """Fails the fsync of a directory while `broken`."""

    broken = False

    def sync_dir(self, path: Path) -> None:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_dir(path)


@pytest.mark.parametrize("act", [Store.rollback, lambda store: store.confirm(2)])
def test_what_failed_in_its_fsync_is_synced_when_repeated(tmp_path: Path, act: Callable[[Store], object]) -> None:
    disk = UnsyncedDisk(tmp_path, lambda top: None)
    with Store.open(tmp_path / "store", disk=disk) as store:
        for number in (1, 2):
            store.commit(store.write(contents(number), created=0.0))
            if number == 1:
                store.confirm(number)
        disk.broken = True
        with pytest.raises(DeviceError):
            act(store)
        disk.broken = False
        act(store)
        now = store.live
    (tmp_path / "rest").mkdir()
    after_outage(disk.top, tmp_path / "rest", None)
    survives(tmp_path / "rest" / "store", Promised({now}, {now}, 2))


def test_collect_waits_until_an_unsynced_rollback_is_safe(ram: Path) -> None:
    outages = 0

    def outage(top: Folder) -> None:
        nonlocal outages
        for seed in range(8 if collecting else 0):
            outages += 1
            rest = ram / "rest"
            rest.mkdir()
            after_outage(top, rest, random.Random(seed))
            survives(rest / "store", Promised({4, 3}, {3}, 5))
            shutil.rmtree(rest)

    collecting = False
    disk = UnsyncedDisk(ram, outage)
    with Store.open(ram / "store", keep=1, disk=disk) as store:
        for number in (1, 2, 3):
            store.commit(store.write(contents(number), created=0.0))
            store.confirm(number)
        store.commit(store.write(contents(4), created=0.0))
        store.write(contents(5), created=0.0)
        disk.broken = True
        with pytest.raises(DeviceError):
            store.rollback()
        disk.broken, collecting = False, True
        assert store.collect() == (1, 4)
    assert outages > 80


def test_a_power_cut_and_the_loss_of_current_leave_the_confirmed_generation(tmp_path: Path) -> None:
    disk = PowerDisk(tmp_path, lambda top: None)
    with Store.open(tmp_path / "store", disk=disk) as store:
        store.commit(store.write(contents(1), created=0.0))
        store.confirm(1)
    (tmp_path / "rest").mkdir()
    after_outage(disk.top, tmp_path / "rest", None)
    (tmp_path / "rest" / "store" / "CURRENT").unlink()
    with Store.open(tmp_path / "rest" / "store") as store:
        assert (store.live, store.confirmed) == (1, 1)
        assert store.recovered_from is not None


def test_a_real_full_disk(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = 'mount -t tmpfs -o size=256k tmpfs "$0"'
    try:
        allowed = subprocess.run([*namespace, "sh", "-c", mount, str(tmp_path)], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    command = [*namespace, "sh", "-c", mount + ' && exec "$@"', str(tmp_path)]
    program = [sys.executable, "-m", "tests.support.store_faults", str(tmp_path)]
    done = subprocess.run([*command, *program], capture_output=True, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {
        "refused": True,
        "clean": True,
        "back": 1,
        "same": True,
        "served": 1,
        "full": True,
    }


# Damage


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("memory.bin", lambda data: data[:-1], "519 bytes, the manifest says 520"),
        ("memory.bin", flip(100), "SHA-256"),
        ("empty", lambda data: b"x", "1 bytes, the manifest says 0"),
        ("manifest.json", flip(40), "seal"),
        ("manifest.json", lambda data: b"", "seal"),
        ("manifest.json", lambda data: b"[" * 100_000, "seal"),
    ],
)
def test_damage_is_found_and_named_and_open_falls_back(
    tmp_path: Path, file: str, change: Callable[[bytes], bytes], reason: str
) -> None:
    with confirmed_store(tmp_path, 2) as store:
        damage(tmp_path / "00000002" / file, change)
        with pytest.raises(CorruptStore, match=f"generation 2, {file}: .*{reason}"):
            store.read(2)
        assert store.rollback() == 1
        assert (store.live, store.confirmed) == (1, 1)
    with Store.open(tmp_path) as store:
        assert store.read(1) == contents(1)


@pytest.mark.parametrize("file", ["memory.bin", "manifest.json", ""])
def test_what_is_missing_makes_open_fall_back_and_say_so(tmp_path: Path, file: str) -> None:
    confirmed_store(tmp_path, 3).close()
    for gone in (tmp_path / "00000003" / file, tmp_path / "00000002" / "head.onnx"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with Store.open(tmp_path) as store:
        assert (store.live, store.confirmed) == (1, 1)
        assert store.recovered_from is not None
        assert (store.recovered_from.number, store.recovered_from.file) == (3, file or "manifest.json")
    with Store.open(tmp_path) as store:
        assert (store.live, store.recovered_from) == (1, None)


def test_open_falls_back_from_a_damaged_generation_on_probation_to_the_confirmed_one(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 2) as store:
        store.commit(store.write(contents(3), created=3.0))
        (tmp_path / "00000002" / ".confirmed").unlink()
    damage(tmp_path / "00000003" / "memory.bin", flip(0))
    with Store.open(tmp_path) as store:
        assert (store.live, store.confirmed) == (2, 2)
        assert str(store.recovered_from) == "generation 3, memory.bin: its SHA-256 is not the manifest's"
    assert (tmp_path / "00000002" / ".confirmed").exists()


@pytest.mark.parametrize("change", [flip(20), lambda data: b"", lambda data: b"null"])
def test_without_a_readable_current_the_newest_confirmed_generation_serves(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    with confirmed_store(tmp_path, 2) as store:
        store.commit(store.write(contents(3), created=3.0))
    damage(tmp_path / "CURRENT", change)
    with Store.open(tmp_path) as store:
        assert (store.live, store.confirmed) == (2, 2)
        assert store.recovered_from is not None
        assert (store.recovered_from.number, store.recovered_from.file) == (None, "CURRENT")


def test_without_any_intact_confirmed_generation_open_refuses_and_keeps_the_evidence(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 2) as store:
        store.write(contents(3), created=3.0)
    for number in (1, 2):
        damage(tmp_path / f"{number:08d}" / "memory.bin", flip(5))
    for _ in range(2):
        with pytest.raises(CorruptStore, match=r"generation 2, memory\.bin"):
            Store.open(tmp_path)
    assert (tmp_path / "00000003" / "memory.bin").read_bytes() == contents(3)["memory.bin"]
    (tmp_path / "CURRENT").unlink()
    with pytest.raises(CorruptStore, match="CURRENT"):
        Store.open(tmp_path)


def test_a_damaged_generation_is_not_committed(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 1) as store:
        second = store.write(contents(2), created=2.0)
        damage(tmp_path / "00000002" / "memory.bin", flip(5))
        with pytest.raises(CorruptStore, match=r"generation 2, memory\.bin"):
            store.commit(second)
        assert (store.live, store.confirmed) == (1, 1)
        (tmp_path / "00000002" / "manifest.json").unlink()
        assert [manifest.number for manifest in store.generations()] == [1]
        assert store.write(contents(3), created=3.0) == 3


def test_a_generation_in_the_wrong_place_is_damage(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 1) as store:
        shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")
        with pytest.raises(CorruptStore, match="belongs to generation 1"):
            store.read(2)


@pytest.mark.parametrize("file", ["CURRENT", "00000002/manifest.json"])
def test_a_newer_store_is_refused_and_left_alone(tmp_path: Path, file: str) -> None:
    confirmed_store(tmp_path, 2).close()
    damage(tmp_path / file, newer)
    before = (tmp_path / "CURRENT").read_bytes()
    with pytest.raises(NewerStore, match="format 2, this version reads up to 1; update"):
        Store.open(tmp_path)
    assert (tmp_path / "CURRENT").read_bytes() == before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_altered_byte_anywhere_never_gives_wrong_bytes(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        root = Path(folder)
        with confirmed_store(root, 2) as store:
            store.commit(store.write(contents(3), created=3.0))
        paths = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
        path = data.draw(st.sampled_from(paths))
        at = data.draw(st.integers(0, path.stat().st_size - 1))
        value = data.draw(st.integers(0, 255))
        damage(path, lambda old: old[:at] + bytes([value]) + old[at + 1 :])
        with Store.open(root, disk=CountDisk()) as store:
            live, number = store.live, store.recover()
            assert live in (2, 3) or (live == 1 and path.parent.name == "00000002")
            assert number in (1, 2)
            assert store.read(number) == contents(number)


# One writer


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 1):
        with pytest.raises(StoreBusy, match="one process at a time"):
            Store.open(tmp_path)

        def other() -> None:
            with pytest.raises(StoreBusy):
                Store.open(tmp_path)

        assert in_child(other) == 0
    with Store.open(tmp_path) as store:
        assert store.live == 1


def test_the_lock_dies_with_a_failed_open_and_with_its_process(tmp_path: Path) -> None:
    with pytest.raises(StoreFull):
        Store.open(tmp_path, disk=FailDisk(0, errno.ENOSPC))

    def killed() -> None:
        store = Store.open(tmp_path)
        store.write(contents(1), created=1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    with Store.open(tmp_path) as store:
        assert store.read(1) == contents(1)


# Collecting


def test_collect_keeps_the_newest_and_all_ways_back(tmp_path: Path) -> None:
    with confirmed_store(tmp_path, 4, keep=2) as store:
        for number in (5, 6, 7, 8):
            store.write(contents(number), created=float(number))
        store.commit(5)
        damage(tmp_path / "00000003" / "memory.bin", flip(0))
        assert store.collect() == (1, 3, 6)
        assert [manifest.number for manifest in store.generations()] == [2, 4, 5, 7, 8]
        assert store.collect() == ()
        assert store.rollback() == 4
        assert store.read(4) == contents(4)


def test_collect_leaves_files_of_others_alone(tmp_path: Path) -> None:
    strangers = ["123", "notes.txt", "000000001", ".partial-photos", "tmp-photos"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    with confirmed_store(tmp_path, 4, keep=1) as store:
        assert store.collect() == (1, 2)
    assert sorted(os.listdir(tmp_path)) == sorted(["00000003", "00000004", "CURRENT", "LOCK", "ROLLBACK", *strangers])


# Any sequence of acts, against a model


class StoreMachine(RuleBasedStateMachine):
    """The model: what each number on disk holds, which is live, which confirmed, which was the highest."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=RAM)
        self.held: dict[int, dict[str, bytes]] = {}
        self.live: int | None = None
        self.confirmed: int | None = None
        self.highest = 0
        self.enter()

    def enter(self) -> None:
        self.store = Store.open(Path(self.folder.name) / "store", keep=2, disk=CountDisk())

    @rule(
        files=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from([b"", b"one", b"two"])),
        created=st.floats(allow_nan=False, allow_infinity=False),
        note=st.text(),
    )
    def write(self, files: dict[str, bytes], created: float, note: str) -> None:
        number = self.store.write(files, created=created, note=note)
        assert number > self.highest
        manifest = self.store.manifest(number)
        assert (manifest.parent, manifest.created, manifest.note) == (self.live, created, note)
        self.held[number], self.highest = files, number

    @precondition(lambda self: any(number != self.confirmed for number in self.held))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.live = data.draw(st.sampled_from(sorted(set(self.held) - {self.confirmed})))
        self.store.commit(self.live)

    @precondition(lambda self: self.live is not None)
    @rule()
    def confirm(self) -> None:
        assert self.live is not None
        self.store.confirm(self.live)
        self.confirmed = self.live

    @precondition(lambda self: self.confirmed is not None)
    @rule()
    def rollback(self) -> None:
        assert self.store.rollback() == self.confirmed
        self.live = self.confirmed

    @rule()
    def collect(self) -> None:
        for number in self.store.collect():
            assert number not in (self.live, self.confirmed, self.highest)
            del self.held[number]
        assert len(self.held) <= 5

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.enter()

    @rule()
    def reboot(self) -> None:
        self.reopen()
        self.live = self.confirmed
        assert self.store.recover() == self.confirmed

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert (self.store.live, self.store.confirmed) == (self.live, self.confirmed)
        assert self.store.recovered_from is None
        assert {manifest.number: self.store.read(manifest.number) for manifest in self.store.generations()} == self.held

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase


# ------------------------------------------------------------------ files that no store wrote, of any kind


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no space


@pytest.mark.parametrize("kind", [a_pipe, an_endless_device, a_link_to_itself, a_folder, a_huge_file])
@pytest.mark.parametrize("place", ["CURRENT", "ROLLBACK", "00000002/manifest.json", "00000002/memory.bin"])
def test_whatever_stands_in_a_files_place_is_damage_and_is_never_waited_for(
    kind: Callable[[Path], None], place: str, tmp_path: Path
) -> None:
    """In a process with a limit of time and memory, so that a read without end fails."""
    confirmed_store(tmp_path, 2).close()
    path = tmp_path / place
    path.unlink(missing_ok=True)
    kind(path)
    script = (
        "import resource, signal, sys; from pathlib import Path; signal.alarm(20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from device.state.store import Store\nfrom edgeear.errors import EdgeearError\n"
        "try:\n    with Store.open(Path(sys.argv[1])) as s: print(s.live, s.recovered_from); s.read(s.live)\n"
        "except EdgeearError as error: print('refused', type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=30)
    answer = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    if place == "ROLLBACK":
        assert answer.startswith("2 None")
    elif place == "CURRENT" and kind is a_folder:
        assert answer.startswith("refused DeviceError")  # it is not removed: somebody put it there
    else:
        assert answer.startswith("2 CURRENT: " if place == "CURRENT" else "1 generation 2, ")


@pytest.mark.parametrize("denied", [errno.EACCES, errno.EPERM])
def test_one_file_that_may_not_be_read_costs_its_generation_only(
    denied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmed_store(tmp_path, 2).close()
    real = os.open

    def refusing(path: Any, *given: Any, **named: Any) -> int:
        if str(path).endswith(forbidden):
            raise PermissionError(denied, os.strerror(denied), str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(os, "open", refusing)
    forbidden = "CURRENT"
    with pytest.raises(DeviceError, match="check the disk and the permissions"):
        Store.open(tmp_path)
    forbidden = "00000002/memory.bin"
    with Store.open(tmp_path) as store:
        assert store.live == 1 and os.strerror(denied) in str(store.recovered_from)


def test_a_sealed_file_in_the_place_of_another_is_damage(tmp_path: Path) -> None:
    confirmed_store(tmp_path, 2).close()
    manifest, current = tmp_path / "00000002" / "manifest.json", tmp_path / "CURRENT"
    kept = current.read_bytes()
    current.write_bytes(manifest.read_bytes())
    with Store.open(tmp_path) as store:
        assert store.live == 2 and "names no generations" in str(store.recovered_from)
    manifest.chmod(0o644)
    manifest.write_bytes(kept)
    with Store.open(tmp_path) as store:
        assert store.live == 1 and "no manifest" in str(store.recovered_from)


@pytest.mark.parametrize(
    "fields",
    [
        {"live": "2", "confirmed": 2},
        {"live": True, "confirmed": True},
        {"live": -1, "confirmed": -1},
        {"live": 2.5, "confirmed": None},
        {"live": [2], "confirmed": 2},
        {},
        {"live": 2},
        {"live": 2, "confirmed": 2, "more": 1},
    ],
)
def test_a_current_with_another_meaning_is_damage(fields: dict[str, object], tmp_path: Path) -> None:
    confirmed_store(tmp_path, 2).close()
    (tmp_path / "CURRENT").write_bytes(store_module._sealed(fields))
    with Store.open(tmp_path) as store:
        assert store.live in (1, 2)
        assert store.read(store.live)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../../etc/passwd", "size": 1, "sha256": ""},
        {"name": "memory.bin", "size": -1, "sha256": ""},
        {"name": "memory.bin", "size": "9", "sha256": ""},
        {"name": "memory.bin"},
        {"name": 3, "size": 1, "sha256": ""},
    ],
)
def test_a_manifest_with_another_meaning_is_damage(entry: dict[str, object], tmp_path: Path) -> None:
    confirmed_store(tmp_path, 2).close()
    path = tmp_path / "00000002" / "manifest.json"
    fields = {"number": 2, "parent": 1, "created": 0.0, "note": "", "files": [entry]}
    path.chmod(0o644)
    path.write_bytes(store_module._sealed(fields))
    with Store.open(tmp_path) as store:
        assert store.live == 1 and store.recovered_from is not None
