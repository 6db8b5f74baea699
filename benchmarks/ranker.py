"""`python -m benchmarks.ranker`: learn the combination of proxies that ships with the package from all tables."""

from __future__ import annotations

import json
from pathlib import Path

from adaptors import transfer
from device.evaluation.nas_table import Truth, examples, from_json
from device.files import write_whole

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "benchmarks" / "data"
SHIPPED = ROOT / "adaptors" / "ranker.json"


def tables() -> list[Truth]:
    """Every table of trained heads, in the order of their names."""
    return [from_json(json.loads(path.read_text())) for path in sorted(TABLES.glob("heads-*.json"))]


def learned() -> str:
    """The text of the shipped file."""
    return transfer.to_json(transfer.fit([e for truth in tables() for e in examples(truth)]))


if __name__ == "__main__":
    write_whole(SHIPPED, learned().encode())
    print(SHIPPED.relative_to(ROOT))
