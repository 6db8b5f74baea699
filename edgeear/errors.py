"""The exceptions of edgeear, split by whose fault it is.

Expected outcomes (out of distribution, rejected, abstained) are values, never exceptions. What is raised is a
caller's mistake (`UsageError`), data that cannot be read (`DataError`), a peer or file that breaks its contract
(`FormatError`), or a failure of the machine (`DeviceError`). Every message names the value, the limit and the remedy.
"""

from __future__ import annotations


class EdgeearError(Exception):
    """Base of everything that edgeear raises on purpose."""


class UsageError(EdgeearError, ValueError):
    """The caller asked for something that cannot be done: a wrong shape, an empty budget, an unknown name."""


class DataError(EdgeearError, ValueError):
    """Input data that cannot be used: an image that does not decode, NaN features, a class with one image."""


class FormatError(EdgeearError, ValueError):
    """A file or message that breaks its own format: truncated, wrong digest, written by a newer version."""


class DeviceError(EdgeearError, OSError):
    """The machine failed: disk full, permission denied, a process killed."""


class KnownDomain(UsageError):
    """A domain of that name is known: learning never replaces one."""
