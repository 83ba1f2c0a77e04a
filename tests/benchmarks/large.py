"""Training steps of a large encoder on synthetic histories: sequences and events a second, memory, utilisation.

    python -m tests.benchmarks.large --preset base|large [--device cuda|cpu] [--set hidden_size=64] [--json FILE]

Histories are as long as people's are: log-normal, most of them short, cut at the preset's length; items follow Zipf's
law. Batches are made before the clock starts, and the steps are whole ones: transfer, forward, backward, both
optimisers.

Model-flops utilisation is that of PaLM (Chowdhery et al. 2022, appendix B): the flops that the model needs, whether or
not its implementation spends more (recomputed activations do not count), over what the card could do in that time:

    flops per event = 6 N + 12 L C (mean attended length)
    utilisation     = flops per event x events per second / peak flops of the card

N are the weights of the blocks, L the blocks, C the width. PaLM's attention term, 12 L C T, is that of full attention;
under a causal mask the event at place t attends to t + 1 events, so of a history of n events (n + 1) / 2 on average,
weighted by events. Only real events count, padding does not. The item table, whose rows are looked up and not
multiplied, and the sampled softmax are left out.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import settings_from, write_json
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.errors import InputError
from lib.model.batches import Batch, SequenceBatches
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.presets import PRESETS, Preset
from lib.model.trainer import Trainer, TrainingConfig
from tests.benchmarks.machine import describe_machine

# dense bfloat16 tensor-core flops a second, by a word of the card's name (NVIDIA's data sheets, without sparsity)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # H100: SXM
ITEMS = {"cuda": 1_000_000, "cpu": 20_000}
MEDIAN_LENGTH, SPREAD = 60, 1.2  # of the log-normal lengths
NEWEST = 1_700_000_000_000  # milliseconds
DAY = 86_400_000


@dataclass(frozen=True)
class BenchmarkSettings:
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


def encoder_config(preset: Preset, items: int) -> BehaviourEncoderConfig:
    """The encoder of a preset, as pretraining would make it for so many items."""
    return BehaviourEncoderConfig(
        item_rows=items + 1,
        **preset.shape(),
        event_kinds=list(EVENT_KINDS),
        value_boundaries=[2.0, 3.0, 4.0, 5.0],
    )


def synthetic_histories(events: int, items: int, generator: np.random.Generator) -> Histories:
    """Users with about so many events together: log-normal lengths of 2 or more, items by Zipf's law."""
    mean = MEDIAN_LENGTH * np.exp(SPREAD**2 / 2)
    users = max(int(events / mean), 1)
    lengths = np.maximum(generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, users).astype(np.int64), 2)
    count = int(lengths.sum())
    # the inverse of the distribution function of density 1 / rank
    rows = np.exp(generator.random(count) * np.log(items)).astype(np.int32)
    return Histories(
        [f"u{user}" for user in range(users)],
        np.concatenate([[0], np.cumsum(lengths)]),
        rows,
        generator.integers(1, len(EVENT_KINDS) + 1, count).astype(np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NEWEST + np.cumsum(generator.integers(1, DAY, count)),
    )


def synthetic_batches(
    config: BehaviourEncoderConfig, items: int, events_per_batch: int, count: int, seed: int
) -> list[Batch]:
    """So many training batches."""
    generator = np.random.default_rng(seed)
    batches: list[Batch] = []
    while len(batches) < count:
        histories = synthetic_histories(2 * count * events_per_batch, items, generator)
        for batch in SequenceBatches(histories, config).epoch(events_per_batch, generator):
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def flops_per_event(trunk_parameters: int, layers: int, width: int, attended_length: float) -> float:
    """Forward and backward, as the module's docstring says."""
    return 6 * trunk_parameters + 12 * layers * width * attended_length


def attended_length(lengths: np.ndarray) -> float:
    """How many events an event attends to, itself included, on average over all events."""
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def peak_flops(card: str) -> float | None:
    """Of the card with this name, or None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def measure(
    preset: Preset, config: TrainingConfig, device: torch.device, items: int, warm_up: int, steps: int
) -> dict[str, Any]:
    """Train for some steps; one flat document of figures."""
    torch.manual_seed(config.seed)
    encoder = BehaviourEncoder(encoder_config(preset, items))
    batches = synthetic_batches(encoder.config, items, preset.events_per_batch, warm_up + steps, config.seed)
    encoder.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it and hides its signature
    trainer = Trainer(encoder, items, config)
    for batch in batches[:warm_up]:
        trainer.step(batch.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, losses, times = time.perf_counter(), [], []
    for batch in batches[warm_up:]:
        begin = time.perf_counter()
        losses.append(trainer.step(batch.to(device)).loss)  # it reads the loss back, and so waits for the card
        times.append((time.perf_counter() - begin) * 1e3)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    lengths = np.concatenate([batch.lengths.numpy() for batch in batches[warm_up:]])
    padded = sum(batch.rows.numel() for batch in batches[warm_up:])
    trunk = sum(parameter.numel() for parameter in encoder.blocks.parameters())
    attended = attended_length(lengths)
    flops = flops_per_event(trunk, preset.num_hidden_layers, preset.hidden_size, attended)
    flops *= float(lengths.sum()) / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "trunk_parameters": trunk,
        "item_parameters": encoder.item_embeddings.weight.numel(),
        "sequences_per_second": len(lengths) / seconds,
        "events_per_second": float(lengths.sum()) / seconds,
        "step_p50_ms": float(np.median(times)),
        "step_max_ms": max(times),
        "peak_memory_bytes": peak_memory(device),
        "padding_share": 1 - float(lengths.sum()) / padded,
        "mean_length": float(lengths.mean()),
        "mean_attended_length": attended,
        "model_flops_per_second": flops,
        "model_flops_utilisation": None if peak is None else flops / peak,
        "last_loss": losses[-1],
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch has had allocated on the card in the timed steps, or what the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def large_command(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "large",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the card if there is one.")] = None,
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
    given = asdict(settings_from(BenchmarkSettings, None, set_ or []))
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
        card = torch.cuda.get_device_name() if kind == "cuda" else None
        setup = {"preset": preset, "device": kind, "card": card, "items": count, "warm_up": warm_up, "steps": steps}
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
