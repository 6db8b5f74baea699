"""What a command does: one method each, from a parsed command to an outcome. Nothing here knows of MQTT.

Rules of this file:

1. An outcome is a value. What the operator asked wrongly is "refused", what the machine could not do is "failed"; both
   leave the serving generation as it was. Only a bug raises.
2. Each command may be applied twice with the same effect as once, because power may fail between doing and noting it.
3. `infer` looks at one picture and changes nothing: neither the shift test nor telemetry sees it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from device.board.board import Board, BoardPolicy
from device.board.events import Event, PolicyChanged
from device.daemon.labels import LabelBook
from device.images.decode import decode_bytes
from device.mqtt import messages
from device.provenance import installation
from device.state.maintenance import facts
from edgeear.errors import DeviceError, EdgeearError
from edgeear.flow import Prediction, infer
from edgeear.forgetting import forget_class, forget_domain
from edgeear.shift import ShiftState
from edgeear.system import Rejected
from edgeear.unlabelled import UnlabelledPolicy

if TYPE_CHECKING:
    from device.mqtt.outbox import Outbox

PICTURE = Path("picture.jpg")
"""How a picture that came in a message is read: as JPEG or PNG, whichever it is."""
SETTINGS, PAUSED = "settings", "paused"
"""Keys under which an operator's choices survive a restart."""


@dataclass(frozen=True)
class Outcome:
    """What came of a command, and the events that it caused."""

    outcome: Literal["ok", "refused", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    events: Sequence[Event] = ()


@dataclass(frozen=True)
class Settings:
    """What `set-policy` changed; None: as configured."""

    labels: int | None = None
    probation: int | None = None
    foreign: float | None = None
    label_free: bool | None = None
    label_wait_s: float | None = None
    telemetry_period_s: float | None = None
    predictions: bool | None = None

    def applied(self, policy: BoardPolicy) -> BoardPolicy:
        """`policy` with these choices in it."""
        changes: dict[str, Any] = {
            "labels": self.labels,
            "probation": self.probation,
            "foreign": self.foreign,
            "patience": self.label_wait_s,
        }
        changed = replace(policy, **{name: value for name, value in changes.items() if value is not None})
        if self.label_free is None:
            return changed
        return replace(changed, unlabelled=(policy.unlabelled or UnlabelledPolicy()) if self.label_free else None)


class Commands:
    """Applies commands to a board; `now` is the time in seconds. `describe` adds the daemon's part to a report."""

    def __init__(
        self,
        board: Board,
        outbox: Outbox,
        labels: LabelBook,
        session: str,
        now: Callable[[], float],
    ) -> None:
        self.board, self.outbox, self.labels = board, outbox, labels
        self._session, self._now = session, now
        self.describe: Callable[[], dict[str, Any]] = dict
        self._configured = board.policy
        self.settings = Settings(**json.loads(outbox.get(SETTINGS) or "{}"))
        board.policy = self.settings.applied(board.policy)
        if outbox.get(PAUSED) == "true":
            board.pause(True)

    def apply(self, command: messages.Command, again: bool = False) -> Outcome:
        """Do what `command` says; `again` where it was begun before, and power failed before it was noted as done."""
        try:
            return self._apply(command, again)
        except DeviceError as error:
            return Outcome("failed", reason=str(error))
        except ModuleNotFoundError as error:
            return Outcome("failed", reason=f"{error}: {installation('learn')}")
        except EdgeearError as error:
            return Outcome("refused", reason=str(error))

    def _apply(self, command: messages.Command, again: bool) -> Outcome:
        match command:
            case messages.Infer():
                return self._infer(command)
            case messages.Label():
                return self._label(command)
            case messages.Adapt():
                return Outcome("ok", events=self.board.adapt_now(command.domain))
            case messages.Rollback():
                return self._moved(self.board.rollback())
            case messages.Confirm():
                return self._moved(self.board.confirm())
            case messages.Pause():
                self.outbox.set(PAUSED, json.dumps(command.paused))
                return Outcome("ok", {"paused": command.paused}, events=self.board.pause(command.paused))
            case messages.SetPolicy():
                return self._set_policy(command)
            case messages.Report():
                return Outcome("ok", self.report())
            case messages.Forget():
                return self._forget(command, again)
            case _:
                assert_never(command)

    def report(self) -> dict[str, Any]:
        """All that an operator may want to know at once."""
        board = self.board
        return {
            "generation": board.system.generation,
            "phase": board.phase,
            "domains": self._domains(),
            "encoder": board.system.encoder_digest,
            "settings": {name: value for name, value in asdict(self.settings).items() if value is not None},
            "labels_waiting": len(self.labels),
            **self.describe(),
        }

    def _domains(self) -> list[Any]:
        """All that is known of each domain, or their names alone where that is more than a response may hold."""
        known = [facts(domain) for domain in self.board.system.domains]
        return known if len(json.dumps(known)) < messages.MAX_RESULT // 2 else [domain["name"] for domain in known]

    def _infer(self, command: messages.Infer) -> Outcome:
        frame = decode_bytes(command.image_bytes, PICTURE, self.board.encoder.input_size)
        prediction, _, _ = infer(self.board.system, self.board.engine, ShiftState(), frame)
        return Outcome("ok", answer(prediction))

    def _label(self, command: messages.Label) -> Outcome:
        if command.session != self._session:
            return Outcome(
                "refused",
                reason=f"labels are for session {command.session}, this one is {self._session}: its frames are gone, "
                "label those that the latest label-wanted event names",
            )
        held = {at for at, _, _ in self.board.wanted()}
        fitting = {at: label for at, label in command.labels.items() if at in held}
        self.labels.add(fitting, command.domain)
        unknown = sorted(command.labels.keys() - held)
        events = self.board.poll()
        return Outcome("ok", {"accepted": len(fitting), "unknown_samples": unknown[:100]}, events=events)

    def _moved(self, events: Sequence[Event]) -> Outcome:
        return Outcome("ok", {"generation": self.board.system.generation}, events=events)

    def _set_policy(self, command: messages.SetPolicy) -> Outcome:
        wanted: dict[str, Any] = dict(command.settings)
        settings = replace(self.settings, **wanted)
        self.board.policy = settings.applied(self._configured)
        self.settings = settings
        kept = {name: value for name, value in asdict(settings).items() if value is not None}
        self.outbox.set(SETTINGS, json.dumps(kept))
        return Outcome("ok", {"settings": kept}, events=(PolicyChanged(*self.board.moment, wanted),))

    def _forget(self, command: messages.Forget, again: bool) -> Outcome:
        if again and self._gone(command):
            return Outcome("ok", {"generation": self.board.system.generation})
        board, label = self.board, command.label
        domain = board.system.domain(command.domain).name
        outcome = forget_domain(board.system, domain) if label is None else forget_class(board.system, domain, label)
        if isinstance(outcome, Rejected):
            return Outcome("refused", reason="; ".join(outcome.reasons))
        what = f"forgot {domain}" if label is None else f"forgot {label} of {domain}, from the sums alone"
        events = board.replace(outcome, what)
        return Outcome("ok", {"generation": board.system.generation, "replay": dict(outcome.replay)}, events=events)

    def _gone(self, command: messages.Forget) -> bool:
        known = {domain.name: domain.memory.classes for domain in self.board.system.domains}
        return command.domain not in known or (command.label or known[command.domain][0]) not in known[command.domain]


def answer(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON; a novelty that is not finite (nothing learned) is None."""
    return {
        "label": prediction.label,
        "route": prediction.route,
        "novelty": messages.finite(prediction.novelty),
        "p": prediction.p,
        "ood": prediction.ood,
    }
