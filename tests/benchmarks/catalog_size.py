"""The cost of a training step as the catalog grows: item rows are gathered and updated sparsely.

    python -m tests.benchmarks.catalog_size [--items 10000 --items 100000 ...] [--json FILE]

Batches of 2,048 events of random items in histories of 20, 512 shared negatives, width 64. All rows are equally likely,
so that a step touches as many distinct rows as it can, and costs the most. Times are medians. `full softmax` is the
memory of a batch-by-catalog matrix of logits alone.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.histories import Histories
from lib.model.batches import Batch, SequenceBatches
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.trainer import Trainer, TrainingConfig, keep_freed_memory
from tests.benchmarks.machine import describe_machine

SIZES = [10_000, 100_000, 1_000_000, 5_000_000]
EVENTS_PER_BATCH, HISTORY = 2048, 20
WARM_UP_STEPS, STEPS = 10, 60


def random_batches(config: BehaviourEncoderConfig, items: int, count: int) -> list[Batch]:
    """Make batches of histories of random items, a minute apart."""
    users = count * EVENTS_PER_BATCH // HISTORY
    events = users * (HISTORY + 1)
    generator = np.random.default_rng(0)
    histories = Histories(
        [str(user) for user in range(users)],
        np.arange(0, events + 1, HISTORY + 1),
        generator.integers(1, items + 1, events).astype(np.int32),
        np.ones(events, dtype=np.int8),
        np.full(events, np.nan, dtype=np.float32),
        np.arange(events) * 60_000,
    )
    return list(SequenceBatches(histories, config).epoch(EVENTS_PER_BATCH, generator))[:count]


def measure(items: int) -> dict[str, Any]:
    """Measure the steps of one catalog size."""
    config = BehaviourEncoderConfig(item_rows=items + 1, event_kinds=["click"])
    trainer = Trainer(BehaviourEncoder(config), items, TrainingConfig())
    batches = random_batches(config, items, WARM_UP_STEPS + STEPS)
    for batch in batches[:WARM_UP_STEPS]:
        trainer.step(batch)
    seconds, rows = [], []
    for batch in batches[WARM_UP_STEPS:]:
        started = time.perf_counter()
        result = trainer.step(batch)
        seconds.append(time.perf_counter() - started)
        rows.append(len(result.rows))
    state = trainer.row_optimizer
    stored = sum(t.numel() * t.element_size() for t in (state.first, state.second, state.steps))
    table = trainer.encoder.item_embeddings.weight
    return {
        "items": items,
        "step_ms": statistics.median(seconds) * 1e3,
        "rows_a_step": statistics.mean(rows),
        "table_and_optimizer_bytes": stored + table.numel() * table.element_size(),
        "full_softmax_bytes": EVENTS_PER_BATCH * items * 4,
    }


def benchmark(
    items: Annotated[list[int] | None, typer.Option(help="Catalog size; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure a training step at several catalog sizes."""
    machine = describe_machine()
    keep_freed_memory()
    torch.manual_seed(0)
    results = []
    for size in items or SIZES:
        results.append(measure(size))
        gc.collect()
    headings = ("items", "step, ms", "rows a step", "table + optimiser, GB", "full softmax would be, GB")
    table = Table(*headings, title=f"{machine['cores']} cores, {machine['processor']}")
    for result in results:
        sizes = (f"{result[name] / 1e9:.2f}" for name in ("table_and_optimizer_bytes", "full_softmax_bytes"))
        table.add_row(f"{result['items']:,}", f"{result['step_ms']:.1f}", f"{result['rows_a_step']:,.0f}", *sizes)
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
