"""What the link and an operator's client ask of paho-mqtt 2: TLS, properties, and texts for what goes wrong."""

from __future__ import annotations

import functools
import logging
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

CONNECT_S: Final = 10.0
"""Seconds for the TCP connection and TLS, and again for the broker's CONNACK."""


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when its handshake fails, because paho does not."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. `ca` None: the authorities of the system. `cert` and `key`: the board's own, None where the broker
    asks for none. They are read at each connect, so that renewed files are used without a restart."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Checks the broker's certificate and name; TLS 1.2 or later. Raises OSError for an unreadable file."""
        for path in filter(None, (self.ca, self.cert, self.key)):
            path.open("rb").close()  # ssl's own error does not name the file
        context = ssl.create_default_context(cafile=self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _TlsSocket
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context


def properties_of(packet: int, **values: Any) -> Properties:
    """Properties of a packet of type `packet` (`PacketTypes`), named as in paho."""
    new: Any = Properties  # untyped in paho
    made: Properties = new(packet)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def publish_properties(content_type: str, expiry_s: int | None, correlation: bytes | None) -> Properties:
    """Cached, except with correlation data, because each of these differs and may have 64 KiB."""
    values = {"ContentType": content_type, "MessageExpiryInterval": expiry_s, "CorrelationData": correlation}
    return (_usual if correlation is None else _made)(*((k, v) for k, v in values.items() if v is not None))


def _made(*values: tuple[str, Any]) -> Properties:
    return properties_of(PacketTypes.PUBLISH, **dict(values))


_usual = functools.lru_cache(maxsize=64)(_made)


def explain(error: Exception, host: str, port: int) -> str:
    """The message for an operator when a connection could not be made."""
    where = f"{host}:{port}"
    match error:
        case socket.gaierror():
            return f"cannot resolve host {host}: {error.strerror}; check mqtt.host and the name server"
        case ssl.SSLCertVerificationError():
            return f"the certificate of {where} is not accepted: {error.verify_message}; check mqtt.ca and mqtt.host"
        case ssl.SSLError():
            return f"TLS with {where} failed: {error.reason or error}; check mqtt.port, mqtt.ca, mqtt.cert and mqtt.key"
        case ConnectionRefusedError():
            return f"nothing listens on {where}; check that the broker runs and mqtt.port"
        case TimeoutError():
            return f"{where} did not answer within {CONNECT_S:g} s; check the network and the firewall"
        case OSError():
            named = f": {error.filename}" if error.filename else ""
            return f"no connection with {where}: {error.strerror or error}{named}"
        case _:
            return f"no connection with {where}: {error}; check mqtt.host"


class LastError(logging.Handler):
    """Keeps the last error that paho logs: nothing else says why a socket failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""
        self.logger = logging.Logger("paho", logging.ERROR)  # of this connection only, outside the tree of loggers
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def __str__(self) -> str:
        return f": {self.text}" if self.text else ""


def send_at_once(client: Client, userdata: Any, sock: Any) -> None:
    """Switch off Nagle's algorithm, which delays a small packet until the previous one is acknowledged."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def decrypted(sock: Any) -> bool:
    """Whether TLS has decrypted bytes that poll(2) does not report."""
    return bool(sock.pending()) if hasattr(sock, "pending") else False
