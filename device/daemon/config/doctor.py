"""`edgeear doctor`: what on this machine would stop the daemon from working, and how to fix it.

Rules of this file:

1. One function for each check. It takes facts or a probe and returns findings; probes.py asks the machine. A source
   brings its own check.
2. An exception in a check becomes a warning; the other checks still run.
3. No check changes anything, except for a temporary file in the state folder. A store that is not in use is opened as
   the daemon would open it.
4. No text holds a secret: `_guarded` redacts every finding. Each remedy works on the machine that it is given for: it
   needs no package that is missing.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from device.daemon.config import probes
from device.daemon.config.certificates import Validity, validity
from device.daemon.config.probes import EncoderFacts, StoreFacts
from device.daemon.config.settings import Config, MqttSection
from device.daemon.finding import Finding, ok, problem, reason, warning
from device.provenance import installation
from device.redaction import redacted
from device.state.store import StoreBusy
from edgeear.errors import EdgeearError, FormatError

INFERENCE_MB = 200
"""Memory of the inference process, measured and rounded up."""
DISK_MB = 200
"""Disk space of some generations, without the outbox, rounded up."""
SLOW_MS = 200.0
SOON_S = 30 * 86_400.0
EARLIEST = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
LATEST = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


Findings = Iterator[Finding]


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is a problem, else 0."""
    return int(any(finding.verdict == "problem" for finding in findings))


def diagnose(config: Config, config_path: Path | None = None, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Every finding on this machine, in the order of the checks. Takes some seconds: it runs the encoder and connects
    to the broker. `config_path` is the file that `config` came from."""
    now = clock()
    encoders: list[EncoderFacts] = []

    def check_encoder() -> Findings:
        encoders.append(probes.encoder(config.device.encoder, config.device.threads, config.device.preprocessing))
        yield from check_encoder_file(encoders[0])

    def check_store_on_encoder() -> Findings:
        yield from check_store(lambda: probes.store(config.device.store), encoders[0].digest if encoders else None)

    learning, mqtt, state = config.learning, config.mqtt, config.device.state
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("cpu", lambda: check_cpu(probes.read("/proc/cpuinfo"), platform.machine())),
        ("cores", lambda: check_cores(probes.cores(), config.device.threads, learning.enabled)),
        ("memory", lambda: check_memory(probes.memory_mb(), learning.memory_limit_mb if learning.enabled else 0)),
        ("clock", lambda: check_clock(now, probes.clock_synchronised())),
        ("state", lambda: check_state(state, probes.writable)),
        ("disk", lambda: check_disk(probes.free_mb(state), config.outbox.max_mb)),
        ("encoder", check_encoder),
        ("store", check_store_on_encoder),
        ("outbox", lambda: check_outbox(config.device.outbox)),
        ("learning", lambda: check_learning(learning.enabled, probes.installed)),
        ("source", lambda: config.source.check(probes)),
        ("secrets", lambda: check_secrets(config, config_path)),
        ("certificate", lambda: check_certificate(mqtt.cert, now)),
        ("broker", lambda: check_broker(mqtt, probes.broker, now)),
    ]
    return [finding for name, check in checks for finding in _guarded(name, check)]


def _guarded(name: str, check: Callable[[], Findings]) -> list[Finding]:
    """The findings of one check; an exception becomes a warning."""
    try:
        found = list(check())
    except Exception as error:
        found = [Finding(name, "warning", f"the check failed ({type(error).__name__}: {error})", "report this bug")]
    return [replace(f, check=name, text=redacted(f.text), remedy=redacted(f.remedy)) for f in found]


def check_cpu(cpuinfo: str, machine: str) -> Findings:
    """Whether the CPU has the instructions that make the encoder fast, from `/proc/cpuinfo` and its architecture."""
    line = re.search(r"(?m)^(?:flags|Features)\s*:(.*)$", cpuinfo)
    flags = set(line[1].split()) if line else set()
    if machine in ("x86_64", "AMD64"):
        wanted = {"avx2": "AVX2"}
    elif machine in ("aarch64", "arm64"):
        wanted = {"asimddp": "NEON dot products"}
    elif machine.startswith("arm"):
        wanted = {"neon": "NEON"}
    else:
        yield warning(f"{machine}: edgeear was not measured on it", "watch its latency in telemetry")
        return
    missing = [name for flag, name in wanted.items() if flag not in flags]
    if not flags:
        yield warning(f"{machine}: its features are unknown", "watch its latency in telemetry")
    elif missing:
        yield warning(f"{machine} without {', '.join(missing)}", "expect slow frames; lower source.fps")
    else:
        yield ok(f"{machine} with {', '.join(wanted.values())}")


def check_cores(cores: int, threads: int, learning: bool) -> Findings:
    """Whether the encoder's threads and a learning process have a core each."""
    if threads > cores:
        yield warning(f"{cores} for {threads} threads", f"set device.threads to {cores} at most")
    elif learning and cores < 2:
        yield warning("1: learning and predictions share it", "expect slow frames during learning")
    else:
        yield ok(str(cores))


def check_memory(available_mb: float | None, learning_mb: int) -> Findings:
    """Whether there is memory for predictions, and for learning up to its limit of `learning_mb` (0: it is off)."""
    need = INFERENCE_MB + learning_mb
    if available_mb is None:
        yield warning("the system does not report it", f"make sure that {need} MB are free")
    elif available_mb < INFERENCE_MB:
        text = f"{available_mb:.0f} MB available, predictions need {INFERENCE_MB}"
        yield problem(text, "stop other programs, or use a larger board")
    elif available_mb < need:
        text = f"{available_mb:.0f} MB available, learning may need {need}"
        yield warning(text, "add swap, or set learning.enabled = false")
    else:
        yield ok(f"{available_mb:.0f} MB available")


def check_clock(now: float, synchronised: bool | None) -> Findings:
    """Whether the clock is right: certificates, message expiry and the order of events depend on it."""
    when = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"
    if not EARLIEST <= now < LATEST:
        yield problem(f"it says {when}", "set it, and run an NTP client (chrony, systemd-timesyncd)")
    elif synchronised:
        yield ok(f"{when}, synchronised")
    else:
        what = "it is unknown whether it is synchronised" if synchronised is None else "not synchronised"
        yield warning(f"{when}, {what}", "run an NTP client (chrony, systemd-timesyncd)")


def check_state(state: Path, writable: Callable[[Path], str | None]) -> Findings:
    """Whether this user may write to the state folder, or create it; `writable` returns what is wrong, or None."""
    if state.exists() and not state.is_dir():
        yield problem(f"{state} is not a folder", "set device.state to a folder")
        return
    why = writable(state)
    if why is not None:
        yield problem(f"{state}: {why}", "change its owner to this user, or change device.state")
    elif state.exists() and stat.S_IMODE(state.stat().st_mode) & 0o022:
        yield warning(f"{state}: other users may write to it", f"chmod go-w {state}")
    else:
        yield ok(f"{state}{'' if state.exists() else ', to be created at the first start'}")


def check_disk(free_mb: float, outbox_mb: int) -> Findings:
    """Whether there is room for a full outbox and some generations."""
    need = outbox_mb + DISK_MB
    if free_mb >= need:
        yield ok(f"{free_mb:.0f} MB free")
    else:
        text = f"{free_mb:.0f} MB free, up to {need} may be needed"
        yield (problem if free_mb < DISK_MB / 4 else warning)(text, "free some space, or lower outbox.max_mb")


def check_encoder_file(encoder: EncoderFacts) -> Findings:
    """Whether the encoder can serve, and how fast it is."""
    for fault in encoder.problems:
        yield (problem if fault.severity == "error" else warning)(fault.what, fault.remedy)
    if encoder.frame_ms is None:
        return
    text = f"{(encoder.digest or '')[:12]}, {encoder.frame_ms:.1f} ms a frame, threads: {encoder.threads}"
    if encoder.frame_ms > SLOW_MS:
        yield warning(text, "raise device.threads or lower source.fps")
    else:
        yield ok(text)


def check_store(open_store: Callable[[], StoreFacts | None], digest: str | None) -> Findings:
    """Whether the store can be read, and was learned on the encoder with this `digest`."""
    try:
        facts = open_store()
    except StoreBusy:
        yield ok("in use by a running daemon, which has checked it")
        return
    except EdgeearError as error:
        yield problem(str(error), "restore it from a backup, or move it away and learn again")
        return
    if facts is None:
        yield ok("nothing is learned yet")
        return
    if facts.damage is not None:
        yield warning(f"{facts.damage}: an older generation is used", "check the disk")
    if digest is not None and facts.encoder is not None and digest != facts.encoder:
        text = f"learned on encoder {facts.encoder[:12]}, but the configured one is {digest[:12]}"
        yield problem(text, "set device.encoder to the old file, or move device.state away")
    else:
        on = "" if facts.live == facts.confirmed else ", on probation"
        yield ok(f"generation {facts.live}{on}, domains: {facts.domains}")


def check_outbox(path: Path) -> Findings:
    """Whether the outbox's file can be used. It is not opened as a database, so a running daemon is not disturbed."""
    if not path.exists():
        yield ok("empty, to be created at the first start")
        return
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        yield problem(f"{path}: {error.strerror}", "change its owner to this user")
        return
    if not os.access(path, os.W_OK):
        yield problem(f"{path}: cannot be written to", "change its owner to this user")
    elif head not in (b"", b"SQLite format 3\0"):
        yield warning(f"{path}: damaged, will be renamed", "keep a copy if you need its messages")
    else:
        yield ok(f"{path.stat().st_size / 2**20:.1f} MB")


def check_learning(enabled: bool, installed: Callable[[str], bool]) -> Findings:
    """Whether the packages of the `learn` extra are installed, if they are needed."""
    missing = [name for name in ("torch", "onnx") if not installed(name)] if enabled else []
    if missing:
        remedy = f"{installation('learn')}, or set learning.enabled = false"
        yield problem(f"not installed: {', '.join(missing)}", remedy)
    else:
        yield ok("ready" if enabled else "off")


def check_secrets(config: Config, config_path: Path | None) -> Findings:
    """Whether other users can read the board's key, or the password in the file."""
    files = [] if config.mqtt.key is None else [(config.mqtt.key, "mqtt.key")]
    if config_path is not None and config.mqtt.password is not None:
        files.append((config_path, "the file with mqtt.password"))
    bad = 0
    for path, what in files:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            yield problem(f"{what} {path}: {error.strerror}", "put the file there")
            bad += 1
            continue
        if not os.access(path, os.R_OK):
            yield problem(f"{what} {path}: this user may not read it", "change its owner to this user")
        elif mode & 0o007:
            yield problem(f"{what} {path}: every user may read it", f"chmod 600 {path}")
        elif mode & 0o070:
            yield warning(f"{what} {path}: its group may read it", f"chmod 600 {path}")
        else:
            continue
        bad += 1
    if not bad:
        yield ok("readable by this user only" if files else "none in use")


def check_certificate(cert: Path | None, now: float) -> Findings:
    """Whether the board's own certificate is valid. For the broker's see `check_broker`."""
    if cert is None:
        return
    try:
        period = validity(cert.read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        yield problem(f"{cert}: {error.strerror}", "put the file there, or change mqtt.cert")
    except FormatError as error:
        yield problem(f"{cert}: {error}", "get it again from the authority that signed it")
    else:
        yield _judged(str(cert), period, now)


def check_broker(mqtt: MqttSection, call: Callable[[MqttSection], Validity | None], now: float) -> Findings:
    """Whether the broker answers, and with a valid certificate. Nothing is sent over MQTT."""
    if not mqtt.enabled:
        yield ok("off")
        return
    where = f"{mqtt.host}:{mqtt.port}"
    try:
        certificate = call(mqtt)
    except OSError as error:
        yield problem(f"{where}: {reason(error)}", _broker_remedy(error))
    else:
        if certificate is not None:
            yield _judged(f"{where} with TLS, its certificate", certificate, now)
        elif mqtt.password is not None:
            yield warning(f"{where} answers; the password is sent unencrypted", "use TLS: set mqtt.ca")
        else:
            yield ok(f"{where} answers")


def _judged(what: str, period: Validity, now: float) -> Finding:
    start, end = (f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d}" for t in (period.start, period.end))
    if now < period.start:
        return problem(f"{what} is not valid before {start}", "set this machine's clock")
    if now >= period.end:
        return problem(f"{what} expired on {end}", "renew it")
    if period.end - now < SOON_S:
        return warning(f"{what} expires on {end}", "renew it before then")
    return ok(f"{what} is valid until {end}")


_NOT_YET, _EXPIRED, _OTHER_NAME, _OTHER_ADDRESS = 9, 10, 62, 64  # X509_V_ERR_ of OpenSSL


def _broker_remedy(error: OSError) -> str:
    code = getattr(error, "verify_code", None)
    if code in (_NOT_YET, _EXPIRED):
        return "check this machine's clock; if it is right, renew the broker's certificate"
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return "set mqtt.host to the name in the broker's certificate"
    if code is not None:
        return "set mqtt.ca to the authority that signed the broker's certificate"
    if isinstance(error, ssl.SSLError):
        return "check mqtt.port (8883 is usual), mqtt.cert and mqtt.key"
    if isinstance(error, socket.gaierror):
        return "correct mqtt.host, or fix the name server"
    return "start the broker, open the firewall, or correct mqtt.host and mqtt.port"
