"""Evaluate a model offline: recall@10, ndcg@10, mrr and coverage under a protocol.

python -m jobs.evaluate --data DATA --model MODEL --protocol leave-one-out [--json FILE]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.configuration import write_json
from lib.datasets import read_events
from lib.events import EVENT_KINDS, InputError

if TYPE_CHECKING:
    from lib.model_folder import Manifest


def evaluate_model(data: str | Path, model: str | Path, protocol: str, allow_leak: bool = False) -> dict[str, Any]:
    """Metrics of a model folder on a dataset.

    Raises:
        InputError: unknown protocol, or a model that was trained on what the protocol tests.
    """
    # torch and transformers, which `--help` need not wait for
    from lib.evaluation import PROTOCOLS, cases_of, evaluate, known_histories
    from lib.model_folder import load_model

    if protocol not in PROTOCOLS:
        raise InputError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    encoder, catalog, manifest = load_model(model)
    if not allow_leak:
        _refuse_leak(manifest, protocol)
    histories, left_out = known_histories(read_events(data), catalog, list(EVENT_KINDS))
    cases = cases_of(histories, protocol)
    if len(cases.users) == 0:
        raise InputError(
            f"data: {data} has no case for {protocol}: no user with two events or more; ingest more events"
        )
    metrics = evaluate(encoder, catalog, cases)
    return metrics | {
        "protocol": protocol,
        "model_version": manifest.version,
        "items": len(catalog),
        "events_of_unknown_items": left_out,
    }


def _refuse_leak(manifest: "Manifest", protocol: str) -> None:
    held_out = manifest.training.get("holdout")
    if held_out == protocol:
        return
    raise InputError(
        f"protocol: the model was trained with holdout {held_out!r}, so {protocol} would test it on what it has seen; "
        f"pretrain with --holdout {protocol}, or add --allow-leak"
    )


def evaluate_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset.")],
    model: Annotated[Path, typer.Option(help="Model folder.")],
    protocol: Annotated[str, typer.Option(help="leave-one-out or temporal.")] = "leave-one-out",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the metrics there.")] = None,
    allow_leak: Annotated[bool, typer.Option(help="Evaluate although the model has seen the targets.")] = False,
) -> None:
    """Evaluate a model offline."""
    metrics = evaluate_model(data, model, protocol, allow_leak)
    if json_ is not None:
        write_json(json_, metrics)
    table = Table("metric", "value", title=f"{protocol}, {metrics['cases']} cases")
    for name, value in metrics.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(evaluate_command)
