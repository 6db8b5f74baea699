"""The shipped deployment, as shipped: the PKI script's certificates against a real mosquitto with the shipped
configuration and access list (only ports and paths differ), and the other files against the formats that read them."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.daemon.metrics import Metrics
from tests.support.broker import Mosquitto, free_port, mosquitto

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
GRANTED, NO_SUBSCRIBERS, NOT_AUTHORIZED = 0x00, 0x10, 0x87
WAIT_S = 10
HOST = "localhost"
ONE, TWO, OPERATOR = "devices/hall/cam-1", "devices/hall/cam-2", "operators/hall/alice"


def pki(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(DEPLOY / "pki.sh"), "--dir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@dataclass(frozen=True)
class Fleet:
    """A broker with its two doors, and the certificates that it admits. `broker.port` is the operators': mosquitto
    opens it last, so that whoever waits for it finds both open."""

    broker: Mosquitto
    boards: int
    pki: Path

    def port(self, identity: str) -> int:
        return self.broker.port if identity.startswith("operators/") else self.boards


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    made = folder / "pki"
    commands = ["init", "broker localhost 127.0.0.1", "device hall/cam-1", "device hall/cam-2", "device hall/stolen"]
    for command in [*commands, "device yard/cam-1", "operator hall alice", "operator yard bob"]:
        done = pki(made, *command.split())
        assert done.returncode == 0, done.stderr
    # A neighbour of the same name, from the same script, whom nobody here has certified.
    for command in ("init", "device hall/cam-1", "operator hall alice"):
        assert pki(folder / "foreign", *command.split()).returncode == 0
    boards = free_port()
    with mosquitto(folder / "broker", shipped(made, boards)) as broker:
        yield Fleet(broker, boards, made)


def shipped(made: Path, boards: int) -> str:
    """The shipped configuration with the ports and paths of this test, for `Mosquitto` to fill in."""
    config = (DEPLOY / "mosquitto/mosquitto.conf").read_text()
    for theirs, ours in {
        "listener 8883\n": f"listener {boards}\n",
        "listener 8884\n": "listener {port}\n",
        "/mosquitto/config/tls/": f"{made}/broker/",
        "/mosquitto/config/acl\n": f"{DEPLOY}/mosquitto/acl\n",
        "/mosquitto/data/": "{folder}/",
    }.items():
        assert theirs in config
        config = config.replace(theirs, ours)
    return config


def context(folder: Path, authority: Path, *, certificate: bool = True) -> ssl.SSLContext:
    """What a client of `folder` brings to the handshake, host names and purposes checked."""
    made = ssl.create_default_context(cafile=authority / "ca.crt")
    role = "operator" if (folder / "operator.crt").exists() else "device"
    if certificate:
        made.load_cert_chain(folder / f"{role}.crt", folder / f"{role}.key")
    return made


class Client:
    """A paho client of one identity whose callbacks are queues."""

    def __init__(self, fleet: Fleet, identity: str, client_id: str = "", will: str | None = None) -> None:
        self.connects: queue.Queue[int] = queue.Queue()
        self.acks: queue.Queue[int] = queue.Queue()
        self.granted: queue.Queue[int] = queue.Queue()
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.told: dict[str, int] = {}
        self._paho = paho = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5, reconnect_on_failure=False
        )
        paho.tls_set_context(context(fleet.pki / identity, fleet.pki / identity))
        if will is not None:
            paho.will_set(will, b"forged", qos=1)
        paho.on_connect = self._on_connect
        paho.on_publish = lambda _c, _u, _m, reason, _p: self.acks.put(reason.value)
        paho.on_subscribe = lambda _c, _u, _m, reasons, _p: self.granted.put(reasons[0].value)
        paho.on_message = lambda _c, _u, message: self.messages.put((message.topic, bytes(message.payload)))
        paho.connect(HOST, fleet.port(identity))
        paho.loop_start()

    def _on_connect(self, _c: object, _u: object, _f: object, reason: ReasonCode, told: Properties | None) -> None:
        self.told = told.json() if told is not None else {}  # type: ignore[no-untyped-call]
        self.connects.put(reason.value)

    def publish(
        self, topic: str, payload: bytes = b"{}", properties: Properties | None = None, *, retain: bool = False
    ) -> int:
        """Publish at QoS 1; the broker's reason code, where granted is granted even if nobody listens."""
        self._paho.publish(topic, payload, qos=1, retain=retain, properties=properties)
        code = self.acks.get(timeout=WAIT_S)
        return GRANTED if code == NO_SUBSCRIBERS else code

    def subscribe(self, topic: str) -> None:
        self._paho.subscribe(topic, qos=1)
        assert self.granted.get(timeout=WAIT_S) == 1

    def next(self) -> tuple[str, bytes]:
        return self.messages.get(timeout=WAIT_S)

    def close(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()
        # paho closes its last sockets when it is freed: now, rather than when the collector comes by.
        self._paho.on_connect = self._paho.on_publish = self._paho.on_subscribe = self._paho.on_message = None
        del self._paho


@contextlib.contextmanager
def connected(fleet: Fleet, identity: str, client_id: str = "", will: str | None = None) -> Iterator[Client]:
    client = Client(fleet, identity, client_id, will)
    try:
        assert client.connects.get(timeout=WAIT_S) == GRANTED
        yield client
    finally:
        client.close()


def topic(device: str, *levels: str) -> str:
    return "/".join(("edgeear/v1", device, *levels))


# --- Who is let in ---------------------------------------------------------------------------------------------------


def refusal(port: int, tls: ssl.SSLContext) -> str:
    """The TLS alert that answers a handshake; empty where it succeeds. In TLS 1.2 the alert is part of the handshake,
    in 1.3 the answer to the first bytes sent, which a closed connection may outrun."""
    if tls.maximum_version is ssl.TLSVersion.MAXIMUM_SUPPORTED:
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with socket.create_connection((HOST, port), WAIT_S) as raw, tls.wrap_socket(raw, server_hostname=HOST):
            return ""
    except ssl.SSLError as error:
        return repr(error)


def admitted(port: int, tls: ssl.SSLContext) -> bool:
    """Whether CONNECT is answered by CONNACK, over TLS 1.3."""
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    connect = bytes.fromhex("101000044d5154540402003c000461206964")
    try:
        with socket.create_connection((HOST, port), WAIT_S) as raw, tls.wrap_socket(raw, server_hostname=HOST) as link:
            link.sendall(connect)
            return link.recv(4) == bytes.fromhex("20020000")
    except OSError:
        return False


def test_certified_are_let_in_and_others_refused_at_tls(fleet: Fleet) -> None:
    foreign, here, port = fleet.pki.parent / "foreign" / ONE, fleet.pki / ONE, fleet.boards
    assert refusal(port, context(here, here)) == ""
    assert "UNKNOWN_CA" in refusal(port, context(foreign, here))
    assert "HANDSHAKE_FAILURE" in refusal(port, context(here, here, certificate=False))
    assert admitted(port, context(here, here))
    assert not admitted(port, context(foreign, here))
    assert not admitted(port, context(here, here, certificate=False))


def test_operators_door_and_boards_door_take_their_own_only(fleet: Fleet) -> None:
    board, operator, foreign = fleet.pki / ONE, fleet.pki / OPERATOR, fleet.pki.parent / "foreign" / OPERATOR
    assert admitted(fleet.broker.port, context(operator, operator))
    assert refusal(fleet.broker.port, context(operator, operator)) == ""
    for stranger in (board, foreign):
        assert "UNKNOWN_CA" in refusal(fleet.broker.port, context(stranger, board))
        assert not admitted(fleet.broker.port, context(stranger, board))
    assert "UNKNOWN_CA" in refusal(fleet.boards, context(operator, operator))


def test_tls_1_1_is_refused(fleet: Fleet) -> None:
    old = context(fleet.pki / ONE, fleet.pki / ONE)
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")  # ours would not even offer it otherwise
    assert "PROTOCOL_VERSION" in refusal(fleet.boards, old)


def test_board_cannot_pass_for_the_broker(fleet: Fleet) -> None:
    """A stolen board's certificate names no host and is not for servers; a client checks both."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(fleet.pki / ONE / "device.crt", fleet.pki / ONE / "device.key")
    client = context(fleet.pki / TWO, fleet.pki / TWO)
    client.check_hostname = False
    ours, theirs = (ssl.MemoryBIO() for _ in range(2))
    one, other = client.wrap_bio(theirs, ours), server.wrap_bio(ours, theirs, server_side=True)
    for side in (one, other):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError, match=r"unsuitable certificate purpose|unsupported certificate"):
        one.do_handshake()


# --- What a board may do ---------------------------------------------------------------------------------------------

UP = ("status", "telemetry", "event", "response", "response/alice", "prediction", "label-request")


def test_board_writes_its_own_topics_and_operator_reads_them(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as operator, connected(fleet, ONE) as board:
        operator.subscribe("edgeear/v1/hall/#")
        for level in UP:
            assert board.publish(topic("hall/cam-1", level)) == GRANTED
            assert operator.next() == (topic("hall/cam-1", level), b"{}")


@pytest.mark.parametrize("device", ["hall/cam-2", "yard/cam-1", "hall"])
def test_board_cannot_write_elsewhere(fleet: Fleet, device: str) -> None:
    with connected(fleet, OPERATOR) as operator, connected(fleet, ONE) as board:
        operator.subscribe("edgeear/v1/hall/#")
        for level in UP:
            assert board.publish(topic(device, level)) == NOT_AUTHORIZED
        assert board.publish(topic("hall/cam-1", "event"), b"last") == GRANTED
        assert operator.next() == (topic("hall/cam-1", "event"), b"last"), "something refused came through"


@pytest.mark.parametrize("device", ["hall/cam-1", "hall/cam-2"])
def test_board_cannot_command_anyone(fleet: Fleet, device: str) -> None:
    with connected(fleet, ONE) as board:
        assert board.publish(topic(device, "command/forget")) == NOT_AUTHORIZED
        assert board.publish(topic(device, "frame")) == NOT_AUTHORIZED


def test_board_gets_its_commands_and_nobody_elses(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as operator, connected(fleet, ONE) as one, connected(fleet, TWO) as two:
        for board in (one, two):
            board.subscribe("#")
        asks = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        asks.ResponseTopic = topic("hall/cam-1", "response/alice")
        asks.CorrelationData = b"7"
        assert operator.publish(topic("hall/cam-1", "command/report"), b"for one", asks) == GRANTED
        assert operator.publish(topic("hall/cam-1", "frame"), b"a frame") == GRANTED
        assert one.next() == (topic("hall/cam-1", "command/report"), b"for one")
        assert one.next() == (topic("hall/cam-1", "frame"), b"a frame")
        assert one.publish(topic("hall/cam-1", "response/alice"), b"answer") == GRANTED
        assert operator.publish(topic("hall/cam-2", "command/report"), b"for two") == GRANTED
        assert two.next() == (topic("hall/cam-2", "command/report"), b"for two")


def test_board_cannot_read_what_others_report(fleet: Fleet) -> None:
    with connected(fleet, ONE) as one, connected(fleet, TWO) as two, connected(fleet, OPERATOR) as operator:
        two.subscribe("#")
        for level in UP:
            assert one.publish(topic("hall/cam-1", level)) == GRANTED
        assert operator.publish(topic("hall/cam-2", "command/report"), b"last") == GRANTED
        assert two.next() == (topic("hall/cam-2", "command/report"), b"last")


def test_last_will_cannot_speak_for_another(fleet: Fleet) -> None:
    """The broker publishes it, but asks the same list."""
    with connected(fleet, OPERATOR) as operator:
        operator.subscribe("edgeear/v1/hall/#")
        with connected(fleet, ONE, will=topic("hall/cam-2", "status")), connected(fleet, ONE) as again:
            # The second connection took the session over, at which the first one's will is due.
            assert again.publish(topic("hall/cam-1", "event"), b"last") == GRANTED
        assert operator.next() == (topic("hall/cam-1", "event"), b"last")


def test_own_last_will_is_published(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as operator:
        operator.subscribe("edgeear/v1/hall/#")
        with connected(fleet, ONE, will=topic("hall/cam-1", "status")), connected(fleet, ONE):
            assert operator.next() == (topic("hall/cam-1", "status"), b"forged")


def test_board_cannot_take_over_anothers_session(fleet: Fleet) -> None:
    """The client id is the certificate's name, whatever the client says."""
    with connected(fleet, ONE, "hall/cam-1") as one, connected(fleet, TWO, "hall/cam-1") as two:
        assert two.publish(topic("hall/cam-2", "event")) == GRANTED
        assert one.publish(topic("hall/cam-1", "event")) == GRANTED
        assert one.connects.empty(), "the first one had to connect again"


def test_discovery_is_each_boards_own(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as assistant, connected(fleet, ONE) as board:
        assistant.subscribe("homeassistant/#")
        for other in ("hall/cam-2", "yard/cam-1", "cam-1", "hall"):
            assert board.publish(f"homeassistant/device/{other}/config") == NOT_AUTHORIZED
        assert board.publish("homeassistant/device/hall/cam-1/config") == GRANTED
        assert assistant.next() == ("homeassistant/device/hall/cam-1/config", b"{}")


# --- What an operator may do -----------------------------------------------------------------------------------------


def test_operators_are_of_one_site(fleet: Fleet) -> None:
    with connected(fleet, "operators/yard/bob") as bob, connected(fleet, ONE) as board:
        bob.subscribe("#")
        assert bob.publish(topic("hall/cam-1", "command/report")) == NOT_AUTHORIZED
        assert board.publish(topic("hall/cam-1", "event")) == GRANTED
        assert bob.publish(topic("yard/cam-1", "command/report"), b"own") == GRANTED
        assert bob.next() == (topic("yard/cam-1", "command/report"), b"own")


def test_operators_do_not_speak_for_boards(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as operator:
        for level in set(UP) - {"status"}:
            assert operator.publish(topic("hall/cam-1", level)) == NOT_AUTHORIZED


def test_operators_of_one_name_do_not_disturb_each_other(fleet: Fleet) -> None:
    with connected(fleet, OPERATOR) as one, connected(fleet, OPERATOR) as two:
        for operator in (one, two):
            assert operator.publish(topic("hall/cam-1", "command/report")) == GRANTED
        assert one.connects.empty()


# --- The broker's limits, and its memory -----------------------------------------------------------------------------


def test_limits_are_told_to_every_client(fleet: Fleet) -> None:
    with connected(fleet, ONE) as board, connected(fleet, OPERATOR) as operator:
        for client in (board, operator):
            assert client.told["MaximumPacketSize"] == 8 * 2**20 + 2**16
            assert client.told["ReceiveMaximum"] == 64


def test_status_of_a_board_survives_the_broker(fleet: Fleet) -> None:
    with connected(fleet, ONE) as board:
        assert board.publish(topic("hall/cam-1", "status"), b"kept", retain=True) == GRANTED
    fleet.broker.stop()
    fleet.broker.start()
    with connected(fleet, OPERATOR) as operator:
        operator.subscribe("edgeear/v1/hall/+/status")
        assert operator.next() == (topic("hall/cam-1", "status"), b"kept")
        assert operator.publish(topic("hall/cam-1", "status"), b"", retain=True) == GRANTED


def test_revoked_board_is_refused_after_a_reload(fleet: Fleet) -> None:
    folder = fleet.pki / "devices/hall/stolen"
    assert refusal(fleet.boards, context(folder, folder)) == ""
    assert pki(fleet.pki, "revoke", str(folder)).returncode == 0
    fleet.broker.stop()
    fleet.broker.start()
    assert "CERTIFICATE_REVOKED" in refusal(fleet.boards, context(folder, folder))
    assert refusal(fleet.boards, context(fleet.pki / ONE, fleet.pki / ONE)) == ""


# --- The PKI script --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and mode."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in files}


def test_pki_keeps_what_exists(fleet: Fleet) -> None:
    before = contents(fleet.pki)
    for command in ("init", "broker localhost 127.0.0.1", "device hall/cam-1", "operator hall alice"):
        done = pki(fleet.pki, *command.split())
        assert done.returncode == 0 and "kept" in done.stderr and "made" not in done.stderr
    refused = pki(fleet.pki, "broker", "elsewhere.example")
    assert refused.returncode == 1 and "is for DNS:localhost,IP:127.0.0.1, not DNS:elsewhere.example" in refused.stderr
    assert contents(fleet.pki) == before


def test_pki_keys_are_their_owners_only(fleet: Fleet) -> None:
    modes = {name: mode for name, (_, mode) in contents(fleet.pki).items()}
    keys = {name for name in modes if name.endswith(".key")}
    assert len(keys) == 9 and {modes[name] for name in keys} == {0o600}
    assert {modes[name] for name in modes if name.endswith((".crt", "crl.pem"))} == {0o644}
    assert stat.S_IMODE((fleet.pki / "ca").stat().st_mode) == 0o700
    assert not list(fleet.pki.rglob(".partial-*"))


def test_pki_warns_and_helps() -> None:
    shown = pki(Path("unused"), "--help")
    assert shown.returncode == 0 and "TESTS AND PILOTS" in shown.stdout
    for command in ("init", "broker", "device", "operator", "revoke"):
        assert f"  {command} " in shown.stdout
    assert not Path("unused").exists()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["device", "hall"], "one SITE/DEVICE is needed"),
        (["device", "hall/cam+"], "1 to 64 of A-Z"),
        (["device", "hall/a/b"], "1 to 64 of A-Z"),
        (["device", "hall/../ca"], "1 to 64 of A-Z"),
        (["device", f"hall/{'x' * 60}"], "65 characters"),
        (["operator", "hall/cam-1", "eve"], "1 to 64 of A-Z"),
        (["broker"], "at least one host"),
        (["broker", "a,URI:b"], "not a host name"),
        (["--days", "0", "init"], "from 1 to 9999"),
        (["revoke", "nowhere"], "no device.crt"),
        (["renew"], "unknown command"),
        (["--force", "init"], "unknown option"),
    ],
)
def test_pki_refuses_what_it_cannot_name(fleet: Fleet, command: list[str], complaint: str) -> None:
    before = contents(fleet.pki)
    done = pki(fleet.pki, *command)
    assert done.returncode == 1 and complaint in done.stderr
    assert contents(fleet.pki) == before


def test_pki_needs_its_authorities(tmp_path: Path) -> None:
    done = pki(tmp_path, "device", "hall/cam-1")
    assert done.returncode == 1 and "run init first" in done.stderr and not list(tmp_path.iterdir())


def test_pki_of_a_board_that_another_authority_signed_cannot_be_revoked(fleet: Fleet) -> None:
    done = pki(fleet.pki, "revoke", str(fleet.pki.parent / "foreign" / ONE))
    assert done.returncode == 1 and "did not sign it" in done.stderr


# --- The other files -------------------------------------------------------------------------------------------------


def test_dashboard_shows_every_metric_and_no_other() -> None:
    """Every series a panel asks for is one the daemon serves, and none that it serves is left out."""
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    asked = set(re.findall(r"\bedgeear_\w+", " ".join(t["expr"] for p in panels(dashboard) for t in p["targets"])))
    families = {family.name: family.type for family in Metrics("1").registry.collect()}
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket", "info": "_info"}
    assert asked == {name + suffix[kind] for name, kind in families.items()}


def test_dashboard_can_be_imported() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= dashboard.keys() and "id" not in dashboard
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    cells = [cell for panel in dashboard["panels"] for cell in covered(panel["gridPos"])]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "panels overlap"
    # Any Prometheus will do, and one board can be picked.
    for panel in panels(dashboard):
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]
        assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def covered(place: dict[str, int]) -> list[tuple[int, int]]:
    return [(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])]


def test_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "edgeear.service"
    unit.write_text(SERVICE.replace("/opt/edgeear/bin/edgeear", "/bin/true"))
    checked = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and "edgeear.service" not in checked.stderr, checked.stderr
    weighed = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert weighed.returncode == 0, weighed.stdout[-2000:]  # an exposure above 2.0 of 10


SERVICE = (DEPLOY / "edgeear.service").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "Type=notify",
        "NotifyAccess=main",
        "WatchdogSec=30",
        "Restart=on-failure",
        "StateDirectory=edgeear",
        "ConfigurationDirectory=edgeear",
        "ProtectSystem=strict",
        "OOMPolicy=continue",
        "MemoryDenyWriteExecute=no",
    ],
)
def test_unit_says(line: str) -> None:
    assert line in SERVICE.splitlines()


def test_image_has_both_targets_and_torch_in_one() -> None:
    stages: dict[str, list[str]] = {}
    for line in (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            stages[line.split()[-1]] = [line]
        elif stages and line and not line.startswith("#"):
            stages[list(stages)[-1]].append(line)
    assert list(stages)[-1] == "base", "what is built where no target is named"
    assert stages["base"] == ["FROM runtime AS base", "COPY --from=build /opt/edgeear /opt/edgeear"]
    assert stages["learn"] == ["FROM runtime AS learn", "COPY --from=build-learn /opt/edgeear /opt/edgeear"]
    assert not any("[learn]" in line for line in stages["build"] + stages["runtime"])
    assert any("[learn]" in line for line in stages["build-learn"])
    assert "USER 10001:10001" in stages["runtime"] and any(line.startswith("HEALTHCHECK") for line in stages["runtime"])
    assert "--platform=${BUILDPLATFORM}" in stages["encoder"][0]


def test_every_container_is_hardened_and_finds_its_files() -> None:
    compose = (DEPLOY / "compose.yaml").read_text()
    hardened, services = compose.split("\nservices:\n")
    for line in ("read_only: true", "cap_drop: [ALL]", 'security_opt: ["no-new-privileges:true"]', "pids_limit: 256"):
        assert f"\n  {line}\n" in hardened
    parts = re.split(r"\n\n?(?=  [a-z]+:\n)", "\n" + services.split("\nvolumes:\n")[0])[1:]
    assert [part.split(":")[0].strip() for part in parts] == ["broker", "edgeear", "prometheus", "grafana"]
    assert all("    <<: *hardened\n" in part and "    mem_limit: " in part for part in parts)
    made = {"./pki/broker", "./edgeear.toml"}  # by pki.sh and by `edgeear init`
    sources = set(re.findall(r"source: (\./[\w./-]+)", services)) - made
    assert len(sources) >= 5 and all((DEPLOY / source).exists() for source in sources)
