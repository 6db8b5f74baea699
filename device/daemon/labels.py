"""The labels that came for collected frames: `device.board.board.Labeller`, filled by label commands.

A label belongs to a frame's sample number, which counts from 1 at each start of the daemon. What is older than the
frames that the board still holds is forgotten, so the book stays as small as the board's buffer. A domain's name is
forgotten with the labels that it came with: it must not name a later domain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count

from edgeear.errors import UsageError

LIMIT = 10_000
"""Labels kept at most."""


class LabelBook:
    """Labels by sample number, and the name that the operator gives to the domain. `taken` says which are in use."""

    def __init__(self, taken: Callable[[], Collection[str]]) -> None:
        self._labels: dict[int, str] = {}
        self._name: tuple[int, str] | None = None  # and the newest sample that it came with
        self._taken = taken

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, labels: Mapping[int, str], domain: str | None = None) -> None:
        """Note labels; a later one for the same frame replaces it. Raises `UsageError` beyond `LIMIT`."""
        if len(self._labels.keys() | labels.keys()) > LIMIT:
            raise UsageError(f"more than {LIMIT} labels wait for frames: send them when label-wanted asks for them")
        self._labels.update(labels)
        if domain and labels:
            self._name = max(labels), domain

    def label(self, at: Sequence[int]) -> list[str | None]:
        """As `device.board.board.Labeller`; labels of frames before all of these are dropped."""
        oldest = min(at, default=0)
        self._labels = {number: label for number, label in self._labels.items() if number >= oldest}
        if self._name is not None and self._name[0] < oldest:
            self._name = None
        return [self._labels.get(number) for number in at]

    def domain(self, at: Sequence[int]) -> str:
        """The operator's name, once; else the first `domain-N` that is free."""
        name, self._name = self._name, None
        taken = self._taken()
        return name[1] if name else next(free for n in count(1) if (free := f"domain-{n}") not in taken)
