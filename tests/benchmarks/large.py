"""Training steps of a large encoder on synthetic histories: sequences and events a second, memory, utilisation.

    python -m tests.benchmarks.large --preset base|large [--device cuda|cpu] [--set hidden_size=64] [--json FILE]

What the histories are and how flops are counted stands in tests/benchmarks/training_step.py.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import settings_from, write_json
from lib.errors import InputError
from lib.model.presets import PRESETS
from lib.model.trainer import TrainingConfig
from lib.settings import Settings
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.training_step import measure

ITEMS = {"cuda": 1_000_000, "cpu": 20_000}


class BenchmarkSettings(Settings):
    """What may be set over the preset."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_length: int | None = None
    dropout: float | None = None
    events_per_batch: int | None = None
    activation_checkpointing: bool | None = None
    accumulation: int | None = None
    precision: str | None = None
    compile: bool = False


def large_command(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "large",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU if there is one.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="Items of the catalog.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before the clock starts.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 20,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the preset; repeatable.")] = None,
    json_: Annotated[Path | None, typer.Option("--json")] = None,
    seed: int = 0,
) -> None:
    """Measure training steps of a preset."""
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ITEMS or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device: {kind!r} is not here; give {' or '.join(ITEMS)}")
    machine = describe_machine()
    given = settings_from(BenchmarkSettings, None, set_ or []).model_dump()
    chosen = PRESETS[preset]
    known = asdict(chosen)
    chosen = replace(chosen, **{name: value for name, value in given.items() if name in known and value is not None})
    config = TrainingConfig(
        learning_rate=chosen.learning_rate,
        precision=given["precision"] or (chosen.gpu_precision if kind == "cuda" else "float32"),
        activation_checkpointing=chosen.activation_checkpointing,
        accumulation=chosen.accumulation,
        compile=given["compile"],
        seed=seed,
    )
    count = items or ITEMS[kind]
    measured = measure(chosen, config, torch.device(kind), count, warm_up, steps)
    if json_ is not None:
        gpu = torch.cuda.get_device_name() if kind == "cuda" else None
        setup = {"preset": preset, "device": kind, "gpu": gpu, "items": count, "warm_up": warm_up, "steps": steps}
        write_json(
            json_, {"machine": machine, **setup, "encoder": asdict(chosen), "training": asdict(config), **measured}
        )
    table = Table("figure", "value", title=f"{preset} on {kind}, {count:,} items, {config.precision}")
    for name, value in measured.items():
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(large_command)
