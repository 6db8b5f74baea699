"""Export of an encoder, the default one or any torch image module, to one ONNX file with its taps.

Rules of this file:

1. A map `(1, C, H, W)` named `t` becomes the pooled taps `t.mean` and `t.std` and, if requested, the spatial tap
   `t.map`. A vector `(1, C)` named `t` becomes the pooled tap `t`.
2. Mean and standard deviation are taken over a regular grid of positions: every k-th row and column, with the smallest
   k that leaves at most `grid` of them. `std = sqrt(mean((x - mean)^2) + 1e-6)` is computed from centred values:
   mean(x^2) - mean^2 loses precision in float32, by up to 0.1 on flat frames in shallow stages.
3. The network is exported as it infers: in evaluation mode, one frame at a time.
4. The same module, weights and exporter give the same bytes: the file holds no date, no path and no stack trace.
5. An export is compared with torch before it is written. The file appears when it is complete.

Only the learning side imports this file. The exporter's warnings are silenced for the whole process while
it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from device.encoder import efficientnet, export_graph
from device.encoder.cache import DEFAULT_ENCODER, publish_encoder
from device.encoder.metadata import Metadata, Preprocessing
from device.encoder.runtime import open_session
from device.files import write_whole
from edgeear.errors import DeviceError, FormatError, UsageError
from edgeear.types import Tap

GRID = 28
DEFAULT_SPATIAL = ("stage5", "stage6", "stage7")
_TOLERANCE = 1e-3  # relative to the largest value of a tap; a sound export stays below 1e-5
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

Tell = Callable[[str], None]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class _Plan:
    """What the file holds beside the module. `classifier` computes `logits` from the tap `head.mean`."""

    preprocessing: Preprocessing
    provenance: Mapping[str, Any]
    hooks: Mapping[str, str] | None = None
    spatial: Collection[str] | None = None
    grid: int | None = GRID
    classifier: nn.Linear | None = None


def default_encoder_path(cache: Path, *, progress: Tell | None = None) -> Path:
    """The default encoder's verified file in `cache`. If there is none, it is exported first, which takes seconds.

    Raises `DeviceError` if the cache cannot be written, `ImportError` without the weights package.
    """
    report = progress or _ignore
    return publish_encoder(cache, DEFAULT_ENCODER, lambda: _default_encoder(report), lambda: report("saving"))


def export_module(
    module: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    mean: Triple,
    scale: Triple,
    taps: Mapping[str, str] | None = None,
    spatial: Collection[str] | None = None,
    grid: int | None = GRID,
    provenance: Mapping[str, Any] | None = None,
    progress: Tell | None = None,
) -> str:
    """Export `module`, which takes `(1, 3, height, width)` on the CPU, to `path`; returns the file's SHA-256.

    A frame is normalised as `(frame - mean) / scale` for each RGB channel in 8-bit units: ImageNet's mean
    0.485 is 123.675 here. `taps` maps tap name -> path of a submodule ("layer3.1") whose output becomes a tap. Without
    it the module's own outputs are the taps: a tensor ("output"), a tuple ("output0", ...) or a dictionary. `spatial`
    names the maps that are kept as spatial taps; None keeps all. `grid` None pools all positions.

    Raises `UsageError` for unknown submodules, for outputs that cannot be taps and for modules that torch
    cannot trace, `FormatError` if ONNX Runtime does not agree with torch, `DeviceError` if `path`
    cannot be written.
    """
    target, report = Path(path), progress or _ignore
    told = {"architecture": type(module).__qualname__, **(provenance or {})}
    plan = _Plan(Preprocessing(*input_size, mean=mean, scale=scale), told, taps, spatial, grid)
    content = _export(module, plan, report)
    try:
        write_whole(target, content, lambda: report("saving"))
    except OSError as error:
        raise DeviceError(f"{target}: cannot be written ({error.strerror}): choose another path") from error
    return hashlib.sha256(content).hexdigest()


def pooled(feature_map: Tensor, grid: int | None = GRID) -> tuple[Tensor, Tensor]:
    """The taps `.mean` and `.std` of a map `(B, C, H, W)`, computed by torch: two tensors `(B, C)`."""
    step = export_graph.grid_step(feature_map.shape[2], feature_map.shape[3], grid)
    sampled = feature_map[:, :, ::step, ::step]
    variance = sampled.var((2, 3), unbiased=False)
    return sampled.mean((2, 3)), (variance + export_graph.EPSILON).sqrt()


def _ignore(_step: str) -> None:
    pass


def _default_encoder(report: Tell) -> bytes:
    report("loading weights")
    network, weights = efficientnet.load_pretrained()
    plan = _Plan(
        Preprocessing(*efficientnet.INPUT_SIZE, mean=efficientnet.MEAN, scale=efficientnet.SCALE),
        {"architecture": "EfficientNet-Lite0", "weights": weights},
        spatial=DEFAULT_SPATIAL,
        classifier=network.fc,
    )
    return _export(network, plan, report)


def _export(module: nn.Module, plan: _Plan, report: Tell) -> bytes:
    """The bytes of the file, compared with torch on one random input."""
    example = torch.randn(1, 3, *plan.preprocessing.size, generator=torch.Generator().manual_seed(0))
    report("tracing")
    with _evaluating(module), _tapped(module, plan.hooks) as network, torch.no_grad():
        outputs = _checked(network.named(example), plan)
        model = _traced(network, example, outputs)
        expected = _expected(outputs, plan)
    report("adding taps")
    content = export_graph.finish(_with_taps(model, outputs, plan), _metadata(expected, plan))
    report("checking")
    _compare(content, example, expected)
    return content


def _with_taps(model: onnx.ModelProto, outputs: Mapping[str, Tensor], plan: _Plan) -> onnx.ModelProto:
    maps = {name: tuple(value.shape) for name, value in outputs.items() if value.dim() == 4}
    export_graph.add_statistics(model.graph, maps, plan.grid)
    if plan.classifier is not None:
        weight, bias = (parameter.detach().numpy() for parameter in plan.classifier.parameters())
        export_graph.add_classifier(model.graph, "head.mean", weight, bias)
    return model


def _expected(outputs: Mapping[str, Tensor], plan: _Plan) -> dict[str, Tensor]:
    """Tap name -> what torch computes for it, in the file's order: pooled taps, then spatial ones."""
    expected: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if value.dim() == 2:
            expected[name] = value
            continue
        expected[f"{name}.mean"], deviation = pooled(value, plan.grid)
        if value[0, 0].numel() > 1:  # one position has no deviation
            expected[f"{name}.std"] = deviation
    if plan.classifier is not None:
        expected[export_graph.LOGITS] = plan.classifier(expected["head.mean"])
    for name, value in outputs.items():
        if value.dim() == 4 and (plan.spatial is None or name in plan.spatial):
            expected[export_graph.map_name(name)] = value
    return expected


def _metadata(expected: Mapping[str, Tensor], plan: _Plan) -> Metadata:
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    return Metadata(
        preprocessing=plan.preprocessing,
        taps=tuple(Tap(name, tuple(value.shape[1:])) for name, value in expected.items()),
        gates={} if plan.classifier is None else {export_graph.LOGITS: export_graph.LOGITS_GATE},
        pooling={"grid": plan.grid, "epsilon": export_graph.EPSILON},
        provenance={**plan.provenance, "exporter": versions},
    )


def _compare(content: bytes, example: Tensor, expected: Mapping[str, Tensor]) -> None:
    """Raise `FormatError` if ONNX Runtime and torch disagree."""
    found = open_session(content, unfold=False).run(list(expected), {export_graph.INPUT: example.numpy()})
    for (name, value), got in zip(expected.items(), found, strict=True):
        reference = value.detach().numpy()
        limit = _TOLERANCE * (1e-3 + np.abs(reference).max())
        difference = np.abs(got - reference).max()
        if not difference <= limit:  # also for NaN
            what = f"tap {name}: ONNX Runtime differs from torch by {difference:.3g}, limit {limit:.3g}"
            raise FormatError(f"{what}; export in float32, without operators that depend on the data")


class _Tapped(nn.Module):
    """A module whose outputs are selected by name, from the result of `module` or from its hooks."""

    def __init__(self, module: nn.Module, pick: Callable[[Any], dict[str, Any]]) -> None:
        super().__init__()
        self.module = module
        self.pick = pick

    def named(self, x: Tensor) -> dict[str, Any]:
        return self.pick(self.module(x))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(self.named(x).values())


@contextlib.contextmanager
def _tapped(module: nn.Module, hooks: Mapping[str, str] | None) -> Iterator[_Tapped]:
    if hooks is None:
        yield _Tapped(module, _own_outputs)
        return
    caught: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, path in hooks.items():
            hook = _submodule(module, path).register_forward_hook(_catch(caught, name))
            stack.callback(hook.remove)
        yield _Tapped(module, lambda _: {name: caught.get(name) for name in hooks})


def _catch(caught: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught[name] = output

    return hook


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(name for name, _ in module.named_children())
        raise UsageError(f"no submodule {path!r}: {type(module).__qualname__} has {known}") from error


def _own_outputs(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, Sequence):
        return {f"output{index}": value for index, value in enumerate(output)}
    return {"output": output}


def _checked(outputs: dict[str, Any], plan: _Plan) -> dict[str, Tensor]:
    """The outputs. Raises `UsageError` unless each of them can be a tap."""
    if not outputs:
        raise UsageError("no taps: name at least one submodule, or pass None for the module's own outputs")
    unknown = sorted(set(plan.spatial or ()) - set(outputs))
    if unknown:
        raise UsageError(f"unknown spatial taps {unknown}: the outputs are {', '.join(outputs)}")
    for name, value in outputs.items():
        _check_name(name, outputs)
        _check_value(name, value)
    return outputs


def _check_name(name: str, outputs: Mapping[str, Any]) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"tap name {name!r}: use up to 64 letters, digits, dots, dashes and underscores")
    root, _, last = name.rpartition(".")
    if name == export_graph.INPUT or (last in ("mean", "std", "map") and root in outputs):
        raise UsageError(f"tap name {name!r} is taken: choose another")


def _check_value(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise UsageError(f"tap {name} is {type(value).__name__}: tap a module that returns one tensor")
    shape = tuple(value.shape)
    if value.dtype != torch.float32 or value.dim() not in (2, 4) or shape[0] != 1 or 0 in shape:
        raise UsageError(f"tap {name} is {value.dtype} {shape}: tap float32 of shape (1, C) or (1, C, H, W)")
    if not bool(torch.isfinite(value).all()):
        raise UsageError(f"tap {name} holds NaN or infinity for a random input: check the module's weights")


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode during the export. Afterwards the module is in its old mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _traced(network: _Tapped, example: Tensor, outputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    names = [export_graph.map_name(name) if value.dim() == 4 else name for name, value in outputs.items()]
    try:
        with _silenced():
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[export_graph.INPUT],
                output_names=names,
                opset_version=export_graph.OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        what = f"{type(network.module).__qualname__} cannot be traced ({str(error).strip()[:200]})"
        raise UsageError(f"{what}: forward must not branch on the data") from error
    if program is None:
        raise FormatError("torch's exporter gave no program: install the torch version that pyproject.toml names")
    return program.model_proto


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress what the exporter prints, warns or logs, but not its exceptions."""
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
