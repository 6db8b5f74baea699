"""What `edgeear doctor` found: the result of one check, and an `OSError` in words for it."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import Literal, Protocol

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """ "problem": the daemon cannot do what the configuration asks for. "warning": it can, but something is missing or
    will end. `remedy` is empty if the verdict is "ok". No text holds a secret. The doctor fills in the `check`."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    return Finding("", "ok", text)


def warning(text: str, remedy: str) -> Finding:
    return Finding("", "warning", text, remedy)


def problem(text: str, remedy: str) -> Finding:
    return Finding("", "problem", text, remedy)


class Machine(Protocol):
    """What a check may ask the machine, beside its files. `config/probes.py` is the real one."""

    def installed(self, package: str) -> bool:
        """Whether `package` can be imported, without importing it."""

    def connect(self, host: str, port: int) -> None:
        """Open a TCP connection and close it. Raises `OSError`."""


def reason(error: OSError) -> str:
    """Why a connection failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({getattr(error, 'reason', None) or error})"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror or str(error)
