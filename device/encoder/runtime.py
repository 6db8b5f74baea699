"""ONNX Runtime: how a session is opened, and which errors it raises.

Rules of this file:

1. Bytes are checked before ONNX Runtime reads them: a file that keeps weights elsewhere is refused.
2. The number of threads is set explicitly, and they never spin, because other programs share the machine.
"""

from __future__ import annotations

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from adaptors.onnx_bytes import check_model

InvalidProtobuf: type[Exception] = ort_errors.InvalidProtobuf
ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_ERRORS_ONLY = 3


def open_session(content: bytes, threads: int = 1, *, unfold: bool = True) -> ort.InferenceSession:
    """A session of `threads` threads for an ONNX model. With `unfold`, int8 weights are dequantised once, here, and not
    in every call.

    Raises `adaptors.onnx_bytes.ModelError` for bytes that may not be opened, one of `ORT_ERRORS`, `ValueError` or
    `RuntimeError` where ONNX Runtime refuses them.
    """
    check_model(content)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if unfold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = _ERRORS_ONLY
    session = ort.InferenceSession(content, options, ["CPUExecutionProvider"], enable_fallback=0)
    session._model_bytes = None  # onnxruntime keeps the whole file for a change of providers, which never happens
    return session
