"""The operators of heads, a file each. A new operator is a file and a row in `OPERATORS`.

An operator owns its legal fields, its search axes, its torch module, its ONNX graph and its cost; the specification,
the search, training, the archive and the proxies ask it. The order of the rows is the order of the search space.
"""

from __future__ import annotations

from adaptors.operators.base import Operator
from adaptors.operators.conv import Conv
from adaptors.operators.depthwise import Depthwise
from adaptors.operators.fourier import Fourier
from adaptors.operators.linear import Linear
from adaptors.operators.mlp import Mlp

OPERATORS: dict[str, Operator] = {
    "linear": Linear(),
    "fourier": Fourier(),
    "mlp": Mlp(),
    "conv": Conv(),
    "depthwise": Depthwise(),
}
