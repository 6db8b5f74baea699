"""The labels that came for collected frames: a `device.board.board.Labeller` that label commands fill.

A label belongs to a frame's sample number, which counts from 1 at each start of the daemon. Labels of frames that the
board no longer holds are dropped, so the book stays as small as the board's buffer. The name of a domain is dropped
with the labels that it came with: it must not name a later domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeear.errors import UsageError

LIMIT = 10_000
"""Labels kept at most."""


class LabelBook:
    """Labels by sample number, and the operator's name for the domain."""

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}
        self._name: tuple[int, str] | None = None  # and the newest sample that it came with

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, labels: Mapping[int, str], domain: str | None = None) -> None:
        """Add labels; a later one for a frame replaces the earlier. Raises `UsageError` beyond `LIMIT`."""
        if len(self._labels.keys() | labels.keys()) > LIMIT:
            raise UsageError(f"more than {LIMIT} labels: send labels only for frames that a label-wanted event names")
        self._labels.update(labels)
        if domain and labels:
            self._name = max(labels), domain

    def label(self, at: Sequence[int]) -> list[str | None]:
        """As `device.board.board.Labeller`; drops the labels of frames older than all of these."""
        oldest = min(at, default=0)
        self._labels = {number: label for number, label in self._labels.items() if number >= oldest}
        if self._name is not None and self._name[0] < oldest:
            self._name = None
        return [self._labels.get(number) for number in at]

    def domain(self, at: Sequence[int]) -> str | None:
        """The operator's name, given out once."""
        name, self._name = self._name, None
        return name[1] if name else None
