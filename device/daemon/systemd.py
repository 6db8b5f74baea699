"""Notifications to systemd: ready, alive, stopping, and a line of status (sd_notify(3)).

Rules of this file:

1. Without `NOTIFY_SOCKET` every call does nothing: the daemon runs the same in a shell, a container or a test.
2. A notification never blocks and never raises: a hanging supervisor must not stop predictions.
3. The loop itself feeds the watchdog, after a turn, at most once in half of its interval, and only in the process that
   systemd watches. A timer thread, or a child process, would feed it although the loop hangs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends to systemd's notification socket. `environment` and `pid` default to those of this process."""

    def __init__(self, environment: Mapping[str, str] | None = None, pid: int | None = None) -> None:
        variables = os.environ if environment is None else environment
        path = variables.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract socket. Other kinds, such as vsock:, are not used for services.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path if path.startswith("/") else ""
        self.watchdog_s = _watchdog_s(variables, os.getpid() if pid is None else pid)
        """Seconds without `alive` after which systemd ends this process; None without a watchdog."""
        self._fed = float("-inf")

    def ready(self, status: str) -> bool:
        """Predictions are served now. True where the message was sent, here and below."""
        return self._send("READY=1", _status(status))

    def status(self, status: str) -> bool:
        """Set the line that `systemctl status` shows."""
        return self._send(_status(status))

    def stopping(self, status: str = "stopping") -> bool:
        """The daemon is stopping as asked."""
        return self._send("STOPPING=1", _status(status))

    def alive(self, now: float) -> bool:
        """Feed the watchdog after a turn of the loop; `now` in seconds of a clock that never goes back."""
        if self.watchdog_s is None or now - self._fed < self.watchdog_s / 2:
            return False
        self._fed = now
        return self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
                link.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:
            return False
        return True


def _status(text: str) -> str:
    """`text` in one line: a line break would start the next assignment."""
    return f"STATUS={' '.join(text.split())}"


def _watchdog_s(variables: Mapping[str, str], pid: int) -> float | None:
    given, watched = variables.get("WATCHDOG_USEC", ""), variables.get("WATCHDOG_PID", str(pid))
    return int(given) / 1e6 if given.isascii() and given.isdigit() and int(given) and watched == str(pid) else None
