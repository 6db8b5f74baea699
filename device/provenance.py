"""What is installed: the machine and the package versions that a figure was measured with, and how to get an extra."""

from __future__ import annotations

import importlib.metadata
import os
import platform

VERSIONED = ("numpy", "onnxruntime", "torch", "pillow")


def machine() -> str:
    """The kind of machine, without its name."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    installed = {name: importlib.metadata.version(name) for name in VERSIONED if _installed(name)}
    return {"python": platform.python_version(), **installed}


def installation(extra: str) -> str:
    """How to install the optional packages of `extra`, a name in pyproject.toml. edgeear is in no package registry."""
    return f"run pip install -e '.[{extra}]' in your clone of edgeear"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
