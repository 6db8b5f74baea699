"""What a board is doing, and what moves it on: the whole state machine as one table.

    serving --(shift, or nothing learned)--> collecting --(enough frames)--> labelling --(labels)--> learning
    learning --(admitted)--> probation --(good or foreign)--> serving
    serving --(offer)--> probation

`TABLE` holds every phase and every signal. An operator's verb is a signal like any other; where the table has None, it
is refused with a remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from device.mqtt.messages import Phase
from edgeear.errors import UsageError

Signal = Literal[
    "shift", "enough", "known", "labels", "too few", "admitted", "rejected", "failed", "good", "foreign",
    "adapt", "offer", "pause", "replace",
]  # fmt: skip
"""What moves a board from phase to phase; the last four are an operator's, who may also say "good" or "foreign"."""
PHASES: tuple[Phase, ...] = get_args(Phase)
TABLE: Mapping[Signal, tuple[Phase | None, ...]] = {
    # from:       serving       collecting    labelling     learning     probation
    "shift":     ("collecting", None,         None,         None,        None),
    "enough":    (None,         "labelling",  None,         None,        None),
    "known":     (None,         "serving",    None,         None,        None),
    "labels":    (None,         None,         "learning",   None,        None),
    "too few":   (None,         None,         "collecting", None,        None),
    "admitted":  (None,         None,         None,         "probation", None),
    "rejected":  (None,         None,         None,         "serving",   None),
    "failed":    (None,         None,         None,         "serving",   None),
    "good":      (None,         None,         None,         None,        "serving"),
    "foreign":   (None,         None,         None,         None,        "serving"),
    "adapt":     ("labelling",  "labelling",  "labelling",  None,        None),
    "offer":     ("probation",  "probation",  "probation",  None,        None),
    "pause":     ("serving",    "serving",    "serving",    "serving",   "probation"),
    "replace":   ("serving",    "serving",    "serving",    "learning",  None),
}  # fmt: skip
"""Where each signal leads from each phase; None where it makes no sense: it is refused."""
REMEDY: Mapping[Phase, str] = {
    "serving": "there is no generation on probation",
    "collecting": "there is no generation on probation",
    "labelling": "there is no generation on probation",
    "learning": "wait for its outcome, or pause to end it",
    "probation": "confirm the generation on probation or roll it back first",
}
"""What an operator is told whose verb is refused in a phase."""
VERBS: Mapping[Signal, str] = {"good": "confirm", "foreign": "rollback", "replace": "forget"}
"""What an operator calls a signal, where it is not the signal's own name."""


def after(phase: Phase, signal: Signal) -> Phase:
    """The phase that `signal` leads to; raises UsageError with a remedy where `phase` refuses it."""
    to = TABLE[signal][PHASES.index(phase)]
    if to is None:
        raise UsageError(f"{VERBS.get(signal, signal)} is refused while {phase}: {REMEDY[phase]}")
    return to
