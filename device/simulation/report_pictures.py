"""The pictures of the report, as inline SVG in the page's own colours.

Rules of this file:

1. matplotlib is imported only while drawing; all its settings are stated here, so the same record gives the same bytes
   on every machine.
2. No text of a record goes through matplotlib, which would need a font for it: names are put in afterwards, as escaped
   SVG text.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from device.files import cache_dir
from device.provenance import installation
from device.simulation.record import ABSTAIN, Growth, RunRecord, ShiftRecord
from edgeear.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

HUES = 8
# Colours that matplotlib writes and `_inline` turns into the page's variables, so that pictures follow the theme.
_INK, _MUTED, _LINE, _ACCENT, _ALERT = (f"#0101{number:02x}" for number in range(5))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _ACCENT: "accent", _ALERT: "alert"}
_VARIABLES |= {f"#0102{number:02x}": f"d{number}" for number in range(HUES)}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgeear",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: measures are the same on every machine
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "path.simplify": False,
}


def printable(words: str) -> str:
    """`words` with U+FFFD for each control character, which no page may hold."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in words)


def picture(target: str, label: str, size: tuple[float, float], draw: Callable[[Figure], list[str]]) -> str:
    """Inline SVG of a figure of `size` inches. `draw` fills the figure and returns the texts of its labels."""
    try:
        os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # it writes a list of fonts there
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"the report needs matplotlib: {installation('report')}") from error
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_SETTINGS}  # not what this machine's file says
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        names = draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), target, label, names)


def _inline(svg: str, target: str, label: str, names: Sequence[str]) -> str:
    """The `<svg>` element alone, in the colours and fonts of the page, with identifiers that begin with `target`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns:xlink|width|height|version)="[^"]*"', "", svg, count=3)
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg" version="1.1"', "").replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{target}-", svg)
    svg = re.sub(r"#010[12][0-9a-f]{2}", lambda match: f"var(--{_VARIABLES.get(match[0], 'ink')})", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"@@(\d+)@@", lambda match: escape(printable(names[int(match[1])])), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(label))}"', 1)


def draw_stream(figure: Figure, record: RunRecord) -> list[str]:
    """Novelty above, p below, and two strips: the true domain and the route."""
    top, middle, strips = figure.subplots(3, 1, sharex=True, height_ratios=(6, 2.4, 1.3))
    stream = record.stream
    names = _draw_bands(top, record)
    top.plot(stream.at, _floats(stream.novelty), color=_INK, linewidth=0.8)
    top.set_ylabel("novelty")
    p = [None if novelty is None else p for novelty, p in zip(stream.novelty, stream.p, strict=True)]
    middle.plot(stream.at, _floats(p, floor=1e-6), color=_INK, linewidth=0.7)
    middle.set_yscale("log")
    _label_log(middle.yaxis)
    middle.set_ylabel("p-value")
    for axes in (top, middle):
        _draw_shifts(axes, record.shift)
    _draw_strips(strips, record)
    strips.set_xlabel("sample")
    end = _end(stream.at)
    strips.set_xlim(stream.at[0], end)
    figure.align_ylabels([top, middle])
    return names


def _draw_bands(axes: Axes, record: RunRecord) -> list[str]:
    """Shade the true domains and name each band that is wide enough; returns the names."""
    stream = record.stream
    names: list[str] = []
    span = _end(stream.at) - stream.at[0]
    for start, end, domain in _runs(stream.at, stream.domain):
        axes.axvspan(start, end, color=_hue(record, domain), alpha=0.13, linewidth=0)
        room = int(120 * (end - start) / span)
        if room >= 4:
            text = f"@@{len(names)}@@"
            transform = axes.get_xaxis_transform()
            axes.text((start + end) / 2, 1.02, text, transform=transform, ha="center", va="bottom")
            names.append(domain if len(domain) <= room else domain[: room - 1] + "\u2026")
    return names


def _draw_shifts(axes: Axes, shifts: Sequence[ShiftRecord]) -> None:
    for shift in shifts:
        if shift.at is None:
            continue
        style = ":" if shift.false_alarm else "-"
        axes.axvline(shift.at, color=_ALERT, linewidth=1.4, linestyle=style)
        if shift.onset is not None and shift.onset < shift.at:
            axes.axvspan(shift.onset, shift.at, color=_ALERT, alpha=0.18, linewidth=0)


def _draw_strips(axes: Axes, record: RunRecord) -> None:
    for row, values in ((1, record.stream.domain), (0, record.stream.route)):
        runs = list(_runs(record.stream.at, values))
        bars = [(start, end - start) for start, end, _ in runs]
        axes.broken_barh(bars, (row + 0.1, 0.8), facecolors=[_hue(record, name) for *_, name in runs])
    axes.set_yticks((0.5, 1.5), labels=("route", "true"))
    axes.set_ylim(0, 2)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)


def draw_search(figure: Figure, growth: Growth) -> list[str]:
    axes = figure.subplots()
    points = [(point, (max(point.parameters, 1), point.score)) for point in growth.candidates]
    scored = [(point, (size, score)) for point, (size, score) in points if score is not None]
    others = [at for point, at in scored if not point.chosen and not point.front]
    front = [at for point, at in scored if point.front and not point.chosen]
    best = [at for point, at in scored if point.chosen]
    axes.scatter(*_columns(others), s=11, color=_MUTED, alpha=0.55, linewidths=0)
    axes.scatter(*_columns(front), s=26, color=_INK, linewidths=0, zorder=2)
    axes.scatter(*_columns(best), s=190, marker="*", color=_ACCENT, zorder=3)
    if scored:  # a log axis without a point has no limits
        ticks = _size_ticks([size for _, (size, _) in scored])
        axes.set_xscale("log")
        axes.set_xlim(ticks[0], ticks[-1])
        _label_log(axes.xaxis, ticks)
    axes.set_xlabel("parameters")
    axes.set_ylabel("proxy score")
    return []


def _size_ticks(sizes: Sequence[int]) -> list[float]:
    """At least two and at most seven ticks around `sizes`: 1, 2 and 5 times powers of ten, or powers alone."""
    low, high = min(sizes) * 0.9, max(sizes) * 1.1
    for steps in ((1, 2, 5), (1,)):
        grid = [step * 10.0**power for power in range(-1, 20) for step in steps]
        start, end = max(t for t in grid if t <= low), min(t for t in grid if t >= high)
        ticks = [tick for tick in grid if start <= tick <= end]
        if len(ticks) <= 7:
            break
    return ticks


def _label_log(axis: Axis, ticks: Sequence[float] = ()) -> None:
    """Plain numbers on a log axis, where matplotlib would write powers in its mathematical notation."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _floats(values: Sequence[float | None], floor: float = -math.inf) -> list[float]:
    """Gaps become NaN, which leaves a gap in the line; a log axis needs a `floor`."""
    return [math.nan if value is None else max(value, floor) for value in values]


def _runs(at: Sequence[int], values: Sequence[str]) -> Iterable[tuple[int, int, str]]:
    """`(start, end, value)` of each stretch of equal values; a stretch ends where the next begins."""
    starts = [(next(group)[0], value) for value, group in groupby(zip(at, values, strict=True), lambda pair: pair[1])]
    ends = [start for start, _ in starts[1:]] + [_end(at)]
    return [(start, end, value) for (start, value), end in zip(starts, ends, strict=True)]


def _end(at: Sequence[int]) -> int:
    """Where the last sample of a stream ends: one step after it begins."""
    return at[-1] + (at[-1] - at[-2] if len(at) > 1 else 1)


def _hue(record: RunRecord, name: str) -> str:
    return _MUTED if name == ABSTAIN else f"#0102{record.domains.index(name) % HUES:02x}"
