"""Look at a running service: versions per replica, freshness, log offsets, pushes.

python -m jobs.status [--url URL] [--json FILE]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from jobs.client import DEFAULT_URL, get_json
from jobs.configuration import write_json
from lib.errors import InputError, objection
from serving.status import AggregatorsStatus, AggregatorsUnavailable, ReplicaStatus, Status


def status_command(
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the whole status there.")] = None,
) -> None:
    """Show what a running service says of itself."""
    answer = get_json(url, "/v1/status")
    if json_ is not None:
        write_json(json_, answer)
    status = _status(answer, url)
    console = Console()
    console.print(f"model version {status.model_version}")
    console.print(_replicas(status.replicas))
    console.print(_facts("learner", status.learner))
    console.print(_facts("aggregator", status.aggregator))
    if status.experiment is not None:
        console.print(_facts("experiment", status.experiment))
    if isinstance(status.aggregator, AggregatorsStatus | AggregatorsUnavailable):
        for shard in status.aggregator.shards:
            console.print(_facts(f"aggregator {shard.shard}", shard))


def _status(answer: Any, url: str) -> Status:
    try:
        return Status.model_validate(answer)
    except ValidationError as error:
        raise InputError(
            f"url: the service at {url} is of another version of afterclick ({objection(error)}); use that version's"
            " command, or curl"
        ) from error


def _replicas(replicas: list[ReplicaStatus]) -> Table:
    table = Table("replica", "version", "checksum", "answers", "deltas", "catch-ups", title="replicas")
    for replica in replicas:
        counts = (replica.version, replica.checksum, replica.answers, replica.deltas, replica.catch_ups)
        table.add_row(replica.replica_id, *map(str, counts))
    return table


def _facts(title: str, part: BaseModel) -> Table:
    table = Table("fact", "value", title=title)
    for name, value in _flat(part.model_dump(exclude={"shards"})):
        table.add_row(name, str(round(value, 4) if isinstance(value, float) else value))
    return table


def _flat(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return facts one by one, those of a part of a part under both names."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{part}", own) for part, own in _flat(value))
        else:
            yield name, value


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(status_command)
