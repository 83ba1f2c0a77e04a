"""Durable events a second and the wait for their acknowledgement, beside plain SQLite commits in a loop.

    python -m tests.benchmarks.feedback_log --seconds 5 --json FILE

Callers are tasks of one event loop, as in the service: each appends a batch, awaits its acknowledgement and goes on.
The log is filled first, so that its indexes have a realistic size. Every row starts from a copy of the same file and
warms up until the WAL has its full size, because a WAL that grows is slower than one that is overwritten.
"""

import asyncio
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.events import Event
from lib.log.feedback import FeedbackLog
from lib.log.log_file import INSERT, row_of
from tests.benchmarks.machine import describe_machine

USERS, ITEMS = 50_000, 10_000
WARM_UP = 10_000  # events; they fill more than the 16 MB at which the WAL is used again


def events() -> Iterator[Event]:
    """Yield events of many users without end, with ids as long as real ones."""
    generator = random.Random(1)
    start = time.time_ns() // 1_000_000
    number = 0
    while True:
        number += 1
        user, item = generator.randrange(USERS), generator.randrange(ITEMS)
        event_id, request_id = f"{generator.getrandbits(128):032x}", f"{generator.getrandbits(128):032x}"
        yield Event(f"user-{user}", f"item-{item}", "click", None, start + number, event_id, request_id)


def take(source: Iterator[Event], count: int) -> list[Event]:
    """Return the next events."""
    return [next(source) for _ in range(count)]


def fill(path: Path, count: int, source: Iterator[Event]) -> None:
    """Append so many events to a log."""
    with FeedbackLog.open(path) as log:
        for start in range(0, count, 10_000):
            log.append(take(source, min(10_000, count - start))).result()


def summary(name: str, batch: int, waits: list[float], commits: int, elapsed: float) -> dict:
    """Return one row; `waits` are seconds, one for each acknowledged batch."""
    p50, p99, longest = np.percentile(waits, [50, 99, 100]) * 1000
    return {
        "name": name,
        "batch": batch,
        "events_per_second": round(len(waits) * batch / elapsed),
        "commits_per_second": round(commits / elapsed),
        "ack_ms": {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(longest, 1)},
    }


def measure_log(path: Path, callers: int, batch: int, seconds: float, source: Iterator[Event]) -> dict:
    """Measure the log under callers that each wait for their acknowledgement."""
    waits: list[float] = []

    async def call(log: FeedbackLog, end: float) -> None:
        while time.perf_counter() < end:
            batch_events = take(source, batch)
            begin = time.perf_counter()
            await asyncio.wrap_future(log.append(batch_events))
            waits.append(time.perf_counter() - begin)

    async def call_all(log: FeedbackLog) -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*[call(log, end) for _ in range(callers)])

    with FeedbackLog.open(path, check=False) as log:
        log.append(take(source, WARM_UP)).result()
        log.append(take(source, 1)).result()
        log.store.commits = 0
        begin = time.perf_counter()
        asyncio.run(call_all(log))
        return summary(f"log, {callers} callers", batch, waits, log.commits, time.perf_counter() - begin)


def measure_plain(path: Path, batch: int, seconds: float, source: Iterator[Event]) -> dict:
    """Measure the peer: the same table and durability, default checkpoints, one commit a batch."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    offset = connection.execute("SELECT MAX(offset) FROM events").fetchone()[0] or 0
    waits: list[float] = []

    def commit(events: list[Event]) -> None:
        nonlocal offset
        rows = [row_of(index, event) for index, event in enumerate(events)]
        start = time.perf_counter()
        connection.execute("BEGIN")
        for row in rows:
            offset += 1
            connection.execute(INSERT, (offset, *row, 0))
        connection.execute("COMMIT")
        waits.append(time.perf_counter() - start)

    commit(take(source, WARM_UP))
    waits.clear()
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        commit(take(source, batch))
    elapsed = time.perf_counter() - begin
    connection.close()
    return summary("plain SQLite", batch, waits, len(waits), elapsed)


def benchmark(
    seconds: Annotated[float, typer.Option(help="Time per row.")] = 5.0,
    prefill: Annotated[int, typer.Option(help="Events in the log before each row.")] = 200_000,
    folder: Annotated[Path | None, typer.Option(help="Where to write; the disk is what is measured.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure the feedback log and its peer."""
    machine, source = describe_machine(), events()
    cases: list[Callable[[Path], dict]] = []
    for batch in (1, 10):
        cases.append(lambda path, batch=batch: measure_plain(path, batch, seconds, source))
        for callers in (1, 32, 128):
            cases.append(lambda path, batch=batch, callers=callers: measure_log(path, callers, batch, seconds, source))
    results = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        filled = Path(scratch, "filled.db")
        fill(filled, prefill, source)
        for case in cases:
            path = Path(shutil.copy(filled, Path(scratch, "log.db")))
            results.append(case(path))
            path.unlink()
    headings = ("", "batch", "events/s", "commits/s", "ack p50 ms", "p99 ms", "max ms")
    table = Table(*headings, title="Durable appends", caption="plain: one commit a batch")
    for row in results:
        figures = [row["batch"], row["events_per_second"], row["commits_per_second"], *row["ack_ms"].values()]
        table.add_row(row["name"], *[f"{figure:,}" for figure in figures])
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "prefill": prefill, "seconds": seconds, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
