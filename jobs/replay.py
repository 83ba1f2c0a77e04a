"""Replay a dataset as a stream: what live learning is worth, event by event, before anything learns from it.

    python -m jobs.replay --data DATA [--json FILE] [--plot FILE.png] [--out FOLDER] [--through URL]

The oldest events pretrain a model, the rest streams in order of time (lib/live/prequential.py says how, and what the
arms batch, history, live and finetune are). Each arm is a Ray task of its own. With --out the model and the oldest
events stay there, and a second replay takes the model from there; `afterclick serve --model OUT/model --data
OUT/oldest` then serves it, and --through URL sends the same stream through that service, over HTTP, as the arm
`service`.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from pydantic import Field

from cluster.local import running_ray
from jobs.configuration import settings_from, write_json
from jobs.pretrain import pretrain
from jobs.pretrain_settings import PretrainSettings
from jobs.replay_service import through_service
from jobs.reports import check_plot, plot_replay, print_replay
from lib.data.dataset import read_events, read_items, read_rating_scale, write_dataset
from lib.data.tables import order_events
from lib.errors import InputError
from lib.live.prequential import Finetuned, Frozen, Live, Outcome, Stream, replay, split_by_time
from lib.live.prequential_comparison import ReplayComparison, compare_arms
from lib.live.settings import LearnerConfig
from lib.model.trainer import keep_freed_memory
from lib.ranking.candidates import WithoutSources, sources_without
from lib.settings import Seed, Settings

ARMS = ("batch", "history", "live", "finetune")
SERVICE = "service"
HOUR = 3_600_000  # milliseconds


class ReplaySettings(Settings):
    """What is replayed, and how."""

    share: float = Field(
        default=0.6, gt=0, lt=1, description="of the events, the oldest: what the model is pretrained on"
    )
    batch_events: int = Field(
        default=64,
        ge=1,
        description="of a micro-batch: a trigger by number, as the stream's clock runs faster than ours",
    )
    finetune_hours: float = Field(
        default=24.0, gt=0, description="of the stream's time, after each of which the arm `finetune` fine-tunes"
    )
    finetune_epochs: int = Field(default=5, ge=1, description="of a fine-tune, over all events so far")
    finetune_learning_rate: float = Field(default=1e-3, gt=0, description="of a fine-tune, at its beginning")
    seed: Seed = Field(default=0, description="of the arm `live`, and of the users that are resampled for intervals")
    without_sources: WithoutSources = Field(default=(), description="sources of candidates that are switched off")
    learner: LearnerConfig = Field(default=LearnerConfig(), description="the learner of the arm `live`")


def run_replay(
    data: Path,
    folder: Path,
    settings: ReplaySettings,
    arms: Sequence[str] = ARMS,
    through: str | None = None,
    pretraining: PretrainSettings | None = None,
) -> ReplayComparison:
    """Pretrain on the oldest events unless the folder has that model, and replay the rest for every arm.

    Raises:
        InputError: an unknown arm, too few events, none that chose an item, a model in the folder that was made of
            others, or a service that is not as it must be.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not (arms or through):
        raise InputError(f"arm: {', '.join(unknown) or 'none given'}; there are {', '.join(ARMS)}")
    stream = split_by_time(read_events(data), settings.share, read_rating_scale(data))
    if not stream.targets.any():
        raise InputError(
            f"data: all of the newest {len(stream.newest)} events turn an item down, so nothing can be ranked; choose "
            f"another share, or ingest the data with the --rating-scale that it has in place of {stream.ratings}"
        )
    outcomes: dict[str, Outcome] = {}
    if arms:
        with running_ray():
            model = _pretrained(stream, data, folder, pretraining or PretrainSettings(holdout="none"))
            outcomes |= _replay_arms(stream, model, settings, arms)
    if through is not None:
        outcomes[SERVICE] = through_service(through, stream)
    return compare_arms(stream, outcomes, settings.seed)


def _pretrained(stream: Stream, data: Path, folder: Path, settings: PretrainSettings) -> Path:
    """Return the model of the oldest events, from the folder if it is there."""
    oldest, model = folder / "oldest", folder / "model"
    if model.exists():
        kept, events = read_events(oldest), order_events(stream.oldest)
        if any(not kept[name].equals(events[name]) for name in ("user_id", "item_id", "timestamp")):
            raise InputError(f"out: {oldest} is not the oldest part of {data}; name another folder")
        return model
    write_dataset(oldest, stream.oldest, read_items(data), read_rating_scale(data))
    pretrain(oldest, model, settings)
    return model


def _replay_arms(stream: Stream, model: Path, settings: ReplaySettings, arms: Sequence[str]) -> dict[str, Outcome]:
    """Return the outcomes by arm; each is a Ray task, as many at a time as there are cores."""
    shared = ray.put(stream)
    task: Any = ray.remote(_replay_arm).options(num_cpus=1, max_retries=0)
    waiting = {task.remote(shared, str(model), settings, arm): arm for arm in arms}
    outcomes = {}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        arm = waiting.pop(done)
        outcomes[arm] = ray.get(done)
        print(f"{arm}: {stream.targets.sum():,} events answered", file=sys.stderr, flush=True)
    return {arm: outcomes[arm] for arm in arms}


def _replay_arm(stream: Stream, model: str, settings: ReplaySettings, name: str) -> Outcome:
    """One arm, in a process of its own."""
    torch.set_num_threads(1)
    keep_freed_memory()
    exclude_seen, sources = not stream.repeats, sources_without(settings.without_sources)
    with tempfile.TemporaryDirectory(prefix="afterclick-replay-") as state:
        if name == "live":
            arm = Live(Path(model), Path(state), settings.learner, exclude_seen, settings.seed, sources)
        elif name == "finetune":
            arm = Finetuned(
                Path(model),
                exclude_seen,
                settings.finetune_epochs,
                settings.finetune_learning_rate,
                settings.finetune_hours * HOUR,
                sources=sources,
            )
        else:
            arm = Frozen(Path(model), exclude_seen, sources)
        return replay(stream, arm, settings.batch_events, live_histories=name != "batch")


def replay_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset.")],
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality over time there, as a PNG file.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="batch, history, live or finetune; repeatable, all by default.")
    ] = None,
    through: Annotated[str | None, typer.Option(help="URL of a service that the stream goes through, too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the oldest events and their model there.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file; repeatable.")] = None,
) -> None:
    """Replay a dataset event by event: frozen weights, learning live, and fine-tunes, side by side."""
    check_plot(plot)
    settings = settings_from(ReplaySettings, config, set_ or [])
    folder = out or Path(tempfile.mkdtemp(prefix="afterclick-replay-"))
    try:
        arms = arm or (() if through else ARMS)
        comparison = run_replay(data, folder.absolute(), settings, arms, through)
    finally:
        if out is None:
            shutil.rmtree(folder)
    if json_ is not None:
        write_json(json_, comparison.as_json())
    title = f"{data.resolve().name}: the newest {1 - settings.share:.0%}, {comparison.events:,} events of "
    title += f"{comparison.users:,} users, each scored before it is learned"
    print_replay(comparison, title)
    if plot is not None:
        plot_replay(comparison, title, plot)


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(replay_command)
