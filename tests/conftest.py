"""What all tests share: deterministic property tests and the way to optional data.

Hypothesis runs the profile `ci`: the same examples on every run, and no deadline, because a slow machine is
no bug. `HYPOTHESIS_PROFILE=default` searches anew on each run.

Data that the project may not ship is looked up in the folder that `EDGEEAR_DATA` names. A test that needs a
file of it asks the fixture `data_file` and is skipped, with the reason, where the file is absent.

`pytest --fast` skips, with the reason, what loads torch and what asks `need` for a broker, a browser or a process of
edgeear. The rest needs no Debian package and ends in under a minute.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from tests.support import needs

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class NoTorch(importlib.abc.MetaPathFinder):
    """Skips the module or test that imports torch. `pytest.skip` raises no ImportError, so nothing can hide it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torch":
            needs.need("torch")
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what needs torch, a broker, a browser or a process")


def pytest_configure(config: pytest.Config) -> None:
    needs.fast = config.getoption("--fast")
    if needs.fast:
        sys.meta_path.insert(0, NoTorch())


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
