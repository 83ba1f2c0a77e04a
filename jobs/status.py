"""Look at a running service: versions per replica, freshness, log offsets, pushes.

python -m jobs.status [--url URL] [--json FILE]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from jobs.client import DEFAULT_URL, get_json
from jobs.configuration import write_json
from jobs.tables import print_facts, print_table
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
    print(f"model version {status.model_version}\n")
    _print_replicas(status.replicas)
    _print_part("learner", status.learner)
    _print_part("aggregator", status.aggregator)
    if status.experiment is not None:
        _print_part("experiment", status.experiment)
    if isinstance(status.aggregator, AggregatorsStatus | AggregatorsUnavailable):
        for shard in status.aggregator.shards:
            _print_part(f"aggregator {shard.shard}", shard)


def _status(answer: Any, url: str) -> Status:
    try:
        return Status.model_validate(answer)
    except ValidationError as error:
        raise InputError(
            f"url: the service at {url} is of another version of afterclick ({objection(error)}); use that version's"
            " command, or curl"
        ) from error


def _print_replicas(replicas: list[ReplicaStatus]) -> None:
    rows = []
    for replica in replicas:
        counts = (replica.version, replica.checksum, replica.answers, replica.deltas, replica.catch_ups)
        rows.append([replica.replica_id, *map(str, counts)])
    print_table(["replica", "version", "checksum", "answers", "deltas", "catch-ups"], rows)
    for rule in sorted({rule for replica in replicas for rule in replica.idle_rules}):
        print(f"ranking.{rule}")


def _print_part(title: str, part: BaseModel) -> None:
    facts = _flat(part.model_dump(exclude={"shards"}))
    print_facts([(name, round(value, 4) if isinstance(value, float) else value) for name, value in facts], title)


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
