"""Sound clips: the samples of a wav file, mixed to one channel.

Rules of this file:
1. PCM of 8, 16, 24 and 32 bits and float of 32 and 64 bits are read, in the plain and in the extensible format.
2. A program that writes into a pipe does not know the length: 0, or a number close to 2**31 or 2**32, means "to the
   end".
3. Everything else raises `WavError` with reason and remedy, before samples are unfolded.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_NAMES = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x31: "GSM", 0x50: "MPEG", 0x55: "MP3", 0xFF: "AAC"}
_CONVERT = "convert it to 16-bit PCM, such as `ffmpeg -i IN.wav -c:a pcm_s16le OUT.wav`"
_OPEN_ENDED = 1 << 16
"""A length this close below 2**31 or 2**32 was written before it was known."""


class WavError(ValueError):
    """A file that gives no samples."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


def read_wav(data: bytes, most: int) -> tuple[NDArray[np.float64], int]:
    """Samples `(frames,)`, the mean of all channels in the file's own units, and the sampling rate in Hz.

    Raises `WavError` for other content and for more than `most` samples over all channels."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise WavError("no RIFF/WAVE file, although its name or its first bytes say so", _CONVERT)
    form: bytes | None = None
    at = 12
    while at + 8 <= len(data):
        name, claimed = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"data":
            return _samples(form, data[at:], claimed, most)
        if name == b"fmt ":
            form = data[at : at + claimed]
        at += claimed + (claimed & 1)
    raise WavError("truncated: it holds no samples", "record or copy it again")


def _samples(form: bytes | None, rest: bytes, claimed: int, most: int) -> tuple[NDArray[np.float64], int]:
    if form is None or len(form) < 16:
        raise WavError("its samples come without a format", "record or copy it again")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if kind == _EXTENSIBLE and len(form) >= 26:
        kind = struct.unpack_from("<H", form, 24)[0]  # the first bytes of the sub-format's GUID
    if (kind, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        name = {_PCM: "PCM", _FLOAT: "float"}.get(kind, _NAMES.get(kind, f"format {kind}"))
        raise WavError(f"wav of {name} with {bits} bits", _CONVERT)
    if not channels or not rate:
        raise WavError(f"{channels} channels at {rate} Hz", "record or copy it again")
    frame = channels * bits // 8
    if claimed == 0 or any(0 <= end - claimed < _OPEN_ENDED for end in (1 << 31, 1 << 32)):
        claimed = len(rest) // frame * frame
    if claimed > len(rest):
        raise WavError(f"truncated: {len(rest)} bytes of {claimed}", "record or copy it again")
    values = claimed // frame * channels
    if values > most:
        raise WavError(f"{values} samples exceed the limit of {most}", "cut it into shorter clips")
    samples = _unfolded(rest[: claimed // frame * frame], kind, bits)
    with np.errstate(invalid="ignore", over="ignore"):  # infinity is refused later, by name
        return samples.reshape(-1, channels).mean(axis=1), rate


def _unfolded(raw: bytes, kind: int, bits: int) -> NDArray[np.float64]:
    if kind == _FLOAT:
        return np.frombuffer(raw, f"<f{bits // 8}").astype(np.float64)
    if bits == 8:
        return np.frombuffer(raw, np.uint8).astype(np.float64) - 128
    if bits == 24:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0].astype(np.float64)
    return np.frombuffer(raw, f"<i{bits // 8}").astype(np.float64)
