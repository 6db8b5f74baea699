"""The section of docs/benchmarks.md on the search for heads, from `nas-DOMAIN.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.tables import Row, percent, spread, table

DESIGNED_ON = ("art_painting", "cartoon")
"""The domains that were looked at while the proxies and their combination were designed."""
SEARCHES = {
    "default": "default",
    "quick": "quick: 2,000 heads filtered, 150 scored",
    "least latency_ms": "default, fastest within 0.3 points",
    "least bytes": "default, smallest within 0.3 points",
    "halving": "default, then successive halving of 8",
}

INTRO = """## Search: which head, without training any?

Heads drawn at random from the search space were trained (the tables in `benchmarks/data/`), and every training-free
score is held against what they reach on images that none of them saw: Kendall's tau, Spearman's rho, the accuracy of
the head that the score picks, the time for one head on one thread. `transfer` is the default: proxies and the words
of a specification, combined as the trained heads of the *other* domains teach. `family` knows the family of a head
alone (operator and reconfigurator), as the others teach; `parameters`, `macs` and `random` are controls. A proxy is
correlated over the heads where it is defined."""


def architecture_search(files: Mapping[str, Any]) -> str:
    """The tables of all domains; nothing without a file."""
    found = {f["domain"]: f for name, f in sorted(files.items()) if name.startswith("nas-") and "proxies" in f}
    if not found:
        return ""
    unseen = [d for d in found if d not in DESIGNED_ON]
    text = [INTRO, _regime(found)]
    text += [f"Domains looked at in the design: {', '.join(d for d in found if d in DESIGNED_ON)}."]
    if unseen:
        text += [f"### Proxies on domains not looked at ({', '.join(unseen)})", _proxies([found[d] for d in unseen])]
    text += [f"### Proxies on all {len(found)} domains", _proxies(list(found.values()))]
    text += ["### Kendall's tau by domain", _by_domain(found), "### The head that the search picks", _searches(found)]
    return "\n\n".join(text)


def _regime(found: Mapping[str, Any]) -> str:
    first = next(iter(found.values()))
    regime = first["regime"]
    text = (
        f"{first['heads']} heads a domain, each trained twice, on {regime['shots']} images a class and for at most "
        f"{regime['epochs']} epochs."
    )
    for domain, content in found.items():
        if kept := content.get("fidelity"):
            text += (
                f" That this keeps the ranking was checked on {kept['heads']} heads of {domain} trained in full (all "
                f"images, {kept['full']['epochs']} epochs): tau {kept['kendall_tau']:.2f}. One full training takes "
                f"{kept['full_training_s']:.1f} s on average."
            )
    return text


def _proxies(contents: list[Any]) -> str:
    names = [p["name"] for p in contents[0]["proxies"]]
    body = []
    for name in names:
        rows = [next(p for p in c["proxies"] if p["name"] == name) for c in contents]
        body.append(
            [
                name,
                f"{100 * np.mean([r['defined'] / c['heads'] for r, c in zip(rows, contents, strict=True)]):.0f} %",
                _mean(rows, "kendall_tau", "{:.2f}"),
                _mean(rows, "spearman", "{:.2f}"),
                _mean(rows, "picked_accuracy", "{:.1%}"),
                _mean(rows, "ms_per_spec", "{:.1f}"),
            ]
        )
    best, mean, eight = (
        float(np.mean([c[k] for c in contents])) for k in ("best_accuracy", "mean_accuracy", "random_of_8_accuracy")
    )
    note = f"Best head of the tables {best:.1%}, mean head {mean:.1%}, best of 8 random heads {eight:.1%}."
    return table(["score", "defined for", "tau", "rho", "accuracy of its pick", "ms a head"], body) + "\n\n" + note


def _mean(rows: list[Row], key: str, shape: str) -> str:
    known = [r[key] for r in rows if r[key] is not None]
    return shape.format(float(np.mean(known))) if known else ""


def _by_domain(found: Mapping[str, Any]) -> str:
    names = [p["name"] for p in next(iter(found.values()))["proxies"]]
    taus = {(d, p["name"]): p["kendall_tau"] for d, c in found.items() for p in c["proxies"]}
    body = [[n, *("" if taus[d, n] is None else f"{taus[d, n]:.2f}" for d in found)] for n in names]
    return table(["score", *found], body)


def _searches(found: Mapping[str, Any]) -> str:
    body = []
    rows = [{**s, "best": c["best_accuracy"]} for c in found.values() for s in c["searches"]]
    for name, words in SEARCHES.items():
        own = [r for r in rows if r["search"] == name]
        if not own:
            continue
        seeds = sorted({r["seed"] for r in own})
        accuracy = [float(np.mean([r["accuracy"] for r in own if r["seed"] == s])) for s in seeds]
        gap = float(np.mean([r["best"] - r["accuracy"] for r in own]))
        body.append(
            [
                words,
                percent(spread(accuracy)),
                f"{100 * gap:+.2f}",
                f"{np.median([r['cost']['latency_ms'] for r in own]):.3f}",
                f"{np.median([r['cost']['bytes'] for r in own]) / 1024:.0f}",
                f"{np.median([r['seconds'] for r in own]):.1f}",
            ]
        )
    header = ["search", "accuracy", "points behind the best of the table", "ms predicted", "KiB", "seconds"]
    eight = float(np.mean([c["random_of_8_accuracy"] for c in found.values()]))
    mean = float(np.mean([c["mean_accuracy"] for c in found.values()]))
    memory = max(c["peak_rss_mb"] for c in found.values())
    note = (
        f"Beside it: best of 8 random heads {eight:.1%}, mean head {mean:.1%}. Means over domains and seeds; "
        f"costs and times medians. Peak memory of the process at most {memory:.0f} MB, all images and maps included."
    )
    return table(header, body) + "\n\n" + note
