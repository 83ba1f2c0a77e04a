"""What each Ray Train worker of a pretraining or fine-tuning job runs (jobs/pretrain.py starts it).

Every epoch's batches, negatives and dropout follow from the seed and the epoch alone, and the first worker checkpoints
weights and optimiser at its end. So a run that was killed and resumed gives the weights of one that was not, and any
number of workers sees the same batches.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from ray import train
from ray.train.torch import get_device
from ray.util.queue import Queue
from torch.utils.tensorboard import SummaryWriter

from jobs.event_stream import StreamedData, read_stream
from jobs.pretrain import PretrainSettings
from lib.data.attributes import attribute_codes, attribute_values
from lib.data.catalog import Catalog
from lib.data.dataset import read_events, read_items
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories, histories_of
from lib.data.holdout import training_part
from lib.data.popularity import DAY, popularity_of, steady_total
from lib.errors import InputError
from lib.live.finetuning import MarkedHistories, WeightedBatches
from lib.model.batches import SequenceBatches
from lib.model.buckets import Figures, figures_of, figures_of_all
from lib.model.encoder import DEFAULT_INPUTS, BehaviourEncoder, BehaviourEncoderConfig
from lib.model.facts import TrainingFacts
from lib.model.folder import Manifest, save_model, write_manifest
from lib.model.presets import Preset, preset_for
from lib.model.trainer import Trainer, TrainingConfig, keep_freed_memory
from lib.versions.folder import OPTIMIZER_FILE, LoadedVersion, load_folder

WARMUP_STEPS = 100
FINAL_LEARNING_RATE = 0.05  # of the peak, at the end of the decay
NEWS_EVERY = 10  # steps
STATE_FILE, METRICS_FILE = "state.safetensors", "metrics.json"
ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class Done:
    """How far a run has come; stored with every checkpoint."""

    epoch: int = 0
    loss: float | None = None  # mean of the newest epoch
    seconds: float = 0.0
    sequences: int = 0

    @property
    def sequences_per_second(self) -> float:
        """Over the whole run."""
        return self.sequences / max(self.seconds, 1e-9)


@dataclass
class TrainingData:
    """What every worker reads: the catalog of all items, and the part of the histories that is trained on."""

    catalog: Catalog
    histories: Histories

    @cached_property
    def figures(self) -> Figures:
        """What must be known of them before training."""
        return figures_of_all([figures_of(0, self.histories)])

    def parts(self) -> Iterator[Histories]:
        """All histories, at once."""
        yield self.histories

    def batches(self, config: BehaviourEncoderConfig) -> SequenceBatches:
        """Training batches for an encoder."""
        return SequenceBatches(self.histories, config)


def read_training_data(data: str, holdout: str) -> TrainingData:
    """Read an ingested dataset.

    Raises:
        InputError: it is missing, or too small to learn from.
    """
    events = read_events(data)
    catalog = Catalog.of_dataset(events["item_id"].unique().to_pylist(), read_items(data))
    histories = training_part(histories_of(events, catalog.row_of, EVENT_KINDS), holdout)
    training_data = TrainingData(catalog, histories)
    refuse_too_small(data, holdout, training_data.figures)
    return training_data


@dataclass
class ContinuedData(TrainingData):
    """What every worker of a fine-tuning run reads: each event counts as a target by a weight of its own, too."""

    weights: np.ndarray  # (E,)

    def batches(self, config: BehaviourEncoderConfig) -> SequenceBatches:
        """Training batches for an encoder."""
        return WeightedBatches(self.histories, config, self.weights)


def refuse_too_small(data: str | Path, holdout: str, figures: Figures) -> None:
    """Refuse data that has nothing to learn from.

    Raises:
        InputError: no user has two events.
    """
    if figures.users_to_learn_from == 0:
        raise InputError(
            f"data: {data} leaves no user with two events to learn from (holdout {holdout}); ingest more events"
        )


def preset_of(settings: PretrainSettings, histories: Histories) -> Preset:
    """The preset that was asked for, fitted to this data, with what was set by hand.

    Raises:
        InputError: the heads do not divide the width.
    """
    preset = preset_for(histories, settings.preset)
    given = {name: value for name, value in asdict(settings).items() if name in asdict(preset) and value is not None}
    preset = replace(preset, **given)
    if preset.hidden_size % preset.num_attention_heads != 0:
        raise InputError(
            f"hidden_size: {preset.hidden_size} is not a multiple of num_attention_heads {preset.num_attention_heads}"
        )
    return preset


def new_encoder(
    training_data: TrainingData | StreamedData, preset: Preset, seed: int, inputs: Sequence[str] = DEFAULT_INPUTS
) -> BehaviourEncoder:
    """A fresh encoder for this data; equal seeds give equal weights."""
    catalog = training_data.catalog
    attributes = attribute_values(catalog) if "attributes" in inputs else []
    codes = attribute_codes(catalog, attributes)
    config = BehaviourEncoderConfig(
        item_rows=len(catalog) + 1,
        **preset.shape(),
        event_kinds=list(EVENT_KINDS),
        value_boundaries=training_data.figures.value_boundaries,
        inputs=list(inputs),
        attribute_values=attributes,
        attributes_per_item=codes.shape[1],
    )
    torch.manual_seed(seed)
    encoder = BehaviourEncoder(config)
    encoder.item_attributes.copy_(torch.from_numpy(codes))
    return encoder


def count_popularity(encoder: BehaviourEncoder, data: TrainingData | StreamedData, half_life: float) -> None:
    """Fill in what is popular at the end of the training data; it weighs no more than live feedback will."""
    reference = data.figures.newest
    totals, users, events = np.zeros(encoder.config.item_rows), 0, 0
    for histories in data.parts():
        totals += popularity_of(histories, reference, half_life, len(totals))
        users, events = users + int((histories.lengths > 0).sum()), events + len(histories.rows)
    most = steady_total(len(data.catalog), users / max(events, 1))
    totals *= min(1.0, most / max(totals.sum(), 1e-9))
    encoder.item_popularity.copy_(torch.from_numpy(totals.astype(np.float32)))


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine (Loshchilov & Hutter 2017) down to a twentieth."""
    warmup = min(WARMUP_STEPS, total // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(total - warmup, 1))
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * decay)


def training_loop(run: dict[str, Any]) -> None:
    """Train to the last epoch, from the newest checkpoint if there is one, and write the model folder."""
    settings = PretrainSettings(**run["settings"])
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(run["threads"])
        keep_freed_memory()
    origin: LoadedVersion | None = None
    if run["start"] is not None:
        origin = load_folder(Path(run["start"]))
        marked = MarkedHistories.load(Path(run["data"]))
        weights = np.where(marked.marked, 1.0, run["older_weight"])
        data = ContinuedData(origin.catalog, marked.histories, weights)
        preset = preset_of(settings, data.histories)
    elif settings.stream:
        data = read_stream(run["data"], Path(run["stream"]))
        preset = preset_of(settings, data.figures.miniature())
    else:
        data = read_training_data(run["data"], settings.holdout)
        preset = preset_of(settings, data.histories)
    encoder = origin.encoder if origin else new_encoder(data, preset, settings.seed, settings.inputs)
    encoder.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it and hides its signature
    trainer = Trainer(encoder, len(data.catalog), _training_config(settings, preset, device))
    if origin is not None and origin.optimizer is not None:
        trainer.load_optimizer_state(origin.optimizer)
    first_step = trainer.steps
    batches = data.batches(encoder.config)
    done = _resume(trainer)
    # a killed run may have written scalars of an epoch that it did not checkpoint: they are purged
    writer = SummaryWriter(run["tensorboard"], purge_step=trainer.steps + 1) if rank == 0 else None
    board: Queue | None = run["board"] if rank == 0 else None
    steps = sum(1 for _ in batches.groups(preset.events_per_batch, np.random.default_rng(settings.seed)))
    total = steps * preset.epochs
    for epoch in range(done.epoch, preset.epochs):
        start = time.perf_counter()
        losses, sequences = [], 0
        torch.manual_seed((settings.seed * 1_000_003 + epoch) * 1_009 + rank)  # dropout
        generator = np.random.default_rng((settings.seed, epoch))
        for step, batch in enumerate(batches.epoch(preset.events_per_batch, generator, rank, world)):
            trainer.learning_rate = learning_rate_at(trainer.steps - first_step, total, preset.learning_rate)
            losses.append(trainer.step(batch.to(device)).loss)
            sequences += len(batch.lengths) * world
            if board is not None and step % NEWS_EVERY == 0:
                board.put(_news(epoch, preset.epochs, step / steps))
        seconds = done.seconds + time.perf_counter() - start
        done = Done(epoch + 1, float(np.mean(losses)), seconds, done.sequences + sequences)
        if writer is not None and board is not None:
            _write_scalars(writer, trainer, done)
            board.put(_news(epoch, preset.epochs, 1.0) | {"loss": done.loss, "seconds": done.seconds})
        _report(trainer, done, rank)
    if writer is None:
        trainer.join_all_gathers()
    else:
        writer.close()
        if origin is None:
            count_popularity(encoder, data, settings.popularity_half_life_days * DAY)
        _save_result(Path(run["result"]), trainer, data, _facts(settings, preset, data, done, world, device))


def _training_config(settings: PretrainSettings, preset: Preset, device: torch.device) -> TrainingConfig:
    given = {name: getattr(settings, name) for name in ("weight_decay", "negatives", "clip_norm", "dislike_weight")}
    given = {name: value for name, value in given.items() if value is not None}
    return TrainingConfig(
        learning_rate=preset.learning_rate,
        precision=settings.precision or (preset.gpu_precision if device.type == "cuda" else "float32"),
        activation_checkpointing=preset.activation_checkpointing,
        accumulation=preset.accumulation,
        compile=settings.compile,
        sharded=settings.sharded,
        seed=settings.seed,
        **given,
    )


def _news(epoch: int, epochs: int, share: float) -> dict[str, Any]:
    """What jobs/progress.py shows while the epoch (from 0) is `share` done."""
    return {"epoch": epoch + 1, "epochs": epochs, "share": (epoch + min(share, 1.0)) / epochs}


def _resume(trainer: Trainer) -> Done:
    """Take over the newest checkpoint, if there is one; how far it had come."""
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return Done()
    with checkpoint.as_directory() as folder:
        state = safetensors.numpy.load_file(Path(folder) / STATE_FILE)
        done = Done(**json.loads((Path(folder) / METRICS_FILE).read_text()))
    weights = {name: t for name, t in state.items() if name.startswith(ENCODER_PREFIX)}
    trainer.load_weights({name.removeprefix(ENCODER_PREFIX): torch.from_numpy(t) for name, t in weights.items()})
    trainer.load_optimizer_state({name: t for name, t in state.items() if name not in weights})
    return done


def _report(trainer: Trainer, done: Done, rank: int) -> None:
    """Hand the epoch's metrics to Ray Train, with a checkpoint from the first worker."""
    if rank != 0:
        trainer.join_all_gathers()
        train.report(asdict(done))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = {f"{ENCODER_PREFIX}{name}": t.cpu().numpy() for name, t in trainer.weights()}
        safetensors.numpy.save_file(weights | trainer.optimizer_state(), Path(folder) / STATE_FILE)
        (Path(folder) / METRICS_FILE).write_text(json.dumps(asdict(done)))
        train.report(asdict(done), checkpoint=train.Checkpoint.from_directory(folder))


def _write_scalars(writer: SummaryWriter, trainer: Trainer, done: Done) -> None:
    writer.add_scalar("loss", done.loss, trainer.steps)
    writer.add_scalar("learning_rate", trainer.learning_rate, trainer.steps)
    writer.add_scalar("sequences_per_second", done.sequences_per_second, trainer.steps)
    writer.flush()


def _facts(
    settings: PretrainSettings,
    preset: Preset,
    data: TrainingData | StreamedData,
    done: Done,
    workers: int,
    device: torch.device,
) -> TrainingFacts:
    """Return what the manifest says of the training."""
    given = asdict(settings) | asdict(_training_config(settings, preset, device)) | asdict(preset)
    return TrainingFacts(
        **given,
        seconds=done.seconds,
        sequences_per_second=done.sequences_per_second,
        loss=done.loss,
        workers=workers,
        device=str(device),
        events=data.figures.events,
        users=data.figures.users,
        items=len(data.catalog),
    )


def _save_result(folder: Path, trainer: Trainer, data: TrainingData | StreamedData, training: TrainingFacts) -> None:
    """The model folder, with the optimiser's state so that learning goes on where it stopped."""
    manifest = Manifest(training=training)
    save_model(folder, trainer.unsharded_encoder().cpu(), data.catalog, manifest)
    safetensors.numpy.save_file(trainer.optimizer_state(), folder / OPTIMIZER_FILE)
    write_manifest(folder, manifest)
