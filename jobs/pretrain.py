"""Pretrain the behaviour encoder on Ray Train: any number of workers, CPU or GPU.

    python -m jobs.pretrain --data DATA --out MODEL [--workers N] [--set epochs=20]

Every epoch is checkpointed in .MODEL.training beside MODEL; a killed worker is started again, and the same command
after a killed job goes on from the newest checkpoint (with other data or settings it starts afresh). TensorBoard
scalars go to MODEL.runs. By default each user's newest event is held out, so that `afterclick evaluate` is honest;
`--holdout none` trains on everything. jobs/training_loop.py is what the workers run.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.local import running_ray
from jobs.configuration import settings_from, write_json
from jobs.progress import shown_progress
from lib.data.dataset import EVENTS_FILE, ITEMS_FILE
from lib.durable import rename_durably
from lib.errors import InputError

if TYPE_CHECKING:
    from ray.train import TrainingFailedError

    from lib.model.folder import Manifest

# the names that lib/evaluation/protocols.py gives its protocols, without the torch that it imports: `--help` is to
# answer at once
HOLDOUTS = ("leave-one-out", "temporal", "none")
INPUTS = ("kind", "gap", "value", "attributes")  # those of lib/model/encoder.py, for the same reason
DEFAULT_INPUTS = ("kind", "value", "attributes")
PRESETS = ("small", "base", "large")  # those of lib/model/presets.py, for the same reason
PRECISIONS = ("float32", "bfloat16")
RESTARTS = 3  # of a failed worker
RUN_FILE, STREAM_FOLDER = "run.json", "stream"
LIVE_FOLDER = "live"  # where `afterclick serve` keeps the log and the versions of a model
LARGEST_SEED = 2**31 - 1
LEAST = {
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_length": 2,
    "epochs": 1,
    "events_per_batch": 1,
    "negatives": 1,
    "accumulation": 1,
}
POSITIVE = ("learning_rate", "clip_norm", "popularity_half_life_days")


@dataclass(frozen=True)
class PretrainSettings:
    """What a run is made of; what is None is chosen from the data (lib/model/presets.py) or by lib/model/trainer.py."""

    holdout: str = HOLDOUTS[0]
    preset: str = PRESETS[0]
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_length: int | None = None
    dropout: float | None = None
    epochs: int | None = None
    events_per_batch: int | None = None  # over all workers
    learning_rate: float | None = None
    weight_decay: float | None = None
    negatives: int | None = None
    clip_norm: float | None = None
    dislike_weight: float | None = None
    inputs: list[str] = field(default_factory=lambda: list(DEFAULT_INPUTS))  # what is read of an event beside its item
    precision: str | None = None  # of the blocks; None: bfloat16 for base and large on a GPU, else float32
    activation_checkpointing: bool | None = None
    accumulation: int | None = None  # parts that a worker works a batch off in
    compile: bool = False  # the blocks, by torch.compile: worth its minute on a GPU only
    sharded: bool = False  # weights are shared out among the workers (FSDP2)
    popularity_half_life_days: float = 7.0
    stream: bool | None = None  # events from disk; None: where they would fill the machine's memory
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("preset", PRESETS), ("holdout", HOLDOUTS), ("precision", (None, *PRECISIONS))):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name}: {value!r} is not one of {', '.join(filter(None, known))}")
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name}: {value} is no number to train with; give a finite one")
            if value is not None and value < LEAST.get(name, value):
                raise InputError(f"{name}: {value} is too small; give {LEAST[name]} or more")
            if value is not None and name in POSITIVE and value <= 0:
                raise InputError(f"{name}: {value} is too small; give more than 0")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"dropout: {self.dropout} is not from 0 to below 1")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise InputError(f"weight_decay: {self.weight_decay} is below 0")
        if self.dislike_weight is not None and self.dislike_weight < 0:
            raise InputError(f"dislike_weight: {self.dislike_weight} is below 0")
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown:
            raise InputError(f"inputs: {', '.join(unknown)} unknown; give some of [{', '.join(INPUTS)}]")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed: {self.seed} is not from 0 to {LARGEST_SEED}")


def pretrain(
    data: str | Path,
    out: str | Path,
    settings: PretrainSettings | None = None,
    workers: int = 1,
    gpu: bool | None = None,
    overwrite: bool = False,
) -> "Manifest":
    """Train a model folder from an ingested dataset, on the running Ray or one started for it.

    `out` appears as a whole when training has ended; until then nothing of it is touched.

    Raises:
        InputError: the data cannot be trained on, `out` must not be replaced, or the cluster is too small.
        RuntimeError: the workers failed more often than they are restarted.
    """
    from jobs.event_stream import must_stream
    from jobs.training_loop import preset_of, read_training_data
    from lib.model.folder import read_manifest

    settings = settings or PretrainSettings()
    data, out = Path(data).absolute(), Path(out).absolute()
    _refuse_loss(out, overwrite)
    if settings.stream is None:
        settings = replace(settings, stream=must_stream(data, workers + 1))  # this process reads them, too
    if not settings.stream:  # bad input before Ray is started
        preset_of(settings, read_training_data(str(data), settings.holdout).histories)
    storage = out.with_name(f".{out.name}.training")
    _prepare(storage, data, settings)
    with running_ray():
        if settings.stream:
            _prepare_stream(data, storage, settings)
        run_workers(data, out, storage, settings, workers, gpu)
    manifest = read_manifest(storage / "result")
    _install(storage / "result", out)
    shutil.rmtree(storage)
    return manifest


def _prepare_stream(data: Path, storage: Path, settings: PretrainSettings) -> None:
    """Put the events where the workers stream them from, unless an interrupted run has done so.

    Raises:
        InputError: the data cannot be trained on; nothing of the run is left then.
    """
    from jobs.event_stream import prepare_stream
    from jobs.training_loop import preset_of, refuse_too_small

    print(f"streaming {data} by way of {storage / STREAM_FOLDER}", file=sys.stderr)
    try:
        figures = prepare_stream(data, storage / STREAM_FOLDER, settings.holdout, settings.seed)
        refuse_too_small(data, settings.holdout, figures)
        preset_of(settings, figures.miniature())
    except InputError:
        shutil.rmtree(storage)
        raise


def run_workers(
    data: Path,
    out: Path,
    storage: Path,
    settings: PretrainSettings,
    workers: int,
    gpu: bool | None,
    start: Path | None = None,
    older_weight: float = 1.0,
) -> None:
    """Run the workers to the end; storage/result is the model then.

    With a model folder to start from, `data` are the marked histories of lib/live/finetuning.py, and those of their
    events that are not marked count by `older_weight`.
    """
    import torch
    from ray import train
    from ray.train.torch import TorchTrainer

    from jobs.training_loop import training_loop

    use_gpu = _enough_devices(workers, gpu)
    with shown_progress() as board, _ctrl_c():
        trainer = TorchTrainer(
            training_loop,
            train_loop_config={
                "settings": asdict(settings),
                "data": str(data),
                "start": str(start) if start is not None else None,
                "older_weight": older_weight,
                "stream": str(storage / STREAM_FOLDER),
                "result": str(storage / "result"),
                "tensorboard": str(out.with_name(f"{out.name}.runs")),
                "threads": max(1, torch.get_num_threads() // workers),
                "board": board,
            },
            scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=train.RunConfig(
                name="run",
                storage_path=str(storage),
                failure_config=train.FailureConfig(max_failures=RESTARTS),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            trainer.fit()
        except train.TrainingFailedError as error:
            raise _reason(error) from error


def _enough_devices(workers: int, gpu: bool | None) -> bool:
    """Whether to train on GPUs: as asked, or if the cluster has one for each worker.

    Raises:
        InputError: this machine cannot hold the workers; a cluster is left to scale up.
    """
    import ray

    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) >= workers if gpu is None else gpu
    kind = "GPU" if use_gpu else "CPU"
    there = int(resources.get(kind, 0))
    if there < workers and not os.environ.get("RAY_ADDRESS"):
        remedy = "train with --no-gpu or fewer --workers" if use_gpu else "use fewer"
        raise InputError(f"workers: {workers} need {workers} {kind}s and Ray has {there} here; {remedy}")
    return use_gpu


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt: Ray Train takes SIGINT for itself, for good, and ends the process with status 0."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


def _reason(error: "TrainingFailedError") -> Exception:
    """What a person should read of Ray Train's error: the first worker's own, in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    rank = min(failures, default=None)
    failure: BaseException = error if rank is None else failures[rank]
    for wrapped in ("_base_exc", "health_check_failure", "controller_failure", "cause"):
        failure = getattr(failure, wrapped, None) or failure
    if isinstance(failure, InputError):
        return InputError(str(failure))
    where = "training" if rank is None else f"worker {rank} and its {RESTARTS} restarts"
    reason = f"{type(failure).__name__}: {failure}".splitlines()[0]  # the rest is a traceback, for the log
    return RuntimeError(f"{where} failed: {reason}; the same command goes on from the newest checkpoint")


def _refuse_loss(out: Path, overwrite: bool) -> None:
    """Refuse an `out` whose replacement would lose something."""
    if out.is_file():
        raise InputError(f"out: {out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if (out / LIVE_FOLDER).exists():
        raise InputError(f"out: {out / LIVE_FOLDER} holds a service's feedback log and versions; choose another folder")
    if not (out / "manifest.json").is_file():
        raise InputError(f"out: {out} is not empty and no model folder; choose another folder")
    if not overwrite:
        raise InputError(f"out: {out} is not empty; choose another folder or add --overwrite")


def _prepare(storage: Path, data: Path, settings: PretrainSettings) -> None:
    keep_or_start_afresh(storage, {"settings": asdict(settings), "data": checksums(data)})


def keep_or_start_afresh(storage: Path, run: dict[str, Any]) -> None:
    """Keep what an interrupted run left if it was the same run by this description; else start afresh.

    Raises:
        InputError: the folder cannot be written.
    """
    run |= {"ray": _ray_version()}
    if storage.exists():
        objection = _objection(storage, run)
        if objection is None:
            print(f"going on with the interrupted run in {storage}", file=sys.stderr)
            return
        print(f"starting afresh: the interrupted run in {storage} {objection}", file=sys.stderr)
        shutil.rmtree(storage)
    try:
        storage.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"out: {storage.parent} cannot be written ({error.strerror}); choose another folder"
        ) from error
    (storage / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")


def _objection(storage: Path, run: dict[str, Any]) -> str | None:
    """Why an interrupted run cannot be resumed, or None."""
    try:
        before = json.loads((storage / RUN_FILE).read_text())
        snapshot = storage / "run" / "checkpoint_manager_snapshot.json"
        if snapshot.exists():  # Ray Train's list of checkpoints, which it does not write atomically
            json.loads(snapshot.read_text())
    except (OSError, ValueError):
        return "is damaged"
    differing = [name for name in run if before.get(name) != run[name]]
    return f"had other {' and '.join(differing)}" if differing else None


def checksums(data: Path) -> dict[str, str]:
    """sha256 of each file of a dataset."""
    files = [data] if data.is_file() else [data / name for name in (EVENTS_FILE, ITEMS_FILE)]
    found = {}
    for path in files:
        if path.exists():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _ray_version() -> str:
    import ray

    return ray.__version__


def _install(result: Path, out: Path) -> None:
    """Put the finished folder in its place, whole."""
    if not out.exists():
        rename_durably(result, out)
        return
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    out.rename(replaced)
    rename_durably(result, out)
    shutil.rmtree(replaced)


def pretrain_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset (events.parquet, items.parquet).")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    gpu: Annotated[bool | None, typer.Option(help="Train on GPUs; by default if there is one for each worker.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file; repeatable.")] = None,
    holdout: Annotated[str | None, typer.Option(help="leave-one-out (default), temporal or none.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the manifest there too.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing model.")] = False,
) -> None:
    """Pretrain the behaviour encoder; size, length and number of epochs are chosen from the data."""
    given = [*(set_ or []), *([f"holdout={holdout}"] if holdout else [])]
    settings = settings_from(PretrainSettings, config, given)
    manifest = pretrain(data, out, settings, workers, gpu, overwrite)
    if json_ is not None:
        write_json(json_, manifest)
    training = manifest.training
    print(
        f"{out}: version {manifest.version}, {training.items} items, {training.events} events, "
        f"{training.epochs} epochs in {training.seconds:.0f} s "
        f"({training.sequences_per_second:.0f} sequences/s), loss {training.loss:.3f}"
    )


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(pretrain_command)
