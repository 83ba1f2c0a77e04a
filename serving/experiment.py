"""An experiment with two models: the challenger's files, and the one actor that counts and decides.

    experiments/<challenger>/model/            its model, kept: what it was made from may be pruned or trained again
    experiments/<challenger>/<name>.sqlite     what was counted (lib/experiments/results.py)

Items are a fact of the shop and not of a model: the challenger that is kept describes them as the live catalog does, so
every filter, rule and later change means the same in both arms. A challenger that wins is offered to the learner
(lib/versions/registry.py), which takes it over as it does a fine-tuned model; one that loses is given up.
"""

import logging
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.actor import ActorHandle

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.experiments.results import SHADOW, ChallengerConfig, ExperimentResults, Records
from lib.live.learning_model import LearningModel
from lib.live.settings import LearnerConfig
from lib.model.encoder import WEIGHTS, BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import MANIFEST, Manifest, read_manifest
from lib.versions.folder import load_folder, save_with_optimizer
from lib.versions.registry import Registry
from lib.versions.rejections import Rejections
from serving.aggregator import NAMESPACE
from serving.status import ExperimentStatus, ShadowStatus

EXPERIMENTS = "experiments"  # name of the actor
FOLDER, MODEL = "experiments", "model"
STATE, OFFERED, VERSION, RUN = "state", "offered", "version", "run"  # facts that are kept with the results
RUNNING, PROMOTING, PROMOTED, REFUSED, ROLLED_BACK = "running", "promoting", "promoted", "refused", "rolled back"
logger = logging.getLogger("ray.serve")


class PreparedChallenger(NamedTuple):
    """A challenger whose files are where every replica finds them."""

    config: ChallengerConfig
    folder: Path

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return self.folder / MODEL

    @property
    def name(self) -> str:
        """Of the experiment: it tells the challenger from others, and whether it is shown."""
        return f"{self.folder.name}-{SHADOW}" if self.config.shadow else self.folder.name

    @property
    def results(self) -> Path:
        """The file of what was counted."""
        return self.folder / f"{self.name}.sqlite"


def check_challenger(config: ChallengerConfig, state: str) -> PreparedChallenger:
    """Return where a challenger's files are, or will be.

    Raises:
        InputError: it cannot be loaded, or it has learned from another log.
    """
    if "://" in state:
        raise InputError("challenger: it needs --state in a folder, where the results are kept")
    stored = config.model.isdecimal()
    try:
        identity = f"version-{int(config.model)}" if stored else _weights_of(config.model)
        challenger = PreparedChallenger(config, Path(state).absolute() / FOLDER / identity)
        if (challenger.model / MANIFEST).exists():  # as it was when the experiment began
            load_folder(challenger.model)
        elif stored:
            Registry.of(state).load(int(config.model))
        elif (offset := load_folder(Path(config.model)).log_offset) > 0:
            raise InputError(
                f"{config.model} has learned from a feedback log, up to offset {offset}: name a version of this service"
                " by its number, or a model as `afterclick pretrain` made it"
            )
    except InputError as error:
        raise InputError(f"challenger: {error}") from error
    return challenger


def _weights_of(model: str) -> str:
    return read_manifest(model).checksums.get(WEIGHTS, "unknown")[:12]


def prepare_challenger(config: ChallengerConfig, state: str) -> PreparedChallenger:
    """Keep a challenger's model, and see that its results can be written; what is there from before goes on.

    Raises:
        InputError: it cannot be loaded, has none of the live model's items or another rating scale, or its results are
            damaged.
    """
    challenger = check_challenger(config, state)
    if not (challenger.model / MANIFEST).exists():
        _keep(challenger, Registry.of(state))
    ExperimentResults(challenger.results).close()
    return challenger


def _keep(challenger: PreparedChallenger, registry: Registry) -> None:
    model, newest = challenger.config.model, registry.load()
    live, scale = newest.catalog, newest.encoder.config.ratings
    kept = _stored(registry, int(model)) if model.isdecimal() else _pretrained(Path(model))
    if (own := kept.encoder.config.ratings) != scale:
        raise InputError(
            f"challenger: the ratings of {model} are on the scale {own}, and the live model's on {scale}; pretrain it "
            f"on data that was ingested with --rating-scale {scale}"
        )
    if not kept.catalog.row_of.keys() & live.row_of.keys():
        raise InputError(f"challenger: {model} has none of the live model's items; pretrain it on the same shop's data")
    described = Catalog(kept.catalog.item_ids[1:], live.attributes, live.removed, kept.catalog.all_splits())
    save_with_optimizer(challenger.model, kept.encoder, described, kept.manifest, kept.optimizer)


class KeptModel(NamedTuple):
    """What is kept of a challenger; its manifest is what the learner needs to take it over."""

    encoder: BehaviourEncoder
    catalog: Catalog
    manifest: Manifest
    optimizer: dict[str, np.ndarray] | None


def _stored(registry: Registry, version: int) -> KeptModel:
    """Load a version, which goes on from its place in the log when it wins."""
    loaded = Rejections(registry.store).passed_by(registry.load(version))
    model = LearningModel(loaded, LearnerConfig())  # it joins the optimiser's deltas
    facts = VersionFacts(
        kind="promotion",
        since=version,
        events=0,
        events_trained=loaded.facts.events_trained,
        events_rejected=loaded.facts.events_rejected,
        half_life=model.counted_half_life,
    )
    manifest = Manifest(version=version, log_offset=loaded.log_offset, facts=facts)
    return KeptModel(model.encoder, model.catalog, manifest, model.trainer.optimizer_state())


def _pretrained(folder: Path) -> KeptModel:
    """Load a model that has nothing of the log, so it learns all of it when it wins."""
    loaded = load_folder(folder)
    manifest = Manifest(version=loaded.version, facts=VersionFacts(kind="promotion"))
    return KeptModel(loaded.encoder, loaded.catalog, manifest, loaded.optimizer)


class Experiment:
    """Counts what the replicas see of one challenger, and acts on the verdict of the sequential test."""

    def __init__(self, state: str, challenger: PreparedChallenger):
        self.challenger = challenger
        self.registry = Registry.of(state)
        self.results = ExperimentResults(challenger.results)
        if self.results.fact(RUN) is None:
            self.results.keep(RUN, uuid.uuid4().hex)  # results that were removed begin another

    def record(self, records: Records) -> bool:
        """Count what a replica has seen; returns whether the experiment goes on."""
        if self.ended:
            return False
        self.results.record(records)
        config = self.challenger.config
        if self.state == RUNNING and config.decide and (verdict := self.results.verdict(config)):
            self._enter(PROMOTING if verdict == "promote" else ROLLED_BACK)
        if self.state == PROMOTING:
            self._promote()
        return not self.ended

    @property
    def offer(self) -> str:
        """The name under which the challenger is offered to the learner."""
        return f"challenger-{self.challenger.name}-{self.results.fact(RUN)}"

    @property
    def state(self) -> str:
        """What the experiment has come to."""
        return self.results.fact(STATE) or RUNNING

    @property
    def ended(self) -> bool:
        """A loser is given up at once; a winner answers its arm until it is live everywhere."""
        return self.state not in (RUNNING, PROMOTING)

    def _enter(self, state: str) -> None:
        self.results.keep(STATE, state)
        logger.warning("experiment %s: %s", self.challenger.name, state)

    def _promote(self) -> None:
        """Leave the winner where the learner looks for it, and see what becomes of it there."""
        if self.offer in self.registry.offers.names():
            return
        version = self.registry.version_of_offer(self.offer)
        if version is not None:
            self.results.keep(VERSION, version)
            self._enter(PROMOTED)
        elif self.results.fact(OFFERED):  # the learner's log says why
            self._enter(REFUSED)
        else:
            self.registry.offers.add(self.offer, self.challenger.model)
            self.results.keep(OFFERED, 1)

    def status(self) -> ExperimentStatus | ShadowStatus:
        """Return what the status says of the experiment."""
        config = self.challenger.config
        kind = ShadowStatus if config.shadow else ExperimentStatus
        return kind(
            name=self.challenger.name,
            state=self.state,
            version=self.results.fact(VERSION),
            **dict(config),
            **dict(self.results.summary(config)),
        )

    def close(self) -> None:
        """Close the file of results."""
        self.results.close()


class Experiments:
    """The actor: what the replicas tell it belongs to the experiment that they take part in.

    While a deployment is replaced these may be two.
    """

    def __init__(self, state: str):
        self.state = state
        self.running: dict[str, Experiment] = {}

    def record(self, challenger: PreparedChallenger, records: Records) -> bool:
        """Count what a replica has seen; returns whether its experiment goes on."""
        experiment = self.running.get(challenger.name)
        if experiment is None:
            experiment = self.running[challenger.name] = Experiment(self.state, challenger)
        experiment.challenger = challenger  # with the share and the test of who was deployed last
        return experiment.record(records)

    def status(self, name: str) -> ExperimentStatus | ShadowStatus | None:
        """Return what the status says of an experiment, None before any replica has told of it."""
        experiment = self.running.get(name)
        return None if experiment is None else experiment.status()

    def close(self) -> None:
        """Close the files of results."""
        for experiment in self.running.values():
            experiment.close()


def start_experiments(state: str) -> ActorHandle:
    """Start the actor if none runs; Ray restarts it, but repeats no call: answers would count twice."""
    actor: Any = ray.remote(Experiments).options(
        name=EXPERIMENTS, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", max_restarts=-1, num_cpus=0
    )
    return actor.remote(state)


def experiments_handle() -> ActorHandle:
    """Return the running actor.

    Raises:
        ValueError: none is running.
    """
    return ray.get_actor(EXPERIMENTS, namespace=NAMESPACE)
