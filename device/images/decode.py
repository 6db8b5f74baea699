"""From a file or its bytes to a frame: images, wav clips and npy arrays.

Rules of this file:
1. `decode` gives a frame or raises `UndecodableInput`, whatever the bytes.
2. Nothing is executed or unpickled, and a size that a header claims is checked before anything is allocated for it.
3. `Limits` bound pixels and memory of one picture. Beside the decoded picture itself only strips and what is left after
   one pass of resizing are in memory, whatever its mode.
4. The content says what a file is. A message about a file that is intact but of another kind names that kind.
"""

from __future__ import annotations

import io
import math
import stat
import struct
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from device.files import escaped
from device.images.wav import WavError, read_wav
from edgeear.errors import DataError, UsageError
from edgeear.types import U8

SUFFIXES = (".jpg", ".jpeg", ".png", ".wav", ".npy")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 32 << 20
"""Of a picture as it is decoded: a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size."""
MAX_SIDE = 1 << 16
MAX_SAMPLES = 8 << 20
MIN_SAMPLES = 64
NAMED = 10
"""How many files, classes or domains a message names before it only counts."""


@dataclass(frozen=True)
class Limits:
    """What one picture may take: `pixels` after decoding, bytes of `memory` while it is decoded, `samples` of a
    clip."""

    pixels: int = MAX_PIXELS
    memory: int = 256 << 20
    samples: int = MAX_SAMPLES


FILES = Limits()


def sent(size: tuple[int, int]) -> Limits:
    """The limits of a picture that somebody sends for a frame of `size`: 8 times its sides, at least a full HD picture,
    and a minute of sound at 16 kHz."""
    return Limits(max(64 * size[0] * size[1], 2 << 20), 64 << 20, 1 << 20)


class UndecodableInput(DataError):
    """Files that cannot be decoded. `paths` holds all; the message names up to ten, with reason and remedy."""

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
        lines = [f"{len(errors)} files cannot be decoded; repair or remove them, or leave them out:"]
        lines += [f"  {error}" for error in errors[:NAMED]]
        if len(errors) > NAMED:
            lines.append(f"  and {len(errors) - NAMED} more")
        return cls("\n".join(lines), tuple(path for error in errors for path in error.paths))


def decode(path: Path, size: tuple[int, int]) -> U8:
    """The frame of one file: uint8 RGB of `(*size, 3)`, `size = (height, width)`. See `decode_bytes`."""
    return decode_bytes(read_input(path), path, size)


def read_input(path: Path) -> bytes:
    """The file's bytes. Raises `UndecodableInput` unless it is a readable file of at most `MAX_FILE_BYTES`."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise _undecodable(path, "a folder", "give its files; `evaluate` and `learn` take folders")
        if not stat.S_ISREG(found.st_mode):
            raise _undecodable(path, "not a regular file", "give the file of a picture")
        if found.st_size > MAX_FILE_BYTES:
            raise _undecodable(path, f"{found.st_size} bytes exceed the {MAX_FILE_BYTES} allowed", "make it smaller")
        return path.read_bytes()
    except UndecodableInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"
        raise _undecodable(path, reason, "check its path and permissions") from error


def decode_bytes(
    data: bytes, path: Path, size: tuple[int, int], limits: Limits = FILES, suffix: str | None = None
) -> U8:
    """The frame `(height, width, 3)` of a file's content, which came under the name `path`. `suffix` replaces that of
    `path`.

    Images: EXIF orientation is applied, transparency becomes white, 16 bits are scaled to 8 (`_levels`), the shorter
    side is resized to fit (bilinear) and the centre is cropped. wav (PCM, float) and one-dimensional npy become a grey
    log-spectrogram: time to the right, 0 Hz at the bottom, half the sampling rate at the top, black at 80 dB below the
    loudest point. npy images are `(H, W)` or `(H, W, 3)`: uint8, uint16 (brighter than 255 somewhere), bool, or
    float in 0..1. Raises `UndecodableInput` for content that cannot be decoded or exceeds `limits`, `UsageError` for an
    empty `size`.
    """
    if min(size) < 1:
        raise UsageError(f"frame size {size} is empty: height and width must be at least 1")
    kind = path.suffix if suffix is None else suffix
    with _named(path):
        if kind.lower() not in SUFFIXES:
            _refuse(f"suffix {kind!r} is not one of {', '.join(SUFFIXES)}", "convert it")
        return _decoder(data, kind.lower())(data, size, limits)


Decoder = Callable[[bytes, tuple[int, int], Limits], U8]

# What the first bytes of files say. `?` stands for any byte.
_OTHERS = {
    b"RIFF????WEBP": "a WebP picture",
    b"GIF8": "a GIF picture",
    b"BM????\0\0\0\0": "a BMP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"????ftypavi": "an AVIF picture",
    b"????ftyphei": "a HEIC picture",
    b"????ftyphev": "a HEIC picture",
    b"????ftypmif1": "a HEIF picture",
    b"????ftyp": "a video or another MP4 file",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF file",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"ID3": "an MP3 clip",
    b"OggS": "an Ogg file",
    b"fLaC": "a FLAC clip",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
}
_LFS = b"version https://git-lfs"


def _decoder(data: bytes, suffix: str) -> Decoder:
    """By content; by the suffix for content that nobody knows. Raises for content that is known and not taken."""
    if not data:
        _refuse("the file is empty (0 bytes)", "copy or record it again")
    if not data.strip(b"\0"):
        _refuse(f"all of its {len(data)} bytes are 0, as after a power cut", "copy or record it again")
    if data.startswith(_LFS):
        _refuse("a pointer of Git LFS instead of the file", "run `git lfs pull`")
    known = {b"RIFF????WAVE": _wav_frame, b"\x93NUMPY": _npy_frame, b"\xff\xd8\xff": _image_frame}
    known[b"\x89PNG"] = _image_frame
    for magic, decoder in known.items():
        if _begins(data, magic):
            return decoder
    for magic, kind in _OTHERS.items():
        if _begins(data, magic):
            _refuse(f"the content is {kind}", f"convert it to one of {', '.join(SUFFIXES)}")
    by_suffix: dict[str, Decoder] = {".wav": _wav_frame, ".npy": _npy_frame}
    return by_suffix.get(suffix, _image_frame)


def _begins(data: bytes, magic: bytes) -> bool:
    return len(data) >= len(magic) and all(want in (63, got) for want, got in zip(magic, data, strict=False))


def fit_image(image: Image.Image, size: tuple[int, int]) -> U8:
    """The frame of a Pillow image of any mode: bit for bit what `decode_bytes` gives for a PNG of it. EXIF orientation
    is obeyed. Mode F must lie in 0..1. Raises `UndecodableInput` for another range, for I that could be 8 bits, for an
    image whose file is broken or closed, and for too many pixels.
    """
    with _named(Path(getattr(image, "filename", "") or "Pillow image")):
        _bound_pixels(*image.size, FILES)
        upright = _upright(image)
        if image.mode == "F":
            array = np.asarray(upright)
            upright = Image.fromarray(_levels(array, _span(array)))
        elif image.mode.startswith("I") and image.format != "PNG":  # there 16 bits are 16 bits
            _require_16_bits(np.asarray(upright))
        return _fit_image(upright, size)


def fit_pixels(pixels: U8, size: tuple[int, int]) -> U8:
    """The frame of decoded pixels, uint8 `(H, W)` or RGB `(H, W, 3)`: the same bits that `decode_bytes` gives for a
    PNG of them. Raises `UsageError` for another type or shape, `DataError` for too few pixels or too many.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}: they must be uint8 (H, W) or (H, W, 3)")
    height, width = pixels.shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels: from 1 to {MAX_PIXELS} are allowed; make the image smaller")
    return _fit_image(Image.fromarray(pixels), size)


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
    tokenize.TokenError,
    Image.DecompressionBombError,
    Warning,  # where warnings are errors
)


def fit_array(array: NDArray[Any], size: tuple[int, int]) -> U8:
    """The frame of an image array `(H, W)`, RGB `(H, W, 3)` or RGBA `(H, W, 4)`, of the types and ranges that npy files
    may have: bit for bit what `decode_bytes` gives for an npy file of it. Raises `UndecodableInput` for any other
    array.
    """
    with _named(Path(f"array of {array.dtype} {array.shape}")):
        if array.ndim == 4:
            _refuse("several images at once", "give list(array)")
        if array.ndim == 3 and array.shape[2] not in (3, 4) and array.shape[0] in (1, 3, 4):
            _refuse("the channels come first", "give array.transpose(1, 2, 0)")
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
            _refuse("the shape is not that of an image", "give (H, W), (H, W, 3) or (H, W, 4)")
        return _array_frame(array, size)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into `UndecodableInput` that names `path`."""
    try:
        yield
    except _Refused as refusal:
        raise _undecodable(path, refusal.reason, refusal.remedy) from None
    except WavError as error:
        raise _undecodable(path, error.reason, error.remedy) from None
    except _BROKEN as error:
        # Pillow's text holds a memory address here, and a bad file must always give the same message.
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        reason = f"broken content ({type(error).__name__}{detail})"
        raise _undecodable(path, reason, "replace it with an intact file or remove it") from error


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise _Refused(reason, remedy)


def _undecodable(path: Path, reason: str, remedy: str) -> UndecodableInput:
    return UndecodableInput(escaped(f"{path}: {reason}; {remedy}"), (path,))


_PASSES = 100
"""Most passes of a progressive JPEG; usual are 10. Each costs as much as a whole picture."""


def _image_frame(data: bytes, size: tuple[int, int], limits: Limits) -> U8:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        width, height = image.size
        # A JPEG of several passes is decoded as a whole before it is made smaller: 2 bytes a pixel and channel.
        passes = 1 if image.format == "PNG" else _passes(data)
        if passes > _PASSES:
            _refuse(f"a JPEG of {passes} passes, the limit is {_PASSES}", "save it as a plain JPEG")
        whole = 2 * width * height * len(image.getbands()) if passes > 1 else 0
        # Decode a large JPEG at 1/2, 1/4 or 1/8 of its size, but at least at twice the frame's size.
        image.draft(None, (2 * max(size), 2 * max(size)))
        _bound_pixels(*image.size, limits, whole)
        image.load()
        return _fit_image(_upright(image), size)


def _passes(jpeg: bytes) -> int:
    """How many passes (scans) the picture has; those of a preview in its header do not count."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] != b"\xda":
        filled = jpeg[at + 1 : at + 2] == b"\xff"
        at += 1 if filled else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    end = jpeg.find(b"\xff\xd9", at)  # neither marker occurs within a scan
    return jpeg.count(b"\xff\xda", at, end if end >= 0 else len(jpeg))


def _bound_pixels(width: int, height: int, limits: Limits, memory: int = 0) -> None:
    """Refuses more pixels than the limits have, and `memory` beside 4 bytes a pixel that exceeds theirs."""
    what = f"{width} x {height} pixels"
    if max(width, height) > MAX_SIDE:
        _refuse(f"{what}: a side exceeds the limit of {MAX_SIDE}", "cut the image into parts")
    if width * height > limits.pixels:
        _refuse(f"{what} exceed the limit of {limits.pixels}", "make the image smaller, or send it as a JPEG")
    if (needed := memory + 4 * width * height) > limits.memory:
        _refuse(f"decoding takes {needed} bytes, the limit is {limits.memory}", "save it as a plain JPEG")


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
    except _BROKEN:  # the pixels may be intact although the EXIF block is damaged
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, span: tuple[float, float] = (0, 65535)) -> Image.Image:
    """The image in RGB; `span` are the lowest and highest level of an image of more than 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray(_levels(levels, span)).convert("RGB")
    if image.mode == "La":  # Pillow takes it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        drawn = image.convert("RGBA")
        paper = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, drawn).convert("RGB")
    return image.convert("RGB")


def _fit_image(image: Image.Image, size: tuple[int, int]) -> U8:
    low, high = image.getextrema() if image.mode.startswith("I") else (0, 65535)
    span = float(low), float(high)  # type: ignore[arg-type]  # one channel, so two numbers
    width = image.size[0]
    return _fit(lambda top, end: _rgb(image.crop((0, top, width, end)), span), image.size, size)


_STRIP = 1 << 18  # pixels that are converted at once


def _fit(strip: Callable[[int, int], Image.Image], whole: tuple[int, int], size: tuple[int, int]) -> U8:
    """The frame of an image of `whole` `(width, height)`, whose rows `[top, end)` are `strip(top, end)` in RGB.

    The shorter side fits and the centre is cropped, bilinear: bit for bit Pillow's `ImageOps.fit`, which resizes along
    rows first, then along columns. Here the first pass goes strip by strip."""
    (width, height), (tall, wide) = whole, size
    ratio = wide / tall
    box_width, box_height = (
        (ratio * height, float(height)) if width / height >= ratio else (float(width), width / ratio)
    )
    left, top = (width - box_width) * 0.5, (height - box_height) * 0.5
    if width * height <= _STRIP:
        box = (left, top, left + box_width, top + box_height)
        return np.array(strip(0, height).resize((wide, tall), Image.Resampling.BILINEAR, box=box), np.uint8)
    # The rows that the second pass reads: those of the box, and the filter's support around it.
    support = math.ceil(max(1.0, box_height / tall)) + 1
    first, last = max(0, math.floor(top) - support), min(height, math.ceil(top + box_height) + support)
    narrow = Image.new("RGB", (wide, last - first))
    step = max(1, _STRIP // width)
    for row in range(first, last, step):
        end = min(row + step, last)
        columns = (left, 0, left + box_width, end - row)
        resized = strip(row, end).resize((wide, end - row), Image.Resampling.BILINEAR, box=columns)
        narrow.paste(resized, (0, row - first))
    rows = (0, top - first, wide, top - first + box_height)
    return np.array(narrow.resize((wide, tall), Image.Resampling.BILINEAR, box=rows), np.uint8)


def _wav_frame(data: bytes, size: tuple[int, int], limits: Limits) -> U8:
    samples, rate = read_wav(data, min(limits.samples, MAX_SAMPLES))
    # 32 ms, rounded to a power of two: 256 samples at 8 kHz, as for an npy signal.
    window = 2 ** round(math.log2(min(max(0.032 * rate, 64), 4096)))
    return _spectrogram(samples, window, size)


def _npy_frame(data: bytes, size: tuple[int, int], limits: Limits) -> U8:
    array = _npy(data)
    if array.ndim == 1:
        _bound_samples(len(array), min(limits.samples, MAX_SAMPLES))
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused below
            signal = array.astype(np.float64)
        return _spectrogram(signal, 256, size)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        _refuse(f"array of shape {array.shape}", "save (H, W) or (H, W, 3) for an image, (samples,) for a signal")
    return _array_frame(array, size, limits)


def _array_frame(array: NDArray[Any], size: tuple[int, int], limits: Limits = FILES) -> U8:
    height, width = array.shape[:2]
    _bound_pixels(width, height, limits)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        _require_16_bits(array)
    span = _span(array)
    return _fit(lambda top, end: _rgb(Image.fromarray(_levels(array[top:end], span))), (width, height), size)


def _npy(data: bytes) -> NDArray[Any]:
    """The array. A header that does not fit the length is refused before anything is allocated. Never unpickles."""
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


def _require_16_bits(array: NDArray[Any]) -> None:
    """Refuses values beyond 16 bits, and those that could be 8 bits."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535 or 0 < high <= 255:
        _refuse(f"values {low} to {high} of {array.dtype}", "give uint8 (mode L) in 0..255 or 16 bits in 0..65535")


_NARROW = 4096


def _span(array: NDArray[Any]) -> tuple[float, float]:
    """Lowest and highest level of an image array; refuses an array of another type or range."""
    if array.dtype.kind not in "fu" or (array.dtype.itemsize > 2 and array.dtype.kind == "u"):
        if array.dtype != np.bool_:
            _refuse(f"image array of {array.dtype}", "give uint8 in 0..255 or float32 in 0..1")
        return 0, 1
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and not (low >= 0 and high <= 1):  # NaN fails this comparison, too
        _refuse(f"float image with values {low:.6g} to {high:.6g}", "remove NaN and scale the image to 0..1")
    return low, high


def _levels(array: NDArray[Any], span: tuple[float, float]) -> U8:
    """An image array of any accepted type, scaled to 0..255; `span` are its lowest and highest level.

    16 bits are scaled from 0..65535, except where the whole picture lies within less than 4,096 levels, as that of a
    thermal camera does: fewer than 16 grey levels would be left. It is scaled from its own range, one level a count at
    most, so that noise is not amplified."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u":
        low, high = span
        if 0 < high - low < _NARROW:
            above = array.astype(np.float32) - np.float32(low)
            narrow: U8 = np.rint(above * np.float32(255 / max(high - low, 255))).astype(np.uint8)
            return narrow
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _bound_samples(samples: int, most: int) -> None:
    if not MIN_SAMPLES <= samples <= most:
        _refuse(f"a signal of {samples} samples", f"give clips of {MIN_SAMPLES} to {most}")


def _spectrogram(samples: NDArray[np.float64], window: int, size: tuple[int, int]) -> U8:
    """Log-spectrogram of a mono signal `(samples,)` as a grey frame, after removing offset and loudness."""
    _bound_samples(len(samples), MAX_SAMPLES)
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        _refuse("the signal holds NaN or infinity", "repair or remove it")
    scaled = samples / (peak or 1.0)
    signal = (scaled - scaled.mean()).astype(np.float32)
    if float(np.abs(signal).max()) < 1e-6:  # silence: do not amplify rounding errors
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
