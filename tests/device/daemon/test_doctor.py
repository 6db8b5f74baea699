"""The doctor: every check passes on a healthy machine, and reports each fault with a remedy."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from device.daemon.config import doctor, probes
from device.daemon.config.certificates import Validity, validity
from device.daemon.config.doctor import exit_code
from device.daemon.config.probes import EncoderFacts, StoreFacts
from device.daemon.config.settings import Config, MqttSection, load_config
from device.daemon.finding import Finding
from device.daemon.sources import NoSource, SourceSection
from device.daemon.sources.camera import CameraSource
from device.daemon.sources.folder import FolderSource
from device.daemon.sources.mqtt import MqttSource
from device.daemon.sources.replay import ReplaySource
from device.daemon.sources.serial import SerialSource
from device.encoder.session import Problem
from device.state.codec import to_files
from device.state.store import CURRENT, Store, StoreBusy
from edgeear.errors import FormatError
from tests.support import fakes, tiny_models

NOW = datetime(2027, 6, 1, tzinfo=UTC).timestamp()
DAY = 86_400.0


def one(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    assert (finding.remedy == "") is (finding.verdict == "ok"), finding
    return finding


def verdict(findings: Iterator[Finding]) -> str:
    return one(findings).verdict


# ------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "expected"),
    [
        ("flags\t\t: fpu avx avx2 fma\n", "x86_64", "ok"),
        ("flags\t\t: fpu avx\n", "x86_64", "warning"),
        ("Features\t: fp asimd asimddp\n", "aarch64", "ok"),
        ("Features\t: fp asimd\n", "aarch64", "warning"),
        ("Features\t: half neon vfpv4\n", "armv7l", "ok"),
        ("", "x86_64", "warning"),
        ("isa : rv64\n", "riscv64", "warning"),
    ],
)
def test_cpu(cpuinfo: str, machine: str, expected: str) -> None:
    assert verdict(doctor.check_cpu(cpuinfo, machine)) == expected


@pytest.mark.parametrize(
    ("cores", "threads", "learning", "expected"),
    [(4, 2, True, "ok"), (1, 1, False, "ok"), (1, 1, True, "warning"), (2, 4, False, "warning")],
)
def test_cores(cores: int, threads: int, learning: bool, expected: str) -> None:
    assert verdict(doctor.check_cores(cores, threads, learning)) == expected


@pytest.mark.parametrize(
    ("available", "learning", "expected"),
    [(1500, 1200, "ok"), (1300, 1200, "warning"), (1300, 0, "ok"), (150, 0, "problem"), (None, 0, "warning")],
)
def test_memory(available: float | None, learning: int, expected: str) -> None:
    assert verdict(doctor.check_memory(available, learning)) == expected


def test_memory_is_the_smaller_of_the_machine_and_its_container() -> None:
    meminfo = "MemTotal: 9999999 kB\nMemAvailable:  2097152 kB\n"
    assert probes.memory_mb(meminfo, "max\n", "5\n") == 2048
    assert probes.memory_mb(meminfo, str(700 << 20), str(200 << 20)) == 500
    assert probes.memory_mb("", "max", "5") is None


@pytest.mark.parametrize(
    ("now", "synchronised", "expected"),
    [
        (NOW, True, "ok"),
        (NOW, False, "warning"),
        (NOW, None, "warning"),
        (0.0, True, "problem"),
        (9e9, True, "problem"),
    ],
)
def test_clock(now: float, synchronised: bool | None, expected: str) -> None:
    assert verdict(doctor.check_clock(now, synchronised)) == expected


# ---------------------------------------------------------------------------------------------------- disk


def test_state(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert verdict(doctor.check_state(tmp_path / "new", probes.writable)) == "ok"
    assert verdict(doctor.check_state(tmp_path, probes.writable)) == "ok"
    assert verdict(doctor.check_state(tmp_path, lambda _: "read-only file system")) == "problem"
    assert verdict(doctor.check_state(tmp_path / "file", probes.writable)) == "problem"
    assert verdict(doctor.check_state(tmp_path / "open", probes.writable)) == "warning"
    assert not (tmp_path / "new").exists()


def test_a_folder_that_takes_no_file_is_told() -> None:
    assert "cannot be written" in str(probes.writable(Path("/proc/none/below")))


@pytest.mark.parametrize(("free", "expected"), [(300, "ok"), (100, "warning"), (10, "problem")])
def test_disk(free: float, expected: str) -> None:
    assert verdict(doctor.check_disk(free, 64)) == expected


def facts(*problems: Problem, ms: float | None = 11.0) -> EncoderFacts:
    return EncoderFacts(1, problems, None if ms is None else "ab" * 32, ms)


def test_encoder_verdicts() -> None:
    assert verdict(doctor.check_encoder_file(facts())) == "ok"
    assert verdict(doctor.check_encoder_file(facts(ms=900.0))) == "warning"
    assert verdict(doctor.check_encoder_file(facts(Problem("error", "broken", "export it"), ms=None))) == "problem"
    both = list(doctor.check_encoder_file(facts(Problem("warning", "no metadata", "export it"))))
    assert [finding.verdict for finding in both] == ["warning", "ok"]


def test_encoder_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEAR_CACHE", str(tmp_path))
    none, gone = (one(doctor.check_encoder_file(probes.encoder(path, 1))) for path in (None, tmp_path / "x"))
    assert none.verdict == gone.verdict == "problem"
    assert "no intact" in none.text and "does not exist" in gone.text and "device.encoder" in gone.remedy
    (tmp_path / "sound.onnx").write_bytes(tiny_models.sound())
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    sound, broken = probes.encoder(tmp_path / "sound.onnx", 1), probes.encoder(tmp_path / "broken.onnx", 1)
    assert sound.frame_ms is not None and sound.digest is not None and broken.frame_ms is None
    assert exit_code(doctor.check_encoder_file(sound)) == 0 and exit_code(doctor.check_encoder_file(broken)) == 1


@pytest.mark.parametrize(("learns", "remedy"), [(True, "run `edgeear encoder export`"), (False, "copy the file")])
def test_the_remedy_for_no_encoder_works_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, learns: bool, remedy: str
) -> None:
    monkeypatch.setenv("EDGEEAR_CACHE", str(tmp_path))
    monkeypatch.setattr(probes, "installed", lambda _: learns)
    assert remedy in one(doctor.check_encoder_file(probes.encoder(None, 1))).remedy


def learned(folder: Path) -> None:
    with Store.open(folder) as store:
        store.commit(store.write(to_files(fakes.empty()), created=0.0))


def test_stores(tmp_path: Path) -> None:
    assert probes.store(tmp_path / "none") is None and not (tmp_path / "none").exists()
    learned(tmp_path / "store")
    found = probes.store(tmp_path / "store")
    assert found == StoreFacts(1, None, 0, fakes.ENCODER, None)
    assert verdict(doctor.check_store(lambda: found, fakes.ENCODER)) == "ok"
    assert verdict(doctor.check_store(lambda: found, None)) == "ok"
    assert verdict(doctor.check_store(lambda: found, "00" * 32)) == "problem"
    assert verdict(doctor.check_store(lambda: None, None)) == "ok"
    fallen = StoreFacts(1, 1, 2, None, "generation 2, manifest.json: cut off")
    assert [finding.verdict for finding in doctor.check_store(lambda: fallen, None)] == ["warning", "ok"]


def test_a_store_in_use_is_sound_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    learned(tmp_path)
    with Store.open(tmp_path):
        with pytest.raises(StoreBusy):
            probes.store(tmp_path)
        assert verdict(doctor.check_store(lambda: probes.store(tmp_path), None)) == "ok"
    (tmp_path / CURRENT).unlink()
    (tmp_path / CURRENT).write_text("nonsense")
    assert verdict(doctor.check_store(lambda: probes.store(tmp_path), None)) == "problem"


def test_outbox(tmp_path: Path) -> None:
    for name, content in (("sound", b"SQLite format 3\0" + bytes(84)), ("damaged", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
    assert verdict(doctor.check_outbox(tmp_path / "none")) == "ok"
    assert verdict(doctor.check_outbox(tmp_path / "sound")) == "ok"
    assert verdict(doctor.check_outbox(tmp_path / "damaged")) == "warning"
    assert verdict(doctor.check_outbox(tmp_path)) == "problem"


# ------------------------------------------------------------------------------------------- configuration


def test_learning() -> None:
    assert verdict(doctor.check_learning(True, lambda _: True)) == "ok"
    assert verdict(doctor.check_learning(False, lambda _: False)) == "ok"
    missing = one(doctor.check_learning(True, lambda name: name != "torch"))
    assert missing.verdict == "problem" and "'.[learn]'" in missing.remedy and "torch" in missing.text


@dataclass(frozen=True)
class FakeMachine:
    """Where packages are installed or not, and ports answer or not."""

    installs: bool = True
    answers: bool = True

    def installed(self, package: str) -> bool:
        assert package == "cv2"
        return self.installs

    def connect(self, host: str, port: int) -> None:
        assert (host, port) in (("sensor", 7000), ("::1", 7000), ("cam", 554), ("cam", 8554))
        if not self.answers:
            raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize(
    ("source", "machine", "expected"),
    [
        (NoSource(), FakeMachine(), "ok"),
        (MqttSource(), FakeMachine(), "ok"),
        (FolderSource(path=Path("/")), FakeMachine(), "ok"),
        (FolderSource(path=Path("/none")), FakeMachine(), "problem"),
        (ReplaySource(path=Path("/dev/null")), FakeMachine(), "problem"),
        (CameraSource(device="/dev/null"), FakeMachine(), "ok"),
        (CameraSource(device="/dev/null"), FakeMachine(installs=False), "problem"),
        (CameraSource(device="63"), FakeMachine(), "problem"),
        (CameraSource(device="rtsp://admin:S3cret@cam/live"), FakeMachine(), "ok"),
        (CameraSource(device="rtsp://admin:S3cret@cam:8554/live"), FakeMachine(answers=False), "problem"),
        (CameraSource(device="rtsp://admin:S3cret@cam:x/live"), FakeMachine(), "problem"),
        (CameraSource(device="srt://admin:S3cret@cam"), FakeMachine(), "warning"),
        (SerialSource(device="/dev/null"), FakeMachine(installs=False), "ok"),
        (SerialSource(device="/dev/none"), FakeMachine(), "problem"),
        (SerialSource(url="tcp://sensor:7000"), FakeMachine(), "ok"),
        (SerialSource(url="tcp://[::1]:7000"), FakeMachine(), "ok"),
        (SerialSource(url="tcp://sensor:7000"), FakeMachine(answers=False), "problem"),
    ],
)
def test_source(source: SourceSection, machine: FakeMachine, expected: str) -> None:
    assert verdict(source.check(machine)) == expected


@pytest.mark.parametrize("device", ["rtsp://admin:S3cret@cam/live", "rtsp://admin:S3cret@cam:x/", "srt://u:S3cret@cam"])
@pytest.mark.parametrize("answers", [True, False])
def test_no_finding_shows_the_password_of_a_camera(device: str, answers: bool) -> None:
    camera = CameraSource(device=device)
    found = doctor._guarded("source", lambda: camera.check(FakeMachine(answers=answers)))

    def fails() -> Iterator[Finding]:
        raise OSError(f"{device} is unreachable")

    found += doctor._guarded("source", fails)
    assert len(found) == 2 and all("cam" in f.text and "S3cret" not in f.text + f.remedy for f in found)


def test_what_this_user_may_not_use_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    tty = one(SerialSource(device="/dev/null").check(FakeMachine()))
    assert tty.verdict == "problem" and "dialout" in tty.remedy
    assert verdict(FolderSource(path=tmp_path).check(FakeMachine())) == "problem"


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o600, "ok"), (0o640, "warning"), (0o604, "problem"), (0o644, "problem")]
)
def test_secrets_are_private(tmp_path: Path, mode: int, expected: str) -> None:
    key, file = tmp_path / "key", tmp_path / "edgeear.toml"
    for path in (key, file):
        path.write_text("x")
        path.chmod(mode)
    assert verdict(doctor.check_secrets(Config(mqtt=MqttSection(tls=True, cert="c", key=key)), None)) == expected
    with_password = load_config(None, {"EDGEEAR_MQTT__USERNAME": "a", "EDGEEAR_MQTT__PASSWORD": "hunter2"})
    found = one(doctor.check_secrets(with_password, file))
    assert found.verdict == expected and "hunter2" not in str(found)


def test_a_key_that_is_not_there_is_told(tmp_path: Path) -> None:
    config = Config(mqtt=MqttSection(tls=True, cert="c", key=tmp_path / "none"))
    assert verdict(doctor.check_secrets(config, None)) == "problem"
    assert verdict(doctor.check_secrets(Config(), tmp_path / "edgeear.toml")) == "ok"


# ------------------------------------------------------------------------------------ certificates, broker


def openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def certificate(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files = ("-keyout", str(key), "-out", str(cert))
    openssl("req", "-x509", *curve, "-subj", "/CN=test", "-addext", "subjectAltName=DNS:localhost", *files, *more)
    return cert, key


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"), "sound", "-days", "90")


@pytest.mark.parametrize("days", ["1", "5000", "20000"])  # two forms of time: before 2050, and after
def test_validity_is_what_openssl_says(tmp_path: Path, days: str) -> None:
    cert, _ = certificate(tmp_path, "a", "-days", days)
    shown = ssl._ssl._test_decode_cert(str(cert))  # type: ignore[attr-defined]
    expected = Validity(*(float(ssl.cert_time_to_seconds(shown[key])) for key in ("notBefore", "notAfter")))
    assert validity(cert.read_text()) == expected and expected.end - expected.start == int(days) * DAY


@given(st.binary(max_size=80))
@example(b"")
def test_what_is_no_certificate_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        validity(ssl.DER_cert_to_PEM_cert(data))
    with pytest.raises(FormatError):
        validity(data.decode("latin-1"))


def test_damaged_certificates_are_one_kind_of_error(pair: tuple[Path, Path]) -> None:
    der = ssl.PEM_cert_to_DER_cert(pair[0].read_text())
    for length in range(0, 200, 3):
        with pytest.raises(FormatError):
            validity(ssl.DER_cert_to_PEM_cert(der[:length]))


def test_own_certificate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    end = validity(pair[0].read_text()).end
    times = {"ok": end - 60 * DAY, "warning": end - 10 * DAY, "problem": end + 1}
    for expected, now in times.items():
        assert verdict(doctor.check_certificate(pair[0], now)) == expected
    early = one(doctor.check_certificate(pair[0], end - 100 * DAY))
    assert early.verdict == "problem" and "clock" in early.remedy
    assert verdict(doctor.check_certificate(tmp_path / "none", NOW)) == "problem"
    assert verdict(doctor.check_certificate(pair[1], NOW)) == "problem"
    assert list(doctor.check_certificate(None, NOW)) == []


@contextmanager
def served(pair: tuple[Path, Path] | None) -> Iterator[int]:
    """A listener on loopback that does a TLS handshake with one client."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def shake() -> None:
            connection, _ = server.accept()
            with connection:
                if pair is None:
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*pair)
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    return  # the client refused the certificate, as the test expects

        thread = threading.Thread(target=shake, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        thread.join(30)


def test_a_broker_over_tls_shows_its_certificate(pair: tuple[Path, Path]) -> None:
    with served(pair) as port:
        found = probes.broker(MqttSection(host="localhost", port=port, ca=pair[0]))
    assert found == validity(pair[0].read_text())


def test_a_broker_in_the_clear_answers() -> None:
    with served(None) as port:
        assert probes.broker(MqttSection(host="127.0.0.1", port=port)) is None


def test_a_certificate_that_nobody_signed_or_of_another_name_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = certificate(tmp_path, "other")
    for host, ca, word in (("localhost", other, "mqtt.ca"), ("127.0.0.1", pair[0], "mqtt.host")):
        with served(pair) as port:
            found = one(doctor.check_broker(MqttSection(host=host, port=port, ca=ca), probes.broker, NOW))
        assert found.verdict == "problem" and word in found.remedy, found


def refused(code: int, message: str) -> ssl.SSLCertVerificationError:
    """The error by which Python reports that OpenSSL refused a broker's certificate."""
    error = ssl.SSLCertVerificationError(1, message)
    error.verify_code, error.verify_message = code, message
    return error


def answering(error: OSError | None, shown: Validity | None = None) -> Callable[[MqttSection], Validity | None]:
    def call(_: MqttSection) -> Validity | None:
        if error is not None:
            raise error
        return shown

    return call


@pytest.mark.parametrize(
    ("error", "text", "remedy"),
    [
        (socket.gaierror(-2, "unknown"), "name is not known", "mqtt.host"),
        (ConnectionRefusedError(111, "Connection refused"), "refused", "start the broker"),
        (TimeoutError("timed out"), "no answer", "firewall"),
        (ssl.SSLError(1, "wrong version number"), "TLS failed", "8883"),
        (refused(10, "certificate has expired"), "expired", "clock"),
        (refused(9, "certificate is not yet valid"), "not yet valid", "clock"),
        (FileNotFoundError(2, "No such file or directory"), "No such file", "correct"),
    ],
)
def test_a_broker_that_does_not_answer(error: OSError, text: str, remedy: str) -> None:
    found = one(doctor.check_broker(MqttSection(), answering(error), NOW))
    assert found.verdict == "problem" and text in found.text and remedy in found.remedy


def test_a_broker_that_answers() -> None:
    assert verdict(doctor.check_broker(MqttSection(), answering(None), NOW)) == "ok"
    assert verdict(doctor.check_broker(MqttSection(enabled=False), answering(OSError()), NOW)) == "ok"
    clear = MqttSection(username="a", password="hunter2")
    found = one(doctor.check_broker(clear, answering(None), NOW))
    assert found.verdict == "warning" and "TLS" in found.remedy and "hunter2" not in str(found)
    for end, expected in ((NOW + 90 * DAY, "ok"), (NOW + DAY, "warning"), (NOW - 1, "problem")):
        shown = Validity(NOW - 400 * DAY, end)
        assert verdict(doctor.check_broker(MqttSection(tls=True), answering(None, shown), NOW)) == expected


# --------------------------------------------------------------------------------------------------- whole


def test_the_whole_examination_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "e.onnx").write_bytes(tiny_models.sound())
    env = {"EDGEEAR_DEVICE__STATE": str(tmp_path / "state"), "EDGEEAR_DEVICE__ENCODER": str(tmp_path / "e.onnx")}
    found = doctor.diagnose(load_config(None, {**env, "EDGEEAR_MQTT__ENABLED": "false"}), clock=lambda: NOW)
    names = list(dict.fromkeys(finding.check for finding in found))
    assert names[:7] == ["cpu", "cores", "memory", "clock", "state", "disk", "encoder"]
    assert names[7:] == ["store", "outbox", "learning", "source", "secrets", "broker"]
    assert not any("could not be checked" in finding.text for finding in found)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("broken", ["cores", "encoder"])
def test_a_check_that_fails_itself_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    monkeypatch.setattr(probes, "encoder", lambda *_: facts(ms=None))
    monkeypatch.setattr(probes, broken, lambda *_: 1 // 0)
    found = doctor.diagnose(Config(mqtt=MqttSection(enabled=False)), clock=lambda: NOW)
    (failed,) = [finding for finding in found if finding.check == broken]
    assert failed.verdict == "warning" and "ZeroDivisionError" in failed.text and found[-1].check == "broker"
    assert sum("ZeroDivisionError" in finding.text for finding in found) == 1


def test_exit_code() -> None:
    ok, warning, problem = (Finding("x", v, "") for v in ("ok", "warning", "problem"))
    assert (exit_code([]), exit_code([ok, warning]), exit_code([ok, problem, warning])) == (0, 0, 1)
