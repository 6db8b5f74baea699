"""What the daemon tells systemd: ready, alive, stopping, and one line of status (sd_notify(3)).

Rules of this file:

1. Without `NOTIFY_SOCKET` everything is a no-op: the daemon runs the same under a shell, a container or a test.
2. Telling never blocks and never raises: a supervisor that hangs does not take the predictions with it.
3. The watchdog is fed by whoever made progress, at most every half of its interval, and only in the process that
   systemd watches: a thread that merely sleeps would prove nothing, a child would feed it for a hung parent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """The daemon's end of systemd's notification socket; `environment` and `pid` are this process's unless given."""

    def __init__(self, environment: Mapping[str, str] | None = None, pid: int | None = None) -> None:
        variables = os.environ if environment is None else environment
        path = variables.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of the abstract namespace; other kinds (vsock:) are not for services.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path if path.startswith("/") else ""
        self.watchdog_s = _watchdog_s(variables, os.getpid() if pid is None else pid)
        """Seconds without a sign of life after which systemd ends this process; None where it does not watch."""
        self._fed = float("-inf")

    def ready(self, status: str) -> bool:
        """The start is over: predictions are served. True where systemd was told, here and below."""
        return self._send("READY=1", _status(status))

    def status(self, status: str) -> bool:
        """One line that `systemctl status` shows."""
        return self._send(_status(status))

    def stopping(self, status: str = "stopping") -> bool:
        """The end has begun, on purpose."""
        return self._send("STOPPING=1", _status(status))

    def alive(self, now: float) -> bool:
        """Called after every step of the daemon's loop, `now` in seconds of a clock that only rises."""
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
    """One assignment, whatever the text: a line break would start the next."""
    return f"STATUS={' '.join(text.split())}"


def _watchdog_s(variables: Mapping[str, str], pid: int) -> float | None:
    given, watched = variables.get("WATCHDOG_USEC", ""), variables.get("WATCHDOG_PID", str(pid))
    return int(given) / 1e6 if given.isascii() and given.isdigit() and int(given) and watched == str(pid) else None
