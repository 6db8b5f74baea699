"""Where a figure comes from: the machine and the versions of the packages that it was measured with."""

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


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
