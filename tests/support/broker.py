"""A real mosquitto for the tests, on a free port of loopback, that can be stopped, killed and started again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.needs import need

PLAIN = "listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 0\nmax_queued_messages 0\n"
"""Without persistence; QoS 1 is neither throttled nor dropped by the broker."""
PERSISTENT = PLAIN + "persistence true\npersistence_location {folder}/\nautosave_interval 1800\n"
"""What is queued for a session survives `stop` and `start`."""


class Mosquitto:
    """One broker process, configured by `config`, in which `{port}` and `{folder}` are filled in."""

    def __init__(self, folder: Path, config: str = PLAIN) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "mosquitto.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "mosquitto.conf"
        # Debian's mosquitto run by root would switch to a user that owns nothing here.
        self._config.write_text("user root\n" + config.format(port=self.port, folder=folder))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the broker accepts connections. Raises AssertionError with its log if it does not."""
        need("a broker")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [mosquitto_path(), "-v", "-c", str(self._config)], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)  # its end is the event; a listening socket has none
        self.stop()
        raise AssertionError(f"mosquitto did not start:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Terminate it and wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def reload(self) -> None:
        """Have it read its access list again."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None


@contextlib.contextmanager
def mosquitto(folder: Path, config: str = PLAIN) -> Iterator[Mosquitto]:
    """A running broker, stopped at the end."""
    broker = Mosquitto(folder, config)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def mosquitto_path() -> str:
    """Where mosquitto is; Debian installs it outside the PATH of users."""
    found = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert found, "mosquitto is not installed: apt-get install mosquitto (make test does it where it may)"
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
