# pyright: reportMissingImports=false
"""RecTools' SASRec on an event table: the peer's half of `compare_rectools`, run by the peer's own interpreter.

Notable features:
- imports nothing of Afterclick, so that it runs in an environment that has RecTools and not the project
- a training budget in wall seconds, kept to the step; loading, preparation and evaluation do not count
- settings that are best for the peer within minutes on a CPU: smaller batches and a higher learning rate than its
  defaults (128 and 1e-3), which take too few steps in that time; its default loss, the softmax over the whole catalog
- RecTools keeps repeats (a user and an item more than once) in the order of time, and so does this module

The protocol is leave-one-out: the last event of each user with two events or more is the target, and the peer trains on
the events before it and reads them. All items are ranked but those that the user has seen; a target that the peer never
saw in training, or that its user had seen before, counts as a miss.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

CUTOFF = 10
WARM_UP_STEPS = 3
MANY_EPOCHS = 1_000_000  # more than any budget holds: the clock stops the training


@dataclass(frozen=True)
class PeerSettings:
    """Settings of the peer's model and of its training."""

    factors: int = 64
    blocks: int = 1
    length: int = 100
    heads: int = 4
    dropout: float = 0.2
    loss: str = "softmax"
    negatives: int = 256
    learning_rate: float = 2e-3  # with batch_size, the best found for a budget of minutes on a CPU
    batch_size: int = 16
    seed: int = 0
    threads: int = 2


class TrainingClock(Callback):
    """A counter of what was trained, which stops at the first step past the budget (seconds; None: never)."""

    def __init__(self, budget_seconds: float | None) -> None:
        self.budget_seconds = budget_seconds
        self.started = 0.0
        self.started_processor = 0.0
        self.seconds = 0.0
        self.processor_seconds = 0.0
        self.steps = 0
        self.sequences = 0
        self.targets = 0
        self.warm_up_seconds = 0.0
        self.warm_up_sequences = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()
        self.started_processor = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step, and stop where the budget is spent."""
        self.steps += 1
        self.sequences += len(batch["x"])
        self.targets += int((batch["y"] != 0).sum())
        self.seconds = time.perf_counter() - self.started
        self.processor_seconds = time.process_time() - self.started_processor
        if self.steps == WARM_UP_STEPS:
            self.warm_up_seconds = self.seconds
            self.warm_up_sequences = self.sequences
        if self.budget_seconds is not None and self.seconds >= self.budget_seconds:
            trainer.should_stop = True

    def sequences_per_second(self) -> float:
        """Return training sequences a second after the first steps, or of all steps where there are no more."""
        if self.steps <= WARM_UP_STEPS:
            return self.sequences / max(self.seconds, 1e-9)
        return (self.sequences - self.warm_up_sequences) / (self.seconds - self.warm_up_seconds)


def read_interactions(path: Path) -> pd.DataFrame:
    """Read events (timestamps in milliseconds) as RecTools' columns, by time, ties in the order of the file."""
    events = pd.read_parquet(path, columns=["user_id", "item_id", "timestamp"])
    interactions = pd.DataFrame(
        {
            Columns.User: events["user_id"],
            Columns.Item: events["item_id"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(events["timestamp"], unit="ms"),
        }
    )
    return interactions.sort_values(Columns.Datetime, kind="stable", ignore_index=True)


def leave_one_out(interactions: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Split into the events before each user's last one, and the last items by user, without users of one event."""
    by_user = interactions.groupby(Columns.User, sort=False)
    events_before = by_user.cumcount().to_numpy()
    is_last = by_user.cumcount(ascending=False).to_numpy() == 0
    last = interactions.loc[is_last & (events_before > 0)]
    targets = pd.Series(last[Columns.Item].to_numpy(), index=last[Columns.User].to_numpy())
    return interactions.loc[~is_last].reset_index(drop=True), targets


def build_model(settings: PeerSettings, clock: TrainingClock, epochs: int) -> SASRecModel:
    """Return the peer's SASRec, whose silent trainer stops by `clock` or after `epochs`."""

    def make_trainer() -> Trainer:
        return Trainer(
            max_epochs=epochs,
            devices=1,
            callbacks=[clock],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    return SASRecModel(
        n_factors=settings.factors,
        n_blocks=settings.blocks,
        n_heads=settings.heads,
        session_max_len=settings.length,
        dropout_rate=settings.dropout,
        loss=settings.loss,
        n_negatives=settings.negatives,
        lr=settings.learning_rate,
        batch_size=settings.batch_size,
        get_trainer_func=make_trainer,
    )


def target_ranks(model: SASRecModel, dataset: Dataset, targets: pd.Series) -> np.ndarray:
    """Return (users,) the target's rank, from 1, in each user's best CUTOFF unseen items; 0 where it is not there."""
    recommended = model.recommend(
        users=targets.index.to_numpy(), dataset=dataset, k=CUTOFF, filter_viewed=True, on_unsupported_targets="ignore"
    )
    hits = recommended[recommended[Columns.Item].to_numpy() == recommended[Columns.User].map(targets).to_numpy()]
    return hits.set_index(Columns.User)[Columns.Rank].reindex(targets.index, fill_value=0).to_numpy()


def metrics_of(ranks: np.ndarray) -> dict[str, float]:
    """Return recall, NDCG and MRR at CUTOFF over all users from what `target_ranks` returned."""
    ranks_of_hits = ranks[ranks > 0].astype(float)
    return {
        f"recall@{CUTOFF}": len(ranks_of_hits) / len(ranks),
        f"ndcg@{CUTOFF}": float((1 / np.log2(ranks_of_hits + 1)).sum() / len(ranks)),
        f"mrr@{CUTOFF}": float((1 / ranks_of_hits).sum() / len(ranks)),
    }


def silence() -> None:
    """Suppress the advice that Lightning and RecTools print about workers, devices and cold users."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "rectools"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="Pydantic serializer warnings")


def run(data: Path, settings: PeerSettings, seconds: float | None, epochs: int | None) -> dict[str, Any]:
    """Train within the budget and evaluate; return metrics, speed, settings and versions."""
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed, verbose=False)
    training, targets = leave_one_out(read_interactions(data))
    if targets.empty:
        raise SystemExit(f"{data}: no user has two events or more, so there is nothing to compare")
    dataset = Dataset.construct(training)
    print(f"RecTools: {len(targets)} users, {len(training)} training events, settings {settings}", flush=True)

    model = build_model(settings, TrainingClock(seconds), epochs or MANY_EPOCHS)
    model.fit(dataset)
    trainer = model.fit_trainer
    assert trainer is not None
    # RecTools trains with a copy of the trainer, so the clock that ran is the copy's
    clock = next(callback for callback in trainer.callbacks if isinstance(callback, TrainingClock))
    trained_users = len(model.data_preparator.train_dataset.user_id_map.external_ids)
    print(f"RecTools: trained {clock.seconds:.1f} s, {clock.sequences_per_second():.0f} sequences/s", flush=True)

    started = time.perf_counter()
    metrics = metrics_of(target_ranks(model, dataset, targets))
    evaluation_seconds = time.perf_counter() - started
    seen = set(zip(training[Columns.User], training[Columns.Item], strict=True))
    items = {item for _, item in seen}
    return {
        **metrics,
        "seconds": clock.seconds,
        "epochs": clock.sequences / trained_users,
        "steps": clock.steps,
        "sequences_per_second": clock.sequences_per_second(),
        # where it is well below the number of threads, something else was running: do not trust the timings
        "cores_used": clock.processor_seconds / max(clock.seconds, 1e-9),
        "targets_per_second": clock.targets / max(clock.seconds, 1e-9),
        "evaluation_seconds": evaluation_seconds,
        "users": len(targets),
        "training_events": len(training),
        "items": len(items),
        "targets_already_seen": sum(pair in seen for pair in targets.items()),
        "targets_not_in_training": sum(item not in items for item in targets),
        "device": str(trainer.strategy.root_device),
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("rectools", "torch", "pytorch-lightning")},
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; defaults of the model are those of PeerSettings."""
    defaults = PeerSettings()
    parser = argparse.ArgumentParser(description="Train and evaluate RecTools' SASRec (leave-one-out).")
    parser.add_argument("--data", type=Path, required=True, help="events.parquet")
    parser.add_argument("--seconds", type=float, help="training budget, wall seconds")
    parser.add_argument("--epochs", type=int, help="stop after this many epochs, if the budget lasts")
    parser.add_argument("--json", type=Path, help="write the result here")
    for name, value in asdict(defaults).items():
        choices = ("softmax", "sampled_softmax", "BCE", "gBCE") if name == "loss" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    arguments = parser.parse_args()
    if arguments.seconds is None and arguments.epochs is None:
        parser.error("give --seconds, --epochs or both")
    return arguments


def main() -> None:
    """Run the peer and write its result as JSON, to the file named or to standard output."""
    arguments = parse_arguments()
    silence()
    settings = PeerSettings(**{name: getattr(arguments, name) for name in asdict(PeerSettings())})
    result = run(arguments.data, settings, arguments.seconds, arguments.epochs)
    text = json.dumps(result, indent=2)
    if arguments.json is None:
        print(text)
        return
    arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
