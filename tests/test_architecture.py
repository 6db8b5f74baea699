"""What import-linter cannot see: which packages are really loaded when the inference side is imported.

The rules themselves (rooms, purity, who may name torch) are import-linter's contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adaptors", "edgeear", "firmware_bridge", "device")
# Not among the base dependencies, and each costs a board tens to hundreds of megabytes.
HEAVY = ("torch", "cv2", "torchhd", "onnx", "pandas", "scipy", "sklearn", "skimage", "mlxtend", "matplotlib")
# Only these learn, or make an encoder.
LEARNING = {
    "edgeear.growth",
    "edgeear.torch_space",
    "device.daemon.learning.worker_child",
    "device.encoder.efficientnet",
    "device.encoder.export",
    "device.encoder.export_graph",
}
# `from edgeear import Ear` (PEP 562): the one import upwards.
LAZY = {"device.api"}
# Rooms of device/ for a desk or a bench, where a command may load what it needs.
DESK = ("device.evaluation", "device.simulation")

PROBE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = [heavy for heavy in sys.argv[1].split(",") if heavy in sys.modules]
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def modules(room: str) -> set[str]:
    """Dotted names of all modules of a room."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / room).rglob("*.py"))
    return {".".join(part for part in path.parts if part != "__init__") for path in files}


def source_of(name: str) -> str:
    """The text of a module."""
    path = ROOT.joinpath(*name.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def imports(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that `source` imports: at the top, inside functions and for the type checker alike."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (within & known) | (set() if within <= known else {node.module})
    return found & known


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def probe(*names: str) -> str:
    """Import `names` in turn in a fresh interpreter; what it complained about, or nothing."""
    command = [sys.executable, "-c", PROBE, ",".join(HEAVY), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stderr


def test_inference_side_loads_no_heavy_package() -> None:
    everything = modules("edgeear") | modules("firmware_bridge") | modules("device")
    serving = {name for name in everything - LEARNING if not name.startswith(DESK)}
    assert {"edgeear", "device.state.store", "device.daemon.loop", "device.mqtt.link", "device.cli.app"} <= serving
    assert probe(*sorted(serving)) == ""


def test_probe_sees_a_heavy_package_behind_another_import() -> None:
    assert probe("edgeear", "sklearn.metrics").startswith("importing sklearn.metrics loads ")


@pytest.mark.parametrize("room", ROOMS)
def test_room_states_its_rules_and_ships_its_types(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None and "Rules of this room:" in docstring
    assert (ROOT / room / "py.typed").is_file()


def test_the_public_names_are_the_only_import_upwards() -> None:
    lower = {"adaptors": ("edgeear", "firmware_bridge", "device"), "edgeear": ("firmware_bridge", "device")}
    found = {
        (name, target)
        for room, above in lower.items()
        for name in modules(room)
        for target in imported(name)
        if target.startswith(above)
    }
    assert found == {("edgeear", "device.api")}
    assert probe("edgeear") == "" and loaded("edgeear", "device", "numpy") == "[]"


def imported(name: str) -> set[str]:
    """Modules that a module names in its import statements, late ones and those for type checkers included, and in the
    table of public names."""
    nodes = list(ast.walk(ast.parse(source_of(name))))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    named = {
        str(node.value) for node in nodes if isinstance(node, ast.Constant) and str(node.value).startswith("device.")
    }
    return whole | parts | {text for text in named if text.replace(".", "").isidentifier() and name == "edgeear"}


def loaded(name: str, *rooms: str) -> str:
    """Which of `rooms` a fresh interpreter has loaded after `import name`, as a printed list."""
    script = f"import sys, {name}; print([room for room in {rooms!r} if room in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() + done.stderr


def test_no_module_imports_itself_through_others() -> None:
    known = set[str]().union(*map(modules, ROOMS))
    graph = {name: imports(source_of(name), known) for name in known}
    assert len(known) > 100 and "device.mqtt.delivery" in graph["device.mqtt.link"]
    graph["edgeear"] -= LAZY  # the public face, loaded when a caller asks for it
    assert circle(graph) == []


def test_a_circle_is_found_whatever_the_imports_look_like() -> None:
    known = {"a", "a.b", "a.c", "a.d"}
    sources = {
        "a.b": "from a import c",
        "a.c": "def f():\n    import a.d",
        "a.d": "if TYPE_CHECKING:\n    from a.b import X",
    }
    graph = {name: imports(source, known) for name, source in sources.items()}
    assert graph == {"a.b": {"a.c"}, "a.c": {"a.d"}, "a.d": {"a.b"}}
    assert set(circle(graph)) == {"a.b", "a.c", "a.d"}
    assert circle({**graph, "a.d": set()}) == []


@pytest.mark.parametrize("name", sorted(modules("edgeear") | modules("adaptors")))
def test_randomness_is_passed_in(name: str) -> None:
    assert unseeded(source_of(name)) == []


def test_unseeded_randomness_is_found() -> None:
    bad = "np.random.rand(3)\nnp.random.default_rng()\nx.default_rng(None)"
    assert unseeded(bad) == ["1: np.random.rand", "2: np.random.default_rng", "3: x.default_rng"]
    assert unseeded("np.random.default_rng(seed).normal()\nnp.random.Generator(bits)") == []


def unseeded(source: str) -> list[str]:
    """Calls that draw from numpy's global state or from the operating system: `line: call`."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    found = [(call.lineno, ast.unparse(call.func)) for call in calls if draws_globally(call)]
    return [f"{line}: {name}" for line, name in sorted(found)]


def draws_globally(call: ast.Call) -> bool:
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name == "default_rng":
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        return not given or ast.unparse(given[0]) == "None"
    return owner in {"np.random", "numpy.random"} and name[0].islower()
