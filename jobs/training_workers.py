"""Ray Train workers of a pretraining or fine-tuning job, started and watched to the end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer

from jobs.pretrain_settings import PretrainSettings
from jobs.progress import shown_progress
from jobs.run_folder import CHECKPOINTS
from jobs.training_loop import TrainingRun, training_loop
from lib.errors import InputError

RESTARTS = 3  # of a failed worker


def run_workers(
    *,
    data: Path,
    storage: Path,
    tensorboard: Path,
    settings: PretrainSettings,
    workers: int,
    gpu: bool | None,
    start: Path | None = None,
    older_weight: float = 1.0,
) -> None:
    """Run the workers to the end, on the running Ray; `storage`/RESULT is the model then.

    Args:
        data: an ingested dataset; with `start`, the marked histories of lib/live/finetuning.py.
        storage: the folder of the run's checkpoints, and of its stream.
        tensorboard: the folder of its scalars.
        settings: of the training.
        workers: how many.
        gpu: whether to train on GPUs; None if the cluster has one for each worker.
        start: the model folder of a fine-tune to start from.
        older_weight: what those events count that are not marked.

    Raises:
        InputError: the data cannot be trained on, or this machine cannot hold the workers.
        RuntimeError: the workers failed more often than they are restarted.
    """
    use_gpu = _enough_devices(workers, gpu)
    with shown_progress() as reports, _ctrl_c():
        run = TrainingRun(
            settings=settings,
            data=data,
            storage=storage,
            tensorboard=tensorboard,
            threads=max(1, torch.get_num_threads() // workers),
            reports=reports,
            start=start,
            older_weight=older_weight,
        )
        trainer = TorchTrainer(
            training_loop,
            train_loop_config={"run": run},
            scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=train.RunConfig(
                name=CHECKPOINTS,
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
    """Return whether to train on GPUs: as asked, or if the cluster has one for each worker.

    Raises:
        InputError: this machine cannot hold the workers; a cluster is left to scale up.
    """
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
    """Raise KeyboardInterrupt on Ctrl-C: Ray Train handles SIGINT for good, and would end the process with status 0."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


def _reason(error: train.TrainingFailedError) -> Exception:
    """Return what a person should read of Ray Train's error: that of the failed worker of lowest rank, in one line."""
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
