"""From an event's acknowledgement to its version live on all replicas, under steady load.

    python -m tests.benchmarks.freshness --model MODEL --data DATA [--seconds 60] [--json FILE]

Starts a service of its own on a copy of the model. Lean clients, in processes of their own, send events and ask for
recommendations at fixed rates (an open loop: a request is sent on time whether or not the one before was answered). An
event is a click of the user on the item of a random line of the dataset. Meanwhile 100 more events are sent, each of
which must be in the user's history right after. Delays and checksums are read from /v1/status.
"""

import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import HOST
from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.dataset import read_events
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.serving_load import afterclick_service, put_load

SETTLE_SECONDS = 30  # for the last events to be learned and pushed
WARM_UP_EVENTS = 64
READ_BACKS = 100
CONNECTIONS = 32  # of each client
WINDOW_SECONDS = 5.0  # between two looks at the status


def clicks(data: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield clicks without end."""
    table = read_events(data)
    users, items = table["user_id"].to_pylist(), table["item_id"].to_pylist()
    generator = np.random.default_rng(seed)
    while True:
        for line in generator.integers(0, len(users), 1024).tolist():
            yield {"user_id": users[line], "item_id": items[line], "event": "click", "event_id": uuid.uuid4().hex}


def read_your_writes(client: httpx.Client, events: Iterator[dict[str, Any]], seconds: float) -> int:
    """Send events one by one, look for each in its user's history right after, and return how many were there."""
    start, found = time.perf_counter(), 0
    for number, event in enumerate(islice(events, READ_BACKS)):
        time.sleep(max(0.0, start + number * seconds / READ_BACKS - time.perf_counter()))
        client.post("/v1/events", json={"events": [event]}).raise_for_status()
        exported = client.get(f"/v1/users/{event['user_id']}/export").raise_for_status().json()
        newest = exported["events"][-5:]  # others may have clicked for this user in between
        found += any(own["item_id"] == event["item_id"] for own in newest)
    return found


def measure(
    port: int, data: Path, events: float, batch: int, answers: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Put load on a service and return the figures."""
    every = clicks(data, seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=f"http://{HOST}:{port}", timeout=30) as client,
        ThreadPoolExecutor(3) as threads,
    ):
        client.post("/v1/events", json={"events": [*islice(every, WARM_UP_EVENTS)]}).raise_for_status()
        settled(client)
        sent, asked = Path(folder) / "events", Path(folder) / "questions"
        # for two seconds more than they are sent, as no event may be sent twice
        requests = batched(islice(every, int(events * (seconds + 2))), batch)
        sent.write_text("".join(json.dumps({"events": request}) + "\n" for request in requests))
        asked.write_text("".join(json.dumps({"user_id": e["user_id"]}) + "\n" for e in islice(every, 5000)))
        before = client.get("/v1/status").raise_for_status().json()
        start = time.perf_counter()
        steady = {"connections": CONNECTIONS, "seconds": seconds, "warm_up": 0}
        writing = threads.submit(put_load, port, sent, rate=events / batch, path="/v1/events", **steady)
        asking = threads.submit(put_load, port, asked, rate=answers, **steady)
        looks = threads.submit(statuses, port, seconds)
        found = read_your_writes(client, every, seconds)
        written, answered = writing.result(), asking.result()
        elapsed = time.perf_counter() - start
        status = settled(client)
    return {"events_of_a_request": batch} | results(
        written, answered, found, before, [*looks.result(), status], elapsed
    )


def statuses(port: int, seconds: float) -> list[dict[str, Any]]:
    """Return the status every few seconds of the load."""
    found = []
    end = time.monotonic() + seconds
    with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=30) as client:
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(WINDOW_SECONDS, left))
            found.append(client.get("/v1/status").raise_for_status().json())
    return found


def compared(status: dict[str, Any]) -> tuple[int, int]:
    """Count the replicas at the learner's version in a status, and those of them with its checksum."""
    learner = status["learner"]
    same = [replica for replica in status["replicas"] if replica["version"] == learner.get("version")]
    return len(same), sum(replica["checksum"] == learner["checksum"] for replica in same)


def batched(events: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of so many events, and the rest."""
    every = iter(events)
    while some := [*islice(every, size)]:
        yield some


def settled(client: httpx.Client) -> dict[str, Any]:
    """Return the status once all that was acknowledged is learned and live, or after SETTLE_SECONDS."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        status = client.get("/v1/status").raise_for_status().json()
        learner = status["learner"]
        done = learner.get("log_offset") == status["aggregator"].get("log_offset")
        live = done and all(replica["version"] == learner["version"] for replica in status["replicas"])
        if live or time.monotonic() > deadline:
            return status
        time.sleep(0.2)


def results(
    written: dict[str, Any],
    answered: dict[str, Any],
    found: int,
    before: dict[str, Any],
    looks: list[dict[str, Any]],
    elapsed: float,
) -> dict[str, Any]:
    """Return one flat document of figures."""
    status = looks[-1]
    learner, replicas = status["learner"], status["replicas"]
    windows = [look["freshness"] for look in looks if look["freshness"] is not None]
    pairs, equal = (sum(counts) for counts in zip(*map(compared, looks), strict=True))
    costs = ("learn_ms", "push_ms", "push_bytes", "build_ms", "transfer_ms", "apply_ms")
    return {
        "seconds": elapsed,
        "event_requests_acknowledged": written["answered"],
        "answers": answered["answered"],
        "failed_requests": sum(side[kind] for side in (written, answered) for kind in ("refused", "errors")),
        "read_your_writes": found,
        "read_your_writes_asked": READ_BACKS,
        "acknowledge_p50_ms": written["p50_ms"],
        "acknowledge_p99_ms": written["p99_ms"],
        "answer_p50_ms": answered["p50_ms"],
        "answer_p90_ms": answered["p90_ms"],
        "answer_p99_ms": answered["p99_ms"],
        # a status is of the latest 2,000 events; these are the median and the worst of all statuses
        "live_p50_ms": statistics.median(window["p50_ms"] for window in windows),
        "live_p99_ms": statistics.median(window["p99_ms"] for window in windows),
        "live_p50_worst_ms": max(window["p50_ms"] for window in windows),
        "live_p99_worst_ms": max(window["p99_ms"] for window in windows),
        "pushes": learner["pushes"] - before["learner"]["pushes"],
        "rejected_updates": learner["rejected_updates"],
        "last_rejection": learner["last_rejection"],
        **{f"{cost}{which}": learner[f"{cost}{which}"] for cost in costs for which in ("", "_p99")},
        "replicas": len(replicas),
        "all_learned": learner["log_offset"] == status["aggregator"]["log_offset"],
        "checksums_equal": f"{equal} of {pairs}",  # where a replica and the learner were at one version
        "deltas_that_came_out_wrong": sum(replica["mismatches"] for replica in replicas),
        "events_trained_or_rejected": learner["events_trained"] + learner["events_rejected"],
        "log_offset": status["aggregator"]["log_offset"],
    }


def freshness_command(
    model: Annotated[Path, typer.Option(help="Model folder; it is copied.")],
    data: Annotated[Path, typer.Option(help="Dataset whose users click.")],
    seconds: Annotated[float, typer.Option(min=1)] = 60,
    events: Annotated[float, typer.Option(help="Events per second.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Events of one request.")] = 1,
    answers: Annotated[float, typer.Option(help="Recommendation requests per second.")] = 50,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    json_: Annotated[Path | None, typer.Option("--json")] = None,
    seed: int = 0,
) -> None:
    """Measure the delay from acknowledgement to live weights."""
    machine = describe_machine()
    with afterclick_service(model, data, replicas) as port:
        measured = measure(port, data, events, batch, answers, seconds, seed)
    if json_ is not None:
        write_json(json_, {"machine": machine, **measured})
    table = Table("figure", "value", title=f"{events:g} events/s, {answers:g} answers/s, {replicas} replicas")
    for name, value in measured.items():
        table.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    run_command(freshness_command)
