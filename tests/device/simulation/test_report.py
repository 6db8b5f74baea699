"""The record, its page and the live view: complete, escaped, the same every time, and readable in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from device.simulation.live import LiveView
from device.simulation.record import (
    MAX_POINTS,
    CandidatePoint,
    EncoderInfo,
    Event,
    Growth,
    OodPair,
    RecordError,
    RunRecord,
    ShiftRecord,
    Stream,
    evenly,
    mean,
)
from device.simulation.report import render, write_report
from edgeear.errors import DeviceError, UsageError
from tests.support.needs import need

need("matplotlib")
DOMAINS = ("photo", "art", "cartoon", "sketch")
ENCODER = EncoderInfo(name="efficientnet-lite0-v1", digest="ab" * 32, input=(224, 224))
VOID = {"meta", "link", "br", "img", "hr", "input", "base"}
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--enable-logging=stderr", "--log-level=0", "--window-size=1200,4000",
)  # fmt: skip


def example(domains: tuple[str, ...] = DOMAINS) -> RunRecord:
    """A run with everything in it: three shifts found, one false alarm, a head for each later domain."""
    count, each = len(domains), 500
    rng = np.random.default_rng(7)
    accuracy = [[0.98 - 0.03 * j - 0.005 * (i - j) if j <= i else None for j in range(count)] for i in range(count)]
    confusion = np.full((count, count + 1), 0.01)
    np.fill_diagonal(confusion, 1 - 0.01 * count)
    return RunRecord(
        title="Four styles, one camera", created=1_770_000_000.0, seed=11, encoder=ENCODER, domains=domains,
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        accuracy_matrix=accuracy, routing_accuracy=confusion.tolist(), final_accuracy=0.9231, bwt=-0.0104,
        forgetting=[0.0, 0.015, 0.01, -0.005][:count], oracle_route_accuracy=0.9417,
        ood=[
            OodPair(known=a, unknown=b, auroc=round(0.9 + 0.01 * i + 0.003 * j, 4), fpr95=0.2143)
            for i, a in enumerate(domains) for j, b in enumerate(domains) if a != b
        ],
        shift=[*example_shifts(domains, each)], stream=example_stream(domains, each, rng),
        growth=[example_growth(name, rng) for name in domains],
        events=[
            Event(at=523, kind="shift", text=f"left {domains[0]}"),
            Event(at=523, kind="search", text="scored 4,096 specs in 3.2 s"),
            Event(at=531, kind="commit", text="generation 2 is live"),
        ],
        timings={"search": 9.7, "training": 61.25, "stream": 410.0}, machine="Cortex-A76, 4 cores, 8 GiB",
        versions={"edgeear": "0.1.0", "onnxruntime": "1.32.0"},
    )  # fmt: skip


def example_shifts(domains: tuple[str, ...], each: int) -> list[ShiftRecord]:
    found = [
        ShiftRecord(from_=a, to=b, onset=each * step, at=each * step + 23, delay_samples=23, detected=True)
        for step, (a, b) in enumerate(pairwise(domains), start=1)
    ]
    alarm = ShiftRecord(from_=domains[0], to=domains[0], at=311, detected=False, false_alarm=True)
    return [*found, alarm]


def example_stream(domains: tuple[str, ...], each: int, rng: np.random.Generator) -> Stream:
    at = range(0, each * len(domains), 4)
    truth = [domains[index // each] for index in at]
    fresh = [index % each < 40 and index >= each for index in at]
    novelty = rng.gamma(9.0, 0.05, len(at)) + np.where(fresh, 1.2, 0.0)
    p = np.where(fresh, rng.uniform(0.0005, 0.01, len(at)), rng.uniform(0.01, 1.0, len(at)))
    route = ["abstain" if new else name for new, name in zip(fresh, truth, strict=True)]
    return Stream(at=tuple(at), novelty=novelty.tolist(), p=p.tolist(), route=tuple(route), domain=tuple(truth))


def example_growth(domain: str, rng: np.random.Generator) -> Growth:
    sizes = (10 ** rng.uniform(3.2, 5.6, 300)).astype(int)
    scores = np.log10(sizes) * 0.7 + rng.normal(0, 0.35, 300)
    best = int(np.argmax(scores - 0.25 * np.maximum(0, np.log10(sizes) - 4.9) * 10))
    return Growth(
        domain=domain, spec={"taps": ["blocks.5", "pooled"], "operator": "dwsep", "width": 96},
        explanation="Best mixed proxy among the specs that fit 128 KiB; spatial taps won over pooled ones.",
        parameters=int(sizes[best]), bytes=84_211, macs=3_911_424, latency_ms_predicted=1.84, search_s=3.2,
        train_s=20.4, specs_scored=4096, validation_accuracy=0.9312,
        candidates=[
            CandidatePoint(
                parameters=int(size), score=float(score), chosen=index == best,
                proxies={"spectral": float(score) * 1.1, "parameters": float(np.log10(size))},
            )
            for index, (size, score) in enumerate(zip(sizes, scores, strict=True))
        ],
    )  # fmt: skip


def with_facts() -> RunRecord:
    """The example with what a simulation adds: the data of each domain, thumbnails, labels and seconds spent."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((96, 96, 3), 90, np.uint8)).save(buffer, "JPEG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    facts = [
        {
            "domain": name,
            "frames": 450,
            "images": 450,
            "labelled": 200,
            "labels": 200,
            "tests": 100,
            "thumbnails": [picture] * 6,
        }
        for name in DOMAINS
    ]
    facts[3] |= {"images": 40, "labels": 31, "tests": 12, "unlabelled": ["guitar", "horse"]}
    raw = json.loads(example().to_json())
    return RunRecord.model_validate(
        raw | {"facts": facts, "growth": [growth | {"total_s": 30.5} for growth in raw["growth"]]}
    )


def bare(**fields: object) -> RunRecord:
    """The least that a run can be: one domain and nothing measured."""
    least = {
        "title": "First light",
        "created": 0.0,
        "seed": 0,
        "encoder": ENCODER,
        "domains": ["photo"],
        "classes": [],
    }
    return RunRecord.model_validate({**least, **fields})


@dataclass
class Page(HTMLParser):
    """What a parser sees: unclosed or crossed tags, references, identifiers, headings and text."""

    open: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    identifiers: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    unnamed_pictures: int = 0
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.references += [given[key] for key in ("href", "src", "action", "data", "xlink:href") if key in given]
        self.identifiers += [given["id"]] if "id" in given else []
        self.unnamed_pictures += tag == "svg" and not (given.get("role") == "img" and given.get("aria-label"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u2009]+", " ", " ".join(self.words))


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


@pytest.fixture(scope="module")
def html() -> str:
    return render(example())


# --- the record -------------------------------------------------------------------------------------------


def test_record_survives_json_and_keeps_the_shared_keys() -> None:
    record = example()
    raw = json.loads(record.to_json())
    assert RunRecord.from_json(record.to_json()) == record
    shared = {"domains", "classes", "seed", "accuracy_matrix", "final_accuracy", "bwt", "oracle_route_accuracy"}
    assert shared | {"routing_accuracy", "ood", "shift", "growth"} <= set(raw)
    assert {"from", "to", "detected", "delay_samples"} <= set(raw["shift"][0])
    assert {"known", "unknown", "auroc", "fpr95"} == set(raw["ood"][0])
    assert {"domain", "spec", "parameters", "bytes", "macs", "search_s", "train_s", "specs_scored"} <= set(
        raw["growth"][0]
    )
    assert raw["accuracy_matrix"][0][1] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.float64("-inf"), None])
def test_what_is_no_number_becomes_null(value: object) -> None:
    record = bare(bwt=value, final_accuracy=value, accuracy_matrix=[[value]], forgetting=[value])
    raw = json.loads(record.to_json())
    assert [raw["bwt"], raw["final_accuracy"], raw["accuracy_matrix"], raw["forgetting"]] == [
        None, None, [[None]], [None],
    ]  # fmt: skip
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"domains": ["a", "a"]}, "must differ"),
        ({"domains": ["abstain"]}, "abstain"),
        ({"accuracy_matrix": [[0.5, 0.5]]}, "accuracy_matrix"),
        ({"routing_accuracy": [[0.5], [0.5]]}, "routing_accuracy"),
        ({"final_accuracy": 92.0}, "final_accuracy"),
        ({"forgetting": [0.1, 0.2]}, "forgetting"),
        ({"ood": [{"known": "photo", "unknown": "art", "auroc": 0.5, "fpr95": 0.5}]}, "not among the domains"),
        ({"shift": [{"from": "photo", "to": "photo", "detected": True}]}, "say where"),
        ({"stream": {"at": [1, 2], "novelty": [0.1]}}, "2 positions but 1 novelty"),
        ({"stream": {"at": list(range(MAX_POINTS + 1))}}, "at most"),
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
    ],
)
def test_record_that_disagrees_with_itself_is_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        bare(**fields)


def test_positions_of_a_stream_rise() -> None:
    with pytest.raises(ValidationError, match="must rise"):
        Stream(at=(3, 3), novelty=(0.1, 0.1), p=(1, 1), route=("photo",) * 2, domain=("photo",) * 2)


def test_growth_is_bounded_and_has_one_winner() -> None:
    growth = example_growth("photo", np.random.default_rng(0)).model_dump()
    two = [{"parameters": 1, "score": 0.1, "chosen": True}] * 2
    with pytest.raises(ValidationError, match="more than one"):
        Growth.model_validate({**growth, "candidates": two})
    with pytest.raises(ValidationError, match="over the limit of 65536"):
        Growth.model_validate({**growth, "spec": {"layers": "x" * 70_000}})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', "null"])
def test_file_that_is_no_record_names_the_remedy(text: str) -> None:
    with pytest.raises(RecordError, match="make it again with"):
        RunRecord.from_json(text)


@given(count=st.integers(0, 5000), limit=st.integers(2, 300))
def test_evenly_keeps_both_ends_and_the_limit(count: int, limit: int) -> None:
    kept = evenly(count, limit)
    assert len(kept) == min(count, limit)
    assert sorted(set(kept)) == list(kept)
    assert not kept or (kept[0], kept[-1]) == (0, count - 1)


def test_evenly_needs_room_for_both_ends() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        evenly(10, 1)


def test_mean_skips_what_was_not_measured() -> None:
    assert (mean([0.5, None, 1.0]), mean([None]), mean([])) == (0.75, None, None)


def test_worth_is_the_last_row_of_the_matrix_against_the_first() -> None:
    worth = with_facts().worth()
    assert [row.without for row in worth] == [0.98, None, None, None]
    assert [row.after for row in worth] == pytest.approx([0.965, 0.94, 0.915, 0.89])
    assert [(row.labels, row.seconds) for row in worth] == [(200, 30.5)] * 3 + [(31, 30.5)]
    stopped = bare(domains=["a", "b"], accuracy_matrix=[[0.5, 0.25], [None, None]]).worth()
    assert [(row.without, row.after, row.gain) for row in stopped] == [(0.5, 0.5, 0.0), (0.25, 0.25, 0.0)]
    assert [(row.labels, row.seconds) for row in bare().worth()] == [(None, None)]


def test_more_foreign_verdicts_than_promised_are_explained() -> None:
    fact = {"domain": "photo", "frames": 40, "images": 9, "labelled": 10, "labels": 7, "tests": 99}

    def told(foreign: int) -> str:
        p = [0.0] * 20 + [0.05] * foreign + [0.5] * (20 - foreign)
        stream = {"at": range(1, 41), "novelty": [None] * 20 + [0.1] * 20, "p": p, "domain": ["photo"] * 40}
        record = bare(facts=[fact], stream=stream | {"route": ["abstain"] * 20 + ["photo"] * 20})
        assert record.own_p("photo") == p[20:]  # not the frames before the head
        return " ".join(record.remarks())

    words = "photo: once it was learned, 15.0 % of 20 of its own frames were called out of distribution."
    assert words in told(3) and "from 7 labelled images; a surprising image counts each time it is shown" in told(3)
    assert "once it was learned" not in told(1)


def test_facts_fit_the_domains_and_thumbnails_are_base64() -> None:
    fact = {"domain": "photo", "frames": 1, "images": 1, "labelled": 0, "labels": 0, "tests": 1}
    assert bare(facts=[fact]).facts[0].domain == "photo"
    with pytest.raises(ValidationError, match="one for each"):
        bare(facts=[fact | {"domain": "art"}])
    for wrong in ('"><img src=x>', "A" * 16_388):
        with pytest.raises(ValidationError, match="thumbnails"):
            bare(facts=[fact | {"thumbnails": [wrong]}])


# --- the page ---------------------------------------------------------------------------------------------


def test_page_has_every_section_and_the_numbers(html: str) -> None:
    text = parse(html).text
    for title in (
        "Headline figures", "Novelty over the stream", "Accuracy matrix", "Routing confusion", "Forgetting",
        "Shifts", "Search: proxy against size", "Heads grown", "Out-of-distribution detection", "Event log",
        "Provenance",
    ):  # fmt: skip
        assert title in text
    for number in (
        "92.3 %", "94.2 % if routed by an oracle", "\N{MINUS SIGN}1.0 pp", "96.0 %", "3 of 3",
        "after 23 samples on average; 1 false alarm", "328.9 KiB", "4 heads in 94.4 s", "82.2 KiB", "3,911,424",
        "1.84 ms", "4,096", "20.4 s", "93.1 %", "21.4 %", "generation 2 is live", "ab" * 32, "onnxruntime 1.32.0",
        "seed 11", "2026-02-02 02:40:00 UTC", "300 of 4096 shown", "Cortex-A76", "giraffe", "Best mixed proxy",
    ):  # fmt: skip
        assert number in text, number


def test_page_begins_with_what_edgeear_was_worth() -> None:
    html = render(with_facts())
    page = parse(html)
    assert (page.wrong, page.open) == ([], [])
    assert html.index("What edgeear was worth") < html.index("Headline figures")
    for words in (
        "With edgeear the classifier is right on 96.5 % of the test images", "without it on 98.0 %",
        "This took 631 labels and 2 min 02 s of learning",
        "sketch has 12 test images, fewer than 30", "sketch has 40 different training images for 450 frames",
        "no image of these classes got a label: guitar, horse",
    ):  # fmt: skip
        assert words in page.text, words
    pictures = [reference for reference in page.references if not reference.startswith("#")]
    assert len(pictures) == 24 and all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert html.count(' alt="frame ') == 24 and len(html) < 1_000_000


def test_page_explains_its_words_and_names_small_tests() -> None:
    text, html = parse(render(with_facts())).text, render(example())
    for word in ("AUROC", "FPR95", "BWT", "Oracle", "Pareto front", "Proxy score", "MACs", "Onset", "p-value"):
        assert re.search(rf"<dt>{word}", html), word
    assert "Some test sets have fewer than 30 images: 100 % may be chance." in text
    assert "100 % may be chance" not in html
    assert "sample 523 (photo to art)" in text and "sample 311 (false alarm in photo)" in text
    assert "has none" in text  # why a head may have no validation accuracy


def test_no_domain_has_the_colour_of_a_shift(html: str) -> None:
    for theme in re.findall(r":root\{[^}]*--d7:[^}]*\}", html):
        colours = {name: np.array([int(value[i : i + 2], 16) for i in (0, 2, 4)])
                   for name, value in re.findall(r"--(alert|d\d):#([0-9a-f]{6})", theme)}  # fmt: skip
        assert len(colours) == 9
        assert all(np.abs(colours[f"d{hue}"] - colours["alert"]).max() >= 60 for hue in range(8))


def test_the_p_value_begins_with_the_first_head() -> None:
    stream = {"at": [1, 2, 3], "p": [0.0, 0.5, 0.9], "route": ["abstain", "photo", "photo"], "domain": ["photo"] * 3}
    unknown, known = (
        re.findall(r">(1e-0?\d|0\.0+1)</text>", render(bare(stream=stream | {"novelty": [first, 0.1, 0.1]})))
        for first in (None, 0.1)
    )
    assert known and not unknown  # p is 0 before anything is learned, which would stretch the axis


def test_size_axis_has_several_ticks_whatever_the_sizes(html: str) -> None:
    picture = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)[1]
    ticks = re.findall(r">(\d{1,3}(?:,\d{3})+)</text>", picture)
    assert len(ticks) >= 3
    points = [{"parameters": size, "score": 1.0} for size in (48_000, 48_500)]
    narrow = render(bare(growth=[{**GROWN, "candidates": points}]))
    assert ">20,000</text>" in narrow and ">50,000</text>" in narrow and ">100,000</text>" in narrow


def test_page_is_well_formed_and_accessible(html: str) -> None:
    page = parse(html)
    assert (page.wrong, page.open) == ([], [])
    assert page.tags.count("h1") == 1
    assert len(set(page.identifiers)) == len(page.identifiers)
    assert page.tags.count("svg") == 1 + len(DOMAINS) and page.unnamed_pictures == 0
    assert page.tags.count("figure") == page.tags.count("svg")
    for figure in re.findall(r"<figure>.*?(?=<figure>|</section>)", html, flags=re.DOTALL):
        assert "<details>" in figure and "<table" in figure


def test_page_refers_only_to_itself(html: str) -> None:
    page = parse(html)
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.identifiers)
    assert not re.search(r"url\((?!#)|@import|@font-face|<script|javascript:|\son\w+=", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html


def test_pictures_follow_the_theme_and_show_the_data(html: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{6}", "".join(pictures))) == set()
    assert "prefers-color-scheme:dark" in html
    assert "$" not in html and "10,000</text>" in pictures[1]  # no mathematical notation on the axes
    stream = pictures[0]
    assert all(f">{name}</text>" in stream for name in DOMAINS)
    assert stream.count("stroke: var(--alert)") >= 2 * 4  # each declared shift in both panels
    assert pictures[1].count("<use") > 300 and "var(--accent)" in pictures[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["<script>", '"><img src=x onerror=alert(1)>', "$x_1$ & 5 %", "素描 @@0@@", "a\x1b[31m\x00"]
)
def test_names_from_outside_are_only_text(html: str, name: str) -> None:
    domains = (name, *DOMAINS[1:])
    hostile = example(domains).model_copy(
        update={"title": name, "machine": name, "classes": (name,), "versions": {name: name}}
    )
    page = parse(render(hostile))
    assert (page.wrong, page.open) == ([], [])
    assert not {"script", "img"} & set(page.tags)
    assert page.tags == parse(html).tags
    seen = name.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
    assert page.text.count(seen) > 20


def test_same_record_gives_the_same_bytes(html: str, tmp_path: Path) -> None:
    assert render(RunRecord.from_json(example().to_json())) == html
    source = tmp_path / "record.json"
    source.write_text(example().to_json(), encoding="utf-8")
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\naxes.facecolor: red\n")
    code = (
        "import sys; from pathlib import Path; from device.simulation.record import RunRecord; "
        "from device.simulation.report import write_report; "
        "write_report(RunRecord.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "3", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path)}
    target = tmp_path / "report.html"
    command = [sys.executable, "-c", code, str(source), str(target)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert target.read_text(encoding="utf-8") == html


def test_rendering_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(bare(stream={"at": [0], "novelty": [1], "p": [1], "route": ["photo"], "domain": ["photo"]}))
    assert dict(matplotlib.rcParams) == before


STREAM = {"at": [5], "novelty": [None], "p": [0.0], "route": ["abstain"], "domain": ["photo"]}
FLAT = {"at": [0, 1], "novelty": [2.0, 2.0], "p": [None, None], "route": ["photo"] * 2, "domain": ["photo"] * 2}
GROWN = {
    "domain": "photo", "spec": {}, "explanation": "", "parameters": 0, "bytes": 0, "macs": 0, "search_s": 0,
    "train_s": 0, "specs_scored": 0, "candidates": [{"parameters": 0, "score": None, "chosen": True}],
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"domains": []},
        {"stream": STREAM},
        {"stream": FLAT},
        {"growth": [GROWN]},
        {"growth": [{**GROWN, "candidates": [{"parameters": 9, "score": 1.0}]}]},
        {"accuracy_matrix": [[None]], "routing_accuracy": [[None, 1.0]], "forgetting": [None]},
        {"forgetting": [0.0], "bwt": 0.0},
        {"shift": [{"from": "photo", "to": "photo", "detected": False}]},
    ],
)
def test_partial_record_renders(fields: dict[str, object]) -> None:
    html = render(bare(**fields))
    page = parse(html)
    assert (page.wrong, page.open) == ([], [])
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())
    assert not re.search(r"(?<![a-z])nan(?![a-z])", html.lower())


def test_empty_sections_say_so() -> None:
    text = parse(render(bare())).text
    for words in ("No stream was recorded", "The stream had no shifts", "No search was recorded", "Nothing was logged"):
        assert words in text


def test_largest_stream_stays_small_enough_to_open() -> None:
    names = ["photo", "abstain"] * (MAX_POINTS // 2)
    novelty = np.random.default_rng(0).normal(size=MAX_POINTS).tolist()
    stream = {
        "at": list(range(MAX_POINTS)), "novelty": novelty, "p": [0.5] * MAX_POINTS, "route": names,
        "domain": ["photo"] * MAX_POINTS,
    }  # fmt: skip
    assert len(render(bare(stream=stream))) < 3_000_000


def test_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    write_report(bare(), target)
    assert target.read_text(encoding="utf-8") == render(bare())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"nowhere/report\.html: cannot write"):
        write_report(bare(), tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"\.\[report\]"):
        render(example())


# --- the page in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    """Path of Chromium. Its absence is a failure: a page that nobody looked at is not tested."""
    need("a browser")
    if "EDGEEAR_NO_BROWSER" in os.environ:
        pytest.skip("EDGEEAR_NO_BROWSER is set")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("no Chromium: install Debian's package `chromium`, or set EDGEEAR_NO_BROWSER to skip this")
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_browser_shows_the_page(browser: str, tmp_path: Path, theme: str) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write_report(with_facts(), page)
    dark = ("--blink-settings=preferredColorScheme=0",) if theme == "dark" else ()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *BROWSER_FLAGS, *dark, profile, f"--screenshot={shot}", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    assert "CONSOLE" not in ran.stderr, ran.stderr
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (4000, 1200, 3) and shot.stat().st_size > 100_000
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    assert len(np.unique(packed)) > 300
    assert (pixels[3, 3].mean() < 60) == (theme == "dark")


@pytest.mark.parametrize("names", [DOMAINS, tuple(f"{name} under_the_northern_roof" for name in DOMAINS)])
def test_phone_needs_no_sideways_scrolling(browser: str, tmp_path: Path, names: tuple[str, ...]) -> None:
    """An outer page measures ours in a frame of 390 px: a browser window cannot be as narrow as that."""
    outer, record = tmp_path / "phone.html", with_facts() if names == DOMAINS else example(names)
    outer.write_text(
        f'<!DOCTYPE html><iframe width="390" height="900" frameborder="0" srcdoc="{escape(render(record))}"></iframe>'
        "<script>onload = () => { const inner = frames[0].document.documentElement;"
        "document.title = inner.clientWidth + ' ' + inner.scrollWidth }</script>",
        encoding="utf-8",
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *BROWSER_FLAGS, profile, "--dump-dom", outer.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    assert "<title>390 390</title>" in ran.stdout, re.findall("<title>.*?</title>", ran.stdout)


def test_browser_would_tell_of_a_console_message(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text("<!DOCTYPE html><title>x</title><script>console.error('heard')</script>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *BROWSER_FLAGS, profile, f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert "CONSOLE" in ran.stderr and "heard" in ran.stderr


# --- the live view ----------------------------------------------------------------------------------------


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=110, height=40, _environ={"TERM": "xterm-256color"}), out


def test_plain_mode_prints_lines_now_and_then() -> None:
    screen, out = console(terminal=False)
    clock = Clock()
    with LiveView(screen, DOMAINS, 100, clock=clock, plain_period=5.0) as view:
        for at in range(1, 101):
            clock.now = float(at)
            view.sample(at, "photo", 0.25, 0.5, "photo")
    lines = out.getvalue().splitlines()
    assert len(lines) == 20  # every 5 s; the last sample is one of them
    assert lines[0] == "      5  of 100: domain photo, novelty 0.25, p 0.5, route photo"
    assert lines[-1].split()[0] == "100"


def test_plain_mode_prints_events_at_once_and_phases_with_the_time_left() -> None:
    screen, out = console(terminal=False)
    clock = Clock()
    with LiveView(screen, DOMAINS, 100, clock=clock) as view:
        view.sample(7, "art", 1.5, None, "abstain")
        view.event("shift", "left photo")
        for done in range(11):
            clock.now += 2.0
            view.phase("search", done, 10)
        for done in range(300):
            view.phase("encode", done + 1, 300)
    text = out.getvalue()
    assert "7  shift      left photo\n" in text
    assert "search: 3 of 10, 14 s left\n" in text and "search: 10 of 10\n" in text
    assert text.count("search: ") == 4  # each 5 s, and the last
    assert "encode" not in text  # over before it was worth a line
    with LiveView(screen, DOMAINS, 100, clock=clock) as view:
        view.phase("memory", 0, 1)
        clock.now += 9.0
        view.phase("memory", 1, 1)
    assert "memory" not in out.getvalue()  # an end without a beginning tells nothing
    assert "\x1b" not in text


def test_table_shows_the_figures_in_plain_text() -> None:
    screen, out = console(terminal=False)
    LiveView(screen, DOMAINS, 1, clock=Clock()).table(example())
    text = out.getvalue()
    for words in ("92.3 %", "94.2 %", "-1.0 %", "3 of 3, false alarms 1", "23.0", "sketch", "82.2 KiB", "20.4 s"):
        assert words in text
    assert text.index("what edgeear was worth") < text.index("final accuracy")
    out.truncate(0)
    LiveView(screen, DOMAINS, 1, clock=Clock()).table(with_facts())
    for words in ("98.0 %", "96.5 %", "-1.5", "631", "122.0 s", "sketch has 12 test images"):
        assert words in out.getvalue(), words
    assert "\x1b" not in text


def test_table_of_a_bare_run_has_no_figures() -> None:
    screen, out = console(terminal=False)
    LiveView(screen, ["photo"], 1, clock=Clock()).table(bare())
    assert "photo" in out.getvalue() and "%" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal: bool) -> None:
    screen, out = console(terminal)
    with LiveView(screen, DOMAINS, 2, clock=Clock(), quiet=True) as view:
        view.sample(1, "photo", 0.1, 0.5, "photo")
        view.event("shift", "left photo")
        view.phase("search", 1, 1)
        view.table(example())
    assert out.getvalue() == ""


def test_terminal_is_redrawn_at_most_once_a_period() -> None:
    screen, out = console(terminal=True)
    clock = Clock()
    with LiveView(screen, DOMAINS, 1000, clock=clock, period=0.1) as view:
        view.sample(1, "photo", 0.1, 0.5, "photo")
        before = out.tell()
        for at in range(2, 501):
            view.sample(at, "photo", 0.1, 0.5, "photo")
        assert out.tell() == before
        clock.now = 0.2
        view.sample(501, "cartoon", 0.7, 0.01, "abstain")
        view.phase("training", 5, 10)
        drawn = out.getvalue()[before:]
    assert all(words in drawn for words in ("501 of 1,000", "cartoon", "abstain", "training", "5 of 10"))


def test_view_ends_and_lets_the_error_through() -> None:
    screen, out = console(terminal=True)
    view = LiveView(screen, DOMAINS, 10, clock=Clock())
    with pytest.raises(RuntimeError, match="broken run"), view:
        view.sample(1, "photo", float("nan"), 0.5, "photo")
        raise RuntimeError("broken run")
    assert out.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in out.getvalue()  # the cursor is back
    end = out.tell()
    view.sample(2, "photo", 0.1, 0.5, "photo")
    assert out.tell() == end


@settings(max_examples=40)
@given(name=st.text(min_size=1, max_size=20), novelty=st.floats(), terminal=st.booleans())
def test_no_name_reaches_the_terminal_as_a_control_code(name: str, novelty: float, terminal: bool) -> None:
    screen, out = console(terminal)
    hostile = name + "\x1b[2J\x07\r[bold]"
    with LiveView(screen, [hostile], 1, clock=Clock()) as view:
        view.sample(1, hostile, novelty, 0.5, hostile)
        view.event(hostile, hostile)
        view.phase(hostile, 1, 2)
    assert "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue()
    assert terminal or not {"\x1b", "\r"} & set(out.getvalue())
    assert "[bold]" in out.getvalue()
