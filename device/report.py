"""The report of one run: a single HTML file that opens anywhere, offline, in light, in dark and on paper.

Rules of this file:

1. The page is a function of the record alone: same record, same bytes. No clock, no name of this machine.
2. Nothing is loaded and nothing runs: no script, no font, no link to elsewhere; the page's own policy forbids it.
3. Every text of the record is escaped. None is handed to matplotlib, which would need a font for it: a picture
   gets its names afterwards, as escaped SVG text.
4. Behind every picture stands its table; colour never carries a meaning alone.
5. matplotlib is needed only while rendering and never imported at import time.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device.paths import write_whole
from device.record import ABSTAIN, Growth, Matrix, RunRecord, ShiftRecord, mean
from edgeear.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NONE = "&ndash;"
"""What stands for a value that was not measured."""
_HUES = 8
# Colours that matplotlib writes and `_inline` turns into the page's variables, so that pictures follow the theme.
_INK, _MUTED, _LINE, _ACCENT, _ALERT = (f"#0101{number:02x}" for number in range(5))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _ACCENT: "accent", _ALERT: "alert"}
_VARIABLES |= {f"#0102{number:02x}": f"d{number}" for number in range(_HUES)}
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

_STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#15202b;--muted:#566472;--line:#d8dfe6;
--accent:#0f766e;--heat:15 118 110;--alert:#c2410c;--bad:194 65 12;
--d0:#2563eb;--d1:#b45309;--d2:#059669;--d3:#9333ea;--d4:#db2777;--d5:#0891b2;--d6:#65a30d;--d7:#6b7280}
@media (prefers-color-scheme:dark){:root{--page:#0e141a;--card:#161e27;--ink:#e7edf3;--muted:#9aa8b6;
--line:#2c3743;--accent:#2dd4bf;--heat:45 212 191;--alert:#fb923c;--bad:251 146 60;
--d0:#60a5fa;--d1:#fbbf24;--d2:#34d399;--d3:#c084fc;--d4:#f472b6;--d5:#22d3ee;--d6:#a3e635;--d7:#9ca3af}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:36px}h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:18px;margin:0 0 4px;letter-spacing:-.01em}h3{font-size:15px;margin:0}
p{margin:0 0 12px}.note,header p,footer{color:var(--muted)}.note{font-size:13.5px;max-width:80ch}
h1,h2,h3,td,th,dd,p,li{overflow-wrap:break-word}.eyebrow{font-size:12.5px;font-weight:600;
letter-spacing:.06em;text-transform:uppercase;margin-bottom:6px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 20px;font-size:13.5px}
a{color:var(--accent);text-decoration:none}a:hover,a:focus{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;margin:0 0 18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;padding:0;margin:0 0 18px;
background:none;border:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}
.card dt{font-size:12.5px;color:var(--muted)}.card dd{margin:0}
.card .big{font-size:28px;font-weight:650;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card .sub{font-size:12.5px;color:var(--muted)}.card .big.warn{color:var(--alert)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
.wide{width:100%}th{font-weight:600;text-align:left}thead th{color:var(--muted);font-size:12.5px}
th,td{padding:6px 20px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child>*{border-bottom:0}td.n,th.n{text-align:right}.wide .n,.wide .k{width:1%;white-space:nowrap}
.wide tr>:last-child{padding-right:0}
.heat{border-collapse:separate;border-spacing:3px}
.heat th,.heat td{border:0;padding:7px 8px}.heat th{max-width:220px}
.heat tr>:first-child{padding-left:0;text-align:left}
.heat td{min-width:66px;white-space:nowrap;text-align:center;border-radius:6px;
background:rgb(var(--heat)/calc(var(--v)*.5))}
.heat td.off{background:rgb(var(--bad)/calc(var(--v)*.75))}
.heat td.none{background:none;color:var(--muted)}.heat thead th:not(:first-child){text-align:center}
.heat td.own{outline:1.5px solid var(--accent);outline-offset:-1.5px}
.bar{display:block;height:9px;border-radius:5px;background:var(--alert);width:calc(var(--v)*100%)}
.bar.gain{background:var(--accent)}td.track{width:55%;padding-top:12px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:var(--c)}
.dot.line{height:3px;vertical-align:middle}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:6px 0 2px;padding:0;list-style:none}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:22px}
figure{margin:0}figcaption{font-size:13.5px}svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px}
.two section{min-width:0}
details{margin-top:10px;font-size:13.5px}summary{cursor:pointer;color:var(--accent)}
details .scroll{max-height:360px;overflow:auto;margin-top:8px}
.kind{display:inline-block;padding:0 8px;border-radius:9px;border:1px solid var(--line);font-size:12.5px}
.kind.shift,.kind.alarm{color:var(--alert);border-color:currentColor}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{margin:8px 0 0;white-space:pre-wrap}footer{font-size:12.5px;padding-bottom:36px}
@media print{:root{color-scheme:light}nav{display:none}body{background:#fff;font-size:11pt}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}section,.card,figure,tr{break-inside:avoid}
section.long{break-inside:auto}details:not([open]){display:none}.scroll{overflow:visible;max-height:none}}
"""


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
        f"<title>{_text(record.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
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
    title = f'<p class="eyebrow">edgeear run report</p><h1>{_text(record.title)}</h1><p>{facts}</p>'
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
        f"<figure>{_picture('novelty', label, (11, 4.6), lambda figure: _draw_stream(figure, record))}"
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
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns[: len(matrix[0])])
    body = []
    for index, (name, row) in enumerate(zip(rows, matrix, strict=True)):
        cells = "".join(
            _heat_cell(value, index == column, wrong and index != column) for column, value in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>')
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
    note = "Every point is a head specification that was scored without training; the star is the one chosen."
    searched = [(number, growth) for number, growth in enumerate(record.growth) if growth.candidates]
    figures = "".join(_search_figure(record, number, growth) for number, growth in searched)
    body = f'<div class="grid">{figures}</div>' if figures else _nothing("No search was recorded.")
    return _section("search", "Search: proxy against size", note, body, long=True)


def _search_figure(record: RunRecord, number: int, growth: Growth) -> str:
    label = f"Proxy score against parameters of {_plural(len(growth.candidates), 'specification')} for {growth.domain}"
    picture = _picture(f"search{number}", label, (4.6, 2.9), lambda figure: _draw_search(figure, growth))
    names = sorted({name for candidate in growth.candidates for name in candidate.proxies})
    rows = (
        (
            f"{candidate.parameters:,}",
            _number(candidate.score),
            *(_number(candidate.proxies.get(name)) for name in names),
            "chosen" if candidate.chosen else "",
        )
        for candidate in growth.candidates
    )
    columns = ("Parameters", "Score", *(_text(name) for name in names), "")
    table = _table(columns, rows, numeric=set(range(2 + len(names))))
    shown = f"{len(growth.candidates)} of {max(growth.specs_scored, len(growth.candidates))} shown"
    return (
        f'<figure><figcaption><h3>{_name(record, growth.domain)}</h3><span class="note">{shown}</span></figcaption>'
        f"{picture}{_details('The points as a table', table)}</figure>"
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
    spec = _text(json.dumps(growth.spec, indent=2, ensure_ascii=False))
    return (
        f"<strong>{_name(record, growth.domain)}</strong><br>{_text(growth.explanation)}"
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
    rows = ((_text(pair.known), _text(pair.unknown), _percent(pair.auroc), _percent(pair.fpr95)) for pair in record.ood)
    table = _table(("Known", "Unknown", "AUROC", "FPR95"), rows, numeric={2, 3})
    body = _heat(matrix, record.domains, record.domains, "Known", wrong=False)
    return _section(
        "ood", "Out-of-distribution detection", note, body + _details("AUROC and FPR95 of each pair", table)
    )


def _events(record: RunRecord) -> str:
    rows = (
        (
            str(event.at),
            f'<span class="kind {_slug(event.kind)}">{_text(event.kind)}</span>',
            _text(event.text),
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
        "Encoder": f"{_text(record.encoder.name)}, input {height} &times; {width}",
        "Encoder digest": f"<code>{_text(record.encoder.digest)}</code>",
        "Seed": str(record.seed),
        "Created": _utc(record.created),
        "Machine": _text(record.machine) or NONE,
        "Versions": ", ".join(f"{_text(name)} {_text(version)}" for name, version in record.versions.items()),
        "Timings": ", ".join(f"{_text(name)} {_seconds(spent)}" for name, spent in record.timings.items()),
        "Classes": ", ".join(_text(name) for name in record.classes),
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
    hue = record.domains.index(domain) % _HUES
    return f'<span class="dot" style="--c:var(--d{hue})"></span>{_text(domain)}'


def _route(record: RunRecord, route: str) -> str:
    return ABSTAIN if route == ABSTAIN else _name(record, route)


def _text(text: str) -> str:
    """Escaped, with characters that no page may hold (controls) made visible as a replacement."""
    return escape("".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text))


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


# --- pictures --------------------------------------------------------------------------------------------


def _picture(target: str, label: str, size: tuple[float, float], draw: Callable[[Figure], list[str]]) -> str:
    """Inline SVG of what `draw` puts into a figure of `size` inches; it returns the texts of its labels."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("the report needs matplotlib: pip install 'edgeear[report]'") from error
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_SETTINGS}  # not what this machine's file says
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        names = draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), target, label, names)


def _inline(svg: str, target: str, label: str, names: Sequence[str]) -> str:
    """The `<svg>` element alone, in the page's colours and fonts, with identifiers that are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns:xlink|width|height|version)="[^"]*"', "", svg, count=3)
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg" version="1.1"', "").replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{target}-", svg)
    svg = re.sub(r"#010[12][0-9a-f]{2}", lambda match: f"var(--{_VARIABLES.get(match[0], 'ink')})", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"@@(\d+)@@", lambda match: _text(names[int(match[1])]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_text(label)}"', 1)


def _draw_stream(figure: Figure, record: RunRecord) -> list[str]:
    """Novelty above, p below, and two strips: the true domain and the route."""
    top, middle, strips = figure.subplots(3, 1, sharex=True, height_ratios=(6, 2.4, 1.3))
    stream = record.stream
    names = _draw_bands(top, record)
    top.plot(stream.at, _floats(stream.novelty), color=_INK, linewidth=0.8)
    top.set_ylabel("novelty")
    middle.plot(stream.at, _floats(stream.p, floor=1e-6), color=_INK, linewidth=0.7)
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


def _draw_search(figure: Figure, growth: Growth) -> list[str]:
    axes = figure.subplots()
    points = [(point.parameters, point.score, point.chosen) for point in growth.candidates]
    scored = [(max(size, 1), score, chosen) for size, score, chosen in points if score is not None]
    others = [(size, score) for size, score, chosen in scored if not chosen]
    best = [(size, score) for size, score, chosen in scored if chosen]
    axes.scatter(*_columns(others), s=11, color=_MUTED, alpha=0.55, linewidths=0)
    axes.scatter(*_columns(best), s=190, marker="*", color=_ACCENT, zorder=3)
    if scored:  # a log axis without a point has no limits
        axes.set_xscale("log")
        _label_log(axes.xaxis)
    axes.set_xlabel("parameters")
    axes.set_ylabel("proxy score")
    return []


def _label_log(axis: Axis) -> None:
    """Plain numbers on a log axis, where matplotlib would write powers in its mathematical notation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=6))
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
    return _MUTED if name == ABSTAIN else f"#0102{record.domains.index(name) % _HUES:02x}"
