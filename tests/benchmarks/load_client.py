"""A lean HTTP client for load: one thread, one selector, requests made beforehand, keep-alive connections.

    python -m tests.benchmarks.load_client --port 8000 --bodies FILE --connections 32 --seconds 10 [--rate 500]

FILE holds one JSON body a line for POST /v1/recommendations, or another path. Each connection sends its next request as
soon as it has the answer to the one before (a closed loop), or, with a rate, when the request is due (an open loop: the
wait for a free connection counts). Prints one JSON object. It runs as a process of its own, so that it shares no
interpreter with what it measures; a request costs it about 20 microseconds.
"""

import gc
import json
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

HOST = "127.0.0.1"


@dataclass
class Connection:
    """One connection and the answer that is arriving on it."""

    socket: socket.socket
    sent_at: int = 0  # nanoseconds
    received: bytes = b""
    expected: int = 0  # bytes of the whole answer, 0 until its header is complete


def request(body: bytes, path: str) -> bytes:
    """Return one POST as bytes."""
    head = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def expected_length(received: bytes) -> int:
    """Return the bytes of an answer, header included; 0 while the header is incomplete."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return 0
    header = received[:end].lower()
    place = header.index(b"content-length:") + len(b"content-length:")
    return end + 4 + int(header[place:].split(b"\r\n", 1)[0])


class Load:
    """Requests on some connections; those due from `start` (nanoseconds) on count."""

    def __init__(self, port: int, requests: list[bytes], connections: int, start: int):
        self.following = cycle(requests)
        self.start = start
        self.selector = selectors.DefaultSelector()
        self.idle: deque[Connection] = deque()
        self.latencies: dict[bytes, list[int]] = {}  # nanoseconds by status
        for _ in range(connections):
            connection = Connection(socket.create_connection((HOST, port)))
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)
            self.idle.append(connection)

    def send(self, due: int) -> None:
        """Send one request; its latency counts from when it was due."""
        connection = self.idle.popleft()
        connection.received, connection.expected, connection.sent_at = b"", 0, due
        connection.socket.sendall(next(self.following))

    def receive(self, timeout: float) -> None:
        """Receive what has arrived, or arrives within so many seconds.

        Raises:
            ConnectionError: an answer was cut off.
        """
        for key, _ in self.selector.select(timeout):
            connection: Connection = key.data
            part = connection.socket.recv(1 << 16)
            if not part:
                raise ConnectionError("the server hung up in the middle of an answer")
            connection.received += part
            if not connection.expected:
                connection.expected = expected_length(connection.received)
            if not connection.expected or len(connection.received) < connection.expected:
                continue
            now = time.perf_counter_ns()
            if connection.sent_at >= self.start:
                self.latencies.setdefault(connection.received[9:12], []).append(now - connection.sent_at)
            self.idle.append(connection)

    def close(self) -> None:
        """Close all connections."""
        for key in list(self.selector.get_map().values()):
            key.data.socket.close()


def load(
    port: int, requests: list[bytes], connections: int, seconds: float, warm_up: float, rate: float | None = None
) -> dict[str, float | None]:
    """Put load on a service; return what happened to the requests that were due after the warm-up."""
    gc.disable()
    begin = time.perf_counter_ns()
    start, end = begin + int(warm_up * 1e9), begin + int((warm_up + seconds) * 1e9)
    running, sent = Load(port, requests, connections, start), 0
    while (now := time.perf_counter_ns()) < end:
        due = now if rate is None else begin + int(sent * 1e9 / rate)
        while running.idle and due <= now:
            running.send(due)
            sent += 1
            due = now if rate is None else begin + int(sent * 1e9 / rate)
        running.receive(1.0 if rate is None or not running.idle else max((due - now) / 1e9, 0.0))
    running.close()
    answered, refused = (np.array(running.latencies.get(status, ())) / 1e6 for status in (b"200", b"503"))
    failed = sum(map(len, running.latencies.values())) - len(answered) - len(refused)
    return {
        "answered": len(answered),
        "requests_per_second": len(answered) / seconds,
        "refused_per_second": len(refused) / seconds,
        "refused": len(refused),
        "errors": failed,
        **{f"p{share}_ms": quantile(answered, share) for share in (50, 90, 95, 99)},
        "refused_p99_ms": quantile(refused, 99),
    }


def quantile(milliseconds: np.ndarray, share: int) -> float | None:
    """Return a percentile, or None without values."""
    return float(np.percentile(milliseconds, share)) if len(milliseconds) else None


def load_command(
    port: Annotated[int, typer.Option()],
    bodies: Annotated[Path, typer.Option(help="One JSON body a line.")],
    connections: Annotated[int, typer.Option(min=1)] = 32,
    seconds: Annotated[float, typer.Option()] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds that do not count.")] = 2.0,
    rate: Annotated[float | None, typer.Option(help="Requests a second; as many as are answered if absent.")] = None,
    path: Annotated[str, typer.Option(help="Where the bodies are posted.")] = "/v1/recommendations",
) -> None:
    """Put load on one path of a service."""
    requests = [request(body, path) for body in bodies.read_bytes().splitlines()]
    print(json.dumps(load(port, requests, connections, seconds, warm_up, rate)))


if __name__ == "__main__":
    typer.run(load_command)
