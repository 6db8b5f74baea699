"""What a test needs beyond Python and the base packages; `pytest --fast` skips the test that needs it."""

from __future__ import annotations

import pytest

fast = False
"""Set by the option `--fast`."""


def need(what: str) -> None:
    """Go on, or skip the test (while collecting: its module) in a fast run."""
    if fast:
        pytest.skip(f"--fast: needs {what}", allow_module_level=True)
