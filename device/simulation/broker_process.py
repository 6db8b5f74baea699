"""The embedded broker's process: it arranges to end with its parent, then becomes the broker.

Started by path, so that edgeear is not imported: `broker_process.py PARENT PROGRAM`. PARENT is the process id of its
parent; PROGRAM is the path of mosquitto, or `iotcore`; standard input is the configuration.
PR_SET_PDEATHSIG, prctl(2), survives the exec, but not a change of user.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask to be killed when the thread that started this process ends; exit now if the parent has ended."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent ended first")


def allow_many_clients() -> None:
    """Raise the limit of open files as far as the system allows: each client needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def become_iotcore() -> None:
    """Serve until killed. iotcore reads its configuration from a file, once; the file is deleted before it serves."""
    from iotcore import IotCoreBroker

    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)  # it logs every packet as an error
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "broker.toml")
        config.write_bytes(sys.stdin.buffer.read())
        broker = IotCoreBroker(config_path=str(config))
    broker.run_forever()


def main(parent: str, program: str) -> None:
    """Become the broker."""
    die_with(int(parent))
    allow_many_clients()
    if program == "iotcore":
        become_iotcore()
    else:
        os.execv(program, [program, "-c", "/dev/stdin"])


if __name__ == "__main__":
    main(*sys.argv[1:])
