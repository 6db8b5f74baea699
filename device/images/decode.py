"""From a file or its bytes to a frame: images, wav clips and npy arrays.

Rules of this file:
1. `decode` gives a frame or raises `UndecodableInput`, whatever the bytes.
2. Nothing is executed or unpickled, and a size that a header claims is checked before anything is allocated for it.
"""

from __future__ import annotations

import io
import math
import stat
import struct
import tokenize
import wave
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from edgeear.errors import DataError, UsageError
from edgeear.types import U8

SUFFIXES = (".jpg", ".jpeg", ".png", ".wav", ".npy")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 64 << 20
MAX_SAMPLES = 8 << 20
MIN_SAMPLES = 64
NAMED = 10
"""How many files, classes or domains a message names before it only counts."""


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


def decode_bytes(data: bytes, path: Path, size: tuple[int, int], suffix: str | None = None) -> U8:
    """The frame `(height, width, 3)` of a file's content. `suffix`, else that of `path`, says how to read it.

    Images: EXIF orientation is applied, transparency becomes white, 16 bits are scaled to 8, the shorter side is
    resized to fit (bilinear) and the centre is cropped. wav (PCM) and one-dimensional npy become a grey
    log-spectrogram: time to the right, 0 Hz at the bottom, half the sampling rate at the top, black at 80 dB below the
    loudest point. npy images are `(H, W)` or `(H, W, 3)`: uint8, uint16 (brighter than 255 somewhere), bool, or
    float in 0..1.
    Raises `UndecodableInput` for content that cannot be decoded, `UsageError` for an empty `size`.
    """
    if min(size) < 1:
        raise UsageError(f"frame size {size} is empty: height and width must be at least 1")
    kind = path.suffix if suffix is None else suffix
    decoder = {".wav": _wav_frame, ".npy": _npy_frame}.get(kind.lower(), _image_frame)
    with _named(path):
        if kind.lower() not in SUFFIXES:
            _refuse(f"suffix {kind!r} is not one of {', '.join(SUFFIXES)}", "convert it")
        return decoder(data, size)


def fit_image(image: Image.Image, size: tuple[int, int]) -> U8:
    """The frame of a Pillow image of any mode: bit for bit what `decode_bytes` gives for a PNG of it. EXIF orientation
    is obeyed. Mode F must lie in 0..1. Raises `UndecodableInput` for another range, for I that could be 8 bits, for an
    image whose file is broken or closed, and for too many pixels.
    """
    with _named(Path(getattr(image, "filename", "") or "Pillow image")):
        _bound_pixels(*image.size)
        upright = _upright(image)
        if image.mode == "F":
            upright = Image.fromarray(_levels(np.asarray(upright)))
        elif image.mode.startswith("I") and image.format != "PNG":  # there 16 bits are 16 bits
            _require_16_bits(np.asarray(upright))
        return _fit(_rgb(upright), size)


def fit_pixels(pixels: U8, size: tuple[int, int]) -> U8:
    """The frame of decoded pixels, uint8 `(H, W)` or RGB `(H, W, 3)`: the same bits that `decode_bytes` gives for a
    PNG of them. Raises `UsageError` for another type or shape, `DataError` for too few pixels or too many.
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
    except _BROKEN as error:
        # Pillow's text holds a memory address here, and a bad file must always give the same message.
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        reason = f"broken content ({type(error).__name__}{detail})"
        raise _undecodable(path, reason, "replace it with an intact file or remove it") from error


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise _Refused(reason, remedy)


def _undecodable(path: Path, reason: str, remedy: str) -> UndecodableInput:
    return UndecodableInput(f"{path}: {reason}; {remedy}", (path,))


def _image_frame(data: bytes, size: tuple[int, int]) -> U8:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        _bound_pixels(*image.size)
        # Decode a large JPEG at 1/2, 1/4 or 1/8 of its size, but at least at twice the frame's size.
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
    except _BROKEN:  # the pixels may be intact although the EXIF block is damaged
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_levels(np.asarray(image).clip(0, 65535).astype(np.uint16))).convert("RGB")
    if image.mode == "La":  # Pillow takes it to LA only
        image = image.convert("LA")
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
    # 32 ms, rounded to a power of two: 256 samples at 8 kHz, as for an npy signal.
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
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused below
            signal = array.astype(np.float64)
        return _spectrogram(signal, 256, size)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        _refuse(f"array of shape {array.shape}", "save (H, W) or (H, W, 3) for an image, (samples,) for a signal")
    return _array_frame(array, size)


def _array_frame(array: NDArray[Any], size: tuple[int, int]) -> U8:
    _bound_pixels(array.shape[1], array.shape[0])
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        _require_16_bits(array)
    return _fit(_rgb(Image.fromarray(_levels(array))), size)


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
    """Refuses values beyond 16 bits, and those that could be 8 bits, whose frame would be nearly black."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535 or 0 < high <= 255:
        _refuse(f"values {low} to {high} of {array.dtype}", "give uint8 (mode L) in 0..255 or 16 bits in 0..65535")


def _levels(array: NDArray[Any]) -> U8:
    """An image array of any accepted type, scaled to 0..255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        _refuse(f"image array of {array.dtype}", "give uint8 in 0..255 or float32 in 0..1")
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN fails this comparison, too
        _refuse(f"float image with values {low:.6g} to {high:.6g}", "remove NaN and scale the image to 0..1")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _spectrogram(samples: NDArray[np.float64], window: int, size: tuple[int, int]) -> U8:
    """Log-spectrogram of a mono signal `(samples,)` as a grey frame, after removing offset and loudness."""
    if not MIN_SAMPLES <= len(samples) <= MAX_SAMPLES:
        _refuse(f"a signal of {len(samples)} samples", f"give clips of {MIN_SAMPLES} to {MAX_SAMPLES}")
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
