"""When a certificate is valid: a field of X.509 that the standard library does not return for a file.

Rules of this file: DER is followed by its lengths (ITU-T X.690) to `Validity` (RFC 5280, 4.1.2.5); no other field is
read and nothing is verified. Anything that is no certificate raises `FormatError`.
"""

from __future__ import annotations

import re
import ssl
from calendar import timegm
from dataclasses import dataclass
from time import strptime

from edgeear.errors import FormatError

_SEQUENCE, _VERSION, _UTC, _GENERALIZED = 0x30, 0xA0, 0x17, 0x18


@dataclass(frozen=True)
class Validity:
    """First and last moment, in seconds since the epoch."""

    start: float
    end: float


def validity(pem: str) -> Validity:
    """The validity of the first certificate in a PEM file. Raises `FormatError`."""
    block = re.search("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL)
    if block is None:
        raise FormatError("it holds no certificate: give a PEM file with BEGIN CERTIFICATE")
    try:
        body = _children(_children(ssl.PEM_cert_to_DER_cert(block[0]))[0][1])[0][1]
        fields = _children(body)
        times = _children(fields[4 if fields[0][0] == _VERSION else 3][1])
        return Validity(_seconds(*times[0]), _seconds(*times[1]))
    except (ValueError, IndexError) as error:
        raise FormatError("its certificate cannot be read: export it again as PEM") from error


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element of a constructed element."""
    found = []
    while data:
        tag, length, at = data[0], data[1], 2
        if length & 0x80:
            at += length & 0x7F
            length = int.from_bytes(data[2:at], "big")
        if at + length > len(data):
            raise ValueError("cut off")
        found.append((tag, data[at : at + length]))
        data = data[at + length :]
    return found


def _seconds(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC:
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != _GENERALIZED:
        raise ValueError(f"tag {tag} is no time")
    return float(timegm(strptime(text, "%Y%m%d%H%M%SZ")))
