"""Events acknowledged a second by one, two and four aggregators, beside plain SQLite commits and bare fsyncs.

    python -m tests.benchmarks.aggregator --seconds 5 --json FILE

Callers are tasks of one event loop, as in a replica: each sends a batch, waits until it is durable and goes on. Every
row starts from logs of the same events. Plain commits are the limit where each batch is synced by itself; aggregators
exceed it where callers share a commit. Everything shares this machine's cores with the callers. Kafka is the mock
brokers of confluent-kafka, in a process of their own. They keep what they acknowledge in memory only, so these rows
show what the protocol, the copy and the aggregator cost, and nothing of a disk.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import running_ray
from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.events import Event
from lib.log.layout import LogLayout
from serving.aggregator import AggregatorConfig
from serving.aggregators import Aggregators, Feedback
from serving.status import AggregatorsStatus, AggregatorStatus
from tests.benchmarks.feedback_log import WARM_UP, events, fill, measure_plain, summary, take
from tests.benchmarks.machine import describe_machine

TIMEOUT = 60.0
BROKERS = """
import sys
from confluent_kafka import Producer
producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})
brokers = producer.list_topics(timeout=20).brokers.values()
print(",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
sys.stdin.read()
"""


def measure_fsync(folder: Path, seconds: float) -> dict[str, Any]:
    """Measure the disk alone: one page overwritten and synced, again and again."""
    waits: list[float] = []
    descriptor = os.open(folder / "page", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, bytes(1 << 20))
    os.fsync(descriptor)
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        os.pwrite(descriptor, os.urandom(4096), 4096 * (len(waits) % 256))
        os.fsync(descriptor)
        waits.append(time.perf_counter() - start)
    elapsed = time.perf_counter() - begin
    os.close(descriptor)
    return summary("fsync of a page", 0, waits, len(waits), elapsed)


@contextmanager
def kafka_brokers() -> Iterator[str]:
    """Start brokers that live as long as the block, and yield their address."""
    command = [sys.executable, "-c", BROKERS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def new_topic(brokers: str) -> str:
    """Return the location of a new topic with four partitions: the brokers make it when they are first asked for it."""
    from confluent_kafka import Producer

    name = f"feedback-{uuid.uuid4().hex}"
    Producer({"bootstrap.servers": brokers}).list_topics(name, timeout=TIMEOUT)
    return f"kafka://{brokers}/{name}"


def measure_aggregators(
    state: Path, layout: LogLayout, callers: int, batch: int, seconds: float, prefill: int, source: Iterator[Event]
) -> dict[str, Any]:
    """Measure one row: the aggregators of a layout, kept busy by callers."""
    layout.begin(state)
    _fill_shards(state, layout, prefill, source)
    aggregators = Aggregators(str(state), None, AggregatorConfig(), layout, TIMEOUT)
    try:
        waits, commits, elapsed, cpu = asyncio.run(_call_all(aggregators, callers, batch, seconds, source))
    finally:
        for handle in aggregators.handles:
            ray.kill(handle)
    name = "1 aggregator" if layout.aggregators == 1 else f"{layout.aggregators} aggregators"
    name += ", Kafka" if layout.log.startswith("kafka") else ", SQLite"
    row = summary(name, batch, waits, commits, elapsed)
    return row | {"cpu_us_per_event": round(cpu / (len(waits) * batch) * 1e6, 1)}


def _fill_shards(state: Path, layout: LogLayout, count: int, source: Iterator[Event]) -> None:
    given = take(source, count)
    for shard in layout.shards():
        mine = [event for event in given if shard.has(event.user_id)]
        with layout.open(state, shard) as log:
            for start in range(0, len(mine), 10_000):
                log.append(mine[start : start + 10_000]).result()


async def _call_all(
    aggregators: Aggregators, callers: int, batch: int, seconds: float, source: Iterator[Event]
) -> tuple[list[float], int, float, float]:
    """Return the wait for each acknowledgement, the commits, the seconds, and the aggregators' seconds of CPU."""
    waits: list[float] = []

    async def call(end: float) -> None:
        while time.perf_counter() < end:
            sent = take(source, batch)
            begin = time.perf_counter()
            answers = await aggregators.append(Feedback(sent, set(), Counter()))
            waits.append(time.perf_counter() - begin)
            assert answers == [None] * batch, answers

    for _ in range(WARM_UP // 1000):
        await aggregators.append(Feedback(take(source, 1000), set(), Counter()))
    commits, cpu = await _spent(aggregators)
    begin = time.perf_counter()
    await asyncio.gather(*[call(begin + seconds) for _ in range(callers)])
    elapsed = time.perf_counter() - begin
    commits_then, cpu_then = await _spent(aggregators)
    return waits, commits_then - commits, elapsed, cpu_then - cpu


async def _spent(aggregators: Aggregators) -> tuple[int, float]:
    """Return the commits and seconds of CPU of all aggregators so far."""
    status = await aggregators.status()
    seconds = 0.0
    assert isinstance(status, AggregatorStatus | AggregatorsStatus), "one is away"
    for shard in status.shards if isinstance(status, AggregatorsStatus) else [status]:
        fields = Path(f"/proc/{shard.process}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")
    return status.commits, seconds


def aggregator_benchmark(
    seconds: Annotated[float, typer.Option(help="Time per row.")] = 5.0,
    callers: Annotated[int, typer.Option(help="Requests under way at once.")] = 64,
    batch: Annotated[int, typer.Option(help="Events of a request.")] = 10,
    prefill: Annotated[int, typer.Option(help="Events in the log before each row.")] = 100_000,
    aggregators: Annotated[list[int] | None, typer.Option(help="How many; repeatable, 1, 2 and 4 if absent.")] = None,
    kafka: Annotated[bool, typer.Option(help="Also with the log on Kafka.")] = True,
    folder: Annotated[Path | None, typer.Option(help="Where to write; the disk is what is measured.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure the aggregators and what bounds them."""
    machine, source = describe_machine(), events()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, running_ray():
        results = [measure_fsync(Path(scratch), seconds)]
        fill(Path(scratch, "plain.db"), prefill, source)
        results.append(measure_plain(Path(scratch, "plain.db"), batch, seconds, source))
        layouts = [LogLayout(count) for count in aggregators or (1, 2, 4)]
        with kafka_brokers() if kafka else nullcontext() as brokers:
            if brokers is not None:
                layouts += [LogLayout(layout.aggregators, new_topic(brokers)) for layout in layouts]
            for number, layout in enumerate(layouts):
                state = Path(scratch, str(number))
                state.mkdir()
                results.append(measure_aggregators(state, layout, callers, batch, seconds, prefill, source))
    title = f"Batches of {batch} events, {callers} callers"
    table = Table("", "events/s", "commits/s", "ack p50 ms", "p99 ms", "max ms", "CPU us/event", title=title, box=None)
    table.columns[0].no_wrap = True
    for row in results:
        waits = row["ack_ms"].values()
        figures = [row["events_per_second"], row["commits_per_second"], *waits, row.get("cpu_us_per_event")]
        table.add_row(row["name"], *[f"{figure:,}" if figure else "" for figure in figures])
    Console().print(table)
    if json_ is not None:
        settings = {"seconds": seconds, "callers": callers, "batch": batch, "prefill": prefill}
        write_json(json_, {"machine": machine, **settings, "results": results})


if __name__ == "__main__":
    run_command(aggregator_benchmark)
