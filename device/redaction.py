"""Removes passwords and tokens from texts that people and brokers see: logs, events, reports, findings, errors.

It hides too much rather than too little: everything between `scheme://` and the last @ of a word is a credential.
"""

from __future__ import annotations

import logging
import re

_SLASHES = r"[A-Za-z][A-Za-z0-9+.-]*(?::|%3A)(?:/|%2F){1,3}"
_USER = r"[^\s/@:]*(?::|%3A)[^\n]*"  # with a password that holds spaces
_CREDENTIALS = re.compile(rf"({_SLASHES})(?:[^\s]*|{_USER})(?:@|%40)", re.IGNORECASE)
_PART = "token|passw|passphrase|pwd|secret|credential|api_?key|access_?key|signature"
_WHOLE = "pass|auth|sig|key"
_PARAMETER = re.compile(rf"((?:\b|_)(?:[\w.-]*(?:{_PART})[\w.-]*|{_WHOLE})(?:=|%3D))[^\s&;#'\"<>]+", re.IGNORECASE)
HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` without user and password of its URLs, and without the values of parameters such as `token=`.

    >>> redacted("camera rtsp://admin:S3cret@cam:554/live?token=abc cannot be opened")
    'camera rtsp://***@cam:554/live?token=*** cannot be opened'
    """
    text = _CREDENTIALS.sub(rf"\1{HIDDEN}@", text)
    return _PARAMETER.sub(rf"\1{HIDDEN}", text)


class RedactedFormatter(logging.Formatter):
    """Formats a log record, with its traceback, and redacts the whole."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
