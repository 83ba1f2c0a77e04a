"""What each input of the encoder adds: the model with all of them, and with one left out at a time.

    python -m tests.benchmarks.ablation --data DIR [--data DIR ...] [--seeds 2] [--json FILE]

Protocol: temporal. The newest 20% of the time span is the test; histories advance with time, weights stay. All items
are ranked but those that the user has seen. Each variant trains with the defaults; figures are means over the seeds.
`no push` trains without pushing away from dislikes, which are no targets (see tests/benchmarks/dislikes.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.training_data import TrainingData, read_training_data
from jobs.training_loop import learning_rate_at, new_encoder
from lib.data.attributes import attribute_values
from lib.data.dataset import read_events
from lib.data.events import EVENT_KINDS
from lib.data.histories import histories_of
from lib.data.holdout import TEMPORAL
from lib.evaluation.metrics import ndcg_at, recall_at
from lib.evaluation.protocols import Cases, cases_of, model_contender, rank
from lib.model.batches import target_weights
from lib.model.encoder import BehaviourEncoder
from lib.model.presets import DEFAULT_INPUTS, INPUTS
from lib.model.trainer import Trainer, TrainingConfig, keep_freed_memory
from tests.benchmarks.machine import describe_machine

VARIANTS: dict[str, tuple[Sequence[str], float]] = {
    "all": (INPUTS, TrainingConfig().dislike_weight),
    **{f"no {out}": ([i for i in INPUTS if i != out], TrainingConfig().dislike_weight) for out in INPUTS},
    "default": (DEFAULT_INPUTS, TrainingConfig().dislike_weight),
    "item alone": ((), TrainingConfig().dislike_weight),
    "no push": (INPUTS, 0.0),
}


def train(data: TrainingData, inputs: Sequence[str], dislike_weight: float, seed: int) -> BehaviourEncoder:
    """Pretrain in this process with the defaults."""
    preset = preset_of(PretrainSettings(), data.figures)
    encoder = new_encoder(data, preset, seed, inputs)
    config = TrainingConfig(seed=seed, negatives=preset.negatives, dislike_weight=dislike_weight)
    trainer, batches = Trainer(encoder, len(data.catalog), config), data.batches(encoder.config)
    steps = sum(1 for _ in batches.groups(preset.events_per_batch, np.random.default_rng(seed)))
    for epoch in range(preset.epochs):
        for batch in batches.epoch(preset.events_per_batch, np.random.default_rng((seed, epoch))):
            trainer.learning_rate = learning_rate_at(trainer.steps, steps * preset.epochs, preset.learning_rate)
            trainer.step(batch)
    return encoder


def measure(encoder: BehaviourEncoder, data: TrainingData, cases: Cases) -> dict[str, float]:
    """Return ndcg@10 and recall@10 over all cases."""
    ranks = rank(model_contender("", encoder, data.catalog, data.catalog), cases).ranks
    return {"ndcg@10": float(ndcg_at(ranks, 10).mean()), "recall@10": float(recall_at(ranks, 10).mean())}


def ablate(folder: Path, seeds: int) -> dict[str, dict[str, float]]:
    """Return the figures of each variant on one dataset, but for variants that change nothing there."""
    data = read_training_data(str(folder), TEMPORAL)
    cases = cases_of(histories_of(read_events(folder), data.catalog.row_of, EVENT_KINDS), TEMPORAL, data.ratings)
    whole = data.histories
    matters = {
        "no kind": len(np.unique(whole.kinds)) > 1,
        "no value": not np.isnan(whole.values).all(),
        "no attributes": bool(attribute_values(data.catalog)),
        "no push": bool((target_weights(whole.kinds, whole.values, EVENT_KINDS, data.ratings) < 0).any()),
    }
    results = {}
    for name, (inputs, dislike_weight) in track(VARIANTS.items(), description=folder.name):
        if not matters.get(name, True):
            continue
        runs = [measure(train(data, inputs, dislike_weight, seed), data, cases) for seed in range(seeds)]
        results[name] = {figure: float(np.mean([run[figure] for run in runs])) for figure in runs[0]}
    return results


def benchmark(
    data: Annotated[list[Path], typer.Option(help="An ingested dataset with times; repeatable.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure what each input adds."""
    keep_freed_memory()
    machine, results = describe_machine(), {}
    for folder in data:
        results[folder.name] = ablate(folder, seeds)
        figures = list(results[folder.name]["all"])
        table = Table("variant", *figures, title=f"{folder.name}, temporal, {seeds} seeds")
        for name, row in results[folder.name].items():
            table.add_row(name, *(f"{row[figure]:.4f}" for figure in figures))
        Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
