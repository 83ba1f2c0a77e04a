"""The loop that each Ray Train worker of a pretraining or fine-tuning job runs.

Every epoch's batches, negatives and dropout follow from the seed and the epoch alone, and rank 0 checkpoints weights
and optimiser at its end. So a run that was killed and resumed gives the weights of one that was not, and any number of
workers sees the same batches.
"""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.progress import Report
from jobs.run_folder import RESULT, STREAM
from jobs.training_data import TrainingData, WeightedData, read_training_data
from lib.data.attributes import attribute_codes, attribute_values
from lib.data.events import EVENT_KINDS
from lib.data.popularity import DAY, popularity_of, steady_total
from lib.live.finetuning import MarkedHistories
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.facts import TrainingFacts
from lib.model.folder import Manifest, save_model, write_manifest
from lib.model.presets import DEFAULT_INPUTS, Preset
from lib.model.trainer import Trainer, TrainingConfig, keep_freed_memory
from lib.ranking.features import FEATURES
from lib.ranking.fit import (
    EXTRA_EPOCHS,
    EXTRA_RATE,
    LEAST_EVENTS,
    Held,
    HeldBack,
    count_all,
    fit_ranker,
    neighbours_for,
    people_come_back,
)
from lib.versions.folder import OPTIMIZER_FILE, LoadedVersion, load_folder

WARMUP_STEPS = 100
FINAL_LEARNING_RATE = 0.05  # of the peak, at the end of the decay
REPORT_EVERY = 10  # steps
STATE_FILE, METRICS_FILE = "state.safetensors", "metrics.json"
ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class TrainingRun:
    """What every worker of a run is told."""

    settings: PretrainSettings
    data: Path  # an ingested dataset; with `start`, the marked histories of lib/live/finetuning.py
    storage: Path  # jobs/run_folder.py
    tensorboard: Path
    threads: int  # of a worker on CPUs
    reports: Queue  # what jobs/progress.py shows
    start: Path | None = None  # the model folder of a fine-tune to start from
    older_weight: float = 1.0  # of those histories' events that are not marked


@dataclass(frozen=True)
class Material:
    """What a run trains with."""

    data: TrainingData | StreamedData
    preset: Preset
    origin: LoadedVersion | None = None  # the version that a fine-tune starts from


@dataclass(frozen=True)
class Metrics:
    """How far a run has come; stored with every checkpoint."""

    epoch: int = 0  # that are done
    loss: float | None = None  # mean of the newest epoch
    seconds: float = 0.0
    sequences: int = 0

    @property
    def sequences_per_second(self) -> float:
        """Over the whole run."""
        return self.sequences / max(self.seconds, 1e-9)


def training_loop(config: dict[str, Any]) -> None:
    """Train to the last epoch, from the newest checkpoint if there is one, and write the model folder."""
    run: TrainingRun = config["run"]
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(run.threads)
        keep_freed_memory()
    worker = TrainingWorker(run, read_material(run), device)
    metrics = worker.resume()
    for epoch in range(metrics.epoch, worker.epochs):
        if epoch == worker.preset.epochs:
            worker.fit_ranker()
        metrics = worker.train_epoch(epoch, metrics)
        worker.checkpoint(metrics)
    worker.finish(metrics)


def read_material(run: TrainingRun) -> Material:
    """Read the data of a run, and the version that it starts from."""
    settings = run.settings
    if run.start is not None:
        origin = load_folder(run.start)
        marked = MarkedHistories.load(run.data)
        weights = np.where(marked.marked, 1.0, run.older_weight)
        data = WeightedData(marked.histories, origin.catalog, weights=weights)
        return Material(data, preset_of(settings, data.figures), origin)
    if settings.stream:
        data = read_stream(run.data, run.storage / STREAM)
        return Material(data, preset_of(settings, data.figures))
    data = read_training_data(run.data, settings.holdout)
    return Material(data, preset_of(settings, data.figures))


class TrainingWorker:
    """One worker's part of a run; rank 0 also reports, checkpoints and writes the result."""

    def __init__(self, run: TrainingRun, material: Material, device: torch.device):
        self.run, self.data, self.preset, self.origin = run, material.data, material.preset, material.origin
        self.device = device
        context = train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.trainer, self.held = new_trainer(run.settings, material, device)
        config = self.trainer.encoder.config
        self.epochs = self.preset.epochs
        self.batches = self.every = self.data.batches(config)
        if self.held is not None:
            self.epochs += math.ceil(EXTRA_EPOCHS * self.preset.epochs)
            self.batches = self.data.batches(config, without=self.held)
        self.steps_per_epoch = [self._steps(self.batches)]
        if self.held is not None:
            self.steps_per_epoch.append(self._steps(self.every))
        self.first_step = self.trainer.steps  # a fine-tune counts on from its origin's
        self.writer: SummaryWriter | None = None

    def resume(self) -> Metrics:
        """Take over the newest checkpoint, if there is one; return how far it had come."""
        metrics = Metrics()
        checkpoint = train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state = safetensors.numpy.load_file(Path(folder) / STATE_FILE)
                metrics = Metrics(**json.loads((Path(folder) / METRICS_FILE).read_text()))
            weights = {name: array for name, array in state.items() if name.startswith(ENCODER_PREFIX)}
            optimizer = {name: array for name, array in state.items() if name not in weights}
            self.trainer.load_weights(
                {name.removeprefix(ENCODER_PREFIX): torch.from_numpy(array) for name, array in weights.items()}
            )
            self.trainer.load_optimizer_state(optimizer)
        if self.rank == 0:
            # a killed run may have written scalars of an epoch that it did not checkpoint: they are purged
            self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.trainer.steps + 1)
        return metrics

    def train_epoch(self, epoch: int, before: Metrics) -> Metrics:
        """Train on this worker's part of every batch of one epoch, counted from 0."""
        seed, preset, trainer = self.run.settings.seed, self.preset, self.trainer
        extra = epoch >= preset.epochs
        steps = self.steps_per_epoch[extra]
        start = time.perf_counter()
        losses, sequences = [], 0
        torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + self.rank)  # dropout
        generator = np.random.default_rng((seed, epoch))
        part = self.every if extra else self.batches
        batches = part.epoch(preset.events_per_batch, generator, self.rank, self.world_size)
        for step, batch in enumerate(batches):
            trainer.learning_rate = self._learning_rate()
            losses.append(trainer.step(batch.to(self.device)).loss)
            sequences += len(batch.lengths) * self.world_size
            if step % REPORT_EVERY == 0:
                self._report(epoch, step / steps)
        metrics = Metrics(
            epoch=epoch + 1,
            loss=float(np.mean(losses)),
            seconds=before.seconds + time.perf_counter() - start,
            sequences=before.sequences + sequences,
        )
        self._report(epoch, 1.0, metrics)
        return metrics

    def _learning_rate(self) -> float:
        """Return the rate of the next step: up and down again, then a smaller decay for what was kept back."""
        step, peak, preset = self.trainer.steps - self.first_step, self.preset.learning_rate, self.preset
        total = self.steps_per_epoch[0] * preset.epochs
        if step < total:
            return learning_rate_at(step, total, peak)
        extra = self.steps_per_epoch[1] * (self.epochs - preset.epochs)
        return decayed(step - total, extra, EXTRA_RATE * peak, FINAL_LEARNING_RATE * peak)

    def _steps(self, batches: Any) -> int:
        generator = np.random.default_rng(self.run.settings.seed)
        return sum(1 for _ in batches.groups(self.preset.events_per_batch, generator))

    def fit_ranker(self) -> None:
        """Fit the ranker on what was kept back, before the encoder learns that, too; rank 0 alone needs it."""
        encoder = self.trainer.unsharded_encoder()
        if self.rank != 0:
            return
        assert self.held is not None
        device, settings = self.device, self.run.settings
        half_life = settings.popularity_half_life_days * DAY
        count_popularity(encoder.cpu(), self.data, half_life, without=self.held)  # what newcomers are shown
        fit_ranker(encoder, self.data, self.held, settings.holdout, settings.seed)
        encoder.to(device)  # pyright: ignore[reportArgumentType]
        own, fitted = self.trainer.encoder.ranker, encoder.ranker
        if own is not None and fitted is not None and own is not fitted:
            own.load_state_dict(fitted.state_dict())

    def _report(self, epoch: int, share: float, metrics: Metrics | None = None) -> None:
        """Say, on rank 0, that so much of an epoch is done; with its metrics at its end."""
        if self.rank != 0:
            return
        epochs = self.epochs
        report = Report(epoch + 1, epochs, (epoch + min(share, 1.0)) / epochs)
        if metrics is not None:
            report = report._replace(loss=metrics.loss, seconds=metrics.seconds)
        self.run.reports.put(report)

    def checkpoint(self, metrics: Metrics) -> None:
        """Hand an epoch's metrics to Ray Train, from rank 0 with a checkpoint, and to TensorBoard."""
        trainer, writer = self.trainer, self.writer
        if writer is None:
            trainer.join_all_gathers()
            train.report(asdict(metrics))
            return
        writer.add_scalar("loss", metrics.loss, trainer.steps)
        writer.add_scalar("learning_rate", trainer.learning_rate, trainer.steps)
        writer.add_scalar("sequences_per_second", metrics.sequences_per_second, trainer.steps)
        writer.flush()
        with tempfile.TemporaryDirectory() as folder:
            weights = {f"{ENCODER_PREFIX}{name}": value.cpu().numpy() for name, value in trainer.weights()}
            safetensors.numpy.save_file(weights | trainer.optimizer_state(), Path(folder) / STATE_FILE)
            (Path(folder) / METRICS_FILE).write_text(json.dumps(asdict(metrics)))
            train.report(asdict(metrics), checkpoint=train.Checkpoint.from_directory(folder))

    def finish(self, metrics: Metrics) -> None:
        """Write the model folder, on rank 0, with the optimiser's state so that learning goes on where it stopped."""
        trainer = self.trainer
        if self.writer is None:
            trainer.join_all_gathers()
            return
        # before all that takes long, as the other workers wait in these all-gathers
        encoder, optimizer = trainer.unsharded_encoder().cpu(), trainer.optimizer_state()
        self.writer.close()
        if self.origin is None:
            count_popularity(encoder, self.data, self.run.settings.popularity_half_life_days * DAY)
            if encoder.counts is not None:
                count_all(encoder, self.data)
        folder, manifest = self.run.storage / RESULT, Manifest(training=self._facts(metrics))
        save_model(folder, encoder, self.data.catalog, manifest)
        safetensors.numpy.save_file(optimizer, folder / OPTIMIZER_FILE)
        write_manifest(folder, manifest)

    def _facts(self, metrics: Metrics) -> TrainingFacts:
        """Return what the manifest says of the training."""
        given = self.run.settings.model_dump() | asdict(self.trainer.config) | asdict(self.preset)
        return TrainingFacts(
            **given,
            seconds=metrics.seconds,
            sequences_per_second=metrics.sequences_per_second,
            loss=metrics.loss,
            workers=self.world_size,
            device=str(self.device),
            events=self.data.figures.events,
            users=self.data.figures.users,
            items=len(self.data.catalog),
        )


def new_trainer(
    settings: PretrainSettings, material: Material, device: torch.device
) -> tuple[Trainer, HeldBack | None]:
    """Return a trainer of a fresh encoder, or of the origin's with its optimiser's state, and what is held back.

    That is what the fresh encoder's ranker is fitted on; None where it has none.
    """
    data, preset, origin = material.data, material.preset, material.origin
    held = None
    encoder = origin.encoder if origin else new_encoder(data, preset, settings.seed, settings.inputs)
    if origin is None:
        held = add_ranker(encoder, data, settings)
    encoder.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it and hides its signature
    trainer = Trainer(encoder, len(data.catalog), training_config(settings, preset, device))
    if origin is not None and origin.optimizer is not None:
        trainer.load_optimizer_state(origin.optimizer)
    return trainer, held


def new_encoder(
    training_data: TrainingData | StreamedData, preset: Preset, seed: int, inputs: Sequence[str] = DEFAULT_INPUTS
) -> BehaviourEncoder:
    """Return a fresh encoder for this data; equal seeds give equal weights."""
    catalog = training_data.catalog
    attributes = attribute_values(catalog) if "attributes" in inputs else []
    codes = attribute_codes(catalog, attributes)
    config = BehaviourEncoderConfig(
        item_rows=len(catalog) + 1,
        **preset.shape(),
        event_kinds=list(EVENT_KINDS),
        value_boundaries=training_data.figures.value_boundaries,
        rating_scale=str(training_data.ratings),
        inputs=list(inputs),
        attribute_values=attributes,
        attributes_per_item=codes.shape[1],
    )
    torch.manual_seed(seed)
    encoder = BehaviourEncoder(config)
    encoder.item_attributes.copy_(torch.from_numpy(codes))
    return encoder


def add_ranker(
    encoder: BehaviourEncoder, data: TrainingData | StreamedData, settings: PretrainSettings
) -> HeldBack | None:
    """Give an encoder empty counts and a ranker, where enough is kept back to fit it on; return what chooses that."""
    figures, neighbours = data.figures, settings.neighbours
    if neighbours is None:
        neighbours = neighbours_for(figures.events, figures.items)
    held = HeldBack(data, figures, encoder.config, settings.holdout, settings.seed)
    if not neighbours or held.expected < LEAST_EVENTS:
        return None
    encoder.config.repeats = people_come_back(figures)
    encoder.add_ranker(neighbours, len(FEATURES))
    return held


def training_config(settings: PretrainSettings, preset: Preset, device: torch.device) -> TrainingConfig:
    """Return the trainer's settings: those that were set by hand, else the preset's, else its own defaults."""
    names = asdict(TrainingConfig()).keys()
    given = asdict(preset) | settings.model_dump(exclude_none=True)
    config = TrainingConfig(**{name: value for name, value in given.items() if name in names})
    if settings.precision is None and device.type == "cuda":
        return replace(config, precision=preset.gpu_precision)
    return config


def count_popularity(
    encoder: BehaviourEncoder,
    data: TrainingData | StreamedData,
    half_life: float,
    without: Held | None = None,
) -> None:
    """Set what is popular at the end of the training data, but for some events; it weighs no more than live ones."""
    reference = data.figures.newest
    totals, users, events = np.zeros(encoder.config.item_rows), 0, 0
    for histories in data.parts():
        if without is not None:
            histories = histories.select(~without(histories))
        totals += popularity_of(histories, reference, half_life, len(totals))
        users, events = users + int((histories.lengths > 0).sum()), events + len(histories.rows)
    most = steady_total(len(data.catalog), users / max(events, 1))
    totals *= min(1.0, most / max(totals.sum(), 1e-9))
    encoder.item_popularity.copy_(torch.from_numpy(totals.astype(np.float32)))


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Return the rate of a step: linear warm-up, then a cosine (Loshchilov & Hutter 2017) down to a twentieth."""
    warmup = min(WARMUP_STEPS, total // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return decayed(step - warmup, total - warmup, peak, FINAL_LEARNING_RATE * peak)


def decayed(step: int, total: int, first: float, last: float) -> float:
    """Return the rate of a step of a cosine from the first rate down to the last."""
    return last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * step / max(total, 1)))
