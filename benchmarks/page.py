"""`make bench-page`: docs/benchmarks.md and its pictures, from the files in benchmarks/results and nothing else.

Rules of this file:

1. No figure is written by hand: a table, a picture or a sentence is there if and only if its file is. Same files, same
   bytes: no date, no random names.
2. Means are over pairs or domains first, then over seeds; the deviation is that of the seeds' means.
3. Every cell in which another method is ahead of ours is listed under its table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page_nas import architecture_search
from benchmarks.science import rows_of
from benchmarks.tables import OURS, Row, cost, lost, over_seeds, percent, plain, spread, table, thousands, unique, where

ROOT = Path(__file__).parent.parent
Files = Mapping[str, Any]
DATA_NAMES = {"pacs": "PACS", "digits": "Digits", "cwru": "CWRU bearings"}
SETTING_NAMES = {"covariate": "unseen domain", "near": "unseen class", "far": "textures"}

INTRO = """# Benchmarks

Written by `make bench-page` from the files in `benchmarks/results/`; not to be edited by hand. `make bench-science`
measures the published methods beside ours again, on the same features of the default encoder.

- **PACS**: photo, art painting, cartoon, sketch; 7 classes. **Digits**: six collections of handwritten, printed and
  coloured digits. **CWRU**: vibration of two bearings at four speeds as log-spectrogram pictures, 9 faults; clips of
  one recording lie on both sides of the split, so that accuracies flatter, and what counts is the comparison.
- A fifth of the files is held out by a hash of their names. A seed picks 90 % of the training images, our projections,
  the folds, and what an anchor draws. Figures are means, ± the deviation over seeds.
- Anchors are our own re-implementations of the published formulas (see
  [decisions](decisions/anchors-are-our-own.md)), fitted on the same training images. FPR95 is the share of known images
  that is called unknown when 95 % of the unknown ones are found.
- Times are microseconds a sample in batches, one thread, from the encoder's features on, projections included. Bytes
  are what is stored for one domain. "Images" says whether images (or their features) are stored."""


# ------------------------------------------------------------------------------------------------ the sections


def page(files: Files, pictures: Path) -> str:
    """The page; writes its pictures into the folder `pictures`, which the page refers to by its name."""
    parts: tuple[tuple[str, Callable[[Any, Files, Path], str]], ...] = (
        ("science-detectors", detectors),
        ("science-routers", routers),
        ("science-learners", learners),
        ("science-classes", classes),
        ("science-attribution", attribution),
        ("science-ablation", ablation),
    )
    pictures.mkdir(parents=True, exist_ok=True)
    found = [INTRO]
    found += [section(files[name], files, pictures) for name, section in parts if name in files]
    found += [architecture_search(files), others(files)]
    found += [provenance(files)]
    return "\n\n".join(part for part in found if part) + "\n"


def detectors(content: Any, files: Files, pictures: Path) -> str:
    """A table for each data set, a picture of PACS, the cells lost, and the hardest pairs."""
    rows = [r for r in content["rows"] if "auroc" in r]
    costs = [r for r in content["rows"] if "bytes" in r]
    names = list(dict.fromkeys(r["detector"] for r in rows))
    text = ["## Novelty: is this input known?", "Each detector knows one domain. AUROC / FPR95 in percent."]
    for data in dict.fromkeys(r["data"] for r in rows):
        own = [r for r in rows if r["data"] == data]
        settings = list(dict.fromkeys(r["setting"] for r in own))
        figures = {
            (n, s, m): over_seeds([r for r in own if r["detector"] == n and r["setting"] == s], m)
            for n in names
            for s in settings
            for m in ("auroc", "fpr95")
        }
        price = {n: cost([r for r in costs if r["detector"] == n and r["data"] == data]) for n in names}
        header = ["detector", *(SETTING_NAMES.get(s, s) for s in settings), "bytes", "µs", "images"]
        body = [
            [
                n,
                *(f"{percent(figures[n, s, 'auroc'])} / {percent(figures[n, s, 'fpr95'])}" for s in settings),
                *price[n],
            ]
            for n in names
        ]
        text += [f"### {DATA_NAMES.get(data, data)}", table(header, body)]
        cells = [
            (f"{m.upper()} {SETTING_NAMES.get(s, s)}", {n: figures[n, s, m][0] for n in names}, m == "auroc")
            for s in settings
            for m in ("auroc", "fpr95")
        ]
        text += [lost(cells)]
        if data == "pacs":
            picture = {s: {n: (figures[n, s, "auroc"], figures[n, s, "fpr95"]) for n in names} for s in settings}
            draw_detectors(picture, pictures / "detectors.svg")
            text += [f"![AUROC and FPR95 of all detectors]({pictures.name}/detectors.svg)", pairs(own)]
    text += [sources("anchor_detectors")]
    return "\n\n".join(text)


def pairs(rows: Sequence[Row]) -> str:
    """Ours and the best anchor on every pair of domains."""
    body = []
    for known, unknown in dict.fromkeys((r["known"], r["unknown"]) for r in rows if r["setting"] == "covariate"):
        own = [r for r in rows if (r["known"], r["unknown"], r["setting"]) == (known, unknown, "covariate")]
        names = dict.fromkeys(r["detector"] for r in own)
        mean = {
            n: [over_seeds([r for r in own if r["detector"] == n], m)[0] for m in ("auroc", "fpr95")] for n in names
        }
        best = max((n for n in mean if n != OURS), key=lambda n: mean[n][0])
        cells = [f"{100 * mean[n][0]:.1f} / {100 * mean[n][1]:.1f}" for n in (OURS, best)]
        body.append([known, unknown, cells[0], f"{cells[1]} ({best})"])
    return table(["known", "unknown", OURS, "anchor of the best AUROC on this pair"], body)


def routers(content: Any, files: Files, pictures: Path) -> str:
    rows = content["rows"]
    names, sets = unique(rows, "router"), unique(rows, "data")
    figures = {(n, d): over_seeds(where(rows, router=n, data=d), "accuracy") for n in names for d in sets}
    body = []
    for n in names:
        own = where(rows, router=n, data=sets[0])
        price = [thousands(max(r["bytes"] for r in own)), f"{np.median([r['us'] for r in own]):.0f}"]
        body.append([n, *(percent(figures[n, d]) for d in sets), *price, "yes" if own[0]["joint"] else "no"])
    body.append(["oracle", *("100.0" for _ in sets), "", "", ""])
    header = ["router", *(DATA_NAMES.get(d, d) for d in sets), "bytes", "µs", "needs all domains at once"]
    cells = [(DATA_NAMES.get(d, d), {n: figures[n, d][0] for n in names}, True) for d in sets]
    intro = "Share of test images that are sent to their own domain, in percent; domains count equally."
    note = "Ours reads the hypervector and the memory that the detector has already; its bytes and time include both."
    return "\n\n".join(
        ["## Routing: which head?", intro, table(header, body), note, lost(cells), sources("anchor_routers")]
    )


def learners(content: Any, files: Files, pictures: Path) -> str:
    rows, text = content["rows"], ["## Learning domain after domain"]
    text += ["PACS in the order photo, art painting, cartoon, sketch; the domain of a test image is not told. Percent."]
    for shots in unique(rows, "shots"):
        own = where(rows, shots=shots)
        mean = {n: over_seeds(where(own, learner=n), "final") for n in unique(own, "learner")}
        body = [
            [
                n,
                percent(mean[n]),
                percent(over_seeds(where(own, learner=n), "bwt"), signed=True),
                *cost(where(own, learner=n)),
            ]
            for n in mean
        ]
        ours = [f for name, f in sorted(files.items()) if name.startswith(f"pacs-{shots or 'all'}-seed")]
        if ours:
            figure = spread([f["final_accuracy"] for f in ours])
            stored = max(g["domain_bytes"] for f in ours for g in f["growth"])
            mean = {OURS: figure, **mean}
            backward = percent(spread([f["bwt"] for f in ours]), signed=True)
            body.insert(0, [f"{OURS} ({len(ours)} seeds)", percent(figure), backward, thousands(stored), "", "no"])
        header = ["learner", "final accuracy", "backward transfer", "bytes", "µs", "images"]
        title = "All training images" if shots is None else f"{shots} images a class"
        text += [f"### {title}", table(header, body)]
        if ours:
            rivals = {n: m[0] for n, m in mean.items() if "ceiling" not in n}
            text += [lost([("final accuracy", rivals, True)]), ceiling({n: m[0] for n, m in mean.items()})]
    text += [sources("anchor_learners")]
    return "\n\n".join(text)


def ceiling(mean: Mapping[str, float]) -> str:
    """How far ours is from the better of the joint trainings."""
    best = max((n for n in mean if "ceiling" in n), key=lambda n: mean[n])
    gap = 100 * (mean[best] - mean[OURS])
    side = "below" if gap > 0 else "above"
    return f"Ours ends {abs(gap):.1f} points {side} the better ceiling, {best.replace(' (ceiling)', '')} training."


def classes(content: Any, files: Files, pictures: Path) -> str:
    rows = content["rows"]
    body = []
    for n in unique(rows, "learner"):
        own = where(rows, learner=n)
        steps = " → ".join(f"{100 * v:.1f}" for v in np.mean([r["steps"] for r in own], axis=0))
        body.append([n, percent(over_seeds(own, "final")), steps, *cost(own)])
    header = ["learner", "final accuracy", "after each step", "bytes", "µs", "images"]
    intro = (
        "PACS joined over its domains, 2 + 2 + 3 classes in a seeded order; after each step all classes seen so far "
        "are told apart. Ours is refitted from its memory (`edgeear/incremental.py`), m coordinates of second order."
    )
    mean = {n: over_seeds(where(rows, learner=n), "final")[0] for n in unique(rows, "learner")}
    stored = {n: max(r["bytes"] for r in where(rows, learner=n)) for n in mean}
    sentences = [
        f"{a} ends {abs(100 * (mean[a] - mean[b])):.1f} points {'above' if mean[a] >= mean[b] else 'below'} {b}, "
        f"at {stored[a] / stored[b]:.2f} times its bytes."
        for a in mean
        for b in mean
        if a.startswith(OURS) and b.startswith("RanPAC")
    ]
    return "\n\n".join(["## Learning class after class", intro, table(header, body), " ".join(sentences)])


def attribution(content: Any, files: Files, pictures: Path) -> str:
    rows = content["rows"]
    sizes = unique(rows, "batch")
    body, kinds = [], unique(rows, "frames")
    for kind in kinds:
        own = where(rows, frames=kind)
        right = [
            over_seeds(
                [{**r, "right": 1 - r["sensor"] if r["content"] else r["sensor"]} for r in where(own, batch=b)], "right"
            )
            for b in sizes
        ]
        body.append([kind, "new content" if own[0]["content"] else "sensor shift", *(percent(r) for r in right)])
    balanced = []
    for b in sizes:
        own = where(rows, batch=b)
        found = np.mean([r["sensor"] for r in own if not r["content"]])
        balanced.append(f"{50 * (found + 1 - np.mean([r['sensor'] for r in own if r['content']])):.1f}")
    body.append(["balanced accuracy", "", *balanced])
    draw_attribution(rows, pictures / "attribution.svg")
    header = ["frames", "truth", *(f"{b} frame{'s' if b > 1 else ''}" for b in sizes)]
    intro = (
        "Photographs are known, without two of their classes. Either those classes come, or known ones through a worse "
        "sensor. Which taps moved (`edgeear/attribution.py`) decides; right decisions in percent, by the frames seen. "
        "The threshold was picked on photographs of this data set, so that the figures flatter it somewhat."
    )
    picture = f"![How far each tap moves]({pictures.name}/attribution.svg)"
    return "\n\n".join(["## Sensor shift or new content?", intro, table(header, body), picture])


def ablation(content: Any, files: Files, pictures: Path) -> str:
    rows = [r for r in content["rows"] if "variant" in r]
    joint = [r for r in content["rows"] if "outlier_weight" in r]
    metrics = ("auroc", "fpr95", "routing", "prototypes", "ridge")
    body = []
    for name in unique(rows, "variant"):
        own = where(rows, variant=name)
        body.append([name, own[0]["choice"], *(percent(over_seeds(own, m)) for m in metrics)])
    header = ["variant", "choice", "AUROC", "FPR95", "routing", "accuracy by prototypes", "by ridge"]
    intro = (
        "One change at a time, on PACS: unseen domains (12 pairs), routing, and accuracy within each domain, read "
        "from the memory by class prototypes (all D dimensions) and by ridge (the first m). `ours` is what runs."
    )
    text = ["## What each choice is worth", intro, table(header, body)]
    names = {OURS if n == "ours" else n: where(rows, variant=n) for n in unique(rows, "variant")}
    cells = [
        (title, {n: over_seeds(own, m)[0] for n, own in names.items()}, m != "fpr95")
        for m, title in zip(metrics, header[2:], strict=True)
    ]
    text += [lost(cells)]
    if joint:
        figures = ("accuracy", "auroc", "fpr95")
        body = [
            [f"{w:g}", *(percent(over_seeds(where(joint, outlier_weight=w), m)) for m in figures)]
            for w in unique(joint, "outlier_weight")
        ]
        text += [
            "Joint training through the hyperdimensional loss (a prototypes head, 20 images a class): weight of the "
            "virtual outliers in the loss, 0 is without; novelty is the smallest angle to a prototype of the head.",
            table(["outlier weight", "accuracy", "AUROC", "FPR95"], body),
        ]
    return "\n\n".join(text)


OTHERS = {
    "ood": "Novelty by `edgeear bench ood`",
    "shift": "Shift: false alarms and delay",
    "routing": "Routing among many domains",
    "labelfree": "Adaptation without labels",
    "runtime": "Run time",
    "daemon": "The daemon: start, idle CPU, memory",
    "adaptation": "Predictions while the board learns",
    "mqtt": "A day without a broker, and a broker that restarts",
    "fuzz": "A million broken messages",
    "fleet": "200 daemons at one broker",
    "class-incremental": "Class-incremental by `edgeear eval`",
}
HIDDEN = {
    "machine",
    "versions",
    "rows",
    "pairs",
    "command",
    "date",
    "encoder_digest",
    "domains",
    "accuracy_matrix",
    "policy",
    "per_device",
    "address",
    "faults",
}


def others(files: Files) -> str:
    """The files of the other benches, each shown as its own tables."""
    text = []
    for name, content in sorted(files.items(), key=lambda item: [*OTHERS, ""].index(_kind(item[0]))):
        if _kind(name) and isinstance(content, dict):
            text += [f"## {OTHERS[_kind(name)]}{'' if name == _kind(name) else f' ({name})'}", *shown(content)]
    return "\n\n".join(text)


def _kind(name: str) -> str:
    return next((k for k in OTHERS if name == k or name.startswith(f"{k}-")), "")


def shown(content: Mapping[str, Any]) -> list[str]:
    """Lists and mappings of records and mappings of figures as tables, the other figures as one line."""
    text, facts = [], []
    for key, value in content.items():
        records = _records(value)
        if records and (key not in HIDDEN or key == "rows"):
            columns = list(dict.fromkeys(k for r in records for k, v in r.items() if _scalar(v) or _figures(v)))
            text.append(
                ("" if key == "rows" else f"{key}:\n\n")
                + table(columns, [[plain(r.get(c)) for c in columns] for r in records])
            )
        elif key not in HIDDEN and isinstance(value, dict) and value and all(map(_scalar, value.values())):
            text.append(f"{key}:\n\n" + table(list(value), [[plain(v) for v in value.values()]]))
        elif key not in HIDDEN and _scalar(value) and value is not None:
            facts.append(f"{key} {plain(value)}")
    return ([", ".join(facts)] if facts else []) + text


def _records(value: Any) -> list[Row]:
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return value
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        return [{"": k, **v} for k, v in value.items()]
    return []


def _figures(value: Any) -> bool:
    """Whether a list of numbers fits into a cell."""
    return isinstance(value, list) and len(value) <= 5 and all(isinstance(v, int | float) for v in value)


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def provenance(files: Files) -> str:
    """Machines and versions behind the tables."""
    text = ["## Where the figures come from"]
    for name, content in sorted(files.items()):
        if isinstance(content, dict) and "machine" in content and not name.startswith("pacs-"):
            versions = ", ".join(f"{k} {v}" for k, v in content.get("versions", {}).items())
            spent = f"; {content['seconds']} s" if "seconds" in content else ""
            text.append(f"- `{name}.json`: {content['machine']}; {versions}{spent}")
    return "\n".join([text[0], "", *text[1:]])


def sources(module: str) -> str:
    """The papers behind the rows of a table."""
    import importlib

    found: dict[str, str] = importlib.import_module(f"benchmarks.{module}").SOURCES
    return "Sources: " + "; ".join(f"{name}: {source}" for name, source in found.items() if name != OURS) + "."


# ----------------------------------------------------------------------------------------------------- pictures


def _canvas(width: float, height: float, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "edgeear", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    )
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def draw_detectors(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Per setting: AUROC and FPR95 of every detector, best on top; bars of deviation."""
    canvas, axes = _canvas(4.2 * len(figures), 3.6, len(figures))
    for axis, (setting, found) in zip(axes, figures.items(), strict=True):
        names = sorted(found, key=lambda n: found[n][0][0])
        for which, (label, marker) in enumerate((("AUROC", "o"), ("FPR95", "s"))):
            values = [[100 * v for v in found[n][which]] for n in names]
            axis.errorbar(
                [v[0] for v in values], range(len(names)), xerr=[v[1] for v in values], fmt=marker, label=label
            )
        axis.set_yticks(range(len(names)), names)
        for tick in axis.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text() == OURS else "normal")
        axis.set_title(SETTING_NAMES.get(setting, setting))
        axis.set_xlabel("percent")
    axes[0].legend(loc="center")
    canvas.tight_layout()
    _save(canvas, path)


def draw_attribution(rows: Sequence[Row], path: Path) -> None:
    """Displacement of every tap for each kind of frame, in the largest batches."""
    canvas, axes = _canvas(7.5, 3.2, 1)
    largest = max(r["batch"] for r in rows)
    for kind in unique(rows, "frames"):
        own = [r for r in where(rows, frames=kind) if r["batch"] == largest]
        style = "k-o" if own[0]["content"] else "--o"
        axes[0].plot(own[0]["taps"], np.mean([r["displacement"] for r in own], axis=0), style, label=kind, markersize=3)
    axes[0].tick_params(axis="x", rotation=60)
    axes[0].set_ylabel("displacement")
    axes[0].legend()
    _save(canvas, path)


def read(results: Path) -> dict[str, Any]:
    """All result files by their stem; those of `benchmarks.science` with their rows unpacked."""
    files = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*.json"))}
    return {k: {**v, "rows": rows_of(v)} if isinstance(v, dict) and "tables" in v else v for k, v in files.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(arguments)
    text = page(read(options.results), options.page.parent / "benchmarks")
    options.page.write_text(text)
    print(f"{options.page}: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
