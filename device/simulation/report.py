"""The report of one run: a single HTML file that opens anywhere, offline, in light, in dark and on paper.

Rules of this file:

1. The page is a function of the record alone: same record, same bytes. No clock, no name of this machine.
2. Nothing is loaded and nothing runs: no script, no font, no link to elsewhere; the page's own policy forbids it.
3. Every text of the record is escaped.
4. Behind every picture stands its table; colour never carries a meaning alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from device.files import write_whole
from device.simulation.record import ABSTAIN, Growth, Matrix, RunRecord, ShiftRecord, mean
from device.simulation.report_pictures import HUES, draw_search, draw_stream, picture, text
from device.simulation.report_style import STYLE
from edgeear.errors import DeviceError

NONE = "&ndash;"
"""What stands for a value that was not measured."""


def write_report(record: RunRecord, path: Path) -> None:
    """Render `record` and put the page at `path` in one step. Raises `DeviceError` where that cannot be written."""
    page = render(record).encode("utf-8")
    try:
        write_whole(path, page)
    except OSError as error:
        reason = error.strerror or error
        raise DeviceError(f"{path}: cannot write the report ({reason}); name a file in a writable folder") from error


def render(record: RunRecord) -> str:
    """The whole page. Raises `UsageError` where matplotlib is not installed."""
    sections = (
        _cards(record),
        _novelty(record),
        f'<div class="two">{_accuracy(record)}{_routing(record)}</div>',
        _forgetting(record),
        _shifts(record),
        _search(record),
        _heads(record),
        _ood(record),
        _events(record),
        _provenance(record),
    )
    body = "\n".join(sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(record.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{_header(record)}\n<main>\n{body}\n</main>\n"
        "<footer>Rates are fractions of one, shown in percent. Positions are sample numbers of the stream.</footer>\n"
        "</body>\n</html>\n"
    )


# --- the parts of the page -------------------------------------------------------------------------------


def _header(record: RunRecord) -> str:
    targets = {
        "stream": "Stream", "accuracy": "Accuracy", "routing": "Routing", "forgetting": "Forgetting",
        "shifts": "Shifts", "search": "Search", "heads": "Heads", "ood": "Detection", "events": "Events",
        "provenance": "Provenance",
    }  # fmt: skip
    links = "".join(f'<a href="#{target}">{label}</a>' for target, label in targets.items())
    facts = (
        f"{_plural(len(record.domains), 'domain')}, {_plural(len(record.classes), 'class', 'classes')}, "
        f"seed {record.seed}, {_utc(record.created)}"
    )
    title = f'<p class="eyebrow">edgeear run report</p><h1>{text(record.title)}</h1><p>{facts}</p>'
    return f'<header>{title}<nav aria-label="Sections">{links}</nav></header>'


def _cards(record: RunRecord) -> str:
    grown = record.growth
    seconds = sum(growth.search_s + growth.train_s for growth in grown)
    size = sum(growth.bytes for growth in grown)
    forgotten = mean(record.forgetting)
    routed = mean(row[index] for index, row in enumerate(record.routing_accuracy))
    found, delay, alarms = _shift_figures(record.shift)
    steps = sum(not shift.false_alarm for shift in record.shift)
    oracle = f"{_percent(record.oracle_route_accuracy)} if routed by an oracle"
    forgot = f"mean over domains; BWT {_points(record.bwt, signed=True)}"
    noticed = f"{delay}; {_plural(alarms, 'false alarm')}"
    heads = f"{_plural(len(grown), 'head')} in {_seconds(seconds)}"
    cards = (
        _card("Final accuracy", _percent(record.final_accuracy), oracle),
        _card("Forgetting", _points(forgotten), forgot),
        _card("Routing accuracy", _percent(routed), "mean over true domains"),
        _card("Shifts found", f"{found} of {steps}", noticed, found < steps or alarms > 0),
        _card("Growth", _bytes(size), heads),
    )
    return f'<h2 class="hidden">Headline figures</h2><dl class="cards">{"".join(cards)}</dl>'


def _card(label: str, value: str, sub: str, warn: bool = False) -> str:
    big = "big warn" if warn else "big"
    return f'<div class="card"><dt>{label}</dt><dd class="{big}">{value}</dd><dd class="sub">{sub}</dd></div>'


def _novelty(record: RunRecord) -> str:
    stream = record.stream
    note = (
        "How far each sample is from all that was known then. Bands show the true domain; solid vertical lines "
        "are declared shifts, dotted ones false alarms, and the shading runs from onset to declaration."
    )
    if not stream.at:
        return _section("stream", "Novelty over the stream", note, _nothing("No stream was recorded."))
    rows = (
        (str(at), _name(record, domain), _route(record, route), _number(novelty), _number(p))
        for at, novelty, p, route, domain in zip(
            stream.at, stream.novelty, stream.p, stream.route, stream.domain, strict=True
        )
    )
    table = _table(("Sample", "True domain", "Route", "Novelty", "p-value"), rows, numeric={0, 3, 4})
    label = f"Novelty of {_plural(len(stream.at), 'sample')} with the true domains, the routes and the shifts"
    body = (
        f"<figure>{picture('novelty', label, (11, 4.6), lambda figure: draw_stream(figure, record))}"
        f"{_legend(record)}</figure>{_details(f'The {len(stream.at)} plotted samples as a table', table)}"
    )
    return _section("stream", "Novelty over the stream", note, body, long=True)


def _legend(record: RunRecord) -> str:
    domains = "".join(f"<li>{_name(record, name)}</li>" for name in record.domains)
    others = (("muted", "abstain", ""), ("alert", "declared shift", " line"))
    marks = "".join(
        f'<li><span class="dot{kind}" style="--c:var(--{colour})"></span>{label}</li>' for colour, label, kind in others
    )
    return f'<ul class="legend" aria-label="Legend">{domains}{marks}</ul>'


def _accuracy(record: RunRecord) -> str:
    note = "Rows: after learning that domain. Columns: accuracy on the domain, routed by the router."
    corner = "After learning"
    table = _heat(record.accuracy_matrix, record.domains, record.domains, corner, wrong=False)
    return _section("accuracy", "Accuracy matrix", note, table)


def _routing(record: RunRecord) -> str:
    note = "Rows: the true domain. Columns: the head that was asked. The diagonal is right, the rest is not."
    columns = (*record.domains, ABSTAIN)
    table = _heat(record.routing_accuracy, record.domains, columns, "True domain", wrong=True)
    return _section("routing", "Routing confusion", note, table)


def _heat(matrix: Matrix, rows: Sequence[str], columns: Sequence[str], corner: str, wrong: bool) -> str:
    """A table shaded by value; with `wrong`, cells off the diagonal take the colour of errors."""
    if not matrix:
        return _nothing("Not measured.")
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns[: len(matrix[0])])
    body = []
    for index, (name, row) in enumerate(zip(rows, matrix, strict=True)):
        cells = "".join(
            _heat_cell(value, index == column, wrong and index != column) for column, value in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="heat"><thead><tr><th scope="col">{corner}</th>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _heat_cell(value: float | None, own: bool, off: bool) -> str:
    if value is None:
        return f'<td class="none">{NONE}</td>'
    shade = value if off else value * value  # squared: accuracies crowd near one
    kind = "off" if off else "own" if own else ""
    return f'<td class="{kind}" style="--v:{shade:.3f}">{_percent(value)}</td>'


def _forgetting(record: RunRecord) -> str:
    note = (
        "What each domain lost between its best and its last accuracy, in percentage points. "
        f"Mean {_points(mean(record.forgetting))}; backward transfer (BWT) {_points(record.bwt, signed=True)}."
    )
    if not record.forgetting:
        return _section("forgetting", "Forgetting", note, _nothing("Not measured."))
    scale = max((abs(value) for value in record.forgetting if value is not None), default=0.0)
    rows = (
        (_name(record, name), _points(value), _bar(value, max(scale, 0.01)))
        for name, value in zip(record.domains, record.forgetting, strict=True)
    )
    table = _table(("Domain", "Forgetting", "Share of the largest"), rows, numeric={1}, classes={2: "track"})
    return _section("forgetting", "Forgetting", note, table)


def _bar(value: float | None, scale: float) -> str:
    if value is None:
        return NONE
    kind = "bar gain" if value < 0 else "bar"
    return f'<span class="{kind}" style="--v:{abs(value) / scale:.3f}" aria-hidden="true"></span>'


def _shifts(record: RunRecord) -> str:
    note = "Each step of the stream, when it was declared and how many samples that took."
    rows = (
        (
            _name(record, shift.from_),
            NONE if shift.false_alarm else _name(record, shift.to),
            _integer(shift.onset),
            _integer(shift.at),
            _integer(shift.delay_samples),
            "false alarm" if shift.false_alarm else "found" if shift.detected else "missed",
        )
        for shift in record.shift
    )
    columns = ("From", "To", "Onset", "Declared at", "Delay in samples", "Outcome")
    body = _table(columns, rows, numeric={2, 3, 4}) if record.shift else _nothing("The stream had no shifts.")
    return _section("shifts", "Shifts", note, body)


def _search(record: RunRecord) -> str:
    note = (
        "Every point is a head specification that was scored without training; the star is the one chosen. Dark points "
        "are the Pareto front: no other is as good in fewer bytes and less time."
    )
    searched = [(number, growth) for number, growth in enumerate(record.growth) if growth.candidates]
    figures = "".join(_search_figure(record, number, growth) for number, growth in searched)
    body = f'<div class="grid">{figures}</div>' if figures else _nothing("No search was recorded.")
    return _section("search", "Search: proxy against size", note, body, long=True)


def _search_figure(record: RunRecord, number: int, growth: Growth) -> str:
    label = f"Proxy score against parameters of {_plural(len(growth.candidates), 'specification')} for {growth.domain}"
    chart = picture(f"search{number}", label, (4.6, 2.9), lambda figure: draw_search(figure, growth))
    names = sorted({name for candidate in growth.candidates for name in candidate.proxies})
    rows = (
        (
            f"{candidate.parameters:,}",
            _number(candidate.score),
            *(_number(candidate.proxies.get(name)) for name in names),
            NONE if candidate.bytes is None else _bytes(candidate.bytes),
            NONE if candidate.latency_ms is None else f"{candidate.latency_ms:.3f} ms",
            "chosen" if candidate.chosen else "front" if candidate.front else "",
        )
        for candidate in growth.candidates
    )
    columns = ("Parameters", "Score", *(text(name) for name in names), "Size", "Latency", "")
    table = _table(columns, rows, numeric=set(range(4 + len(names))))
    shown = f"{len(growth.candidates)} of {max(growth.specs_scored, len(growth.candidates))} shown"
    return (
        f'<figure><figcaption><h3>{_name(record, growth.domain)}</h3><span class="note">{shown}</span></figcaption>'
        f"{chart}{_details('The points as a table', table)}</figure>"
    )


def _heads(record: RunRecord) -> str:
    note = "What was added for each domain, what it costs on the board, and why the search picked it."
    rows = (
        (
            _head_words(record, growth),
            _percent(growth.validation_accuracy),
            f"{growth.parameters:,}",
            _bytes(growth.bytes),
            f"{growth.macs:,}",
            NONE if growth.latency_ms_predicted is None else f"{growth.latency_ms_predicted:.2f} ms",
            f"{growth.specs_scored:,}",
            _seconds(growth.search_s),
            _seconds(growth.train_s),
        )
        for growth in record.growth
    )
    columns = ("Domain", "Validation", "Parameters", "Size", "MACs", "Latency", "Specs", "Search", "Training")
    body = _table(columns, rows, numeric=set(range(1, 9))) if record.growth else _nothing("No head was grown.")
    return _section("heads", "Heads grown", note, body, long=True)


def _head_words(record: RunRecord, growth: Growth) -> str:
    spec = text(json.dumps(growth.spec, indent=2, ensure_ascii=False))
    return (
        f"<strong>{_name(record, growth.domain)}</strong><br>{text(growth.explanation)}"
        f"{_details('Specification', f'<pre>{spec}</pre>')}"
    )


def _ood(record: RunRecord) -> str:
    note = (
        "AUROC of the novelty score with one domain known (rows) against one unknown (columns), each pair alone. "
        f"Mean AUROC {_percent(mean(pair.auroc for pair in record.ood))}, "
        f"mean FPR95 {_percent(mean(pair.fpr95 for pair in record.ood))}."
    )
    if not record.ood:
        return _section("ood", "Out-of-distribution detection", note, _nothing("No pair was measured."))
    auroc = {(pair.known, pair.unknown): pair.auroc for pair in record.ood}
    matrix = tuple(tuple(auroc.get((known, unknown)) for unknown in record.domains) for known in record.domains)
    rows = ((text(pair.known), text(pair.unknown), _percent(pair.auroc), _percent(pair.fpr95)) for pair in record.ood)
    table = _table(("Known", "Unknown", "AUROC", "FPR95"), rows, numeric={2, 3})
    body = _heat(matrix, record.domains, record.domains, "Known", wrong=False)
    return _section(
        "ood", "Out-of-distribution detection", note, body + _details("AUROC and FPR95 of each pair", table)
    )


def _events(record: RunRecord) -> str:
    rows = (
        (
            str(event.at),
            f'<span class="kind {_slug(event.kind)}">{text(event.kind)}</span>',
            text(event.text),
        )
        for event in record.events
    )
    table = _table(("Sample", "Kind", "What happened"), rows, numeric={0}, classes={1: "k"})
    if len(record.events) > 60:
        table = _details(f"All {len(record.events)} events", table)
    body = table if record.events else _nothing("Nothing was logged.")
    return _section("events", "Event log", "What the system did, in order.", body, long=True)


def _provenance(record: RunRecord) -> str:
    height, width = record.encoder.input
    facts = {
        "Encoder": f"{text(record.encoder.name)}, input {height} &times; {width}",
        "Encoder digest": f"<code>{text(record.encoder.digest)}</code>",
        "Seed": str(record.seed),
        "Created": _utc(record.created),
        "Machine": text(record.machine) or NONE,
        "Versions": ", ".join(f"{text(name)} {text(version)}" for name, version in record.versions.items()),
        "Timings": ", ".join(f"{text(name)} {_seconds(spent)}" for name, spent in record.timings.items()),
        "Classes": ", ".join(text(name) for name in record.classes),
    }
    rows = (f'<tr><th scope="row">{key}</th><td>{value or NONE}</td></tr>' for key, value in facts.items())
    body = f'<div class="scroll"><table class="wide"><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("provenance", "Provenance", "What is needed to make this run again.", body)


# --- pieces of HTML --------------------------------------------------------------------------------------


def _section(target: str, title: str, note: str, body: str, long: bool = False) -> str:
    kind = ' class="long"' if long else ""
    return (
        f'<section id="{target}" aria-labelledby="{target}-title"{kind}><h2 id="{target}-title">{title}</h2>'
        f'<p class="note">{note}</p>{body}</section>'
    )


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: set[int] | None = None,
    classes: dict[int, str] | None = None,
) -> str:
    """A table of cells that are HTML already; `numeric` columns are right-aligned."""
    kinds = {index: "n" for index in numeric or ()} | (classes or {})
    mark = [f' class="{kinds[index]}"' if index in kinds else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(mark, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(mark, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="wide"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _nothing(why: str) -> str:
    return f'<p class="note">{why}</p>'


def _name(record: RunRecord, domain: str) -> str:
    hue = record.domains.index(domain) % HUES
    return f'<span class="dot" style="--c:var(--d{hue})"></span>{text(domain)}'


def _route(record: RunRecord, route: str) -> str:
    return ABSTAIN if route == ABSTAIN else _name(record, route)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}&thinsp;%"


def _points(value: float | None, signed: bool = False) -> str:
    return NONE if value is None else f"{100 * value:{'+' if signed else ''}z.1f}&thinsp;pp".replace("-", "&minus;")


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _integer(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _shift_figures(shifts: Sequence[ShiftRecord]) -> tuple[int, str, int]:
    """How many shifts were found, their mean delay in words, and the number of false alarms."""
    found = [shift for shift in shifts if shift.detected]
    delay = mean(shift.delay_samples for shift in found)
    words = "no delay measured" if delay is None else f"after {delay:.0f} samples on average"
    return len(found), words, sum(shift.false_alarm for shift in shifts)
