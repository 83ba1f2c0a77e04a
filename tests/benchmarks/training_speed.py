"""Training speed beside RecTools' SASRec with sampled softmax: same machine, data, width, depth, length and negatives.

    python -m tests.benchmarks.training_speed --data DIR [--data DIR ...] [--seconds 30] [--json FILE]

Both train on each user's events but the newest, with 256 negatives, on all cores, and with a memory allocator that
keeps freed memory. The peer trains in batches of 128 users, its default, in a virtual environment of its own (see
compare_rectools). The first steps do not count.

A sequence is not the same to both: Afterclick cuts a history that is longer than the length into windows and trains on
all of them, RecTools takes each user's newest events. So targets a second are shown as well: predicted events, without
padding.
"""

import itertools
import tempfile
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
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.training_data import read_training_data
from jobs.training_loop import new_encoder
from lib.data.holdout import LEAVE_ONE_OUT
from lib.model.trainer import Trainer, TrainingConfig, keep_freed_memory
from tests.benchmarks.compare_rectools import RECTOOLS, available_cores, peer_environment, run_peer
from tests.benchmarks.machine import describe_machine

NEGATIVES = 256
WARM_UP_STEPS = 20
PEER_OPTIONS = ["--loss", "sampled_softmax", "--negatives", str(NEGATIVES), "--batch-size", "128"]


def measure_afterclick(data: Path, seconds: float) -> dict[str, Any]:
    """Train with the defaults, but for the number of negatives; return the speed."""
    training_data = read_training_data(str(data), LEAVE_ONE_OUT)
    preset = preset_of(PretrainSettings(), training_data.figures)
    encoder = new_encoder(training_data, preset, seed=0)
    trainer = Trainer(encoder, len(training_data.catalog), TrainingConfig(negatives=NEGATIVES))
    batches = training_data.batches(encoder.config)
    epochs = (batches.epoch(preset.events_per_batch, np.random.default_rng(epoch)) for epoch in itertools.count())
    endless = itertools.chain.from_iterable(epochs)
    for batch in itertools.islice(endless, WARM_UP_STEPS):
        trainer.step(batch)
    sequences = targets = steps = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        batch = next(endless)
        trainer.step(batch)
        sequences, targets, steps = sequences + len(batch.lengths), targets + int(batch.lengths.sum()), steps + 1
    return {
        "hidden_size": preset.hidden_size,
        "num_hidden_layers": preset.num_hidden_layers,
        "max_length": preset.max_length,
        "steps": steps,
        "sequences_per_second": sequences / elapsed,
        "targets_per_second": targets / elapsed,
    }


def compare(data: Path, python: Path, seconds: float) -> dict[str, Any]:
    """Return both speeds on one dataset, and their ratios."""
    afterclick = measure_afterclick(data, seconds)
    with tempfile.TemporaryDirectory(prefix="training-speed-") as folder:
        peer = run_peer(python, data, Path(folder), afterclick, ["--seconds", str(seconds), *PEER_OPTIONS])
    names = ("sequences_per_second", "targets_per_second")
    ratios = {name: afterclick[name] / peer[name] for name in names}
    return {"data": data.name, "afterclick": afterclick, "rectools": peer, "ratio": ratios}


def print_results(results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Print the speeds as a table."""
    title = f"Training, {NEGATIVES} negatives; {machine['cores']} cores, {machine['processor']}"
    table = Table("data", "length", "", "Afterclick", f"RecTools {RECTOOLS}", "ratio", title=title)
    for result in results:
        for name, ratio in result["ratio"].items():
            speeds = [f"{result[side][name]:,.0f}" for side in ("afterclick", "rectools")]
            length = str(result["afterclick"]["max_length"])
            table.add_row(result["data"], length, name.replace("_per_second", "/s"), *speeds, f"{ratio:.1f}")
    Console().print(table)


def benchmark(
    data: Annotated[list[Path], typer.Option(help="An ingested dataset; repeatable.")],
    seconds: Annotated[float, typer.Option(help="Of training, for each side and dataset.")] = 30.0,
    peer_python: Annotated[Path | None, typer.Option(help="An interpreter that has RecTools.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure training speed beside RecTools' SASRec."""
    machine = describe_machine()
    python = peer_python.absolute() if peer_python else peer_environment()
    keep_freed_memory()
    torch.set_num_threads(available_cores())
    results = [compare(folder.resolve(), python, seconds) for folder in data]
    print_results(results, machine)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
