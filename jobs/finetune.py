"""Fine-tune a served model on Ray Train with the feedback since its newest base, and put the result in its place.

    python -m jobs.finetune --model MODEL [--data DATA] [--since VERSION] [--every 24]

The newest events are held out (lib/live/finetuning.py). Where the result is not worse on them than the live weights
were, it is offered to the near-line learner, which takes it over as the next version while the replicas go on
answering, and learns from there on. Checkpoints are in STATE/finetuning: whatever is killed when, the same command goes
on, and an offer is taken over once.
"""

import fcntl
import json
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from cluster.local import running_ray
from jobs.configuration import settings_from, write_json
from jobs.pretrain import LIVE_FOLDER
from jobs.pretrain_settings import PretrainSettings
from jobs.run_folder import RESULT, checksums, resume_or_restart
from lib.durable import write_durably
from lib.errors import InputError
from lib.model.presets import Precision
from lib.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.evaluation.comparison import Comparison
    from lib.live.finetuning import Cut
    from lib.live.learning_model import LearningModel
    from lib.versions.folder import LoadedVersion
    from lib.versions.registry import Registry

FOLDER = "finetuning"
LOCK_FILE = "finetuning.lock"
PLAN_FILE, TRAINED_FILE, HELD_OUT_FILE = "plan.json", "trained.parquet", "held_out.parquet"
START, RIVAL = "start", "rival"  # the models that it starts from, and that it is compared with
TAKE_OVER_SECONDS = 60.0  # to wait for the learner
LOOK_SECONDS = 0.2
METRIC = "ndcg@10"


class FinetuneSettings(Settings):
    """How a model is fine-tuned, and how good the result must be."""

    epochs: int = Field(default=5, ge=1, description="passes over the feedback")
    learning_rate: float = Field(default=5e-4, ge=0, description="at its peak; it is warmed up, and decays")
    events_per_batch: int = Field(default=2048, ge=1, description="over all workers")
    negatives: int = Field(default=512, ge=1, description="random items that each batch's targets are compared with")
    older_events: float = Field(default=1.0, ge=0, description="of other users, drawn at random, for each new event")
    older_weight: float = Field(default=0.5, ge=0, description="of an older event as a target, where a new one's is 1")
    held_out: float = Field(
        default=0.1, gt=0, le=0.5, description="share of the new events, the newest, that the result is judged by"
    )
    most_held_out: int = Field(default=10_000, ge=1, description="events of that share at most")
    tolerance: float = Field(
        default=0.005, ge=0, description="how far the result's NDCG@10 may be below the live weights'"
    )
    popularity_half_life: float | None = Field(
        default=None,
        gt=0,
        description="in events; default: as many as the base has items, and at least 1000",
    )
    precision: Precision | None = Field(default=None, description="of the blocks; default: float32")
    accumulation: int = Field(default=1, ge=1, description="parts that a worker processes a batch in")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of all that is drawn")


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    since: int  # the version that it started from
    rival: int  # the live version that it was compared with
    events: int  # that were learned
    held_out_events: int
    log_offset: int  # of the result
    metrics: dict[str, dict[str, dict[str, float]]]  # live, base and the difference: each with its interval
    accepted: bool
    version: int | None  # as which it is live; None where it was not accepted, or where no learner runs
    seconds: float

    def sentence(self) -> str:
        """One line for a person."""
        live, base = (self.metrics[name][METRIC]["value"] for name in ("live", "base"))
        compared = f"{METRIC} {base:.4f} against {live:.4f} of version {self.rival} on {self.held_out_events} events"
        if not self.accepted:
            return f"not published: worse than the live version beyond the tolerance ({compared}); nothing has changed"
        if self.version is None:
            return f"offered ({compared}): the learner takes it over as soon as it runs"
        return f"version {self.version} is live, fine-tuned with {self.events} events ({compared})"


def finetune(
    state: str | Path,
    data: str | Path | None = None,
    since: int | None = None,
    settings: FinetuneSettings | None = None,
    workers: int = 1,
    gpu: bool | None = None,
) -> Outcome:
    """Fine-tune once, on the running Ray or one started for it; returns when the result is live, or was refused.

    Raises:
        InputError: nothing is served at this state, the version is not stored, or there is too little feedback.
        RuntimeError: the workers failed more often than they are restarted.
    """
    from lib.versions.registry import Registry

    settings = settings or FinetuneSettings()
    state = _state_folder(state)
    with _alone(state):
        return _finetune(Registry.of(state), state, data, since, settings, workers, gpu)


def _finetune(
    registry: "Registry",
    state: Path,
    data: str | Path | None,
    since: int | None,
    settings: FinetuneSettings,
    workers: int,
    gpu: bool | None,
) -> Outcome:
    from jobs.training_workers import run_workers  # torch and Ray

    start, storage = time.monotonic(), state / FOLDER
    run = {
        "settings": settings.model_dump(),
        "since": since,
        "data": checksums(Path(data)) if data is not None else None,
    }
    resume_or_restart(storage, run)
    if not (storage / PLAN_FILE).exists():
        try:
            _plan(registry, state, storage, data, since, settings)
        except InputError:
            shutil.rmtree(storage)
            raise
    plan = json.loads((storage / PLAN_FILE).read_text())
    with running_ray():
        run_workers(
            data=storage / TRAINED_FILE,
            storage=storage,
            tensorboard=storage.with_name(f"{storage.name}.runs"),
            settings=_pretrain_settings(storage, settings),
            workers=workers,
            gpu=gpu,
            start=storage / START,
            older_weight=settings.older_weight,
        )
    try:
        metrics = _judge(storage)
    except InputError:
        shutil.rmtree(storage)
        raise
    accepted = metrics["difference"][METRIC]["value"] >= -settings.tolerance
    if accepted:
        _offer(registry, storage, plan, metrics)
    try:
        version = _taken_over(registry, plan["name"]) if accepted else None
    except RuntimeError:
        shutil.rmtree(storage)  # what the learner could not use is not offered again
        raise
    shutil.rmtree(storage)
    facts = {name: plan[name] for name in ("events", "held_out_events")}
    cut = plan["cut"]
    return Outcome(
        cut["since"], cut["rival"], **facts, log_offset=cut["until"], metrics=metrics, accepted=accepted,
        version=version, seconds=time.monotonic() - start,
    )  # fmt: skip


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """No other run works in the same folder; the lock goes with the process.

    Raises:
        InputError: one does.
    """
    with (state / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"state: {state} is being fine-tuned by another process; wait until it has ended"
            ) from None
        yield


def _state_folder(state: str | Path) -> Path:
    from lib.log.layout import LogLayout

    if "://" in str(state):
        raise InputError(f"state: {state} is no folder; fine-tune where the feedback log is")
    folder = Path(state).absolute()
    if not any(path.is_file() for path in LogLayout.of(folder).files(folder)):
        raise InputError(f"state: {folder} has no feedback log; serve the model and take feedback first")
    return folder


def _plan(
    registry: "Registry",
    state: Path,
    storage: Path,
    data: str | Path | None,
    since: int | None,
    settings: FinetuneSettings,
) -> None:
    """Write what the run starts from, learns from and is judged by; the plan is the last file to come.

    Raises:
        InputError: a version is not stored, the dataset cannot be read or its ratings have another scale than the
            model's, or there is too little feedback.
    """
    import pyarrow as pa

    from lib.data.dataset import check_rating_scale
    from lib.live.finetuning import cut_feedback, feedback, keep_ranker, of_known_items, older_events, recount
    from lib.live.learning_model import LearningModel, popularity_half_life
    from lib.live.settings import LearnerConfig
    from lib.log.layout import read_log
    from lib.model.folder import Manifest, save_model
    from lib.versions.rejections import Rejections

    live = registry.load()
    version = registry.base_of(live) if since is None else since
    rejections = Rejections(registry.store)
    begun = rejections.passed_by(registry.load(version))
    if data is not None:
        check_rating_scale(data, begun.encoder.config.ratings)
    with read_log(state) as log:
        every = feedback(log, begun.log_offset, log.last_offset())
        logged = every["offset"].to_numpy()
        harmful = rejections.cover(logged)  # what did harm once is not learned here either
        new, offsets = every.filter(pa.array(~harmful)), logged[~harmful]
        share, most = settings.held_out, settings.most_held_out
        cut = cut_feedback(registry, offsets, live, version, begun.log_offset, share, most)
        learned = int((offsets <= cut.until).sum())
        wanted = round(settings.older_events * learned)
        older = older_events(log, data, cut, new["user_id"].unique(), wanted, settings.seed)
        older = older.filter(pa.array(~rejections.cover(older["offset"].to_numpy())))
        passed_by = int((logged[harmful] <= cut.until).sum())
    rival = registry.load(cut.rival)  # a copy, as the learner prunes its versions while the workers train
    save_model(storage / RIVAL, rival.encoder, rival.catalog, Manifest())
    live.catalog.change(_item_changes(state))
    half_life = popularity_half_life(settings.popularity_half_life, begun)
    learner = LearnerConfig(seed=settings.seed, popularity_half_life=half_life)
    model = LearningModel(begun, learner, live.catalog)
    events = of_known_items(pa.concat_tables([older, new]), model.catalog, learner.new_item_users)
    model.add_items(events["item_id"].unique().to_pylist())
    with read_log(state) as log:
        recount(model.encoder, model.catalog, _origin(registry, begun), log, data, cut.until, rejections)
    keep_ranker(model.encoder, rival.encoder)
    _write_material(storage, model, events, cut, settings)
    plan = {
        "name": f"{time.time_ns() // 1_000_000:013d}-{uuid.uuid4().hex}",
        "cut": asdict(cut),
        "events": learned,
        "held_out_events": len(new) - learned,
        "half_life": half_life,
        "ledger": {
            "events_trained": begun.facts.events_trained + learned,
            "events_rejected": begun.facts.events_rejected + passed_by,
        },
    }
    write_durably(storage / PLAN_FILE, f"{json.dumps(plan, indent=2)}\n".encode())
    print(
        f"fine-tuning version {cut.since} with {learned} events and {len(older)} older ones; "
        f"{plan['held_out_events']} are held out",
        file=sys.stderr,
    )


def _write_material(
    storage: Path, model: "LearningModel", events: "pa.Table", cut: "Cut", settings: FinetuneSettings
) -> None:
    """Write the model that training starts from, what it learns from, and the histories that end in held-out events."""
    import pyarrow as pa

    from lib.live.finetuning import TooFewEvents, count_popularity, histories_around, of_users
    from lib.model.folder import Manifest
    from lib.versions.folder import save_with_optimizer

    encoder, catalog, config = model.encoder, model.catalog, model.encoder.config
    kinds = config.event_kinds or []
    held_out = events["offset"].to_numpy() > cut.until
    trained = histories_around(events.filter(pa.array(~held_out)), cut.after, catalog, kinds, config.max_length)
    judges = events.filter(pa.array(held_out))["user_id"].unique()
    if not trained.targets.any():
        raise TooFewEvents("since: no event follows another one of its user; wait for more feedback")
    count_popularity(encoder, catalog, events, cut, model.popularity_half_life)
    trained.save(storage / TRAINED_FILE)
    histories_around(of_users(events, judges), cut.until, catalog, kinds).save(storage / HELD_OUT_FILE)
    save_with_optimizer(storage / START, encoder, catalog, Manifest(), model.trainer.optimizer_state())


def _origin(registry: "Registry", begun: "LoadedVersion") -> "LoadedVersion":
    """Return the version with which the lineage of one began.

    It is that one itself where the other is not stored any more, or has other items, as after a rollback behind the
    winner of an experiment.
    """
    from lib.versions.accounts import Accounts

    version = Accounts(registry).origin_of(begun.version)
    if version is None or version not in registry.snapshots():
        return begun
    origin = registry.load(version)
    items = origin.catalog.item_ids
    alike = origin.encoder.config.neighbours == begun.encoder.config.neighbours
    return origin if alike and begun.catalog.item_ids[: len(items)] == items else begun


def _item_changes(state: Path) -> dict[str, dict[str, Any] | None]:
    """Return what items that were put or deleted while live are now."""
    from lib.log.items import ItemLog
    from lib.log.layout import ITEM_LOG_FILE

    if not (state / ITEM_LOG_FILE).exists():
        return {}
    log = ItemLog(state / ITEM_LOG_FILE)
    try:
        return {change.item_id: change.attributes for change in log.after(0)}
    finally:
        log.close()


def _pretrain_settings(storage: Path, settings: FinetuneSettings) -> PretrainSettings:
    """Return the settings of the training loop: shape and length are those of the model that it starts from."""
    config = json.loads((storage / START / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_length", "dropout", "inputs")
    names = ("epochs", "learning_rate", "events_per_batch", "negatives", "precision", "accumulation", "seed")
    given = {name: config[name] for name in shape} | {name: getattr(settings, name) for name in names}
    return PretrainSettings(holdout="none", stream=False, **given)


def _judge(storage: Path) -> dict[str, dict[str, dict[str, float]]]:
    from lib.live.finetuning import MarkedHistories, judge
    from lib.versions.folder import load_folder

    result, rival = load_folder(storage / RESULT), load_folder(storage / RIVAL)
    held_out = MarkedHistories.load(storage / HELD_OUT_FILE)
    return _metrics(judge((result.encoder, result.catalog), (rival.encoder, rival.catalog), held_out))


def _metrics(comparison: "Comparison") -> dict[str, dict[str, dict[str, float]]]:
    live, base = comparison.results
    found = {"live": live.metrics, "base": base.metrics, "difference": base.differences}
    names = (METRIC, "recall@10", "mrr")
    return {who: {name: asdict(estimates[name]) for name in names} for who, estimates in found.items()}


def _offer(registry: "Registry", storage: Path, plan: Mapping[str, Any], metrics: dict[str, Any]) -> None:
    """Leave the result where the learner looks for it, unless a run that was killed has done so."""
    from lib.model.facts import VersionFacts
    from lib.model.folder import read_manifest, write_manifest

    if registry.version_of_offer(plan["name"]) is not None:
        return
    folder, cut = storage / RESULT, plan["cut"]
    facts = VersionFacts(
        kind="finetune",
        since=cut["since"],
        rival=cut["rival"],
        events=plan["events"],
        half_life=plan.get("half_life"),
        **plan["ledger"],
    )
    manifest = read_manifest(folder).model_copy(update={"log_offset": cut["until"], "facts": facts, "metrics": metrics})
    write_manifest(folder, manifest)
    registry.offers.add(plan["name"], folder)


def _taken_over(registry: "Registry", name: str) -> int | None:
    """Return the version as which an offer is live everywhere; None where no learner takes it over for a while.

    Raises:
        RuntimeError: the learner could not use it.
    """
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    while name in registry.offers.names():  # it goes when all replicas have it
        if time.monotonic() > deadline:
            return registry.version_of_offer(name)
        time.sleep(LOOK_SECONDS)
    version = registry.version_of_offer(name)
    if version is None:
        raise RuntimeError("the learner could not take the result over; its log says why")
    return version


def finetune_command(
    model: Annotated[Path, typer.Option(help="Model folder that is being served.")],
    state: Annotated[Path | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    data: Annotated[Path | None, typer.Option(help="Ingested dataset, whose behaviour is not to be forgotten.")] = None,
    since: Annotated[int | None, typer.Option(min=1, help="Version to start from; the newest base if absent.")] = None,
    every: Annotated[float | None, typer.Option(help="Repeat after so many hours, until Ctrl-C.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    gpu: Annotated[bool | None, typer.Option(help="Train on GPUs; by default if there is one for each worker.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file; repeatable.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write what came of it there.")] = None,
) -> None:
    """Fine-tune with the feedback since a version; a result that is not worse goes live, and learning goes on."""
    settings = settings_from(FinetuneSettings, config, set_ or [])
    if every is not None and not 0 < every < float("inf"):
        raise InputError(f"every: {every} is no number of hours; give more than 0")
    run = (state or model / LIVE_FOLDER, data, since, settings, workers, gpu)
    if every is not None:
        _repeat(run, every * 3600, json_)
    outcome = finetune(*run)
    _tell(outcome, json_)
    if not outcome.accepted:
        raise typer.Exit(1)


def _tell(outcome: Outcome, json_: Path | None) -> None:
    print(outcome.sentence(), flush=True)
    if json_ is not None:
        write_json(json_, asdict(outcome))


def _repeat(run: tuple[Any, ...], seconds: float, json_: Path | None) -> None:
    """Fine-tune again and again; a run that fails, or has too little feedback, does not keep the next from its turn.

    Raises:
        InputError: the first run says that something is wrong with what was given.
    """
    from lib.live.finetuning import TooFewEvents

    first = True
    while True:
        start = time.monotonic()
        try:
            _tell(finetune(*run), json_)
        except (InputError, RuntimeError, OSError) as error:
            if first and isinstance(error, InputError) and not isinstance(error, TooFewEvents):
                raise
            print(f"failed: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        first = False
        time.sleep(max(0.0, start + seconds - time.monotonic()))


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(finetune_command)
