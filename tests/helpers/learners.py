"""A small learner under test: its settings, one update, and what two of them must have in common."""

import numpy as np

from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.live.training_batch import training_batch
from lib.model.batches import Batch
from lib.model.delta import Delta
from lib.ranking.recommender import Recommender
from lib.ranking.stage import RankingStage
from lib.versions.registry import Registry
from tests.helpers.tiny import (
    assert_same_state,
    copied_state,
    history,
    micro_batch,
)

REPLAY = [history([10, 11, 12, 13]), history([14, 15])]
CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_candidates=12), new_item_users=1)


def recommender_of(registry: Registry, version: int | None = None) -> Recommender:
    """A replica."""
    loaded = registry.load(version)
    return Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset)


def update(learner: NearlineLearner, number: int, *items: int | str) -> Delta:
    """Learn from one user's newest event."""
    names = items or (1 + number % 20, 2 + number % 20, 3 + number % 20)
    outcome = learner.learn(micro_batch(number, [history(names)], replay=REPLAY))
    assert isinstance(outcome, Delta), outcome
    return outcome


def training_batch_of(learner: NearlineLearner, batch: MicroBatch) -> Batch | None:
    """Return what the learner trains on."""
    return training_batch(batch, learner.model, learner.config, learner.influence, learner.rejections)


def optimizer_of(learner: NearlineLearner) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in learner.model.trainer.optimizer_state().items()}


def assert_same_optimizer(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not np.array_equal(one[name], other[name])]
    assert not different, f"these tensors differ: {different}"


def assert_same_learners(one: NearlineLearner, other: NearlineLearner) -> None:
    assert_same_state(copied_state(one.model.encoder), copied_state(other.model.encoder))
    assert_same_optimizer(optimizer_of(one), optimizer_of(other))
    assert one.model.catalog.item_ids == other.model.catalog.item_ids
    assert one.model.checksum == other.model.checksum
    assert_same_stages(one.model.stage, other.model.stage)
    for name in ("version", "log_offset", "events_trained", "events_rejected"):
        assert getattr(one.lineage, name) == getattr(other.lineage, name), name


def assert_same_stages(one: RankingStage | None, other: RankingStage | None) -> None:
    """They rank alike."""
    if one is None or other is None:
        assert one is other
        return
    rows = np.arange(1, len(one.index))
    assert np.array_equal(one.index.vectors, other.index.vectors)
    assert np.array_equal(one.popularity.shares, other.popularity.shares)
    assert np.array_equal(one.standing.trends(rows), other.standing.trends(rows))
    assert np.array_equal(one.standing.trending(None, 5), other.standing.trending(None, 5))
    assert np.array_equal(one.standing.newest(None), other.standing.newest(None))
