"""Overload: admitted requests are answered in time, the others are refused at once, and afterwards all is as before.

    python -m tests.benchmarks.overload --model MODEL --data DATA [--times 3] [--seconds 10] [--json FILE]

On two replicas, with a lean client on the same cores: the capacity is what 32 connections get answered that ask as fast
as they can. Then, as open loops, half of it, `times` it, and half of it again, second by second.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.serving_load import afterclick_service, put_load, write_bodies

CONNECTIONS = 512  # enough that a request seldom waits for one
RECOVERY_SECONDS = 6


def measure(port: int, bodies: Path, times: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return the figures of each phase."""
    capacity = put_load(port, bodies, connections=32, seconds=seconds)
    half, over = capacity["requests_per_second"] / 2, capacity["requests_per_second"] * times
    results = {"32 connections": capacity}
    results["half of it"] = put_load(port, bodies, connections=CONNECTIONS, seconds=seconds, rate=half)
    results[f"{times:g} times"] = put_load(port, bodies, connections=CONNECTIONS, seconds=seconds, rate=over)
    for second in range(1, RECOVERY_SECONDS + 1):
        results[f"half again, second {second}"] = put_load(
            port, bodies, connections=CONNECTIONS, seconds=1, warm_up=0, rate=half
        )
    return results


def overload_benchmark(
    model: Annotated[Path, typer.Option(help="Model folder; it is copied.")],
    data: Annotated[Path, typer.Option(help="Dataset whose users ask.")],
    times: Annotated[float, typer.Option(min=1, help="Times the capacity.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Of each phase.")] = 10,
    json_: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure what happens beyond the capacity."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder, afterclick_service(model, data, 2) as port:
        write_bodies(data, Path(folder) / "bodies")
        results: dict[str, Any] = measure(port, Path(folder) / "bodies", times, seconds)
    figures = list(results["32 connections"])
    table = Table("load", "answered/s", "refused/s", "errors", "p50 ms", "p95 ms", "p99 ms", "refused p99 ms")
    for name, row in results.items():
        table.add_row(name, *("-" if row[figure] is None else f"{row[figure]:.1f}" for figure in figures))
    Console().print(table)
    if json_ is not None:
        write_json(json_, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(overload_benchmark)
