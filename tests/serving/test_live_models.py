"""The live model of a replica: whatever becomes of a change, no answer is made of two versions."""

import asyncio

import numpy as np
import pytest
from fastapi import Request

from lib.live.learner import NearlineLearner
from lib.model.delta import Delta
from lib.model.fingerprint import fingerprint
from lib.ranking.recommender import Question
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from serving.errors import NoModel, answer_of
from serving.live_models import LiveModels
from tests.helpers.learners import CONFIG, update
from tests.helpers.tiny import history, started_registry


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


def answered_version(models: LiveModels) -> int:
    """Ask, and see that what answers is the stored version to the bit."""
    [answer] = asyncio.run(models.answer([Question(history([1, 2]), 5)], [None]))
    stored = models.registry.load(answer.version).encoder
    assert len(answer.items) == 5
    assert models.live.checksum == fingerprint(models.live.encoder) == fingerprint(stored)
    return answer.version


def fail(*arguments):
    raise MemoryError("no memory")


@pytest.mark.parametrize("step", ["encoder", "index", "fingerprint"])
def test_a_change_that_fails_half_way_is_in_no_answer(registry, monkeypatch, step):
    models = LiveModels(registry, RankingRules())
    delta = update(NearlineLearner(registry, CONFIG), 1)
    if step == "encoder":
        monkeypatch.setattr("lib.ranking.recommender.InferenceEncoder", fail)  # the weights have changed already
    else:
        monkeypatch.setattr(getattr(models.live, step), "update", fail)
    monkeypatch.setattr(models, "_load", fail)
    asyncio.run(models.apply(delta))
    with pytest.raises(NoModel):
        answered_version(models)
    assert asyncio.run(models.apply(delta)) is None  # the mixture takes no other delta
    monkeypatch.undo()
    assert answered_version(models) == 2
    assert (models.counts["mismatches"], models.counts["deltas"]) == (1, 0)


def test_a_delta_that_does_not_fit_is_refused_and_the_next_one_taken(registry):
    models, learner = LiveModels(registry, RankingRules()), NearlineLearner(registry, CONFIG)
    unfit = Delta(2, 1, "", 0, 25, np.zeros(0, dtype=np.int64), {"blocks.9.weight": np.zeros(3, np.float32)})
    asyncio.run(models.apply(unfit))
    assert answered_version(models) == 1
    asyncio.run(models.apply(update(learner, 1)))
    assert answered_version(models) == 2
    assert models.counts["deltas"] == 1


def test_a_replica_that_cannot_read_a_newer_release_stays_at_its_version(registry, monkeypatch):
    models, learner = LiveModels(registry, RankingRules()), NearlineLearner(registry, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr("lib.model.delta.FORMAT", 99)
        update(learner, 1)
    asyncio.run(models.catch_up(2))
    [answer] = asyncio.run(models.answer([Question(history([1, 2]), 5)], [None]))
    assert (answer.version, models.live.version) == (1, 1)


def test_without_a_whole_model_a_request_is_to_be_sent_again():
    error = NoModel()
    answer = asyncio.run(answer_of(error)(Request({"type": "http"}), error))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
