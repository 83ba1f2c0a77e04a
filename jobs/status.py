"""Look at a running service: versions per replica, freshness, log offsets, pushes.

python -m jobs.status [--url URL] [--json FILE]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.client import DEFAULT_URL, get_json
from jobs.configuration import write_json


def status_command(
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the whole status there.")] = None,
) -> None:
    """Show what a running service says of itself."""
    status = get_json(url, "/v1/status")
    if json_ is not None:
        write_json(json_, status)
    console = Console()
    replicas = Table("replica", "version", "checksum", "answers", "deltas", "catch-ups", title="replicas")
    for replica in status["replicas"]:
        columns = ("replica_id", "version", "checksum", "answers", "deltas", "catch_ups")
        replicas.add_row(*(str(replica[name]) for name in columns))
    console.print(f"model version {status['model_version']}")
    console.print(replicas)
    shards = status["aggregator"].pop("shards", [])
    for part in ("learner", "aggregator", "experiment"):
        if part in status:
            console.print(_facts(part, status[part]))
    for shard in shards:
        console.print(_facts(f"aggregator {shard['shard']}", shard))


def _facts(title: str, facts: dict[str, Any]) -> Table:
    table = Table("fact", "value", title=title)
    for name, value in _flat(facts):
        table.add_row(name, str(round(value, 4) if isinstance(value, float) else value))
    return table


def _flat(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Facts one by one, those of a part of a part under both names."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{part}", own) for part, own in _flat(value))
        else:
            yield name, value


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(status_command)
