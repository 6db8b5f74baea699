"""Three ways to serve a head in int8, against fp32: time, bytes, accuracy on one domain's test images.

    python -m benchmarks.int8 DATA DOMAIN

Heads are trained once, in fp32. "each call" and "at load" are our stored form, int8 weights with one scale a row,
unfolded by ONNX Runtime at every call or once; "static" is ONNX Runtime's post-training quantisation of weights (one
scale a channel) and activations after its own pre-processing, calibrated on the training features in three ways. Times
are the least of eight medians.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from adaptors.archive import pack
from adaptors.fields import TapShapes
from adaptors.search import single_thread
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy, train
from device.encoder.runtime import open_session
from device.evaluation.data import I64, DataOptions, open_encoder, read_domains
from edgeear.types import F32, Features

CALIBRATED = {"MinMax": 300, "Percentile": 100, "Entropy": 100}
"""Method of calibration -> training samples that it looks at."""
SHOTS, EPOCHS, ROUNDS, CALLS = 100, 12, 8, 100


def heads(shapes: TapShapes) -> dict[str, HeadSpec]:
    """Heads of all operators: pooled taps for the vector ones, the last map and two pooled taps for the others."""
    pooled = tuple(t for t, s in shapes.items() if len(s) == 1)
    last, two, eight = [t for t, s in shapes.items() if len(s) == 3][-1], pooled[-2:], pooled[-8:]
    conv, depthwise = HeadSpec(two, "conv", 96, 2, spatial=last), HeadSpec(two, "depthwise", 96, 2, spatial=last)
    trained = {
        "mlp 64, 2 layers": HeadSpec(eight, "mlp", 64, 2, residual=True),
        "conv 96, 2 layers": replace(conv, residual=True, pool="gem"),
        "conv 32": replace(conv, width=32, depth=1),
        "depthwise 96, 2 layers": replace(depthwise, residual=True, pool="pyramid"),
    }
    return {
        "linear, ridge": HeadSpec(eight),
        "linear, prototypes": HeadSpec(eight, reconfigurator="prototypes", normalisation="unit"),
        "fourier 4096, ridge": HeadSpec(eight, "fourier", 4096, bandwidth=0.3),
        "fourier 2048, prototypes": HeadSpec(eight, "fourier", 2048, bandwidth=0.3, reconfigurator="prototypes"),
        **{name: replace(spec, reconfigurator="linear") for name, spec in trained.items()},
        "mlp 32, prototypes": HeadSpec(two, "mlp", 32, reconfigurator="prototypes"),
        "depthwise 64, hard-swish, prototypes": replace(
            depthwise, width=64, depth=1, activation="hardswish", reconfigurator="prototypes"
        ),
    }


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, features: Features, count: int) -> None:
        self._rest = iter([{t: x[i : i + 1] for t, x in features.items()} for i in range(count)])

    def get_next(self) -> Mapping[str, F32] | None:
        return next(self._rest, None)


def static(onnx: bytes, features: Features, method: str) -> bytes:
    """The graph with ONNX Runtime's static quantisation, calibrated on training features."""
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / name for name in ("fp32.onnx", "ready.onnx", "int8.onnx"))
        source.write_bytes(onnx)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        count = min(CALIBRATED[method], len(next(iter(features.values()))))
        options: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True}
        options |= {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        options |= {"calibrate_method": CalibrationMethod[method]}
        quantize_static(ready, target, _Samples(features, count), **options)
        return target.read_bytes()


def plain_session(onnx: bytes) -> ort.InferenceSession:
    """As a head is served, but quantised operators are left as they are."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def milliseconds(sessions: Mapping[str, ort.InferenceSession], one: Features) -> dict[str, float]:
    """The least of the medians of each session, which take turns."""
    least = dict.fromkeys(sessions, float("inf"))
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            seconds = []
            for _ in range(CALLS):
                begun = time.perf_counter()
                session.run(["scores"], one)
                seconds.append(time.perf_counter() - begun)
            least[name] = min(least[name], 1e3 * float(np.median(seconds)))
    return least


def answers(session: ort.InferenceSession, features: Features) -> I64:
    n = len(next(iter(features.values())))
    rows = [session.run(["scores"], {t: x[i : i + 1] for t, x in features.items()})[0] for i in range(n)]
    found: I64 = np.concatenate(rows).argmax(axis=1)
    return found


def main(data: str, domain: str) -> None:
    logging.disable(logging.WARNING)
    options = DataOptions(data=Path(data), order=(domain,), shots=SHOTS, spatial=1, test_on_rest=True)
    encoder, _ = open_encoder(options)
    read = read_domains(options, encoder, lambda *_: None)
    given, test, truth = read.domains[0].samples(read.classes), read.domains[0].test, read.domains[0].test_labels
    names, shapes = list(given.classes), {t: x.shape[1:] for t, x in given.views[0].items()}
    print("| head | form | ms | KiB | accuracy | other answers |\n|---|---|---|---|---|---|")
    for name, spec in heads(shapes).items():
        with single_thread():
            fitted = train(spec, shapes, given.views, given.labels, len(names), TrainPolicy(epochs=EPOCHS))
        full = pack(spec, shapes, names, fitted.weights, 0).onnx
        small = pack(replace(spec, bits=8), shapes, names, fitted.weights, 0).onnx
        seen = {t: given.views[0][t] for t in spec.inputs}
        graphs = {"fp32": full, "each call": small, "at load": small}
        graphs |= {f"static {m}": static(full, seen, m) for m in CALIBRATED}
        ours = ("fp32", "at load")
        sessions = {k: open_session(g) if k in ours else plain_session(g) for k, g in graphs.items()}
        features = {t: test[t] for t in spec.inputs}
        took = milliseconds(sessions, {t: x[:1] for t, x in features.items()})
        found = {form: answers(session, features) for form, session in sessions.items()}
        for form, said in found.items():
            right = np.mean([read.classes[t] == names[a] for t, a in zip(truth, said, strict=True)])
            other = np.mean(said != found["fp32"])
            figures = f"{took[form]:.4f} | {len(graphs[form]) / 1024:.0f} | {right:.1%} | {other:.1%}"
            print(f"| {name} | {form} | {figures} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
