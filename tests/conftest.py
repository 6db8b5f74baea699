"""What all tests share: deterministic property tests and the way to optional data.

Hypothesis runs the profile `ci`: the same examples on every run, and no deadline, because a slow machine is
no bug. `HYPOTHESIS_PROFILE=default` searches anew on each run.

Data that the project may not ship is looked up in the folder that `EDGEEAR_DATA` names. A test that needs a
file of it asks the fixture `data_file` and is skipped, with the reason, where the file is absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """The path of a file under `EDGEEAR_DATA`, by its name; skips the test where there is none."""
    folder = os.environ.get("EDGEEAR_DATA", "")

    def find(name: str) -> Path:
        if not folder:
            pytest.skip(f"needs {name}: set EDGEEAR_DATA to the folder that holds it")
        path = Path(folder, name)
        if not path.is_file():
            pytest.skip(f"needs {name}, which is not in EDGEEAR_DATA={folder}")
        return path

    return find
