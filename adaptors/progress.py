"""The one type of progress callback, shared by every room."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, the steps done and the steps in all."""
