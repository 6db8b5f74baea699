"""The encoder's session, and one ONNX Runtime session for each head, opened at its first use.

A Fourier head answers a single input without a session (direct.py)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from adaptors.archive import HeadArchive
from device.encoder.direct import DirectHead, direct
from device.encoder.runtime import open_session
from edgeear.types import F32, Encoder, Features

SESSIONS = 32
"""Head sessions kept open; the least recently used one is closed first."""


class OrtEngine:
    """`edgeear.system.Engine` on ONNX Runtime. Heads are small: each session has one thread."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._heads: OrderedDict[str, ort.InferenceSession] = OrderedDict()
        self._direct: OrderedDict[str, DirectHead | None] = OrderedDict()

    def encode(self, frame: NDArray[np.uint8], taps: tuple[str, ...]) -> dict[str, F32]:
        return self.encoder.encode(frame[None], taps)

    def scores(self, head: HeadArchive, features: Features) -> F32:
        """Class scores `(samples, classes)`; `features` must hold every tap of the head, batch first."""
        if len(features[head.spec.inputs[0]]) == 1 and (found := self._direct_form(head)):
            return found.scores(features)
        return _run(self._session(head), head, features)

    def _direct_form(self, head: HeadArchive) -> DirectHead | None:
        """Looked for once for each head. If there is one, the head's session is closed."""
        key = head.digest
        if key in self._direct:
            self._direct.move_to_end(key)
        else:
            self._direct[key] = found = direct(head, partial(_run, self._session(head), head))
            if found:
                del self._heads[key]
            if len(self._direct) > SESSIONS:
                self._direct.popitem(last=False)
        return self._direct[key]

    def _session(self, head: HeadArchive) -> ort.InferenceSession:
        key = head.digest
        session = self._heads.pop(key, None) or open_session(head.onnx)
        self._heads[key] = session
        if len(self._heads) > SESSIONS:
            self._heads.popitem(last=False)
        return session


def _run(session: ort.InferenceSession, head: HeadArchive, features: Features) -> F32:
    out: F32 = session.run(["scores"], {t: features[t] for t in head.spec.inputs})[0]
    return out
