"""What each command does: one row for each, from a parsed command to an outcome. No topic and no broker is known here.

Rules of this file:

1. An outcome is a value. `apply` is the only place that turns errors into outcomes: what the operator asked wrongly is
   "refused", what the machine could not do is "failed". Both leave the serving generation as it was. A bug is "failed",
   too, and logged: the broker would send a command that is never acknowledged again and again.
2. A command may be applied twice, because power may fail between doing and noting it. `forget` would be refused then,
   so it looks first whether it had its effect.
3. `infer` looks at one picture and changes nothing: neither the shift test nor telemetry sees it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from device.board.board import Board
from device.board.events import BoardEvent, PolicyChanged
from device.daemon.labels import LabelBook
from device.images.decode import decode_bytes, sent
from device.mqtt import messages
from device.mqtt.settings import LiveSettings, read_stored
from device.provenance import installation
from device.state.maintenance import facts
from edgeear.errors import DeviceError, EdgeearError
from edgeear.flow import Prediction, infer
from edgeear.forgetting import forget_class, forget_domain
from edgeear.shift import ShiftState
from edgeear.system import Rejected

if TYPE_CHECKING:
    from device.mqtt.outbox import Outbox

LOG = logging.getLogger("edgeear")
PICTURE = Path("picture.jpg")
"""Stands for the picture of a message, whose file may be JPEG or PNG."""
MOST_CLASSES = 10
"""Of the response to `infer`: the most probable ones."""
SETTINGS, PAUSED = "settings", "paused"
"""Keys of what the outbox keeps of an operator's choices across restarts."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command, and the events that it caused."""

    outcome: Literal["ok", "refused", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    events: Sequence[BoardEvent] = ()


class Commands:
    """Applies commands to a board. `configured` are the settings before an operator changed any, `describe` gives the
    daemon's part of a report."""

    def __init__(
        self,
        board: Board,
        outbox: Outbox,
        labels: LabelBook,
        session: str,
        configured: LiveSettings,
        describe: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.board, self.outbox, self.labels = board, outbox, labels
        self._session, self._configured, self._describe = session, configured, describe
        self.stored = read_stored(outbox.get(SETTINGS))
        self.settings = configured.changed(self.stored.chosen)
        board.policy = board.policy.with_live(self.settings)
        if outbox.get(PAUSED) == "true":
            board.pause(True)

    def apply(self, command: messages.Command, again: bool = False) -> Outcome:
        """Apply `command`. `again`: it was begun before, and power failed before it was noted as done."""
        try:
            if again and isinstance(command, messages.Forget) and self._forgotten(command):
                return self._serving()
            return TABLE[type(command)](self, command)
        except DeviceError as error:
            return Outcome("failed", reason=str(error))
        except ModuleNotFoundError as error:
            return Outcome("failed", reason=f"{error}: {installation('learn')}")
        except EdgeearError as error:
            return Outcome("refused", reason=str(error))
        except Exception as error:
            LOG.exception("command %s failed", command.id)
            return Outcome("failed", reason=f"internal error, {type(error).__name__}: {error}")

    def report(self) -> dict[str, Any]:
        """The whole report on a board."""
        board = self.board
        return {
            "generation": board.system.generation,
            "phase": board.phase,
            "domains": self._domains(),
            "encoder": board.system.encoder_digest,
            "settings": dict(self.stored.chosen),
            "labels_waiting": len(self.labels),
            **self._describe(),
        }

    def _domains(self) -> list[Any]:
        """The facts of each domain; names alone where the facts do not fit into a response."""
        known = [facts(domain) for domain in self.board.system.domains]
        return known if len(json.dumps(known)) < messages.MAX_RESULT // 2 else [domain["name"] for domain in known]

    def _infer(self, command: messages.Infer) -> Outcome:
        size = self.board.engine.encoder.input_size
        frame = decode_bytes(command.image_bytes, PICTURE, size, sent(size))
        prediction, _, _ = infer(self.board.system, self.board.engine, ShiftState(), frame)
        most = dict(list(prediction.probabilities.items())[:MOST_CLASSES])
        return Outcome("ok", {**prediction_facts(prediction), "probabilities": most})

    def _pause(self, command: messages.Pause) -> Outcome:
        self.outbox.set(PAUSED, json.dumps(command.paused))
        return Outcome("ok", {"paused": command.paused}, events=self.board.pause(command.paused))

    def _label(self, command: messages.Label) -> Outcome:
        if command.session != self._session:
            return Outcome(
                "refused",
                reason=f"the labels are for session {command.session}, now it is {self._session} and those frames are "
                "gone: label the frames of the latest label-wanted event",
            )
        held = {seen.number for seen in self.board.wanted()}
        fitting = {at: label for at, label in command.labels.items() if at in held}
        self.labels.add(fitting, command.domain)
        unknown = sorted(command.labels.keys() - held)
        events = self.board.poll()
        return Outcome("ok", {"accepted": len(fitting), "unknown_samples": unknown[:100]}, events=events)

    def _serving(self, events: Sequence[BoardEvent] = ()) -> Outcome:
        return Outcome("ok", {"generation": self.board.system.generation}, events=events)

    def _set_policy(self, command: messages.SetPolicy) -> Outcome:
        wanted = command.settings
        text = self.stored.with_changes(wanted)
        self.outbox.set(SETTINGS, text)
        self.stored = read_stored(text)
        self.settings = self._configured.changed(self.stored.chosen)
        self.board.policy = self.board.policy.with_live(self.settings)
        told = PolicyChanged(*self.board.moment, wanted)
        return Outcome("ok", {"settings": dict(self.stored.chosen)}, events=(told,))

    def _forget(self, command: messages.Forget) -> Outcome:
        board, label = self.board, command.label
        domain = board.system.domain(command.domain).name
        outcome = forget_domain(board.system, domain) if label is None else forget_class(board.system, domain, label)
        if isinstance(outcome, Rejected):
            return Outcome("refused", reason="; ".join(outcome.reasons))
        what = f"forgot {domain}" if label is None else f"forgot {label} of {domain}, from the sums alone"
        events = board.replace(outcome, what)
        return Outcome("ok", {"generation": board.system.generation, "replay": dict(outcome.replay)}, events=events)

    def _forgotten(self, command: messages.Forget) -> bool:
        known = {domain.name: domain.memory.classes for domain in self.board.system.domains}
        return command.domain not in known or (command.label or known[command.domain][0]) not in known[command.domain]


def prediction_facts(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON. `score` is the probability of the predicted class, None where the board abstained. An
    infinite novelty (nothing learned) is None."""
    return {
        "label": prediction.label,
        "score": None if prediction.label is None else prediction.probabilities.get(prediction.label),
        "route": prediction.route,
        "novelty": messages.finite(prediction.novelty),
        "p": prediction.p,
        "ood": prediction.ood,
    }


TABLE: Final[Mapping[type[messages.Command], Callable[[Commands, Any], Outcome]]] = {
    messages.Infer: Commands._infer,
    messages.Label: Commands._label,
    messages.Adapt: lambda self, command: Outcome("ok", events=self.board.adapt_now(command.domain)),
    messages.Rollback: lambda self, command: self._serving(self.board.rollback()),
    messages.Confirm: lambda self, command: self._serving(self.board.confirm()),
    messages.Pause: Commands._pause,
    messages.SetPolicy: Commands._set_policy,
    messages.Report: lambda self, command: Outcome("ok", self.report()),
    messages.Forget: Commands._forget,
}
"""What each command does; its name, fields and help are those of the model (device/mqtt/messages.py)."""
