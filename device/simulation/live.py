"""The live view of a simulation, a status block on a terminal and plain lines elsewhere; and the summary of a run.

Rules of this file:

1. It only shows: no call changes the run or waits.
2. Time comes from the clock that is passed in. There is no thread: the screen changes only inside a call.
3. On a terminal it redraws at most once per `period`. Elsewhere it prints events at once and progress at most once per
   `plain_period`, so a step that is over sooner prints nothing.
4. Control codes in names and messages are replaced. Off a terminal none is written at all.
5. Samples are numbered from 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from device.simulation.record import ABSTAIN, RunRecord, mean

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_blue", "bright_magenta")
_HISTORY = 48


@dataclass(frozen=True)
class _Sample:
    at: int
    domain: str
    novelty: float
    p: float | None
    route: str


@dataclass(frozen=True)
class _Phase:
    name: str
    done: int
    total: int
    started: float


class LiveView:
    """Shows a run of `total` samples over `domains`; use it as a context manager.

    `clock` gives seconds that never go back; `period` and `plain_period` are in its seconds.
    """

    def __init__(
        self,
        console: Console,
        domains: Sequence[str],
        total: int,
        *,
        clock: Callable[[], float],
        quiet: bool = False,
        period: float = 0.1,
        plain_period: float = 5.0,
    ) -> None:
        self._console, self._domains, self._total, self._clock = console, tuple(domains), total, clock
        fancy = console.is_terminal and not console.is_dumb_terminal
        self._mode: Literal["quiet", "live", "plain"] = "quiet" if quiet else "live" if fancy else "plain"
        self._period = period if fancy else plain_period
        self.at = 0
        """Number of the sample that is being served, from 1; 0 before the first."""
        self._started = self._shown = clock()
        self._sample: _Sample | None = None
        self._phase: _Phase | None = None
        self._history: deque[float] = deque(maxlen=_HISTORY)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._mode == "live":
            self._live = Live(self._block(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def sample(self, at: int, domain: str, novelty: float, p: float | None, route: str) -> None:
        """Sample number `at` was served: its true domain, and what the system made of it."""
        self.at, self._sample = at, _Sample(at, domain, novelty, p, route)
        self._history.append(novelty)
        self._refresh(last=at >= self._total)

    def event(self, kind: str, text: str) -> None:
        """Something that stays on the screen: a shift, a head picked, a generation committed."""
        line = f"{self.at or '-':>7}  {_clean(kind):<10} {_clean(text)}"
        if self._mode != "quiet":
            self._line(line, "bold" if kind == "shift" else "")
        if self._mode == "live":
            self._refresh()

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of a step that holds up the stream, such as search or training; `done == total` ends it."""
        fresh = self._phase is None or self._phase.name != name or done < self._phase.done
        started = self._clock() if fresh or self._phase is None else self._phase.started
        self._phase = _Phase(name, done, total, started)
        if self._mode == "plain":  # a new phase restarts the period, and only a phase with a line gets one for its end
            self._shown = started if fresh else self._shown
            if done < total or self._shown > started:
                self._refresh(last=done >= total)
        else:
            self._refresh(last=fresh or done >= total)
        if done >= total:
            self._phase = None

    def table(self, record: RunRecord) -> None:
        """The summary of a run."""
        if self._mode != "quiet":
            remarks = [Text(f"  {_clean(remark)}") for remark in record.remarks()]
            self._console.print(
                _worth_table(record), *remarks, _figures(record), _domains_table(record), sep="\n", highlight=False
            )

    def _refresh(self, last: bool = False) -> None:
        """Redraw or print if the period is over, or if this is the `last` word on something."""
        now = self._clock()
        if self._mode == "quiet" or not (last or now - self._shown >= self._period):
            return
        self._shown = now
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
        elif self._mode == "plain":
            self._line(self._phase_line(self._phase) if self._phase else self._sample_line())

    def _line(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style=style), highlight=False, soft_wrap=True)

    def _sample_line(self) -> str:
        now = self._sample
        if now is None:
            return f"{'-':>7}  waiting for the first sample"
        p = "-" if now.p is None else f"{now.p:.3g}"
        return (
            f"{now.at:>7}  of {self._total}: domain {_clean(now.domain)}, novelty {now.novelty:.3g}, p {p}, "
            f"route {_clean(now.route)}"
        )

    def _phase_line(self, phase: _Phase) -> str:
        left = self._left(phase.done, phase.total, phase.started)
        return f"{self.at or '-':>7}  {_clean(phase.name)}: {phase.done} of {phase.total}{left}"

    def _left(self, done: int, total: int, started: float) -> str:
        """What is left at the pace since `started`, in words; nothing before there is a pace."""
        spent = self._clock() - started
        if done <= 0 or done >= total or spent <= 0:
            return ""
        return f", {_duration(spent / done * (total - done))} left"

    def _block(self) -> RenderableType:
        """What a terminal shows: the stream's bar, the latest sample, and the phase that runs."""
        now = self._sample
        done = 0 if now is None else min(now.at, self._total)
        bars = Table.grid(padding=(0, 2))
        bars.add_row(*self._bar("stream", done, self._total, self._started))
        if self._phase is not None:
            phase = self._phase
            bars.add_row(*self._bar(phase.name, phase.done, phase.total, phase.started))
        if now is None:
            return bars
        facts = Text.assemble(
            ("domain ", "dim"), (_clean(now.domain), self._colour(now.domain)),
            ("   route ", "dim"), (_clean(now.route), self._colour(now.route)),
            ("   novelty ", "dim"), f"{now.novelty:.3g}",
            ("   p ", "dim"), "-" if now.p is None else f"{now.p:.3g}",
        )  # fmt: skip
        return Group(bars, facts, Text(_sparkline(self._history), style="cyan"))

    def _bar(self, name: str, done: int, total: int, started: float) -> tuple[RenderableType, ...]:
        bar = ProgressBar(total=max(total, 1), completed=done, width=40)
        return Text(_clean(name)), bar, Text(f"{done:,} of {total:,}{self._left(done, total, started)}")

    def _colour(self, domain: str) -> str:
        if domain == ABSTAIN or domain not in self._domains:
            return "dim"
        return _COLOURS[self._domains.index(domain) % len(_COLOURS)]


def _clean(text: str) -> str:
    """Without control codes, which could move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _sparkline(values: Sequence[float]) -> str:
    known = [value for value in values if abs(value) < 1e300]  # also drops NaN
    if not known:
        return ""
    low = min(known)
    step = (max(known) - low) / (len(_BLOCKS) - 1) or 1.0
    return "".join(_BLOCKS[round((value - low) / step)] for value in known)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _worth_table(record: RunRecord) -> Table:
    worth = record.worth()
    note = "without: the head of the first domain answers every domain; labels: different images; learning: seconds"
    table = Table(title=Text(_clean(record.title)), caption=note, box=box.SIMPLE, title_justify="left")
    table.caption_justify = "left"
    table.add_column("what edgeear was worth", overflow="fold")
    for name in ("without", "with", "gain", "labels", "learning"):
        table.add_column(name, justify="right")
    for row in worth:
        gain = "-" if row.gain is None else f"{100 * row.gain:+.1f}"
        labels = "-" if row.labels is None else f"{row.labels:,}"
        figures = (_percent(row.without), _percent(row.after), gain, labels, _spent(row.seconds))
        table.add_row(Text(_clean(row.domain)), *figures)
    table.add_section()
    before, after = record.mean_worth()
    spent, seconds = record.spent()
    gain = "-" if before is None or after is None else f"{100 * (after - before):+.1f}"
    labels = "-" if spent is None else f"{spent:,}"
    table.add_row("all, mean or sum", _percent(before), _percent(after), gain, labels, _spent(seconds))
    return table


def _figures(record: RunRecord) -> Table:
    steps = [shift for shift in record.shift if not shift.false_alarm]
    alarms = len(record.shift) - len(steps)
    delay = mean(shift.delay_samples for shift in steps if shift.detected)
    found = f"{sum(shift.detected for shift in steps)} of {len(steps)}, false alarms {alarms}"
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("final accuracy", _percent(record.final_accuracy))
    table.add_row("with an oracle's routes", _percent(record.oracle_route_accuracy))
    table.add_row("backward transfer (BWT)", _percent(record.bwt))
    table.add_row("forgetting, mean", _percent(mean(record.forgetting)))
    table.add_row("shifts found", found)
    table.add_row("delay in samples, mean", "-" if delay is None else f"{delay:.1f}")
    return table


def _domains_table(record: RunRecord) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("domain", overflow="fold")
    for name in ("routed right", "forgetting", "head", "search", "training"):
        table.add_column(name, justify="right")
    grown = {growth.domain: growth for growth in record.growth}
    for index, name in enumerate(record.domains):
        routed = record.routing_accuracy[index][index] if record.routing_accuracy else None
        lost = record.forgetting[index] if record.forgetting else None
        head = grown.get(name)
        size, times = ("-", ("-", "-"))
        if head is not None:
            size = f"{head.bytes / 1024:.1f} KiB"
            times = (_spent(head.search_s), _spent(head.train_s))
        table.add_row(Text(_clean(name)), _percent(routed), _percent(lost), size, *times)
    return table


def _spent(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
