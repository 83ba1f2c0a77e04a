"""Pretrain the behaviour encoder on Ray Train: any number of workers, CPU or GPU.

    python -m jobs.pretrain --data DATA --out MODEL [--workers N] [--set epochs=20]

Every epoch is checkpointed in .MODEL.training beside MODEL; a killed worker is started again, and the same command
after a killed job goes on from the newest checkpoint (with other data or settings it starts afresh). TensorBoard
scalars go to MODEL.runs. By default each user's newest event is held out, so that `afterclick evaluate` is honest;
`--holdout none` trains on everything. jobs/training_loop.py is what the workers run.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.local import running_ray
from jobs.configuration import settings_from, write_json
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.run_folder import RESULT, STREAM, checksums, resume_or_restart
from lib.data.holdout import LEAVE_ONE_OUT, NONE, TEMPORAL
from lib.durable import rename_durably
from lib.errors import InputError

if TYPE_CHECKING:
    from lib.model.folder import Manifest

LIVE_FOLDER = "live"  # where `afterclick serve` keeps the log and the versions of a model


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
    # torch and Ray, which `--help` does not wait for
    from jobs.event_stream import must_stream
    from jobs.training_data import read_training_data
    from jobs.training_workers import run_workers
    from lib.model.folder import read_manifest

    settings = settings or PretrainSettings()
    data, out = Path(data).absolute(), Path(out).absolute()
    _refuse_loss(out, overwrite)
    if settings.stream is None:
        settings = settings.model_copy(update={"stream": must_stream(data, workers + 1)})  # this process reads, too
    if not settings.stream:  # bad input is refused before Ray is started
        preset_of(settings, read_training_data(data, settings.holdout).figures)
    storage = out.with_name(f".{out.name}.training")
    resume_or_restart(storage, _description(data, settings))
    with running_ray():
        if settings.stream:
            _prepare_stream(data, storage, settings)
        run_workers(
            data=data,
            storage=storage,
            tensorboard=out.with_name(f"{out.name}.runs"),
            settings=settings,
            workers=workers,
            gpu=gpu,
        )
    manifest = read_manifest(storage / RESULT)
    _install(storage / RESULT, out)
    shutil.rmtree(storage)
    return manifest


def _description(data: Path, settings: PretrainSettings) -> dict[str, Any]:
    """Say what a run is made of."""
    return {"settings": settings.model_dump(), "data": checksums(data)}


def _prepare_stream(data: Path, storage: Path, settings: PretrainSettings) -> None:
    """Put the events where the workers stream them from, unless an interrupted run has done so.

    Raises:
        InputError: the data cannot be trained on; nothing of the run is left then.
    """
    from jobs.event_stream import prepare_stream
    from jobs.training_data import refuse_too_small

    print(f"streaming {data} by way of {storage / STREAM}", file=sys.stderr)
    try:
        figures = prepare_stream(data, storage / STREAM, settings.holdout, settings.seed)
        refuse_too_small(data, settings.holdout, figures)
        preset_of(settings, figures)
    except InputError:
        shutil.rmtree(storage)
        raise


def _refuse_loss(out: Path, overwrite: bool) -> None:
    """Refuse an `out` whose replacement would lose something.

    Raises:
        InputError: it is a file, a served model, no model, or a model that may not be overwritten.
    """
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


def _install(result: Path, out: Path) -> None:
    """Move the finished folder to its place, as a whole."""
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
    holdout: Annotated[str | None, typer.Option(help=f"{LEAVE_ONE_OUT} (default), {TEMPORAL} or {NONE}.")] = None,
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
