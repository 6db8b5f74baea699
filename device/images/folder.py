"""Folder data sets: `DIR/DOMAIN/CLASS/*.{jpg,jpeg,png,wav,npy}`, read, split and decoded.

Rules that this file owns:
1. Domains keep the given order, else they are sorted; classes are the sorted union over the domains read.
2. Whether a file is a test file depends on its relative path `DOMAIN/CLASS/name` alone, never on order.
3. `decode` gives a frame or raises `UndecodableInput`, whatever the bytes. Nothing is executed or unpickled,
   and a size that a header claims is checked before anything is allocated for it.
4. A view is a function of its name and the frame's pixels, so equal files have equal views on every machine.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import struct
import tokenize
import unicodedata
import wave
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from edgeear.errors import DataError, DeviceError, UsageError
from edgeear.types import U8

SUFFIXES = (".jpg", ".jpeg", ".png", ".wav", ".npy")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 64 << 20
MAX_SAMPLES = 8 << 20
MIN_SAMPLES = 64
NAMED = 10
"""How many files, classes or domains a message names before it only counts."""


class UndecodableInput(DataError):
    """Files that give no frame. `paths` holds all; the message names up to ten, with reason and remedy."""

    def __init__(self, message: str, paths: tuple[Path, ...]) -> None:
        super().__init__(message)
        self.paths = paths

    def __reduce__(self) -> tuple[type[UndecodableInput], tuple[str, tuple[Path, ...]]]:
        return type(self), (str(self), self.paths)

    @classmethod
    def of_many(cls, errors: Sequence[UndecodableInput]) -> UndecodableInput:
        """One error for all of `errors`, which must not be empty."""
        if len(errors) == 1:
            return errors[0]
        lines = [f"{len(errors)} files cannot be decoded; mend, remove or skip them (on_bad='skip'):"]
        lines += [f"  {error}" for error in errors[:NAMED]]
        if len(errors) > NAMED:
            lines.append(f"  and {len(errors) - NAMED} more")
        return cls("\n".join(lines), tuple(path for error in errors for path in error.paths))


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled file; `relative` is its posix path `DOMAIN/CLASS/name`, `label` the index of its class."""

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
    """List the data set under `root`; no file is opened.

    Hidden names are passed over in silence, files of other kinds and empty classes with a warning. A class
    with one image is kept (`split` trains on it) and warned about. An empty domain is an error if it was
    asked for by name, else a warning.

    Raises `DataError` (no such folder or domain, nothing to read, names that differ only in their Unicode
    form), `UsageError` (no domain or one domain twice), `DeviceError` (permission denied).
    """
    folder, warnings = Path(root), _Warnings()
    present = tuple(entry.name for entry in _visible(folder) if entry.is_dir())
    chosen = present if domains is None else _chosen(folder, present, tuple(domains))
    files = {domain: _classes_of(folder / domain, warnings) for domain in chosen}
    for domain in [name for name in chosen if not files[name]]:
        if domains is not None:
            raise DataError(_empty(folder / domain))
        warnings.append(_empty(folder / domain))
        del files[domain]
    if not files:
        raise DataError(f"{folder} has no DOMAIN/CLASS/ folder with {_listed(SUFFIXES)} files: add some")
    classes = tuple(sorted({name for found in files.values() for name in found}))
    _refuse_twins(tuple(files), "domains")
    _refuse_twins(classes, "classes")
    _warn_of_gaps(files, classes, warnings)
    index = {name: label for label, name in enumerate(classes)}
    items = {domain: tuple(_items(folder, domain, found, index)) for domain, found in files.items()}
    return FolderData(folder, tuple(files), classes, items, tuple(warnings))


class _Warnings(list[str]):
    """Sentences collected while reading."""

    def ignored(self, folder: Path, names: Sequence[str], why: str) -> None:
        if names:
            self.append(f"{folder}: {len(names)} ignored ({why}): {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _empty(folder: Path) -> str:
    return f"domain {folder} is empty: add CLASS/ folders with {_listed(SUFFIXES)} files or leave it out"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} is not a folder: give the one that holds DOMAIN/CLASS/ folders") from error
    except OSError as error:
        raise DeviceError(f"{folder} cannot be listed ({error.strerror}): check its permissions") from error


def _chosen(folder: Path, present: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    if not wanted:
        raise UsageError("the list of domains is empty: name at least one, or give none to read all")
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise UsageError(f"domains named twice: {_listed(twice)}: name each domain once")
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(f"{folder} has no domain {_listed(missing)}: it has {_listed(present) or 'none'}")
    return wanted


def _classes_of(domain: Path, warnings: _Warnings) -> dict[str, list[str]]:
    entries = _visible(domain)
    loose = [e.name for e in entries if not e.is_dir() and Path(e.name).suffix.lower() in SUFFIXES]
    warnings.ignored(domain, loose, "outside a class folder")
    found = {e.name: _files_of(domain / e.name, warnings) for e in entries if e.is_dir()}
    empty = [name for name, files in found.items() if not files]
    warnings.ignored(domain, empty, "class folders without an image")
    return {name: files for name, files in found.items() if files}


def _files_of(folder: Path, warnings: _Warnings) -> list[str]:
    entries = _visible(folder)
    usable = [e.name for e in entries if e.is_file() and Path(e.name).suffix.lower() in SUFFIXES]
    others = sorted({e.name for e in entries}.difference(usable))
    warnings.ignored(folder, others, f"not a regular file ending in {_listed(SUFFIXES)}")
    return usable


def _refuse_twins(names: tuple[str, ...], what: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise DataError(f"{what} {twin!a} and {name!a} differ only in Unicode form: spell them alike")


def _warn_of_gaps(files: Mapping[str, dict[str, list[str]]], classes: tuple[str, ...], warnings: _Warnings) -> None:
    folded = [name.casefold() for name in classes]
    cased = [name for name in classes if folded.count(name.casefold()) > 1]
    if cased:
        warnings.append(f"classes that differ only in upper and lower case are kept apart: {_listed(cased)}")
    for domain, found in files.items():
        absent = [name for name in classes if name not in found]
        if absent:
            warnings.append(f"domain {domain} has no image of {len(absent)} classes: {_listed(absent)}")
        single = [name for name, names in found.items() if len(names) == 1]
        if single:
            why = "one image, which is trained on and never tested"
            warnings.append(f"domain {domain}: {len(single)} classes have {why}: {_listed(single)}")


def _items(root: Path, domain: str, found: dict[str, list[str]], index: dict[str, int]) -> Iterable[Item]:
    for name, files in found.items():
        for file in files:
            yield Item(root / domain / name / file, f"{domain}/{name}/{file}", index[name])


# ------------------------------------------------------------------------------------------------- splitting


def is_test(relative: str, fraction: float = 0.2) -> bool:
    """Whether a file is a test file, by the SHA-256 of its posix path `DOMAIN/CLASS/name`.

    Raises `UsageError` unless `0 <= fraction < 1`.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"test fraction {fraction} is outside 0 <= fraction < 1: 0.2 is the usual choice")
    # One file system stores a name decomposed and another composed; the split must not move with the disk.
    path = unicodedata.normalize("NFC", relative).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(path).digest()[:6], "big") < fraction * 2**48


def split(items: Sequence[Item], fraction: float = 0.2) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """`(training, test)` items of one domain by `is_test`, in order.

    A class all of whose items are test files keeps its first by name to train on.
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
    """Pick `k` of the training `items` of every class (all where there are fewer), sorted by path.

    The pick of a class depends on its own files, its label and `seed` only; k shots are among k + 1 shots.
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


# -------------------------------------------------------------------------------------------------- decoding


def decode(path: Path, size: tuple[int, int]) -> U8:
    """The frame of one file: uint8 RGB of `(*size, 3)`, `size = (height, width)`. See `decode_bytes`."""
    return decode_bytes(read_input(path), path, size)


def read_input(path: Path) -> bytes:
    """The file's bytes. Raises `UndecodableInput` unless it is a readable file of at most `MAX_FILE_BYTES`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _undecodable(path, "not a regular file", "remove it")
        if found.st_size > MAX_FILE_BYTES:
            raise _undecodable(path, f"{found.st_size} bytes exceed the {MAX_FILE_BYTES} allowed", "make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise _undecodable(path, f"cannot be read ({error.strerror})", "check its permissions") from error


def decode_bytes(data: bytes, path: Path, size: tuple[int, int]) -> U8:
    """The frame `(height, width, 3)` of a file's content; the suffix of `path` says how to read it.

    Images: EXIF orientation obeyed, transparency laid on white, 16-bit scaled to 8, shorter side resized to
    fit (bilinear), centre cropped. wav (PCM) and one-dimensional npy: a grey log-spectrogram, time to the
    right, 0 Hz at the bottom and half the sampling rate at the top, 80 dB below the loudest point is black.
    npy images: `(H, W)` or `(H, W, 3)`, uint8, uint16, bool, or float in 0..1.
    Raises `UndecodableInput` for any content that gives no frame, `UsageError` for an empty `size`.
    """
    if min(size) < 1:
        raise UsageError(f"frame size {size} is empty: height and width must be at least 1")
    decoder = {".wav": _wav_frame, ".npy": _npy_frame}.get(path.suffix.lower(), _image_frame)
    try:
        if path.suffix.lower() not in SUFFIXES:
            _refuse(f"suffix {path.suffix!r} is not one of {_listed(SUFFIXES)}", "convert it")
        return decoder(data, size)
    except _Refused as refusal:
        raise _undecodable(path, refusal.reason, refusal.remedy) from None
    except _BROKEN as error:
        # Pillow's own words hold a memory address here, and one bad file must give one message.
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        reason = f"broken content ({type(error).__name__}{detail})"
        raise _undecodable(path, reason, "replace it by an intact file or remove it") from error


def fit_pixels(pixels: U8, size: tuple[int, int]) -> U8:
    """The frame of an image that is decoded already, uint8 `(H, W)` or RGB `(H, W, 3)`: bit for bit what `decode_bytes`
    gives for a PNG of it. Raises `UsageError` for another type or shape, `DataError` for too few pixels or too many.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}: they must be uint8 (H, W) or (H, W, 3)")
    height, width = pixels.shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels: from 1 to {MAX_PIXELS} are allowed; make the image smaller")
    return _fit(Image.fromarray(pixels).convert("RGB"), size)


class _Refused(Exception):
    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


# What Pillow, wave and numpy's header parser raise, or have raised, on damaged files.
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    wave.Error,
    tokenize.TokenError,
    Image.DecompressionBombError,
    Warning,  # where warnings are errors
)


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise _Refused(reason, remedy)


def _undecodable(path: Path, reason: str, remedy: str) -> UndecodableInput:
    return UndecodableInput(f"{path}: {reason}; {remedy}", (path,))


def _image_frame(data: bytes, size: tuple[int, int]) -> U8:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        _bound_pixels(*image.size)
        # A large JPEG is decoded at 1/2, 1/4 or 1/8, never below twice the frame.
        image.draft(None, (2 * max(size), 2 * max(size)))
        image.load()
        return _fit(_rgb(_upright(image)), size)


def _bound_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        _refuse(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}", "make the image smaller")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:  # a damaged EXIF block says nothing about the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_levels(np.asarray(image).clip(0, 65535).astype(np.uint16))).convert("RGB")
    if image.has_transparency_data:
        drawn = image.convert("RGBA")
        paper = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, drawn).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, size: tuple[int, int]) -> U8:
    return np.array(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR), np.uint8)


def _wav_frame(data: bytes, size: tuple[int, int]) -> U8:
    with wave.open(io.BytesIO(data), "rb") as clip:
        channels, width, rate, claimed = clip.getparams()[:4]
        if claimed > MAX_SAMPLES:
            _refuse(f"{claimed} samples exceed the limit of {MAX_SAMPLES}", "cut it into shorter clips")
        raw = clip.readframes(claimed)
    if len(raw) != claimed * channels * width:
        _refuse(f"truncated: {len(raw)} bytes of {claimed * channels * width}", "record or copy it again")
    samples = _pcm(raw, width).reshape(-1, channels).mean(axis=1)
    # 32 ms: a power of two, so that 8 kHz gives the 256 samples that a bare signal gets.
    window = 2 ** round(math.log2(min(max(0.032 * rate, 64), 4096)))
    return _spectrogram(samples, window, size)


def _pcm(raw: bytes, width: int) -> NDArray[np.float64]:
    if width == 1:
        return np.frombuffer(raw, np.uint8).astype(np.float64) - 128
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0].astype(np.float64)
    return np.frombuffer(raw, f"<i{width}").astype(np.float64)


def _npy_frame(data: bytes, size: tuple[int, int]) -> U8:
    array = _npy(data)
    if array.ndim == 1:
        with np.errstate(over="ignore"):  # a longer float that overflows becomes infinity, refused below
            signal = array.astype(np.float64)
        return _spectrogram(signal, 256, size)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
        _bound_pixels(array.shape[1], array.shape[0])
        return _fit(Image.fromarray(_levels(array)).convert("RGB"), size)
    _refuse(f"array of shape {array.shape}", "save (H, W) or (H, W, 3) for an image, (samples,) for a signal")


def _npy(data: bytes) -> NDArray[Any]:
    """The array, refused before anything is allocated unless its header fits its length. Never unpickles."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        _refuse(f"npy version {version}", "save it with numpy.save")
    formats = np.lib.format
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or dtype.kind not in "buif":
        _refuse(f"array of {dtype}", "save plain numbers: uint8 or float32")
    held, claimed = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if held != claimed or min(shape, default=0) < 1:
        _refuse(f"shape {shape} of {dtype} needs {claimed} bytes, the file holds {held}", "save it again")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def _levels(array: NDArray[Any]) -> U8:
    """An image array of any accepted type as 0..255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        _refuse(f"image array of {array.dtype}", "save uint8 in 0..255 or float32 in 0..1")
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails it
        _refuse(f"float image with values {low:.6g} to {high:.6g}", "remove NaN and scale the image to 0..1")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _spectrogram(samples: NDArray[np.float64], window: int, size: tuple[int, int]) -> U8:
    """Log-spectrogram of a mono signal `(samples,)` as a grey frame; offset and loudness are taken out."""
    if not MIN_SAMPLES <= len(samples) <= MAX_SAMPLES:
        _refuse(f"a signal of {len(samples)} samples", f"give clips of {MIN_SAMPLES} to {MAX_SAMPLES}")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        _refuse("the signal holds NaN or infinity", "repair or remove it")
    scaled = samples / (peak or 1.0)
    signal = (scaled - scaled.mean()).astype(np.float32)
    if float(np.abs(signal).max()) < 1e-6:  # silence: only rounding is left, which must not be amplified
        return np.zeros((*size, 3), np.uint8)
    signal = np.pad(signal, (0, max(0, window - len(signal))))
    hop = max(1, (len(signal) - window) // (2 * size[1]))
    frames = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32), 2 * window, axis=1))
    decibel = 20 * np.log10(np.maximum(power, 1e-10))
    levels = np.clip(1 + (decibel - decibel.max()) / 80, 0, 1).T[::-1] * 255
    picture = Image.fromarray(np.rint(levels).astype(np.uint8))
    grey = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return np.repeat(grey[:, :, None], 3, axis=2)


# ----------------------------------------------------------------------------------------------------- views


def view(frame: U8, name: str) -> U8:
    """An augmented `frame (height, width, 3)` of the same shape: "plain", "flip", or "crop1" to "crop9999".

    A crop is a random resized crop of 0.6 to 1 of the area, flipped half the time, with brightness and
    contrast changed by up to a fifth; its randomness is the SHA-256 of the name and the pixels.
    Raises `UsageError` for another name, shape or type.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UsageError(f"frame of {frame.dtype} {frame.shape}: it must be uint8 (height, width, 3)")
    if name == "plain":
        return frame
    if name == "flip":
        return np.ascontiguousarray(frame[:, ::-1])
    if not re.fullmatch(r"crop[1-9][0-9]{0,3}", name):
        raise UsageError(f"view {name!r} is not one of plain, flip, crop1 to crop9999")
    digest = hashlib.sha256(name.encode() + b"\0" + frame.tobytes()).digest()
    return _crop(frame, np.random.default_rng(int.from_bytes(digest, "big")))


def _crop(frame: U8, rng: np.random.Generator) -> U8:
    height, width = frame.shape[:2]
    area, ratio = rng.uniform(0.6, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, tall = width * min(1.0, math.sqrt(area * ratio)), height * min(1.0, math.sqrt(area / ratio))
    left, top = rng.uniform(0, 1) * (width - wide), rng.uniform(0, 1) * (height - tall)
    box = (left, top, min(width, left + wide), min(height, top + tall))
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(picture, np.float32)
    if rng.uniform() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, brightness = rng.uniform(0.8, 1.2, size=2).astype(np.float32)
    mean = np.float32(pixels.mean(dtype=np.float64))
    changed = ((pixels - mean) * contrast + mean) * brightness
    jittered: U8 = np.rint(changed.clip(0, 255)).astype(np.uint8)
    return jittered
