"""A challenger beside the live model: its answers in each replica, and the one actor that counts and decides.

A replica that has a challenger answers the users of its arm with it, in the same batches; in shadow mode it asks the
challenger on a thread of its own, after the live answer was given, and leaves out what it has no time for. Once a
second it tells the actor what it has seen, and hears whether the experiment goes on; what it has not told when it is
killed is not counted. A challenger that wins is offered to the learner (lib/registry.py), which takes it over as it
does a fine-tuned model; one that loses is given up. Until it is promoted it does not learn.
"""

import asyncio
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from lib.catalog import Catalog
from lib.events import Event, InputError
from lib.experiment import (
    CHALLENGER,
    SHADOW,
    ChallengerConfig,
    ExperimentResults,
    Impression,
    Reaction,
    Records,
    Shadow,
    arm_in,
    tagged,
)
from lib.learner import LearnerConfig, NearlineLearner
from lib.model_folder import MANIFEST, Manifest, read_manifest, write_manifest
from lib.ranking_rules import RankingRules
from lib.recommender import Question, RankedItem, Recommender
from lib.registry import Registry, load_folder, save_with_optimizer
from serving.names import EXPERIMENT, NAMESPACE

FOLDER = "experiments"
TELL_SECONDS = 1.0
SHADOW_BATCH = 16  # answers that the challenger is asked for at once
SHADOWS_WAITING = 256  # at most; the newest are left out
VERDICT, VERSION = "verdict", "version"
logger = logging.getLogger("ray.serve")


class Answer(NamedTuple):
    """What was answered, by which version, and of which arm of an experiment."""

    version: int
    items: list[RankedItem]
    arm: str | None = None  # None where the user takes no part in one
    question: Question | None = None  # with the history that it was answered from, for the shadow


def prepare_challenger(config: ChallengerConfig, state: str) -> ChallengerConfig:
    """The same with a model folder that stays: a stored version is copied, because versions are pruned.

    Raises:
        InputError: the challenger cannot be loaded, or cannot answer what the live model can.
    """
    if "://" in state:
        raise InputError("challenger: it needs --state in a folder, where the results are kept")
    registry = Registry(state)
    try:
        if config.model.isdecimal():
            config = config.model_copy(update={"model": str(_copied(registry, int(config.model), Path(state)))})
        loaded = load_folder(Path(config.model))
    except InputError as error:
        raise InputError(f"challenger: {error}") from error
    live = registry.load().catalog
    missing = sorted(_attributes(live) - _attributes(loaded.catalog))
    if missing:
        raise InputError(f"challenger: its catalog has no {missing[0]}; pretrain it on data with the same attributes")
    loaded.catalog.joined(live)  # as it must be when it is promoted
    return config


def _copied(registry: Registry, version: int, state: Path) -> Path:
    """The folder of a stored version."""
    folder = state / FOLDER / f"version-{version}"
    if (folder / MANIFEST).exists():
        return folder
    learner = NearlineLearner(registry, LearnerConfig(), registry.load(version))
    counts = {name: getattr(learner, name) for name in ("events_trained", "events_rejected")}
    manifest = Manifest(version=version, log_offset=learner.log_offset, facts=counts)
    save_with_optimizer(folder, learner.encoder, learner.catalog, manifest, learner.trainer.optimizer_state())
    return folder


def _attributes(catalog: Catalog) -> set[str]:
    return set(catalog.attributes.column_names) if catalog.attributes is not None else set()


def experiment_name(config: ChallengerConfig) -> str:
    """What tells an experiment from others: the challenger's weights, and whether it is shown."""
    model = read_manifest(config.model).checksums["model.safetensors"][:12]
    return f"{model}-{SHADOW}" if config.shadow else model


def challenger_of(state: str, config: ChallengerConfig, rules: RankingRules) -> "Challenger":
    """The challenger for one replica; the experiment is started if need be."""
    loaded = load_folder(Path(config.model))
    recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset, rules)
    return Challenger(config, recommender, start_experiment(state, config))


class Challenger:
    """The challenger in one replica."""

    def __init__(self, config: ChallengerConfig, recommender: Recommender, actor: Any):
        self.config = config
        self.name = experiment_name(config)
        self.recommender = recommender
        self.actor = actor
        self.records = Records.none()
        self.waiting: deque[tuple[str, Question, list[str]]] = deque()
        self.lock = threading.Lock()  # held while the recommender is read or changed
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def catalog_changed(self, items: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Items have other attributes, or are removed."""
        with self.lock:
            self.recommender.catalog_changed(items)

    def answer(self, live: Recommender, questions: Sequence[Question], user_ids: Sequence[str | None]) -> list[Answer]:
        """Answer each question by its user's arm."""
        arms = [self._arm(question, user_id) for question, user_id in zip(questions, user_ids, strict=True)]
        own = [place for place, arm in enumerate(arms) if arm == CHALLENGER]
        others = [place for place, arm in enumerate(arms) if arm != CHALLENGER]
        ranked: dict[int, list[RankedItem]] = {}
        if others:
            ranked |= zip(others, live.recommend([questions[place] for place in others]), strict=True)
        if own:
            with self.lock:
                ranked |= zip(own, self.recommender.recommend([questions[place] for place in own]), strict=True)
        versions = {CHALLENGER: self.recommender.version}
        return [
            Answer(versions.get(arm or "", live.version), ranked[place], arm, questions[place])
            for place, arm in enumerate(arms)
        ]

    def _arm(self, question: Question, user_id: str | None) -> str | None:
        """The arm of a question; None also where one of two arms could not understand the filter."""
        arm = self.config.arm_of(user_id, self.name)
        return arm if arm in (None, SHADOW) or self._understands(question) else None

    def _understands(self, question: Question) -> bool:
        """Whether the challenger's catalog has what the filter asks for."""
        try:
            with self.lock:
                self.recommender.mask(question.filter)
        except InputError:
            return False
        return True

    def note(self, request_id: str, user_id: str, answer: Answer) -> str:
        """Count an answer that is shown; returns the id that names its arm."""
        assert answer.arm is not None
        request_id = tagged(request_id, self.name, answer.arm)
        if answer.arm != SHADOW:
            self.records.impressions.append(Impression(user_id, answer.arm))
        elif len(self.waiting) < SHADOWS_WAITING and answer.question is not None:
            self.waiting.append((request_id, answer.question, [item.item_id for item in answer.items]))
        return request_id

    def react(self, events: Sequence[Event]) -> None:
        """Count events that were accepted and name an answer of this experiment."""
        for event in events:
            arm = arm_in(event.request_id, self.name)
            if arm is not None and event.request_id is not None:
                reaction = Reaction(event.user_id, arm, event.request_id, event.event, event.item_id)
                self.records.reactions.append(reaction)

    async def run(self) -> None:
        """Ask for shadows and tell the actor what was seen; returns when the experiment has ended."""
        while await self.tell():
            await asyncio.sleep(TELL_SECONDS)
            while self.waiting:
                asked = [self.waiting.popleft() for _ in range(min(SHADOW_BATCH, len(self.waiting)))]
                shadows = await asyncio.get_running_loop().run_in_executor(self.executor, self._shadows, asked)
                self.records.shadows += shadows

    def _shadows(self, asked: Sequence[tuple[str, Question, list[str]]]) -> list[Shadow]:
        asked = [own for own in asked if self._understands(own[1])]
        # copies: a history keeps what a recommender read of it, and this is another thread
        histories = [question.history.newest(len(question.history)) for _, question, _ in asked]
        questions = [q._replace(history=copy, explain=False) for (_, q, _), copy in zip(asked, histories, strict=True)]
        with self.lock:
            answers = self.recommender.recommend(questions)
        return [
            Shadow(request_id, live, [item.item_id for item in items])
            for (request_id, _, live), items in zip(asked, answers, strict=True)
        ]

    async def tell(self) -> bool:
        """Hand over the records; whether the experiment goes on."""
        records, self.records = self.records, Records.none()
        try:
            return await self.actor.record.remote(records)
        except RayError as error:  # an actor that died is restarted, and goes on from its file
            logger.warning("what was seen for a second is not counted: %s", error)
            return True


class Experiment:
    """The actor: counts what the replicas see, and acts on the verdict of the sequential test."""

    def __init__(self, state: str, config: ChallengerConfig):
        self.config = config
        self.name = experiment_name(config)
        self.registry = Registry(state)
        self.results = ExperimentResults(Path(state) / FOLDER / f"{self.name}.sqlite", config)

    def record(self, records: Records) -> bool:
        """Count what a replica has seen; returns whether the experiment goes on."""
        if self._ended():
            return False
        self.results.record(records)
        if self.config.decide and self.results.fact(VERDICT) is None:
            verdict = self.results.verdict()
            if verdict is not None:
                self.results.keep(VERDICT, verdict)
                logger.warning("experiment %s: %s", self.name, verdict)
        if self.results.fact(VERDICT) == "promote":
            self._promote()
        return not self._ended()

    @property
    def offer(self) -> str:
        """The name under which the challenger is offered to the learner."""
        return f"challenger-{self.name}"

    def _ended(self) -> bool:
        """A loser is given up at once; a winner answers its arm until it is live everywhere."""
        verdict = self.results.fact(VERDICT)
        return verdict == "rollback" or (verdict == "promote" and self.results.fact(VERSION) is not None)

    def _promote(self) -> None:
        """Leave the winner where the learner looks for it, once, and see it live everywhere."""
        if self.offer in self.registry.offers():
            return
        version = self.registry.adopted(self.offer)
        if version is not None:
            self.results.keep(VERSION, version)
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(shutil.copytree(self.config.model, Path(temporary) / "model", ignore=_only_files))
            manifest = read_manifest(folder)
            write_manifest(folder, manifest.model_copy(update={"facts": manifest.facts | {"kind": "promotion"}}))
            self.registry.offer(self.offer, folder)

    def status(self) -> dict[str, Any]:
        """What the status says of the experiment."""
        verdict = self.results.fact(VERDICT)
        states = {None: "running", "rollback": "rolled back", "promote": "promoted" if self._ended() else "promoting"}
        return {
            "name": self.name,
            "state": states[verdict],
            **self.config.model_dump(),
            **self.results.summary(),
            "version": self.results.fact(VERSION),
        }

    def close(self) -> None:
        """Close the file of results."""
        self.results.close()


def _only_files(folder: str, names: list[str]) -> list[str]:
    """What is not copied of a model folder: live state, of which it may have some."""
    return [name for name in names if not (Path(folder) / name).is_file()]


def start_experiment(state: str, config: ChallengerConfig) -> ActorHandle:
    """The running experiment, started if need be; Ray restarts it, but repeats no call: answers would count twice."""
    actor: Any = ray.remote(Experiment).options(
        name=EXPERIMENT,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0.1,
    )
    return actor.remote(state, config)


def experiment_handle() -> ActorHandle:
    """The running experiment.

    Raises:
        ValueError: none is running.
    """
    return ray.get_actor(EXPERIMENT, namespace=NAMESPACE)
