"""The daemon's configuration: precedence, messages that name every fault and no secret, and the file of `init`."""

from __future__ import annotations

import os
import re
import socket
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from device.daemon.config import init
from device.daemon.config.init import commented_toml, write_config
from device.daemon.config.settings import Config, load_config, sections
from device.daemon.sources.camera import CameraSource
from edgeear.errors import DeviceError, UsageError


def written(folder: Path, text: str) -> Path:
    path = folder / "edgeear.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path | None = None, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_config(path, env or {})
    return str(caught.value).split("\n  ")[1:]


def test_nothing_given_is_all_defaults() -> None:
    assert load_config(None, {}) == Config()


def test_the_process_environment_is_read_only_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEAR_MQTT__HOST", "elsewhere")
    assert Config().mqtt.host == load_config(None, {}).mqtt.host == "localhost"
    assert load_config(None).mqtt.host == "elsewhere"


def test_the_environment_wins_key_by_key(tmp_path: Path) -> None:
    path = written(tmp_path, '[mqtt]\nhost = "file"\nport = 1\n[source]\nkind = "camera"\ndevice = 0\n')
    env = {"EDGEEAR_MQTT__HOST": "env", "edgeear_telemetry__predictions": "true", "EDGEEAR_SOURCE__FPS": ""}
    config = load_config(path, env)
    assert (config.mqtt.host, config.mqtt.port, config.telemetry.predictions) == ("env", 1, True)
    assert config.source == CameraSource(device="0", fps=5.0)


def test_other_variables_are_left_alone() -> None:
    env = {"EDGEEAR_CACHE": "/x", "EDGEEAR_DATA": "", "EDGEEAR_MQTT": "{bad", "HOME": "/", "MQTT__PORT": "x"}
    assert load_config(None, env) == Config()


@pytest.mark.parametrize("given", ['"5"', "5", '"3.1.1"'])
def test_the_protocol_may_be_a_number(tmp_path: Path, given: str) -> None:
    assert load_config(written(tmp_path, f"[mqtt]\nprotocol = {given}"), {}).mqtt.protocol == given.strip('"')


def test_every_fault_is_told_with_key_value_limit_and_remedy(tmp_path: Path) -> None:
    text = (
        '[mqtt]\nport = 70000\nhots = "x"\n[source]\nkind = "foldr"\nmax_age_s = nan\n[sauce]\n[learning]\nnice = 1.5'
    )
    env = {"EDGEEAR_OUTBOX__MAX_MB": "0", "EDGEEAR_MQT__HOST": "x", "EDGEEAR_DEVICE__NMAE": "x"}
    told = faults(written(tmp_path, text), env)
    for start, end in (
        ("mqtt.port = 70000: must be at most 65535", "for example port = 1883"),
        ("mqtt.hots: no such key", "did you mean host?"),
        ("source.kind = 'foldr': must be one of 'none', 'folder'", "for example kind = 'none'"),
        ("source.max_age_s = nan: must be finite", "for example max_age_s = 2.0"),
        ("sauce: no such section", "did you mean source?"),
        ("learning.nice = 1.5: must be a valid integer", "for example nice = 19"),
        ("outbox.max_mb = '0' (from EDGEEAR_OUTBOX__MAX_MB): must be at least 1", "for example max_mb = 64"),
        ("EDGEEAR_MQT__HOST: no such section", "did you mean mqtt?"),
        ("device.nmae (from EDGEEAR_DEVICE__NMAE): no such key", "did you mean name?"),
    ):
        assert [line for line in told if line.startswith(start) and line.endswith(end)], (start, told)
    assert len(told) == 9


BAD: list[tuple[str, str, list[object]]] = [
    ("device", "site", ["", "a/b", "a b", "+", "#", "x" * 65, 3]),
    ("device", "name", ["", "a/b", "ä", "a\n"]),
    ("device", "state", ["", "a\0b", 7]),
    ("device", "threads", [0, 65]),
    ("device", "seed", [-1, 2**31]),
    ("source", "queue", [0, 1025]),
    ("source", "fps", [0, -1, 241, float("inf")]),
    ("source", "max_age_s", [0, 3601, float("nan")]),
    ("source", "baud", [0, 5_000_000]),
    ("source", "url", ["sensor:7000", "tcp://sensor", "udp://a:1", "tcp://u:p@a:1"]),
    ("source", "device", [""]),
    ("mqtt", "host", ["", "a b", "mqtt://a"]),
    ("mqtt", "port", [0, 65536, "x", True]),
    ("mqtt", "protocol", ["4", 4]),
    ("mqtt", "keepalive_s", [4, 3601]),
    ("mqtt", "session_expiry_s", [-1, 2**32]),
    ("mqtt", "receive_maximum", [0, 65536]),
    ("mqtt", "inflight", [0, 65536]),
    ("learning", "labels", [4]),
    ("learning", "probation", [0]),
    ("learning", "foreign", [0, 1.1]),
    ("learning", "label_wait_s", [-1]),
    ("learning", "budget", ["huge"]),
    ("learning", "specs", [0]),
    ("learning", "time_limit_s", [0]),
    ("learning", "memory_limit_mb", [100]),
    ("learning", "nice", [-1, 20]),
    ("telemetry", "period_s", [0.5]),
    ("outbox", "max_mb", [0]),
    ("outbox", "max_count", [99]),
    ("outbox", "max_age_s", [59]),
    ("metrics", "port", [-1, 65536]),
]


@pytest.mark.parametrize(("section", "key", "value"), [(s, k, value) for s, k, values in BAD for value in values])
def test_ranges(tmp_path: Path, section: str, key: str, value: object) -> None:
    text = init._toml(value) if not isinstance(value, float) else str(value)
    (told,) = faults(written(tmp_path, f"[{section}]\n{key} = {text}"))
    assert told.startswith(f"{section}.{key} = ")


def test_every_key_is_bounded_or_closed() -> None:
    for name, model in sections().items():
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
            if field.annotation in (int, float):
                bounds = {kind for rule in field.metadata for kind in ("ge", "gt", "le") if hasattr(rule, kind)}
                assert "le" in bounds and len(bounds) == 2, f"{name}.{key}"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[source]\nkind = "folder"', "source.path"),
        ('[source]\nkind = "replay"', "source.path"),
        ('[source]\nkind = "camera"', "source.device"),
        ('[source]\nkind = "serial"', "source.device, url"),
        ('[source]\nkind = "serial"\ndevice = "a"\nurl = "tcp://a:1"', "source.device, url"),
        ('[source]\nkind = "mqtt"\n[mqtt]\nenabled = false', "source.kind"),
        ('[mqtt]\ncert = "a"\nca = "b"', "mqtt.key"),
        ('[mqtt]\nkey = "a"\nca = "b"', "mqtt.cert"),
        ('[mqtt]\ncert = "a"\nkey = "b"', "mqtt.tls"),
        ('[mqtt]\npassword = "x"', "mqtt.username"),
        ("mqtt = 3", "mqtt"),
    ],
)
def test_what_belongs_together_is_asked_for(tmp_path: Path, text: str, word: str) -> None:
    (told,) = faults(written(tmp_path, text))
    assert told.startswith(word)


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, {"EDGEEAR_DEVICE__STATE": "~/x"}).device.state == Path("/home/me/x")


def test_it_is_frozen() -> None:
    config = Config()
    for owner, name in ((config, "mqtt"), (config.mqtt, "port")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, name, 1)


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f'[mqtt]\npassword = ["{SECRET}"]',
        f'[mqtt]\npassword = {{a = "{SECRET}"}}',
        f'[mqtt]\npasword = "{SECRET}"',
        f'mqtt = "{SECRET}"',
        f'password = "{SECRET}"',
        f'[mqtt]\npassword = "{SECRET}"',
        f'[mqtt]\npassword = "{SECRET}\n',
        f'[mqtt]\nusername = "a"\npassword = "{SECRET}"\nport = 0',
    ],
)
def test_no_secret_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, text), {})
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_secret_is_in_no_repr() -> None:
    config = load_config(None, {"EDGEEAR_MQTT__PASSWORD": SECRET, "EDGEEAR_MQTT__USERNAME": "a"})
    assert config.mqtt.password is not None and config.mqtt.password.get_secret_value() == SECRET
    assert SECRET not in repr(config) + str(config) + str(config.model_dump()) + config.model_dump_json()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"[mqtt]\nport = \n", "line 2"),
        (b"[mqtt]\n\n[mqtt]\n", "line 3"),
        (b"[mqtt]\nhost = '\xff'\n", "line 2 is not UTF-8"),
        (b"a = " + b"[" * 5000, "nested"),
        (b"#" * (1 << 20) + b"\n", "1048576 bytes"),
    ],
)
def test_a_file_that_is_no_toml_is_named_with_its_line(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=word) as caught:
        load_config(path, {})
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="edgeear init"):
        load_config(tmp_path / "none.toml", {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
SECTION = st.sampled_from([*sections(), "x", ""])
KEY = st.sampled_from([key for model in sections().values() for key in model.model_fields]) | st.text(max_size=4)


@given(st.dictionaries(SECTION, st.dictionaries(KEY, JSON, max_size=3) | JSON, max_size=3))
def test_any_table_gives_a_configuration_or_usage_errors(table: dict[str, Any]) -> None:
    variables: dict[str, str] = {}
    for section, values in table.items():
        for key, value in (values if isinstance(values, dict) else {"": values}).items():
            variables[f"EDGEEAR_{section}__{key}"] = str(value)
    try:
        assert load_config(None, variables).mqtt
    except UsageError as error:
        assert "fault" in str(error)


# ------------------------------------------------------------------------------------------- the written file


def test_the_written_file_is_the_defaults() -> None:
    table = tomllib.loads(commented_toml())
    assert table["device"] == {"site": "site", "name": "board"} and not any(
        table[s] for s in sections() if s != "device"
    )
    assert Config(**table) == Config()


def test_every_line_that_could_be_uncommented_is_right() -> None:
    table = tomllib.loads(re.sub("(?m)^#(?=[a-z])", "", commented_toml()))
    assert {name: list(values) for name, values in table.items()} == {
        name: list(model.model_fields) for name, model in sections().items()
    }
    assert Config(**table).mqtt.host == "localhost"
    for name, model in sections().items():
        written, plain = model(**table[name]), model()
        for key, field in model.model_fields.items():
            if field.default is not None:
                assert getattr(written, key) == getattr(plain, key)
            else:
                assert getattr(written, key) is not None


def test_the_file_says_ranges_and_choices() -> None:
    text = commented_toml()
    assert "(1 to 65,535)" in text and "One of small, medium, large." in text
    assert max(map(len, text.splitlines())) <= 100


def test_init_writes_a_private_file_and_refuses_to_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "north gate.example.org")
    path = tmp_path / "edgeear.toml"
    write_config(path)
    assert load_config(path, {}).device.name == "north-gate"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        write_config(path)
    assert path.read_text() == "mine"
    write_config(path, force=True)
    assert load_config(path, {}).device.name == "north-gate" and os.listdir(tmp_path) == ["edgeear.toml"]


def test_init_does_not_follow_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--force"):
        write_config(tmp_path / "link")


def test_init_names_the_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="folder"):
        write_config(tmp_path / "none" / "edgeear.toml")


@pytest.mark.parametrize("host", ["", "...", "-", "ß"])
def test_a_host_without_a_usable_name_is_called_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    write_config(tmp_path / "a")
    assert load_config(tmp_path / "a", {}).device.name == "board"


# ------------------------------------------------------------------------------------ files of other systems


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_saved_by_another_system_loads_the_same(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    text = end.join(["[device]", 'site = "hall"', "# Größe", "[mqtt]", "enabled = false", ""])
    path = tmp_path / "edgeear.toml"
    path.write_bytes((mark + text).encode(encoding))
    config = load_config(path, {})
    assert config.device.site == "hall" and not config.mqtt.enabled


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[device]\n".encode("utf-16-le"), "line 1 holds a zero byte; save the file as UTF-8"),
        ("[device]\n".encode("utf-32"), "line 1 holds a zero byte; save the file as UTF-8"),
        (b"[device]\nsite = 'a'\n" + bytes(4096), "line 3 holds a zero byte; save the file as UTF-8"),
        ("\ufeff[device]".encode("utf-16-le")[:-1], "is not UTF-16"),
        (b"\xef\xbb\xbf[device]\nsite = '\xff'", "line 2 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_one_fault_with_its_remedy(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "edgeear.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_config(path, {})
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- secrets


def test_the_password_of_a_camera_is_in_no_message_and_no_repr(tmp_path: Path) -> None:
    text = '[source]\nkind = "camera"\ndevice = "rtsp://admin:S3cret@cam/live?token=S3cret"\n'
    config = load_config(written(tmp_path, text), {})
    assert config.source.model_dump()["device"] == "rtsp://admin:S3cret@cam/live?token=S3cret"
    assert "S3cret" not in f"{config!r}{config}{config.source!r}" and "cam/live" in repr(config.source)
    (fault,) = faults(written(tmp_path, text.replace("device", "fps")))[:1]
    assert "source.fps" in fault and "S3cret" not in fault
