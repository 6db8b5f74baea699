"""From rows of figures to the words and tables of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
OURS = "edgeear"


def unique(rows: Iterable[Row], key: str) -> list[Any]:
    """Values of a key in order of their first appearance."""
    return list(dict.fromkeys(r[key] for r in rows))


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with all the given values."""
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def over_seeds(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Mean and deviation over seeds of each seed's mean; NaN where there is no row."""
    seeds = dict.fromkeys(r["seed"] for r in rows)
    return spread([float(np.mean([r[metric] for r in rows if r["seed"] == s])) for s in seeds])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and deviation with divisor n - 1; NaN where there is too little for either."""
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def percent(figure: tuple[float, float], signed: bool = False) -> str:
    """`97.0 ± 0.2`; nothing where nothing was measured."""
    mean, deviation = figure
    text = "" if np.isnan(mean) else f"{100 * mean:{'+' if signed else ''}.1f}"
    return text if np.isnan(deviation) else f"{text} ± {100 * deviation:.1f}"


def cost(rows: Sequence[Row]) -> list[str]:
    """Largest bytes, median time, exemplars."""
    if not rows:
        return ["", "", ""]
    time = f"{np.median([r['us'] for r in rows]):.0f}"
    return [thousands(max(r["bytes"] for r in rows)), time, "yes" if rows[0]["exemplars"] else "no"]


def thousands(number: float) -> str:
    return f"{round(number):,}"


def plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lost(cells: Iterable[tuple[str, Mapping[str, float], bool]]) -> str:
    """Where another method is ahead of ours; cells are (name, figure of each method, larger is better)."""
    behind, count = [], 0
    for name, figures, larger in cells:
        sign = 1 if larger else -1
        ahead = {n: v for n, v in figures.items() if n != OURS and sign * (v - figures[OURS]) > 5e-4}
        count += 1
        if ahead:
            best = max(ahead, key=lambda n: sign * ahead[n])
            rest = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
            behind.append(f"{name} ({best} {100 * ahead[best]:.2f} against {100 * figures[OURS]:.2f}{rest})")
    if not behind:
        return f"Ours is ahead, or level within 0.05 points, in all {count} columns."
    return f"**Ours loses {len(behind)} of {count} columns:** " + "; ".join(behind) + "."


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *body]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)
