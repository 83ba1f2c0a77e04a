"""A lean HTTP client for load: one thread, one poll, requests made beforehand, closed loop on keep-alive connections.

    python -m tests.benchmarks.load_client --port 8000 --bodies FILE --connections 32 --seconds 10

FILE holds one JSON body a line for POST /v1/recommendations. Each connection sends its next request as soon as it has
the answer to the one before. Prints one JSON object. A process of its own, so that it shares no interpreter with what
it measures; a request costs it about 20 microseconds.
"""

import gc
import json
import selectors
import socket
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

HOST = "127.0.0.1"
PATH = "/v1/recommendations"


@dataclass
class Connection:
    """One connection and the answer that is under way on it."""

    socket: socket.socket
    sent_at: int = 0  # nanoseconds
    received: bytes = b""
    expected: int = 0  # bytes of the whole answer, 0 until its header is complete


def request(body: bytes, path: str = PATH) -> bytes:
    """One POST as bytes."""
    head = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def expected_length(received: bytes) -> int:
    """Bytes of an answer, header included; 0 while the header is incomplete."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return 0
    header = received[:end].lower()
    place = header.index(b"content-length:") + len(b"content-length:")
    return end + 4 + int(header[place:].split(b"\r\n", 1)[0])


def load(port: int, requests: list[bytes], connections: int, seconds: float, warm_up: float) -> dict[str, float]:
    """Keep `connections` requests under way; what happened after the warm-up.

    Raises:
        ConnectionError: an answer was cut off.
    """
    following = cycle(requests)
    selector = selectors.DefaultSelector()
    gc.disable()
    for _ in range(connections):
        connection = Connection(socket.create_connection((HOST, port)))
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.sent_at = time.perf_counter_ns()
        connection.socket.sendall(next(following))
    start = time.perf_counter_ns() + int(warm_up * 1e9)
    end = start + int(seconds * 1e9)
    latencies: list[int] = []
    errors = 0
    while (now := time.perf_counter_ns()) < end:
        for key, _ in selector.select(timeout=1.0):
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
            if now >= start:
                latencies.append(now - connection.sent_at)
                errors += connection.received[9:12] != b"200"
            connection.received, connection.expected, connection.sent_at = b"", 0, now
            connection.socket.sendall(next(following))
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    milliseconds = np.array(latencies) / 1e6
    p50, p95, p99 = np.quantile(milliseconds, [0.5, 0.95, 0.99]).tolist() if len(milliseconds) else [float("nan")] * 3
    return {
        "requests_per_second": len(latencies) / seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "errors": errors,
    }


def load_command(
    port: Annotated[int, typer.Option()],
    bodies: Annotated[Path, typer.Option(help="One JSON body a line.")],
    connections: Annotated[int, typer.Option(min=1)] = 32,
    seconds: Annotated[float, typer.Option()] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds that do not count.")] = 2.0,
) -> None:
    """Put load on POST /v1/recommendations."""
    requests = [request(body) for body in bodies.read_bytes().splitlines()]
    print(json.dumps(load(port, requests, connections, seconds, warm_up)))


if __name__ == "__main__":
    typer.run(load_command)
