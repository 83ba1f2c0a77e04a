"""From an event's acknowledgement to its version live on all replicas, under steady load.

    python -m tests.benchmarks.freshness --model MODEL --data DATA [--seconds 60] [--json FILE]

Starts a service of its own on a copy of the model, sends events and asks for recommendations at fixed rates (an open
loop: the next request is sent on time whether or not the one before has been answered), checks that an acknowledged
event is in the history behind the next answer, and reads delays and checksums from /v1/status.
"""

import asyncio
import json
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import free_port
from jobs.command_line import run_command
from jobs.serve import running_service
from lib.datasets import read_events
from serving.app import ServeArguments
from tests.benchmarks.machine import describe_machine

SETTLE_SECONDS = 30  # for the last events to be learned and pushed
WARM_UP_EVENTS = 64


class Load:
    """Events and questions at fixed rates."""

    def __init__(self, client: aiohttp.ClientSession, users: list[str], items: list[str], seed: int):
        self.client = client
        self.users, self.items = users, items
        self.generator = np.random.default_rng(seed)
        self.failures: list[str] = []
        self.acknowledge_ms: list[float] = []
        self.answer_ms: list[float] = []
        self.read_back = 0
        self.read_back_missing = 0

    async def send_event(self) -> None:
        """One click of a random user on a random item."""
        await self._timed("POST", "/v1/events", self.acknowledge_ms, json={"events": [self._event()]})

    async def ask(self) -> None:
        """Recommendations for a random user."""
        user = self.generator.choice(self.users)
        await self._timed("GET", f"/v1/users/{user}/recommendations", self.answer_ms)

    async def read_your_write(self) -> None:
        """Send an event, and look for it behind the very next request."""
        event = self._event()
        if await self._timed("POST", "/v1/events", self.acknowledge_ms, json={"events": [event]}) is None:
            return
        exported = await self._timed("GET", f"/v1/users/{event['user_id']}/export", [])
        if exported is None:
            return
        self.read_back += 1
        newest = exported["events"][-5:]  # others may have clicked for this user in between
        self.read_back_missing += all(e["item_id"] != event["item_id"] for e in newest)

    def _event(self) -> dict[str, Any]:
        user, item = self.generator.choice(self.users), self.generator.choice(self.items)
        return {"user_id": user, "item_id": item, "event": "click", "event_id": uuid.uuid4().hex}

    async def _timed(self, method: str, path: str, times: list[float], **body: Any) -> Any:
        start = time.perf_counter()
        try:
            async with self.client.request(method, path, **body) as response:
                text = await response.text()
        except aiohttp.ClientError as error:
            self.failures.append(f"{method} {path}: {error!r}")
            return None
        if response.status != 200:
            self.failures.append(f"{method} {path}: {response.status} {text[:100]}")
            return None
        times.append((time.perf_counter() - start) * 1e3)
        return json.loads(text)


async def at_rate(action: Any, per_second: float, seconds: float) -> None:
    """Start `action` at fixed times, and wait for all of them."""
    if per_second <= 0:
        return
    start, running = time.perf_counter(), []
    for number in range(int(per_second * seconds)):
        await asyncio.sleep(max(0.0, start + number / per_second - time.perf_counter()))
        running.append(asyncio.create_task(action()))
    await asyncio.gather(*running)


async def measure(url: str, data: Path, events: float, answers: float, seconds: float, seed: int) -> dict[str, Any]:
    """Put the load on a service and collect what it says."""
    table = read_events(data)
    users, items = sorted(set(table["user_id"].to_pylist())), sorted(set(table["item_id"].to_pylist()))
    timeout = aiohttp.ClientTimeout(total=30)
    # aiohttp: a leaner client leaves the cores to what is measured
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=64)) as client:
        warm_up = Load(client, users, items, seed + 1)
        await at_rate(warm_up.send_event, WARM_UP_EVENTS, 1)
        await settled(client)
        load = Load(client, users, items, seed)
        before = await status_of(client)
        start = time.perf_counter()
        await asyncio.gather(
            at_rate(load.send_event, events, seconds),
            at_rate(load.ask, answers, seconds),
            at_rate(load.read_your_write, 100 / seconds, seconds),
        )
        elapsed = time.perf_counter() - start
        status = await settled(client)
    return results(load, before, status, elapsed)


async def status_of(client: aiohttp.ClientSession) -> dict[str, Any]:
    """GET /v1/status."""
    async with client.get("/v1/status") as response:
        response.raise_for_status()
        return await response.json()


async def settled(client: aiohttp.ClientSession) -> dict[str, Any]:
    """The status once everything acknowledged is learned and live, or after SETTLE_SECONDS."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        status = await status_of(client)
        learner = status["learner"]
        done = learner.get("log_offset") == status["aggregator"].get("log_offset")
        if (
            done and all(r["version"] == learner["version"] for r in status["replicas"])
        ) or time.monotonic() > deadline:
            return status
        await asyncio.sleep(0.2)


def results(load: Load, before: dict[str, Any], status: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """One flat document of figures."""
    learner, replicas = status["learner"], status["replicas"]
    checksums = {replica["checksum"] for replica in replicas}
    return {
        "seconds": elapsed,
        "events_acknowledged": len(load.acknowledge_ms),
        "events_per_second": len(load.acknowledge_ms) / elapsed,
        "answers": len(load.answer_ms),
        "failed_requests": len(load.failures),
        "first_failures": load.failures[:3],
        "read_your_writes": load.read_back - load.read_back_missing,
        "read_your_writes_asked": load.read_back,
        "acknowledge_p50_ms": quantile(load.acknowledge_ms, 0.5),
        "acknowledge_p99_ms": quantile(load.acknowledge_ms, 0.99),
        "answer_p50_ms": quantile(load.answer_ms, 0.5),
        "answer_p99_ms": quantile(load.answer_ms, 0.99),
        "live_p50_ms": status["freshness"]["p50_ms"],
        "live_p99_ms": status["freshness"]["p99_ms"],
        "pushes": learner["pushes"] - before["learner"]["pushes"],
        "rejected_updates": learner["rejected_updates"],
        "learn_ms": learner["learn_ms"],
        "push_ms": learner["push_ms"],
        "push_bytes": learner["push_bytes"],
        "replicas": len(replicas),
        "all_learned": learner["log_offset"] == status["aggregator"]["log_offset"],
        "checksums_equal": checksums == {learner["checksum"]},
        "events_trained_or_rejected": learner["events_trained"] + learner["events_rejected"],
        "log_offset": status["aggregator"]["log_offset"],
    }


def quantile(values: list[float], share: float) -> float | None:
    """A quantile, or None without values."""
    return float(np.quantile(values, share)) if values else None


def freshness_command(
    model: Annotated[Path, typer.Option(help="Model folder; it is copied.")],
    data: Annotated[Path, typer.Option(help="Dataset whose users click.")],
    seconds: Annotated[float, typer.Option(min=1)] = 60,
    events: Annotated[float, typer.Option(help="Events per second.")] = 50,
    answers: Annotated[float, typer.Option(help="Recommendation requests per second.")] = 50,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    json_: Annotated[Path | None, typer.Option("--json")] = None,
    seed: int = 0,
) -> None:
    """Measure the delay from acknowledgement to live weights."""
    machine = describe_machine()
    folder = Path(tempfile.mkdtemp(prefix="afterclick-freshness-"))
    try:
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("live"))
        arguments = ServeArguments(model=str(folder / "model"), data=str(data.absolute()), replicas=replicas)
        with running_service(arguments, free_port()) as service:
            measured = asyncio.run(measure(service.url, data, events, answers, seconds, seed))
    finally:
        shutil.rmtree(folder)
    if json_ is not None:
        json_.write_text(json.dumps({"machine": machine, **measured}, indent=2) + "\n")
    table = Table("figure", "value", title=f"{events:g} events/s, {answers:g} answers/s, {replicas} replicas")
    for name, value in measured.items():
        table.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    run_command(freshness_command)
