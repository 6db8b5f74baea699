"""The report of one run: a single HTML file that opens anywhere, offline, in light and dark mode and on paper.

Rules of this file and of its template, `report.html.j2`:

1. The page is a function of the record alone: same record, same bytes. It holds no clock and no name of this machine.
2. Nothing is loaded and nothing runs: no script, no font, no link to elsewhere; the page's own policy forbids it.
3. Every text of the record is escaped by the template engine; control characters become U+FFFD.
4. A value that was not measured is shown as a dash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from device.files import write_whole
from device.provenance import installation
from device.simulation.record import ABSTAIN, FEW_TESTS, Matrix, RunRecord, mean
from device.simulation.report_pictures import HUES, draw_search, draw_stream, picture, printable
from edgeear.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(record: RunRecord, path: Path) -> None:
    """Render `record` and write the page to `path` in one step. Raises `DeviceError` if that cannot be written."""
    page = render(record).encode("utf-8")
    try:
        write_whole(path, page)
    except OSError as error:
        reason = error.strerror or error
        raise DeviceError(f"{path}: cannot write the report ({reason}); name a file in a writable folder") from error


def render(record: RunRecord) -> str:
    """The whole page. Raises `UsageError` if matplotlib or Jinja2 is not installed."""
    template = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(record=record, hues=HUES, abstain=ABSTAIN, **_view(record), **_pictures(record))


def _view(record: RunRecord) -> dict[str, object]:
    """What the template shows beside the record itself."""
    steps = [shift for shift in record.shift if not shift.false_alarm]
    detected = [shift for shift in steps if shift.detected]
    worth, (without, after), (labels, seconds) = record.worth(), record.mean_worth(), record.spent()
    auroc = {(pair.known, pair.unknown): pair.auroc for pair in record.ood}
    detection = [[auroc.get((known, unknown)) for unknown in record.domains] for known in record.domains]
    stream = record.stream
    routes = (*record.domains, ABSTAIN)[: len(record.routing_accuracy[0]) if record.routing_accuracy else 0]
    return {
        "worth": worth,
        "without": without,
        "after": after,
        "labels": labels,
        "seconds": seconds,
        "facts": {fact.domain: fact for fact in record.facts},
        "remarks": record.remarks(),
        "routed": mean(row[index] for index, row in enumerate(record.routing_accuracy)),
        "found": len(detected),
        "steps": len(steps),
        "alarms": len(record.shift) - len(steps),
        "delay": mean(shift.delay_samples for shift in detected),
        "learning": sum(growth.search_s + growth.train_s for growth in record.growth),
        "samples": list(zip(stream.at, stream.domain, stream.route, stream.novelty, stream.p, strict=True)),
        "accuracy": _rows(record, record.accuracy_matrix),
        "routing": _rows(record, record.routing_accuracy),
        "detection": _rows(record, detection),
        "routes": routes,
        "forgotten": _rows(record, record.forgetting),
        "declared": [shift for shift in record.shift if shift.at is not None],
        "few": FEW_TESTS,
        "few_tests": any(fact.tests < FEW_TESTS for fact in record.facts),
        "largest": max([0.01, *(abs(value) for value in record.forgetting if value is not None)]),
    }


def _rows(record: RunRecord, values: Matrix | Sequence[object]) -> list[tuple[str, object]]:
    return list(zip(record.domains, values, strict=True)) if values else []


def _pictures(record: RunRecord) -> dict[str, object]:
    """Inline SVG: made by us, with the record's texts escaped in it."""
    from markupsafe import Markup

    stream, searches = "", []
    if record.stream.at:
        many = _plural(len(record.stream.at), "sample")
        label = f"Novelty of {many} with the true domains, the routes and the shifts"
        stream = picture("novelty", label, (11, 4.6), partial(draw_stream, record=record))
    for number, growth in enumerate(record.growth):
        if growth.candidates:
            many = _plural(len(growth.candidates), "specification")
            label = f"Proxy score against parameters of {many} for {growth.domain}"
            drawn = picture(f"search{number}", label, (4.6, 2.9), partial(draw_search, growth=growth))
            proxies = sorted({name for candidate in growth.candidates for name in candidate.proxies})
            searches.append((growth, Markup(drawn), proxies))
    return {"stream_picture": Markup(stream), "searches": searches}


def _environment() -> Environment:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError(f"the report needs Jinja2: {installation('report')}") from error

    dash = Markup("&ndash;")

    def shown(value: object) -> object:
        if value is None:
            return dash
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def percent(value: float | None) -> str:
        return dash if value is None else Markup(f"{100 * value:.1f}&thinsp;%")

    def points(value: float | None, signed: bool = False) -> str:
        number = None if value is None else f"{100 * value:{'+' if signed else ''}z.1f}&thinsp;pp"
        return dash if number is None else Markup(number.replace("-", "&minus;"))

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "number": lambda value: None if value is None else f"{value:.4g}",
        "integer": lambda value: None if value is None else f"{value:,}",
        "unit": lambda value, form: None if value is None else form % value,
        "bytes": _bytes,
        "seconds": _seconds,
        "plural": _plural,
        "mean": mean,
        "utc": lambda seconds: datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "slug": lambda words: re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-"),
    }
    return environment


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _bytes(count: int | None) -> str | None:
    if count is None or count < 1024:
        return None if count is None else f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"


def _seconds(seconds: float | None) -> str | None:
    if seconds is None or seconds < 100:
        return None if seconds is None else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
