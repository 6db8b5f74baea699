"""How fast the embedded brokers pass QoS 1 messages: `python -m benchmarks.broker`.

The clients are sockets that write prepared MQTT 5 packets, so that the broker is measured and not a client library.
Every message is acknowledged to its publisher and by the one subscriber; the clock stops when that has them all.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time

from device.simulation.embedded import EmbeddedBroker, Name, embedded_broker

BROKERS: tuple[Name, ...] = ("mosquitto", "iotcore")
MESSAGES = 40_000  # within the 65,535 packet identifiers, so none has to wait for an acknowledgement
PAYLOAD = 200
TOPIC = b"bench/telemetry"
HEAD = 3  # a PUBLISH's type and two bytes of length


def text(value: bytes) -> bytes:
    """An MQTT string."""
    return len(value).to_bytes(2, "big") + value


def connected(broker: EmbeddedBroker, name: str) -> socket.socket:
    """A client with a clean session that has read its CONNACK."""
    client = socket.create_connection((broker.host, broker.port), timeout=60)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = text(b"MQTT") + bytes([5, 0x02, 0, 60, 0]) + text(name.encode())
    client.sendall(bytes([0x10, len(body)]) + body)
    assert client.recv(1024)[0] == 0x20
    return client


def publish(packet_id: int) -> bytes:
    """One PUBLISH with QoS 1."""
    body = text(TOPIC) + packet_id.to_bytes(2, "big") + b"\0" + bytes(PAYLOAD)
    return bytes([0x32, len(body) & 0x7F | 0x80, len(body) >> 7]) + body


def discard(clients: list[socket.socket], stop: threading.Event) -> None:
    """Read acknowledgements away until told to stop."""
    with selectors.DefaultSelector() as ready:
        for client in clients:
            ready.register(client, selectors.EVENT_READ)
        while not stop.is_set():
            for key, _ in ready.select(0.1):
                key.fileobj.recv(1 << 16)  # type: ignore[union-attr]


def receive(client: socket.socket, count: int) -> None:
    """Acknowledge `count` messages as they come; all are of one length."""
    size, start = len(publish(1)), HEAD + 2 + len(TOPIC)
    left = bytearray()
    while count:
        left += client.recv(1 << 18)
        whole = len(left) // size
        assert set(left[: whole * size : size]) <= {0x32}
        ids = (left[n * size + start : n * size + start + 2] for n in range(whole))
        client.sendall(b"".join(b"\x40\x02" + packet_id for packet_id in ids))
        del left[: whole * size]
        count -= whole


def rate(broker: EmbeddedBroker, publishers: int) -> float:
    """Messages a second from `publishers`, who write in turn, to one subscriber."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(broker, f"publisher-{n}")) for n in range(publishers)]
        subscriber = stack.enter_context(connected(broker, "subscriber"))
        body = b"\0\1\0" + text(TOPIC) + b"\1"
        subscriber.sendall(bytes([0x82, len(body)]) + body)
        assert subscriber.recv(1024)[0] == 0x90
        stop = threading.Event()
        reader = threading.Thread(target=discard, args=(clients, stop))
        bursts = [b"".join(publish(n) for n in range(first, first + 10)) for first in range(1, MESSAGES, 10)]

        def write() -> None:
            for turn, burst in enumerate(bursts):
                clients[turn % publishers].sendall(burst)

        writer = threading.Thread(target=write)
        began = time.perf_counter()
        reader.start()
        writer.start()
        receive(subscriber, MESSAGES)
        took = time.perf_counter() - began
        stop.set()
        writer.join()
        reader.join()
    return MESSAGES / took


def main() -> None:
    """One line a broker and number of publishers."""
    for name in BROKERS:
        with embedded_broker(prefer=name) as broker:
            for publishers in (1, 200):
                print(f"{name}, {publishers} publishers: {rate(broker, publishers):,.0f} messages/s", flush=True)


if __name__ == "__main__":
    main()
