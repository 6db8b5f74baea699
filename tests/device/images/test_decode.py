"""What decodes to a frame, what is refused, and that damage gives one kind of error."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from device.images import decode as decoding
from device.images.dataset import read_folder
from device.images.decode import UndecodableInput, decode, decode_bytes
from edgeear.errors import UsageError
from edgeear.types import U8
from tests.support.needs import need

SIZE = (16, 24)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def npy(array: NDArray[Any], allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def wav(samples: NDArray[np.float64], rate: int = 8000, width: int = 2) -> bytes:
    """PCM of `samples (frames,)` or `(frames, channels)` in -1..1."""
    stream = io.BytesIO()
    scaled = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (scaled + 128 if width == 1 else scaled).astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(stream, "wb") as clip:
        clip.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        clip.setsampwidth(width)
        clip.setframerate(rate)
        clip.writeframes(raw.tobytes())
    return stream.getvalue()


def tone(hertz: float, count: int = 4000, rate: int = 8000) -> NDArray[np.float64]:
    return 0.8 * np.sin(2 * np.pi * hertz * np.arange(count) / rate)


def frame_of(data: bytes, suffix: str, size: tuple[int, int] = SIZE) -> U8:
    frame = decode_bytes(data, Path("domain/class/file" + suffix), size)
    assert frame.shape == (*size, 3) and frame.dtype == np.uint8 and frame.flags.writeable
    return frame


def refusal(data: bytes, suffix: str) -> str:
    with pytest.raises(UndecodableInput) as caught:
        decode_bytes(data, Path("domain/class/file" + suffix), SIZE)
    assert caught.value.paths == (Path("domain/class/file" + suffix),)
    assert f"file{suffix}: " in str(caught.value)
    return str(caught.value)


def noise(height: int = 20, width: int = 30) -> U8:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("JPEG", ".JPEG"), ("PNG", ".jpg")])
def test_a_plain_colour_survives(kind: str, suffix: str) -> None:
    frame = frame_of(encoded(Image.new("RGB", (50, 40), (200, 30, 90)), kind, quality=95), suffix)
    assert np.abs(frame.astype(int) - (200, 30, 90)).max() <= 3


def test_an_image_of_the_frames_size_is_not_touched() -> None:
    pixels = noise(*SIZE)
    assert np.array_equal(frame_of(encoded(Image.fromarray(pixels), "PNG"), ".png"), pixels)


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_cropped_after_the_shorter_side_fits(turned: bool) -> None:
    pixels = np.zeros((20, 60), np.uint8)
    pixels[:, 20:40] = 255
    pixels[:, 29:31] = 100
    frame = frame_of(encoded(Image.fromarray(pixels.T if turned else pixels), "PNG"), ".png", (40, 40))[..., 0]
    line = (frame.T if turned else frame)[20]
    assert line[1] == line[-2] == 255 and line[0] > 150, "what lies beyond the centre square must be gone"
    assert line[19] == line[20] == 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    image.paste((0, 255, 0), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(frame_of(data, ".png", (40, 40)), expected)


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    data = encoded(Image.new("RGB", (40, 40), (9, 9, 9)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert frame_of(data, ".png").max() == 9


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white_and_half_transparent_ones_between(mode: str) -> None:
    image = Image.new(mode, (48, 16), (100, 0) if mode == "LA" else (100, 100, 100, 0))
    image.paste((100, 255) if mode == "LA" else (100, 100, 100, 255), (16, 0, 32, 16))
    frame = frame_of(encoded(image, "PNG"), ".png", (16, 48))
    assert (frame[:, 4] == 255).all() and (frame[:, 24] == 100).all()


def test_a_palettes_transparent_colour_is_white() -> None:
    image = Image.new("P", (48, 16), 1)
    image.putpalette([0, 0, 0, 7, 8, 9])
    image.paste(0, (16, 0, 32, 16))
    frame = frame_of(encoded(image, "PNG", transparency=0), ".png", (16, 48))
    assert (frame[:, 24] == 255).all() and (frame[:, 4] == (7, 8, 9)).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P"])
def test_every_mode_gives_its_own_colours(mode: str) -> None:
    image = Image.new("RGB", (48, 16), (255, 255, 255))
    image.paste((0, 0, 0), (16, 0, 32, 16))
    kind, suffix = ("JPEG", ".jpg") if mode == "CMYK" else ("PNG", ".png")
    frame = frame_of(encoded(image.convert(mode), kind), suffix, (16, 48)).astype(int)
    assert frame[:, 4].min() > 250 and frame[:, 24].max() < 5


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 24).astype(np.uint16), (16, 1))
    frame = frame_of(encoded(Image.fromarray(ramp), "PNG"), ".png")
    assert np.abs(frame[0, :, 0] - np.linspace(0, 255, 24)).max() <= 1


def test_a_large_jpeg_is_decoded_smaller_without_changing_the_picture() -> None:
    y, x = np.mgrid[0:1200, 0:1600]
    image = Image.fromarray(np.stack([x * 255 // 1600, y * 255 // 1200, (x + y) % 256 // 2], -1).astype(np.uint8))
    data = encoded(image, "JPEG", quality=95)
    full = np.asarray(ImageOps.fit(Image.open(io.BytesIO(data)), (64, 64), Image.Resampling.BILINEAR))
    assert np.abs(frame_of(data, ".jpg", (64, 64)).astype(int) - full).mean() < 2


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8300, 12000, 60000])
def test_decompression_bombs_are_refused_before_they_unfold(side: int) -> None:
    assert "limit" in refusal(png_header(side, side), ".png")


def test_a_truncated_image_is_refused() -> None:
    for kind, suffix in (("PNG", ".png"), ("JPEG", ".jpg")):
        data = encoded(Image.fromarray(noise(90, 90)), kind)
        refusal(data[: len(data) // 2], suffix)


def test_other_formats_and_suffixes_are_refused() -> None:
    refusal(encoded(Image.fromarray(noise()), "GIF"), ".png")
    assert ".gif" in refusal(encoded(Image.fromarray(noise()), "GIF"), ".gif")
    refusal(b"", ".jpg")


def test_an_empty_frame_size_is_refused() -> None:
    with pytest.raises(UsageError, match="frame size"):
        decode_bytes(b"", Path("a.png"), (0, 4))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize(
    "whole", [(1, 1), (1, 900), (900, 1), (7, 5), (24, 16), (300, 200), (301, 199), (2000, 700), (640, 1100)]
)
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (40, 40)])
def test_resizing_by_strips_is_bit_for_bit_resizing_at_once(
    mode: str, whole: tuple[int, int], size: tuple[int, int]
) -> None:
    width, height = whole
    image = Image.fromarray(noise(height, width)).convert(mode)
    expected = np.asarray(ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.BILINEAR))
    assert np.array_equal(decoding.fit_image(image, size), expected)


def cost(data: bytes, limits: decoding.Limits, size: tuple[int, int]) -> tuple[int, str]:
    """Peak memory in bytes of decoding in a process of its own, and its answer."""
    need("a process")
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from device.images import decode as d\n"
        "limits = d.Limits(*map(int, sys.argv[1:4])); size = (int(sys.argv[4]), int(sys.argv[5]))\n"
        "data = sys.stdin.buffer.read(); now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = now()\n"
        "try: d.decode_bytes(data, Path('a.png'), size, limits); answer = 'ok'\n"
        "except d.UndecodableInput as error: answer = str(error)\n"
        "print(now() - before, answer)"
    )
    given = [limits.pixels, limits.memory, limits.samples, *size]
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, given)], input=data, capture_output=True, check=True, timeout=60
    ).stdout.decode()
    peak, answer = found.split(maxsplit=1)
    return int(peak), answer.strip()


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rgb": ("RGB", "PNG", {}),
    "rgba": ("RGBA", "PNG", {}),
    "grey and alpha": ("LA", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "palette and alpha": ("P", "PNG", {"transparency": 0}),
    "16 bits": ("I;16", "PNG", {}),
    "bits": ("1", "PNG", {}),
    "jpeg": ("RGB", "JPEG", {}),
    "cmyk": ("CMYK", "JPEG", {}),
    "progressive": ("RGB", "JPEG", {"progressive": True}),
}


def plain(kind: str, width: int, height: int) -> bytes:
    mode, form, options = KINDS[kind]
    image = Image.new(mode, (width, height))
    if mode == "P":
        image.putpalette([1, 2, 3] * 256)
    return encoded(image, form, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_within_the_limits_takes_bounded_memory(kind: str) -> None:
    """As many pixels as a file may have; a few KB of bytes. 4 bytes a pixel is what Pillow keeps of RGB."""
    side = math.isqrt(decoding.MAX_PIXELS)
    peak, answer = cost(plain(kind, side, side), decoding.FILES, (224, 224))
    assert answer == "ok"
    assert peak < 4 * decoding.MAX_PIXELS + (64 << 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_somebody_sends_is_small_or_refused(kind: str) -> None:
    size = (224, 224)
    peak, answer = cost(plain(kind, 5000, 5000), decoding.sent(size), size)
    if kind in ("jpeg", "cmyk"):  # decoded at an eighth of their size
        assert answer == "ok"
    else:
        assert "limit" in answer and "; " in answer
    assert peak < 20 << 20
    peak, answer = cost(plain(kind, 1920, 1080), decoding.sent((64, 64)), (64, 64))
    assert answer == "ok" and peak < 40 << 20


def test_a_jpeg_of_many_passes_is_refused_and_a_preview_is_no_pass() -> None:
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    assert "passes" in refusal(data[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 200 + data[-2:], ".jpg")
    assert decoding._passes(data) == data.count(b"\xff\xda") > 1
    preview = b"\xff\xe1" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    assert decoding._passes(data[:2] + preview + data[2:]) == data.count(b"\xff\xda")
    assert scan and decoding._passes(encoded(Image.fromarray(noise()), "JPEG")) == 1


def test_a_side_beyond_the_limit_is_refused() -> None:
    assert "side exceeds the limit" in refusal(plain("bits", decoding.MAX_SIDE + 1, 1), ".png")


@pytest.mark.parametrize(
    ("kind", "suffix", "named"),
    [("WEBP", ".jpg", "WebP"), ("GIF", ".jpg", "GIF"), ("BMP", ".png", "BMP"), ("TIFF", ".jpg", "TIFF")],
)
def test_an_intact_file_of_another_kind_is_named(kind: str, suffix: str, named: str) -> None:
    text = refusal(encoded(Image.fromarray(noise()), kind), suffix)
    assert f"the content is a {named} picture" in text and "convert it" in text and "broken" not in text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty (0 bytes)"),
        (bytes(5000), "all of its 5000 bytes are 0"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(99), "AVIF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".wav", ".npy"])
def test_what_is_no_picture_at_all_is_named(data: bytes, named: str, suffix: str) -> None:
    assert named in refusal(data, suffix)


def test_a_picture_under_the_name_of_a_clip_is_still_a_picture() -> None:
    pixels = noise(*SIZE)
    assert np.array_equal(frame_of(encoded(Image.fromarray(pixels), "PNG"), ".wav"), pixels)
    assert np.array_equal(frame_of(npy(pixels), ".jpg"), pixels)
    assert np.array_equal(frame_of(wav(tone(500)), ".png"), frame_of(wav(tone(500)), ".wav"))


# --------------------------------------------------------------------------------------------------- 16 bits


def thermal(low: int, high: int) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(low, high, (16, 24), endpoint=True).astype(np.uint16)


@pytest.mark.parametrize(("low", "high"), [(29000, 29400), (0, 300), (7000, 11000), (65000, 65535)])
def test_a_narrow_span_of_16_bits_keeps_its_differences(low: int, high: int) -> None:
    array = thermal(low, high)
    frame = frame_of(encoded(Image.fromarray(array), "PNG"), ".png")
    assert len(np.unique(frame)) > 100
    expected = (array.astype(float) - array.min()) * 255 / (int(array.max()) - int(array.min()))
    assert np.abs(frame[..., 0] - expected).max() <= 0.5001
    assert np.array_equal(frame, frame_of(npy(array), ".npy"))
    assert np.array_equal(frame, decoding.fit_image(Image.fromarray(array), SIZE))


def test_noise_of_16_bits_is_not_amplified() -> None:
    array = thermal(30000, 30003)
    assert np.array_equal(frame_of(npy(array), ".npy")[..., 0], (array - 30000).astype(np.uint8))
    even = np.full((16, 24), 257 * 90, np.uint16)
    assert (frame_of(npy(even), ".npy") == 90).all()


# --------------------------------------------------------------------------------------------------- signals


def loudest_row(frame: U8) -> int:
    return int(frame[..., 0].astype(int).sum(axis=1).argmax())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("hertz", [500, 1000, 3000])
def test_a_tone_is_a_line_at_its_frequency(width: int, hertz: int) -> None:
    frame = frame_of(wav(tone(hertz), width=width), ".wav", (100, 80))
    assert abs(loudest_row(frame) - (100 - hertz / 40)) <= 2
    assert (frame[..., 0] == frame[..., 1]).all() and (frame[..., 0] == frame[..., 2]).all()


def test_time_runs_to_the_right() -> None:
    frame = frame_of(wav(np.concatenate([tone(1000), 0 * tone(1)])), ".wav", (64, 64))[..., 0].astype(int)
    assert frame[:, :30].max(axis=0).min() > 200 and frame[:, 34:].max() == 0


def test_channels_are_mixed() -> None:
    both = np.stack([tone(1000), tone(3000)], axis=1)
    rows = frame_of(wav(both), ".wav", (100, 80))[..., 0].astype(int).sum(axis=1)
    assert rows[73:78].max() > rows[50] + 1000 and rows[23:28].max() > rows[50] + 1000


def test_loudness_and_offset_do_not_show() -> None:
    plain = frame_of(npy(tone(1000)), ".npy").astype(int)
    quiet = frame_of(npy(tone(1000) / 500 + 40), ".npy").astype(int)
    assert np.abs(plain - quiet).max() <= 1


def test_a_bare_signal_looks_like_the_same_wav_at_8_khz() -> None:
    samples = tone(700) + 0.1 * tone(1900)
    bare, clip = (
        frame_of(npy(samples), ".npy").astype(int),
        frame_of(wav(samples, width=4), ".wav").astype(int),
    )
    assert np.abs(bare - clip).max() <= 1
    integers = frame_of(npy(np.rint(samples * 30000).astype(np.int16)), ".npy").astype(int)
    assert np.abs(bare - integers).mean() < 5


@pytest.mark.parametrize("level", [0.0, 3.7, 1e300])
def test_silence_is_black(level: float) -> None:
    assert frame_of(npy(np.full(500, level)), ".npy").max() == 0


def test_short_signals_of_the_permitted_length_decode() -> None:
    assert frame_of(npy(np.random.default_rng(0).normal(size=decoding.MIN_SAMPLES)), ".npy").max() > 240
    assert "samples" in refusal(npy(np.ones(decoding.MIN_SAMPLES - 1)), ".npy")
    assert "samples" in refusal(wav(np.zeros(0)), ".wav")


def test_long_signals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_SAMPLES", 3999)
    assert "3999" in refusal(wav(tone(100)), ".wav")
    assert "3999" in refusal(npy(tone(100)), ".npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_signals_with_nan_or_infinity_are_refused(value: float) -> None:
    samples = tone(500)
    samples[7] = value
    assert "NaN" in refusal(npy(samples), ".npy")


_GUID = bytes.fromhex("000000001000800000aa00389b71")
S = np.sin(np.arange(16000) * 0.2)
RAW = {
    (1, 8): (S * 127 + 128).astype(np.uint8).tobytes(),
    (1, 16): (S * 3e4).astype("<i2").tobytes(),
    (1, 24): b"".join(struct.pack("<i", int(x * 8e6))[:3] for x in S),
    (1, 32): (S * 2e9).astype("<i4").tobytes(),
    (3, 32): S.astype("<f4").tobytes(),
    (3, 64): S.astype("<f8").tobytes(),
}


def riff(
    kind: int, bits: int, data: bytes, *, extensible: bool = False, size: int | None = None, more: bytes = b""
) -> bytes:
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, 1, 16000, 2000 * bits, bits // 8, bits)
    form += struct.pack("<HHIH", 22, bits, 4, kind) + _GUID if extensible else b""
    claimed = len(data) if size is None else size
    body = b"WAVE" + more + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", claimed) + data
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("form", RAW, ids=str)
def test_every_usual_wav_gives_the_same_picture(form: tuple[int, int], extensible: bool) -> None:
    reference = frame_of(riff(1, 32, RAW[1, 32]), ".wav", (64, 64)).astype(int)
    found = frame_of(riff(*form, RAW[form], extensible=extensible), ".wav", (64, 64)).astype(int)
    assert np.abs(found - reference).mean() < (25 if form == (1, 8) else 5)
    assert loudest_row(found.astype(np.uint8)) == loudest_row(reference.astype(np.uint8))


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36])
def test_a_wav_from_a_pipe_is_read_to_its_end(size: int) -> None:
    whole = frame_of(riff(1, 16, RAW[1, 16]), ".wav", (64, 64))
    assert np.array_equal(frame_of(riff(1, 16, RAW[1, 16], size=size), ".wav", (64, 64)), whole)
    assert np.array_equal(frame_of(riff(1, 16, RAW[1, 16], more=b"LIST\3\0\0\0abc\0"), ".wav", (64, 64)), whole)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (riff(6, 8, bytes(4000)), "A-law with 8 bits"),
        (riff(0x11, 4, bytes(4000)), "IMA ADPCM"),
        (riff(3, 16, bytes(4000)), "float with 16 bits"),
        (riff(1, 16, b""), "0 samples"),
        (riff(1, 16, RAW[1, 16])[:-7], "truncated: 31993 bytes of 32000"),
        (riff(1, 16, RAW[1, 16])[:40], "truncated"),
        (b"RIFF\4\0\0\0WAVE", "truncated: it holds no samples"),
        (riff(3, 32, np.full(4000, np.nan, "<f4").tobytes()), "NaN"),
    ],
)
def test_a_wav_that_gives_no_samples_says_why(data: bytes, named: str) -> None:
    text = refusal(data, ".wav")
    assert named in text and "; " in text and "intact" not in text


def test_channels_count_for_the_limit_of_samples() -> None:
    form = struct.pack("<HHIIHH", 1, 60000, 16000, 0, 60000, 8)
    data = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", 9 << 20) + bytes(9 << 20)
    assert "exceed the limit" in refusal(data, ".wav")


def test_a_truncated_or_unsupported_wav_is_refused() -> None:
    data = wav(tone(500))
    assert "truncated" in refusal(data[:-100], ".wav")
    not_pcm = bytearray(data)
    not_pcm[20:22] = struct.pack("<H", 3)
    refusal(bytes(not_pcm), ".wav")


# ------------------------------------------------------------------------------------------------------- npy


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: pixels,
        lambda pixels: np.asfortranarray(pixels),
        lambda pixels: (pixels / 255).astype(np.float32),
        lambda pixels: (pixels / 255).astype(">f8"),
        lambda pixels: pixels.astype(np.uint16) * 257,
    ],
)
def test_every_number_type_gives_the_same_picture(convert: Callable[[U8], NDArray[Any]]) -> None:
    pixels = noise(*SIZE)
    assert np.array_equal(frame_of(npy(convert(pixels)), ".npy"), pixels)
    grey = pixels[..., 0]
    assert np.array_equal(frame_of(npy(convert(grey)), ".npy"), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bits_are_rounded() -> None:
    steps = np.array([[128, 129, 65535 - 129, 65535 - 128]] * 4, np.uint16)
    frame = decode_bytes(npy(steps), Path("a.npy"), (4, 4))
    assert frame[0, :, 0].tolist() == [0, 1, 254, 255]


def test_a_mask_is_black_and_white() -> None:
    mask = noise(*SIZE)[..., 0] > 128
    assert np.array_equal(frame_of(npy(mask), ".npy")[..., 1], mask * np.uint8(255))


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), 255.0), "0..1"),
        (np.full((8, 8), -0.1), "0..1"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((8, 8), np.complex64), "complex64"),
        (np.zeros((8, 8, 4), np.uint8), "shape"),
        (np.zeros((2, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8), np.uint8), "shape"),
        (np.zeros((), np.float32), "shape"),
        (np.array(["text"]), "U4"),
        (np.zeros(4, [("a", "f4")]), "plain numbers"),
    ],
)
def test_arrays_that_are_no_picture_are_refused_with_the_reason(array: NDArray[Any], word: str) -> None:
    assert word in refusal(npy(array), ".npy")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.unlink, ("/nonexistent/unpickled",)


def test_nothing_is_unpickled() -> None:
    assert "object" in refusal(npy(np.array([Bomb()]), allow_pickle=True), ".npy")


@pytest.mark.parametrize("shape", ["(1000000000000, 3)", "(-8, -8)", "(9, 8)", "(True, 64)"])
def test_a_header_that_lies_about_the_length_is_refused(shape: str) -> None:
    data = npy(np.zeros((8, 8), np.uint8))
    header = data[10:].split(b"\n")[0].replace(b"(8, 8)", shape.encode()).rstrip()
    refusal(data[:8] + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(64), ".npy")


# ----------------------------------------------------------------------------------------------------- files


def test_files_that_cannot_be_read_are_undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("missing.png", "folder.png", "pipe.png"):
        with pytest.raises(UndecodableInput, match=name):
            decode(tmp_path / name, SIZE)
    (tmp_path / "long.png").write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 100)
    with pytest.raises(UndecodableInput, match="100"):
        decode(tmp_path / "long.png", SIZE)


def test_decode_reads_the_file(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(decode(tmp_path / "a.png", SIZE), frame_of(data, ".png"))


def test_one_error_names_ten_files_and_holds_all() -> None:
    single = [UndecodableInput(f"{number}.png: broken", (Path(f"{number}.png"),)) for number in range(13)]
    assert UndecodableInput.of_many(single[:1]) is single[0]
    error = UndecodableInput.of_many(single)
    assert error.paths == tuple(Path(f"{number}.png") for number in range(13))
    assert "13 files" in str(error) and "9.png: broken" in str(error) and "and 3 more" in str(error)
    assert "10.png" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.paths) == (str(error), error.paths)


SUFFIXED = st.sampled_from([".jpg", ".png", ".wav", ".npy"])
MAGIC = st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WAVEfmt ", b"\x93NUMPY\x01\0v\0"])


@given(SUFFIXED, MAGIC, st.binary(max_size=400))
def test_random_bytes_give_a_frame_or_one_kind_of_error(suffix: str, magic: bytes, data: bytes) -> None:
    decodes_or_is_undecodable(magic + data, suffix)


def decodes_or_is_undecodable(data: bytes, suffix: str) -> None:
    try:
        frame = decode_bytes(data, Path("a" + suffix), SIZE)
    except UndecodableInput as error:
        assert "a" + suffix in str(error)
    else:
        assert frame.shape == (*SIZE, 3) and frame.dtype == np.uint8


VALID = [
    (".png", encoded(Image.fromarray(noise()).convert("P"), "PNG", transparency=1)),
    (".png", encoded(Image.fromarray(noise()), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")),
    (".jpg", encoded(Image.fromarray(noise()), "JPEG", progressive=True)),
    (".wav", wav(tone(500, 300), width=3)),
    (".npy", npy(noise())),
    (".npy", npy(tone(500, 300))),
]


@settings(max_examples=300)
@given(st.data())
def test_damaged_files_give_a_frame_or_one_kind_of_error(data: st.DataObject) -> None:
    suffix, content = data.draw(st.sampled_from(VALID))
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(broken) - 1, 200)) | st.integers(0, len(broken) - 1))
        broken[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    decodes_or_is_undecodable(bytes(broken[: data.draw(st.just(len(broken)) | st.integers(1, len(broken)))]), suffix)


# ------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(("archive", "classes"), [("PACS", 7), ("FSDD", 10), ("Digits_tree", 10)])
def test_real_data_decodes(tmp_path: Path, data_file: Callable[[str], Path], archive: str, classes: int) -> None:
    with tarfile.open(data_file(f"{archive}.tar.gz")) as tar:
        members = [member for member in tar if member.isfile()][::60]
        tar.extractall(tmp_path, members, filter="data")
    roots = [path for path in (tmp_path, *tmp_path.rglob("*")) if any(path.glob("*/*/*.*"))]
    data = read_folder(roots[0])
    frames = [decode(item.path, (64, 64)) for items in data.items.values() for item in items]
    assert len(data.classes) == classes
    assert len(frames) == len(members)
    assert min(int(frame.max()) - int(frame.min()) for frame in frames) > 50
