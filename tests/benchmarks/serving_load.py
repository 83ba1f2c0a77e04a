"""Answers a second and their latency: Afterclick, the limit of its ingress, and a server written by hand.

    python -m tests.benchmarks.serving_load --model MODEL --data DATA [--seconds 8] [--json FILE]

Over loopback, with a lean client on the same cores (tests/benchmarks/load_client.py). Each request asks for 10 items
for a random user of the dataset, on 1, 8, 32 and 128 connections. One run measures Afterclick with one and with two
replicas; a deployment behind the same ingress that answers at once, which is the limit; and one process of uvicorn,
torch and FAISS with the same model (tests/benchmarks/plain_server.py), with one thread and with one for each core.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from fastapi import FastAPI, Response
from ray import serve
from ray.serve.config import HTTPOptions
from rich.console import Console
from rich.table import Table

from cluster.local import HOST, free_port, running_ray
from jobs.command_line import run_command
from jobs.configuration import write_json
from jobs.service import running_service
from lib.data.dataset import read_events
from serving.app import ServeArguments
from tests.benchmarks.machine import describe_machine

CONNECTIONS = (1, 8, 32, 128)
REQUESTS = 5000  # that differ, before the first one is sent again
START_SECONDS = 120.0

nothing = FastAPI()


@nothing.post("/v1/recommendations")
async def answer_nothing() -> Response:
    """Answer nothing, at the cost of any answer behind this ingress."""
    return Response(b'{"items":[]}', media_type="application/json")


@serve.ingress(nothing)
class Nothing:
    """A deployment that computes nothing."""


@contextmanager
def no_op_service(replicas: int) -> Iterator[int]:
    """Start the limit; yield its port."""
    port = free_port()
    with running_ray():
        try:
            serve.start(http_options=HTTPOptions(host=HOST, port=port))
            deployment = serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})(Nothing)
            serve.run(deployment.bind(), name="nothing", route_prefix="/")  # pyright: ignore[reportAttributeAccessIssue]
            wait_until_answering(port)
            yield port
        finally:
            serve.shutdown()


@contextmanager
def plain_service(model: Path, data: Path, threads: int) -> Iterator[int]:
    """Start the peer; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.plain_server", "--model", str(model), "--data", str(data)]
    process = subprocess.Popen([*command, "--port", str(port), "--threads", str(threads)])
    try:
        wait_until_answering(port)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def afterclick_service(model: Path, data: Path, replicas: int) -> Iterator[int]:
    """Start Afterclick; yield its port."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="afterclick-load-"))
    try:
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("live"))
        arguments = ServeArguments(model=str(folder / "model"), data=str(data.absolute()), replicas=replicas)
        with running_service(arguments, port):
            yield port
    finally:
        shutil.rmtree(folder)


def wait_until_answering(port: int) -> None:
    """Wait for any answer but a failure.

    Raises:
        httpx.TransportError: there is none for START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"http://{HOST}:{port}/").raise_for_status()
            return
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                return
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def measure(port: int, bodies: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Return the figures by number of connections."""
    return {str(count): put_load(port, bodies, connections=count, seconds=seconds) for count in CONNECTIONS}


def put_load(port: int, bodies: Path, **options: float | str) -> dict[str, Any]:
    """Run the load client, in a process of its own; return its figures."""
    command = [sys.executable, "-m", "tests.benchmarks.load_client", "--port", str(port), "--bodies", str(bodies)]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def write_bodies(data: Path, path: Path) -> None:
    """Write questions of random users, one a line."""
    users = sorted(set(read_events(data)["user_id"].to_pylist()))
    chosen = np.random.default_rng(0).choice(users, REQUESTS)
    path.write_text("".join(json.dumps({"user_id": user, "k": 10}) + "\n" for user in chosen))


def load_benchmark(
    model: Annotated[Path, typer.Option(help="Model folder; it is copied.")],
    data: Annotated[Path, typer.Option(help="Dataset whose users ask.")],
    seconds: Annotated[float, typer.Option(min=1, help="For each number of connections.")] = 8,
    only: Annotated[str, typer.Option(help="Only the services whose name holds this.")] = "",
    json_: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure answers a second."""
    machine, cores = describe_machine(), os.cpu_count() or 1
    services = {
        "Afterclick, 1 replica": lambda: afterclick_service(model, data, 1),
        "Afterclick, 2 replicas": lambda: afterclick_service(model, data, 2),
        "no-op, 1 replica": lambda: no_op_service(1),
        "no-op, 2 replicas": lambda: no_op_service(2),
        "by hand, 1 thread": lambda: plain_service(model, data, 1),
        f"by hand, {cores} threads": lambda: plain_service(model, data, cores),
    }
    results: dict[str, Any] = {}
    table = Table("service", "connections", "requests/s", "p50 ms", "p95 ms", "p99 ms", "errors")
    with tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder) / "bodies"
        write_bodies(data, bodies)
        for name, service in services.items():
            if only not in name:
                continue
            with service() as port:
                results[name] = measure(port, bodies, seconds)
            for connections, row in results[name].items():
                times = (f"{row[figure]:.1f}" for figure in ("p50_ms", "p95_ms", "p99_ms"))
                table.add_row(name, connections, f"{row['requests_per_second']:.0f}", *times, str(row["errors"]))
    Console().print(table)
    if json_ is not None:
        write_json(json_, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(load_benchmark)
