"""Folder data sets `DIR/DOMAIN/CLASS/*.{jpg,jpeg,png,wav,npy}`: what is listed, and how it is split.

Rules of this file:
1. Domains keep the given order, else they are sorted. Classes are the sorted union over the domains read.
2. Whether a file is a test file depends on its relative path `DOMAIN/CLASS/name` alone, never on order.
3. Links that lead nowhere or to themselves and folders that file systems make for themselves are passed over.
4. Other usual layouts are recognised, and the message says what to do.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.files import escaped
from device.images.decode import NAMED, SUFFIXES
from edgeear.errors import DataError, DeviceError, UsageError


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled file; `relative` is its posix path `DOMAIN/CLASS/name` as text (`files.escaped`), `label` the index
    of its class."""

    path: Path
    relative: str
    label: int


@dataclass(frozen=True)
class FolderData:
    """What `read_folder` found. `items` is keyed by domain, sorted by path; `warnings` are sentences."""

    root: Path
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    items: Mapping[str, tuple[Item, ...]]
    warnings: tuple[str, ...]


# --------------------------------------------------------------------------------------------------- reading


def read_folder(root: Path, domains: Sequence[str] | None = None) -> FolderData:
    """List the data set under `root`. No file is opened.

    Hidden names are skipped silently, files of other kinds and empty classes with a warning. A class with one image
    is kept, with a warning: `split` trains on it. An empty domain is an error if `domains` names it, else a warning.

    Raises `DataError` (no such folder or domain, nothing to read, names of domains or classes that are not UTF-8 or
    differ only in their Unicode form), `UsageError` (no domain, or one twice), `DeviceError` (permission denied).
    """
    folder, warnings = Path(root), _Warnings()
    present = tuple(entry.name for entry in _visible(folder) if _is(entry, os.DirEntry.is_dir))
    if domains is None and present and {name.lower() for name in present} <= _SPLITS:
        raise DataError(
            f"{escaped(folder)}: {listed(present)} are splits of one domain, as torchvision lays them out, not "
            "domains: move the images of each class together into DOMAIN/CLASS/ (edgeear makes its own split), or name "
            "the folders with --order to take them as domains"
        )
    chosen = present if domains is None else _chosen(folder, present, tuple(domains))
    files = {domain: _classes_of(folder / domain, warnings) for domain in chosen}
    for domain in [name for name in chosen if not files[name]]:
        if domains is not None:
            raise DataError(_empty(folder / domain))
        warnings.append(_empty(folder / domain))
        del files[domain]
    if not files:
        raise DataError(
            f"{escaped(folder)} has no DOMAIN/CLASS/ folder with {listed(SUFFIXES)} files: {_remedy(warnings)}"
        )
    classes = tuple(sorted({name for found in files.values() for name in found}))
    for names, what in ((tuple(files), "domains"), (classes, "classes")):
        _refuse_unreadable(names, what)
        _refuse_twins(names, what)
    _warn_of_gaps(files, classes, warnings)
    index = {name: label for label, name in enumerate(classes)}
    items = {domain: tuple(_items(folder, domain, found, index)) for domain, found in files.items()}
    return FolderData(folder, tuple(files), classes, items, tuple(map(escaped, warnings)))


_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LOOSE = "outside a class folder"
_MADE_BY_SYSTEMS = {"lost+found", "system volume information", "$recycle.bin", "__macosx", "@eadir", "thumbs.db"}


def _passed_over(name: str) -> bool:
    """Whether an entry is hidden or made by a file system, not by you."""
    return name.startswith(".") or name.lower() in _MADE_BY_SYSTEMS


def _is(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """`kind` of an entry; False for a link to itself and for what cannot be looked at."""
    try:
        return kind(entry)
    except OSError:
        return False


def _remedy(warnings: Sequence[str]) -> str:
    if any(_LOOSE in warning for warning in warnings):
        return "its folders hold images themselves, as if they were classes; put all of them into one folder, a domain"
    return "add some"


class _Warnings(list[str]):
    """Sentences collected while reading."""

    def ignored(self, folder: Path, names: Sequence[str], why: str) -> None:
        if names:
            self.append(f"{folder}: {len(names)} ignored ({why}): {listed(names)}")


def listed(names: Sequence[str]) -> str:
    """The first `NAMED` names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return escaped(", ".join(names[:NAMED])) + more


def _empty(folder: Path) -> str:
    if any(Path(e.name).suffix.lower() in SUFFIXES and _is(e, os.DirEntry.is_file) for e in _visible(folder)):
        return f"domain {escaped(folder)} holds pictures, not CLASS/ folders: give the folder that it lies in"
    return f"domain {escaped(folder)} is empty: add CLASS/ folders with {listed(SUFFIXES)} files or leave it out"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not _passed_over(e.name)), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{escaped(folder)} is not a folder: name the folder that holds DOMAIN/CLASS/ folders"
        ) from error
    except OSError as error:
        raise DeviceError(f"{escaped(folder)} cannot be listed ({error.strerror}): check its permissions") from error


def _chosen(folder: Path, present: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    if not wanted:
        raise UsageError("the list of domains is empty: name at least one, or give none to read all")
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise UsageError(f"domains named twice: {listed(twice)}: name each domain once")
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(f"{escaped(folder)} has no domain {listed(missing)}: it has {listed(present) or 'none'}")
    return wanted


def _classes_of(domain: Path, warnings: _Warnings) -> dict[str, list[str]]:
    entries = _visible(domain)
    folders = [e.name for e in entries if _is(e, os.DirEntry.is_dir)]
    loose = [e.name for e in entries if e.name not in folders and Path(e.name).suffix.lower() in SUFFIXES]
    warnings.ignored(domain, loose, _LOOSE)
    found = {name: _files_of(domain / name, warnings) for name in folders}
    empty = [name for name, files in found.items() if not files]
    warnings.ignored(domain, empty, "class folders without an image")
    return {name: files for name, files in found.items() if files}


def _files_of(folder: Path, warnings: _Warnings) -> list[str]:
    entries = _visible(folder)
    usable = [e.name for e in entries if _is(e, os.DirEntry.is_file) and Path(e.name).suffix.lower() in SUFFIXES]
    nested = [e.name for e in entries if _is(e, os.DirEntry.is_dir)]
    others = sorted({e.name for e in entries}.difference(usable, nested))
    warnings.ignored(folder, nested, "nested folders")
    warnings.ignored(folder, others, f"not a regular file ending in {listed(SUFFIXES)}")
    return usable


def _refuse_unreadable(names: tuple[str, ...], what: str) -> None:
    """Domains and classes become text in results, so their names must be."""
    bad = [escaped(name) for name in names if escaped(name) != name]
    if bad:
        raise DataError(f"{what} whose names are not UTF-8: {listed(bad)}: rename the folders")


def _refuse_twins(names: tuple[str, ...], what: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise DataError(f"{what} {twin!a} and {name!a} differ only in Unicode form: rename one")


def _warn_of_gaps(files: Mapping[str, dict[str, list[str]]], classes: tuple[str, ...], warnings: _Warnings) -> None:
    folded = [name.casefold() for name in classes]
    cased = [name for name in classes if folded.count(name.casefold()) > 1]
    if cased:
        warnings.append(f"classes that differ only in upper and lower case are kept apart: {listed(cased)}")
    for domain, found in files.items():
        absent = [name for name in classes if name not in found]
        if absent:
            warnings.append(f"domain {domain} has no image of {len(absent)} classes: {listed(absent)}")
        single = [name for name, names in found.items() if len(names) == 1]
        if single:
            why = "one image, which is trained on and never tested"
            warnings.append(f"domain {domain}: {len(single)} classes have {why}: {listed(single)}")


def _items(root: Path, domain: str, found: dict[str, list[str]], index: dict[str, int]) -> Iterable[Item]:
    for name, files in found.items():
        for file in files:
            yield Item(root / domain / name / file, escaped(f"{domain}/{name}/{file}"), index[name])


# ------------------------------------------------------------------------------------------------- splitting


def is_test(relative: str, fraction: float = 0.2) -> bool:
    """Whether a file is a test file, by the SHA-256 of its posix path `DOMAIN/CLASS/name`.

    Raises `UsageError` unless `0 <= fraction < 1`.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"test fraction {fraction} is outside 0 <= fraction < 1: 0.2 is the usual choice")
    # File systems differ in the Unicode form of names. The split must not depend on it.
    path = unicodedata.normalize("NFC", relative).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(path).digest()[:6], "big") < fraction * 2**48


def split(items: Sequence[Item], fraction: float = 0.2) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """`(training, test)` items of one domain by `is_test`, in order.

    If all items of a class are test files, the first by name is used for training instead.
    """
    trained = {item.label for item in items if not is_test(item.relative, fraction)}
    rescued: dict[int, str] = {}
    for item in items:
        if item.label not in trained:
            rescued[item.label] = min(rescued.get(item.label, item.relative), item.relative)
    kept = set(rescued.values())
    tested = [is_test(item.relative, fraction) and item.relative not in kept for item in items]
    pairs = list(zip(items, tested, strict=True))
    return tuple(i for i, test in pairs if not test), tuple(i for i, test in pairs if test)


def shots(items: Sequence[Item], k: int, seed: int) -> tuple[Item, ...]:
    """Pick `k` of the training `items` of every class, or all if there are fewer, sorted by path.

    The pick of a class depends on its own files, its label and `seed` only. The pick of k is part of that of k + 1.
    Raises `UsageError` for `k < 1` or a negative seed.
    """
    if k < 1 or seed < 0:
        raise UsageError(f"shots={k}, seed={seed}: shots must be at least 1 and the seed at least 0")
    picked: list[Item] = []
    for label in sorted({item.label for item in items}):
        own = sorted((item for item in items if item.label == label), key=lambda item: item.relative)
        order = np.random.default_rng([seed, label]).permutation(len(own))
        picked += [own[int(place)] for place in order[:k]]
    return tuple(sorted(picked, key=lambda item: item.relative))
