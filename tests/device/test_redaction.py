"""No text that people or brokers see shows the password of a URL."""

from __future__ import annotations

import logging
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.redaction import RedactedFormatter, redacted

CREDENTIALS = ["admin:S3cret", "S3cret", ":S3cret", "admin:a@S3cret", "a/b:S3cret#?x", "admin:my S3cret", "a:S3%63ret"]


@pytest.mark.parametrize("scheme", ["rtsp://", "RTSPS://", "http://", "mqtt://", "tcp+tls://", "rtsp:/", "x-y:///"])
@pytest.mark.parametrize("credentials", CREDENTIALS)
@pytest.mark.parametrize(
    "around", ["{}", "camera {}: cannot be opened", "KeyError('{}')", "(in file name): {}\nnext line"]
)
def test_credentials_go_and_the_host_stays(scheme: str, credentials: str, around: str) -> None:
    told = redacted(around.format(f"{scheme}{credentials}@cam:554/live"))
    assert told == around.format(f"{scheme}***@cam:554/live")


def test_a_url_inside_a_url_is_redacted_too() -> None:
    inside = quote("rtsp://admin:S3cret@cam/live", safe="")
    told = redacted(f"http://hub/api?src={inside}&name=yard")
    assert "S3cret" not in told and "cam" in told and told.endswith("&name=yard")


@pytest.mark.parametrize(
    "name", ["token", "password", "passwd", "pwd", "pass", "access_token", "api_key", "X-Auth", "auth", "secret", "sig"]
)
def test_the_values_of_secret_parameters_go_and_the_others_stay(name: str) -> None:
    assert redacted(f"http://cam/s?a=1&{name}=S3cret&b=2") == f"http://cam/s?a=1&{name}=***&b=2"
    assert redacted(f"http://cam/s?{name.upper()}=S3cret") == f"http://cam/s?{name.upper()}=***"
    assert "S3cret" not in redacted(f"rtsp://cam:554/user=admin_{name}=S3cret_channel=1")


@pytest.mark.parametrize(
    "text",
    [
        "no frames come: camera rtsp://cam:554/live: cannot be opened",
        "tcp://sensor:7000: no answer in time",
        "a@b.example, 12:30, site/board, author=x, C:\\frames, /srv/a@b.jpg",
        "",
    ],
)
def test_what_holds_no_secret_is_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


@given(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1), st.text(max_size=20))
def test_no_password_of_a_url_survives(password: str, before: str) -> None:
    assert redacted(f"{before} rtsp://admin:<{password}>@cam/").endswith("rtsp://***@cam/")


def test_a_log_record_is_redacted_with_its_traceback() -> None:
    try:
        raise OSError("rtsp://admin:S3cret@cam/ failed")
    except OSError as error:
        told = (type(error), error, error.__traceback__)
    record = logging.LogRecord("edgeear", 40, "", 0, "lost %s", ("rtsp://admin:S3cret@cam/",), told)
    text = RedactedFormatter("%(message)s").format(record)
    assert "S3cret" not in text and text.count("rtsp://***@cam/") >= 2 and "Traceback" in text
