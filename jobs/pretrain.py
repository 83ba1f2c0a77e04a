"""Pretrain the behaviour encoder on Ray Train: any number of workers, CPU or GPU.

    python -m jobs.pretrain --data DATA --out MODEL [--workers N] [--set epochs=20]

Every epoch is checkpointed; a killed worker is started again, and the same command after a killed job goes on from the
newest checkpoint. TensorBoard scalars go to MODEL.runs. By default each user's newest event is held out, so that
`afterclick evaluate` is honest; `--holdout none` trains on everything.
"""

import json
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
import torch
import typer
from ray import train
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue
from torch.utils.tensorboard import SummaryWriter

from cluster.local import running_ray
from jobs.progress import TrainingProgress
from lib.catalog import Catalog
from lib.datasets import read_events, read_items
from lib.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.evaluation import LEAVE_ONE_OUT, NONE, TEMPORAL, training_part
from lib.events import EVENT_KINDS, InputError
from lib.model_folder import Manifest, read_manifest, save_model, write_manifest
from lib.popularity import DAY, event_counts
from lib.presets import Preset, preset_for
from lib.registry import OPTIMIZER_FILE
from lib.sequences import Histories, SequenceBatches, histories_of, value_boundaries
from lib.training import Trainer, TrainingConfig

HOLDOUTS = (LEAVE_ONE_OUT, TEMPORAL, NONE)
WARMUP_STEPS = 100
FINAL_LEARNING_RATE = 0.05  # of the peak, at the end of a linear decay
STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class PretrainSettings:
    """What a run is made of; what is None is chosen from the data (lib/presets.py)."""

    holdout: str = LEAVE_ONE_OUT
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_length: int | None = None
    dropout: float | None = None
    epochs: int | None = None
    events_per_batch: int | None = None  # over all workers
    learning_rate: float | None = None
    weight_decay: float = TrainingConfig.weight_decay
    negatives: int = TrainingConfig.negatives
    clip_norm: float = TrainingConfig.clip_norm
    popularity_half_life_days: float = 7.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.holdout not in HOLDOUTS:
            raise InputError(f"holdout: {self.holdout!r} is not one of {', '.join(HOLDOUTS)}")
        for name in ("hidden_size", "num_hidden_layers", "max_length", "epochs", "events_per_batch", "negatives"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is too small; give 1 or more")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"dropout: {self.dropout} is outside 0 to 1")

    def preset(self, histories: Histories) -> Preset:
        """The preset for this data, with what was set by hand."""
        chosen = preset_for(histories)
        given = {f.name: getattr(self, f.name) for f in fields(Preset) if getattr(self, f.name) is not None}
        return replace(chosen, **given)


@dataclass
class TrainingData:
    """What every worker reads: the catalog of all items, and the part of the histories that is trained on."""

    catalog: Catalog
    histories: Histories
    timestamps: np.ndarray  # (E,) of the trained events


def read_training_data(data: str, holdout: str) -> TrainingData:
    """Read an ingested dataset.

    Raises:
        InputError: it is missing, or too small to learn from.
    """
    events, items = read_events(data), read_items(data)
    item_ids = list(dict.fromkeys(events["item_id"].to_pylist()))
    catalog = Catalog(item_ids, items)
    if items is not None:
        catalog.extend(items["item_id"].to_pylist())
    histories = training_part(histories_of(events, catalog.row_of, EVENT_KINDS), holdout)
    if int((histories.lengths >= 2).sum()) == 0:
        raise InputError(
            f"data: {data} leaves no user with two events to learn from (holdout {holdout}); ingest more events"
        )
    return TrainingData(catalog, histories, histories.timestamps)


def new_encoder(training_data: TrainingData, preset: Preset, seed: int) -> BehaviourEncoder:
    """A fresh encoder for this data; equal seeds give equal weights."""
    config = BehaviourEncoderConfig(
        item_rows=len(training_data.catalog) + 1,
        hidden_size=preset.hidden_size,
        intermediate_size=4 * preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        max_length=preset.max_length,
        dropout=preset.dropout,
        event_kinds=list(EVENT_KINDS),
        value_boundaries=value_boundaries(training_data.histories.values),
    )
    torch.manual_seed(seed)
    return BehaviourEncoder(config)


def count_popularity(encoder: BehaviourEncoder, histories: Histories, half_life: float) -> None:
    """Fill in what is popular at the end of the training data."""
    reference = int(histories.timestamps.max())
    counts = event_counts(histories.timestamps, reference, half_life)
    totals = np.bincount(histories.rows, weights=counts, minlength=encoder.config.item_rows)
    encoder.item_popularity.copy_(torch.from_numpy(totals.astype(np.float32)))
    encoder.popularity_reference.fill_(reference)


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then linear decay."""
    warmup = min(WARMUP_STEPS, total // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (1 - FINAL_LEARNING_RATE) * (step - warmup) / max(total - warmup, 1))


def training_loop(run: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    settings = PretrainSettings(**run["settings"])
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(run["threads"])
    data = read_training_data(run["data"], settings.holdout)
    preset = settings.preset(data.histories)
    encoder = new_encoder(data, preset, settings.seed).to(device)
    trainer = Trainer(encoder, len(data.catalog), _training_config(settings, preset))
    batches = SequenceBatches(data.histories, encoder.config)
    first_epoch, spent, sequences = _resume(trainer)
    torch.manual_seed(settings.seed + 1000 * first_epoch + rank)  # dropout
    writer = SummaryWriter(run["tensorboard"]) if rank == 0 else None
    board: Queue | None = run["board"] if rank == 0 else None
    steps = sum(1 for _ in batches.groups(preset.events_per_batch, np.random.default_rng(settings.seed)))
    total = steps * preset.epochs
    for epoch in range(first_epoch, preset.epochs):
        start = time.perf_counter()
        losses = []
        generator = np.random.default_rng((settings.seed, epoch))
        for step, batch in enumerate(batches.epoch(preset.events_per_batch, generator, rank, world)):
            trainer.learning_rate = learning_rate_at(trainer.steps, total, preset.learning_rate)
            result = trainer.step(batch.to(device))
            losses.append(result.loss)
            sequences += len(batch.lengths) * world
            if board is not None and step % 10 == 0:
                board.put({"epoch": epoch, "epochs": preset.epochs, "share": (epoch + step / steps) / preset.epochs})
        spent += time.perf_counter() - start
        metrics = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": spent, "sequences": sequences}
        if writer is not None and board is not None:
            _write_scalars(writer, trainer, metrics, spent)
            board.put({"epoch": epoch, "epochs": preset.epochs, "share": (epoch + 1) / preset.epochs, **metrics})
        _report(trainer, metrics, rank)
    if rank == 0:
        count_popularity(encoder, data.histories, settings.popularity_half_life_days * DAY)
        training = (
            asdict(settings)
            | asdict(preset)
            | {
                "seconds": spent,
                "sequences_per_second": sequences / max(spent, 1e-9),
                "workers": world,
                "device": str(device),
                "events": len(data.histories.rows),
                "users": int((data.histories.lengths > 0).sum()),
                "items": len(data.catalog),
                "loss": metrics["loss"] if first_epoch < preset.epochs else None,
            }
        )
        _save_result(Path(run["result"]), trainer, data.catalog, training)


def _training_config(settings: PretrainSettings, preset: Preset) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=preset.learning_rate,
        weight_decay=settings.weight_decay,
        negatives=settings.negatives,
        clip_norm=settings.clip_norm,
        seed=settings.seed,
    )


def _resume(trainer: Trainer) -> tuple[int, float, int]:
    """Continue from the newest checkpoint: (first epoch to run, seconds spent, sequences seen)."""
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return 0, 0.0, 0
    with checkpoint.as_directory() as folder:
        state = safetensors.numpy.load_file(Path(folder) / STATE_FILE)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    prefix = "encoder."
    weights = {name.removeprefix(prefix): torch.from_numpy(t) for name, t in state.items() if name.startswith(prefix)}
    trainer.encoder.load_state_dict(weights)
    trainer.load_optimizer_state({name: tensor for name, tensor in state.items() if not name.startswith(prefix)})
    return metrics["epoch"], metrics["seconds"], metrics["sequences"]


def _report(trainer: Trainer, metrics: dict[str, Any], rank: int) -> None:
    """Hand the epoch's metrics to Ray Train, with a checkpoint from the first worker."""
    if rank != 0:
        train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = {f"encoder.{name}": t.cpu().numpy() for name, t in trainer.encoder.state_dict().items()}
        safetensors.numpy.save_file(weights | trainer.optimizer_state(), Path(folder) / STATE_FILE)
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics))
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


def _write_scalars(writer: SummaryWriter, trainer: Trainer, metrics: dict[str, Any], spent: float) -> None:
    writer.add_scalar("loss", metrics["loss"], trainer.steps)
    writer.add_scalar("learning_rate", trainer.learning_rate, trainer.steps)
    writer.add_scalar("sequences_per_second", metrics["sequences"] / max(spent, 1e-9), trainer.steps)
    writer.flush()


def _save_result(folder: Path, trainer: Trainer, catalog: Catalog, training: dict[str, Any]) -> None:
    """The model folder, with the optimiser's state so that learning goes on where it stopped."""
    manifest = Manifest(training=training)
    save_model(folder, trainer.encoder.cpu(), catalog, manifest)
    safetensors.numpy.save_file(trainer.optimizer_state(), folder / OPTIMIZER_FILE)
    write_manifest(folder, manifest)


def pretrain(
    data: str | Path,
    out: str | Path,
    settings: PretrainSettings | None = None,
    workers: int = 1,
    gpu: bool | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Train a model folder from an ingested dataset, on the running Ray or one started for it.

    Raises:
        InputError: the data cannot be trained on, or `out` exists.
        ray.train.TrainingFailedError: the workers failed more often than they are restarted.
    """
    settings = settings or PretrainSettings()
    data, out = Path(data).absolute(), Path(out).absolute()
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"out: {out} is not empty; choose another folder or add --overwrite")
    read_training_data(str(data), settings.holdout)  # bad input is found before anything is started
    use_gpu = torch.cuda.is_available() if gpu is None else gpu
    storage = out.with_name(f".{out.name}.training")
    result = storage / "result"
    board = Queue()
    run = {
        "settings": asdict(settings),
        "data": str(data),
        "result": str(result),
        "tensorboard": str(out.with_name(f"{out.name}.runs")),
        "threads": max(1, (torch.get_num_threads()) // workers),
        "board": board,
    }
    trainer = TorchTrainer(
        training_loop,
        train_loop_config=run,
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=train.RunConfig(
            name="run",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=3),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    )
    with TrainingProgress() as progress:
        shown = threading.Thread(target=_show, args=(board, progress), daemon=True)
        shown.start()
        trainer.fit()
        board.put(None)
        shown.join(timeout=5)
    board.shutdown()
    manifest = read_manifest(result)
    _install(result, out)
    shutil.rmtree(storage)
    return manifest


def _install(result: Path, out: Path) -> None:
    """Put the finished folder in its place."""
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(result, out)


def _show(board: Queue, progress: TrainingProgress) -> None:
    while True:
        try:
            news = board.get(timeout=1)
        except Empty:
            continue
        if news is None:
            return
        progress.show(news)


def pretrain_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset (events.parquet, items.parquet).")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    gpu: Annotated[bool | None, typer.Option(help="Train on GPUs; by default if there are any.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file; repeatable.")] = None,
    holdout: Annotated[str | None, typer.Option(help="leave-one-out (default), temporal or none.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the manifest there too.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing model.")] = False,
) -> None:
    """Pretrain the behaviour encoder; size, length and number of epochs are chosen from the data."""
    from jobs.configuration import settings_from

    given = [*(set_ or []), *([f"holdout={holdout}"] if holdout else [])]
    settings = settings_from(PretrainSettings, config, given)
    with running_ray():
        manifest = pretrain(data, out, settings, workers, gpu, overwrite)
    if json_ is not None:
        json_.write_text(manifest.model_dump_json(indent=2) + "\n")
    training = manifest.training
    print(
        f"{out}: version {manifest.version}, {training['items']} items, {training['events']} events, "
        f"{training['epochs']} epochs in {training['seconds']:.0f} s "
        f"({training['sequences_per_second']:.0f} sequences/s), loss {training['loss']:.3f}"
    )


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(pretrain_command)
