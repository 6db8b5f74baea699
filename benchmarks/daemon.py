"""What a board's daemon costs: `edgeear run` with the built-in encoder, a store of 8 domains and a real mosquitto.

    python -m benchmarks.daemon [--data DIR] [--json FILE] [--seconds 60] [--starts 5]

`ready_s`: seconds from the start of the process to READY=1 on systemd's socket. `idle`: connected, with nothing to do
for `seconds`, without a source and with a folder that stays empty: CPU time of all threads, from /proc/PID/stat, as a
share of one core, and resident memory. `serving`: a replay of the pictures in DIR at 10 frames a second. `torch`:
whether anything of it is mapped into the process, which it must not be. Times depend on what else the machine does:
`load` is its load average at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from device.encoder.cache import cached_encoder
from device.evaluation.runtime import _write_generation
from device.files import cache_dir
from device.mqtt import messages
from device.operator.client import BrokerAddress, Operator
from device.state.store import Store
from tests.support.boards import DEVICE, SITE, DaemonProcess, config, state
from tests.support.broker import Mosquitto, mosquitto

DOMAINS, FPS = 8, 10
BARS = {"ready_s": 2.0, "idle_cpu_share": 0.01}
SETTLE_S = 3.0
"""After the start, before a measurement begins."""
Figures = dict[str, Any]


def learned(folder: Path, encoder: Path) -> None:
    """A store with one confirmed generation of `DOMAINS` domains."""
    _write_generation(encoder, folder / "generation", DOMAINS)
    files = {path.name: path.read_bytes() for path in (folder / "generation").iterdir()}
    with Store.open(state(folder).store) as store:
        number = store.write(files, created=0.0)
        store.commit(number)
        store.confirm(number)


def starts(board: DaemonProcess, count: int) -> list[float]:
    """Seconds to readiness; the first start, which fills the file cache, is not among them."""
    seconds = []
    for _ in range(count + 1):
        board.start()
        seconds.append(round(board.wait_told("READY=1"), 3))
        board.terminate()
    return seconds[1:]


def measured(name: str, board: DaemonProcess, broker: Mosquitto, seconds: float) -> Figures:
    """CPU share and memory over `seconds`, and what the daemon answers at the end of them."""
    with board:
        board.wait_told("READY=1")
        board.wait_said("broker: connected")
        time.sleep(SETTLE_S)
        cpu, began = board.cpu_s(), time.monotonic()
        time.sleep(seconds)
        share = (board.cpu_s() - cpu) / (time.monotonic() - began)
        rss, peak, torch = board.rss_mb(), board.peak_mb(), "torch" in board.maps()
        with Operator(BrokerAddress("127.0.0.1", broker.port), (f"edgeear/v1/{SITE}/{DEVICE}/response",)) as us:
            report: dict[str, Any] = us.ask(SITE, DEVICE, messages.Report(id=f"after-{name}")).result
        board.terminate()
    figures = {"cpu_share": round(share, 5), "rss_mb": round(rss, 1), "rss_peak_mb": round(peak, 1), "torch": torch}
    return {**figures, "domains": len(report["domains"]), "frames": report["frames"]["answered"]}


def benchmark(folder: Path, encoder: Path, data: Path, seconds: float, count: int) -> Figures:
    learned(folder, encoder)
    empty = folder / "incoming"
    empty.mkdir()
    usual = "labels = 140\nprobation = 40\nspecs = 300"
    sources = {
        "none": 'kind = "none"',
        "folder": f'kind = "folder"\npath = "{empty}"',
        "replay": f'kind = "replay"\npath = "{data}"\nfps = {FPS}',
    }
    with mosquitto(folder / "broker") as broker:
        boards = {
            kind: config(folder, broker.port, encoder, learning=usual, source=source)
            for kind, source in sources.items()
        }
        ready = starts(DaemonProcess(folder, boards["none"]), count)
        rows = {kind: measured(kind, DaemonProcess(folder, text), broker, seconds) for kind, text in boards.items()}
    median = statistics.median(ready)
    idle = {kind: rows[kind] for kind in ("none", "folder")}
    return {
        "machine": f"{platform.machine()} x{os.cpu_count()}, {platform.python_version()}",
        "load": [round(x, 2) for x in os.getloadavg()],
        "bars": BARS,
        "ready_s": ready,
        "ready_s_median": median,
        "idle": idle,
        "serving": {"fps": FPS, **rows["replay"]},
        "torch": any(row["torch"] for row in rows.values()),
        "met": median <= BARS["ready_s"] and all(row["cpu_share"] <= BARS["idle_cpu_share"] for row in idle.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=cache_dir() / "PACS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    encoder = cached_encoder(cache_dir())
    assert encoder is not None, "no encoder in the cache: `edgeear encoder export` makes it"
    with tempfile.TemporaryDirectory() as name:
        result = benchmark(Path(name), encoder, options.data, options.seconds, options.starts)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
