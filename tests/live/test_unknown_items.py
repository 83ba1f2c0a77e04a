"""Items that only feedback names: a row once enough users met one, bounded, and the same after a restart."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lib.live.learner import NearlineLearner
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.live.unknown_items import UnknownItems
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.model.fingerprint import fingerprint
from lib.versions.registry import Registry
from lib.versions.rejections import Rejection
from tests.helpers.learners import CONFIG, assert_same_learners, training_batch_of
from tests.helpers.tiny import history, micro_batch, started_registry

TWO = CONFIG.model_copy(update={"new_item_users": 2})


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


def batch_of(offset: int, *events: tuple[str, Sequence[int | str]]) -> MicroBatch:
    """The newest event of each user is new."""
    users, items = zip(*events, strict=True)
    return replace(micro_batch(offset, [history(own) for own in items]), user_ids=list(users))


def learned(learner: NearlineLearner, *events: tuple[str, Sequence[int | str]]) -> Delta:
    outcome = learner.learn(batch_of(learner.log_offset + 1, *events))
    assert isinstance(outcome, Delta)
    return outcome


def state_of(unknown: UnknownItems) -> list[tuple[str, list[str]]]:
    """In order, as the order says what is forgotten first."""
    return list(unknown.users_of.items())


def test_an_item_has_a_row_when_so_many_users_have_met_it(registry):
    learner = NearlineLearner(registry, CONFIG.model_copy(update={"new_item_users": 3}))
    for user, new in (("ann", []), ("ann", []), ("ben", []), ("ann", []), ("cem", ["new"]), ("dia", [])):
        assert learned(learner, (user, [1, 2, "new"])).new_items == new
    assert learner.model.catalog.row_of["new"] == 25
    assert len(learner.lineage.unknown_items) == 0
    assert learned(learner, ("ann", [1, "other"]), ("ben", [2, "other"]), ("cem", ["other"])).new_items == ["other"]
    assert learner.lineage.facts.rows_by_events == 2
    assert fingerprint(registry.load().encoder) == learner.model.checksum


def test_the_default_is_two_users():
    assert LearnerConfig().new_item_users == 2


def test_an_event_of_an_item_without_a_row_leaves_the_others_as_they_are(registry):
    learner = NearlineLearner(registry, TWO)
    batch = replace(micro_batch(4, [history([1, 2, "unknown", 3, "unknown", 4])], [4]), user_ids=["ann"])
    trained = training_batch_of(learner, batch)
    assert trained is not None
    assert sorted(trained.target_rows[trained.target_weights > 0].tolist()) == [3, 4]
    before = learner.model.encoder.item_popularity.clone()
    assert isinstance(learner.learn(batch), Delta)
    assert np.flatnonzero((learner.model.encoder.item_popularity != before).numpy()).tolist() == [3, 4]
    assert (learner.log_offset, learner.lineage.events_trained) == (4, 4)


def test_a_put_item_has_its_row_at_once_and_waits_no_more(registry):
    learner = NearlineLearner(registry, TWO)
    learned(learner, ("ann", [1, "new"]))
    delta = learner.change_items([ItemChange(1, "new", {})])
    assert delta is not None
    assert delta.new_items == ["new"]
    assert len(learner.lineage.unknown_items) == 0
    assert learner.lineage.facts.rows_by_events == 0
    assert state_of(NearlineLearner(registry, TWO).lineage.unknown_items) == []


@pytest.mark.parametrize("snapshot_every", [3, 1000])
def test_a_restarted_learner_gives_the_same_rows(tmp_path, monkeypatch, snapshot_every):
    monkeypatch.setattr("lib.live.unknown_items.MOST_WAITING", 5)
    config = TWO.model_copy(update={"snapshot_every": snapshot_every})
    steady, restarted = (NearlineLearner(started_registry(tmp_path / name), config) for name in ("steady", "restarted"))
    random = np.random.default_rng(0)
    given = []
    for number in range(40):
        events = [(f"user-{random.integers(6)}", [1 + number % 20, f"n{random.integers(20)}"]) for _ in range(2)]
        one, other = learned(steady, *events), learned(restarted, *events)
        assert one.new_items == other.new_items
        given += one.new_items
        restarted = NearlineLearner(restarted.registry, config)
        assert state_of(restarted.lineage.unknown_items) == state_of(steady.lineage.unknown_items)
        assert restarted.lineage.unknown_items.rows == steady.lineage.unknown_items.rows == len(given)
    assert 3 < len(given) < 20
    assert_same_learners(steady, restarted)


def test_what_waits_outlives_another_model(registry, tmp_path):
    learner = NearlineLearner(registry, TWO)
    learned(learner, ("ann", [1, "new"]))
    base = registry.load(1)
    learner.adopt(base, base.facts)
    again = NearlineLearner(registry, TWO)
    assert state_of(again.lineage.unknown_items) == state_of(learner.lineage.unknown_items) != []
    assert learned(again, ("ben", [1, "new"])).new_items == ["new"]


def test_an_item_that_another_model_has_waits_no_more(registry, tmp_path):
    learner = NearlineLearner(registry, TWO)
    other = NearlineLearner(started_registry(tmp_path / "other"), TWO)
    learned(learner, ("ann", [1, "newer"]), ("ann", [1, "new"]))
    assert other.change_items([ItemChange(1, "new", {})]) is not None
    loaded = other.registry.load()
    learner.adopt(loaded, loaded.facts)
    assert list(learner.lineage.unknown_items.users_of) == ["newer"]
    assert state_of(NearlineLearner(registry, TWO).lineage.unknown_items) == state_of(learner.lineage.unknown_items)


def test_no_number_of_made_up_ids_makes_the_model_grow(registry, monkeypatch):
    monkeypatch.setattr("lib.live.unknown_items.MOST_WAITING", 50)
    learner = NearlineLearner(registry, TWO)
    sizes = set()
    for number in range(20):
        delta = learned(learner, *((f"user-{n}", [1, f"{number}.{n}"]) for n in range(10)))
        sizes.add(delta.item_rows)
    assert sizes == {25}
    assert len(learner.model.catalog) == 24
    assert list(learner.lineage.unknown_items.users_of) == [f"{n}.{m}" for n in range(15, 20) for m in range(10)]


def test_a_rejected_update_and_a_quarantine_say_nothing_of_an_item(registry):
    learner = NearlineLearner(registry, TWO)
    learner.model.trainer.learning_rate = float("inf")
    batch = batch_of(1, ("ann", [1, 2, "new"]), ("ben", [1, 2, "new"]), ("cem", [1, 2, 3]))
    assert isinstance(learner.learn(batch), Rejection)
    learner.model.trainer.learning_rate = 1e-3
    quiet = batch_of(2, ("ann", [1, "new"]), ("ben", [1, "new"]))
    for offset, each in enumerate(quiet.histories, start=3):
        each.offsets[-1] = offset
    assert isinstance(learner.learn(replace(quiet, last_offset=4, quarantined=frozenset((3, 4)))), Delta)
    assert (len(learner.model.catalog), len(learner.lineage.unknown_items)) == (24, 0)


def test_beyond_the_most_rows_events_give_none_and_puts_do(registry, caplog):
    config = TWO.model_copy(update={"new_item_users": 1, "new_item_rows": 2})
    learner = NearlineLearner(registry, config)
    assert learned(learner, ("ann", [1, "a"]), ("ben", [1, "b"]), ("cem", [1, "c"])).new_items == ["a", "b"]
    learner = NearlineLearner(registry, config)
    for _ in range(2):
        assert learned(learner, ("ann", [1, "d"]), ("ben", [1, 2])).new_items == []
    assert learner.lineage.unknown_items.refused == 2
    assert caplog.text.count("as many as new_item_rows allows; put an item") == 2, "once a process"
    delta = learner.change_items([ItemChange(1, "d", {})])
    assert delta is not None
    assert delta.new_items == ["d"]
