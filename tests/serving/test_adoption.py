"""A learner takes another model over: one atomic version, from which it learns each event that is not in it once."""

import sys
import threading
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.live.learner import NearlineLearner
from lib.live.learning_model import LearningModel
from lib.live.settings import LearnerConfig
from lib.model.delta import Delta
from lib.model.facts import VersionFacts
from lib.model.folder import Manifest
from lib.versions.attempts import ITEM_ATTEMPT_FILE, Attempts
from lib.versions.folder import LoadedVersion, load_folder, save_with_optimizer
from lib.versions.registry import Registry
from serving.learner import OFFER_SECONDS, Learner, Progress
from serving.learner_workers import LearnerWorkers
from serving.rollout import Acknowledgement, Acknowledgements
from serving.watchdog import Watchdog
from tests.helpers.learners import (
    CONFIG,
    assert_same_learners,
    assert_same_optimizer,
    optimizer_of,
    recommender_of,
    update,
)
from tests.helpers.tiny import (
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

FACTS = VersionFacts(kind="finetune", offer="first")


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


@pytest.fixture
def learner(registry: Registry) -> NearlineLearner:
    return NearlineLearner(registry, CONFIG)


def model_folder(path: Path, log_offset: int, items: int = 24, **changes) -> Path:
    """A base that has learned from the log up to an offset."""
    encoder, catalog = tiny_encoder(items, seed=7, **changes), Catalog(item_ids(items))
    manifest = Manifest(log_offset=log_offset, facts=VersionFacts(events_trained=log_offset))
    save_with_optimizer(path, encoder, catalog, manifest, None)
    return path


def base(path: Path, log_offset: int, items: int = 24, **changes) -> LoadedVersion:
    return load_folder(model_folder(path, log_offset, items, **changes))


def test_the_other_model_is_the_next_version_and_a_restarted_learner_has_it(registry, learner, tmp_path):
    for number in range(1, 6):
        update(learner, number)
    learner.adopt(base(tmp_path / "base", 3), FACTS)
    assert (learner.version, learner.lineage.base) == (7, 7)
    # the ledger is that of the new weights: events 4 and 5 are learned again, from the log
    assert (learner.log_offset, learner.lineage.events_trained) == (3, 3)
    restarted = NearlineLearner(registry, CONFIG)
    assert_same_learners(learner, restarted)
    assert (restarted.lineage.base, restarted.lineage.facts.offer, restarted.lineage.facts.adopted) == (
        7,
        "first",
        learner.lineage.facts.adopted,
    )
    assert_same_state(copied_state(recommender_of(registry).encoder), copied_state(learner.model.encoder))
    assert registry.version_of_offer("first") == 7
    assert registry.version_of_offer("second") is None
    update(learner, 4)
    restarted = NearlineLearner(registry, CONFIG)
    assert (restarted.lineage.base, restarted.lineage.facts.offer, restarted.lineage.facts.adopted) == (
        7,
        None,
        learner.lineage.facts.adopted,
    )
    assert (restarted.version, restarted.log_offset, restarted.lineage.events_trained) == (8, 4, 4)


def test_what_came_meanwhile_is_learned_as_if_the_new_weights_had_been_there_before(registry, learner, tmp_path):
    for number in range(1, 6):
        update(learner, number)
    learner.adopt(base(tmp_path / "base", 3), FACTS)
    other = Registry(tmp_path / "other")  # where nothing but the new weights ever was
    made = base(tmp_path / "base", 3)
    manifest = Manifest(version=7, log_offset=3, facts=VersionFacts(events_trained=3))
    other.publish_snapshot(made.encoder, made.catalog, manifest, None)
    alone = NearlineLearner(other, CONFIG)
    for number in (4, 5, 6):
        assert update(learner, number).checksum == update(alone, number).checksum
    assert_same_learners(learner, alone)


def test_items_that_came_meanwhile_keep_their_rows(registry, learner, tmp_path):
    update(learner, 1, 1, 2, "new")
    update(learner, 2, 1, 2, "newer")
    learner.adopt(base(tmp_path / "base", 1, items=26), FACTS)  # it has items of its own, too
    assert learner.model.catalog.item_ids[25:] == ["i25", "i26", "new", "newer"]
    rows = learner.model.encoder.item_embeddings.weight[27:29]
    assert (rows.norm(dim=1) > 0).all()
    replica = recommender_of(registry)
    assert replica.similar("newer", 28)
    replica.apply(Delta.from_bytes(update(learner, 2, 1, 2, "newer").to_bytes()))
    assert replica.checksum == learner.model.checksum
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_the_other_model_may_have_another_shape(registry, learner, tmp_path):
    update(learner, 1)
    learner.adopt(base(tmp_path / "base", 1, hidden_size=8, max_length=4), FACTS)
    assert learner.sample_sizes.history_length == 4
    replica = recommender_of(registry)
    replica.apply(Delta.from_bytes(update(learner, 2).to_bytes()))
    assert replica.checksum == learner.model.checksum


def test_the_optimisers_state_comes_with_it(registry, learner, tmp_path):
    for number in range(1, 4):
        update(learner, number)
    made = registry.load(3)
    learner.adopt(made, FACTS)
    assert_same_optimizer(optimizer_of(learner), LearningModel(registry.load(3), CONFIG).trainer.optimizer_state())


def test_two_learners_cannot_publish_one_version(registry, learner, tmp_path):
    stale = NearlineLearner(registry, CONFIG)
    learner.adopt(base(tmp_path / "base", 0), FACTS)
    with pytest.raises(FileExistsError, match="another learner"):
        update(stale, 1)
    stale = NearlineLearner(registry, CONFIG)
    update(learner, 1)
    with pytest.raises(FileExistsError, match="another learner"):
        stale.adopt(base(tmp_path / "base", 0), FACTS)


def test_a_rollback_behind_a_base_brings_the_old_weights_and_no_event_twice(registry, learner, tmp_path):
    for number in range(1, 5):
        update(learner, number)
    old, moments = copied_state(learner.model.encoder), optimizer_of(learner)
    learner.adopt(base(tmp_path / "base", 2, hidden_size=8), FACTS)
    update(learner, 3)
    assert learner.restore(5) is None
    assert_same_state(old, copied_state(learner.model.encoder))
    assert_same_optimizer(moments, optimizer_of(learner))
    # the old weights had learned event 4, which the new ones had not yet
    assert (learner.version, learner.log_offset, learner.lineage.events_trained) == (8, 4, 4)
    update(learner, 5)
    assert learner.restore(6) is None  # and forth again: what the old weights have learned is not learned again
    assert (learner.version, learner.log_offset, learner.lineage.events_trained) == (10, 5, 5)
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_the_base_outlives_pruning(tmp_path):
    registry = started_registry(tmp_path / "store")
    learner = NearlineLearner(registry, LearnerConfig(negatives=8, snapshot_every=2, keep_bytes=1))
    update(learner, 1)
    learner.adopt(base(tmp_path / "base", 1), FACTS)
    for number in range(2, 12):
        update(learner, number)
    assert registry.snapshots()[:2] == [1, 3]
    assert registry.load(learner.lineage.base).log_offset == 1


def test_offers_wait_in_order_and_go(registry, tmp_path):
    assert registry.offers.names() == []
    registry.offers.add("2", model_folder(tmp_path / "two", 2))
    registry.offers.add("1", model_folder(tmp_path / "one", 1))
    assert registry.offers.names() == ["1", "2"]
    assert registry.offers.load("2").log_offset == 2
    registry.offers.withdraw("1")
    assert registry.offers.names() == ["2"]
    (tmp_path / "store" / "offers" / "2" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"model\.safetensors is not the file"):
        registry.offers.load("2")


def test_histories_are_read_anew_by_another_recommender(registry, tmp_path):
    """The rows of a cached history are those of one model."""
    read = history([3, 4, "unknown"])
    first = recommender_of(registry)
    encoded = first.encode(read)
    assert first.encode(read) is encoded
    registry.publish_snapshot(tiny_encoder(seed=2), Catalog(reversed(item_ids(24))), Manifest(version=2), None)
    other = recommender_of(registry).encode(read)
    assert other is not encoded
    assert np.array_equal(other.codes[0], [22, 21])


def test_learning_from_an_empty_batch_after_a_base(registry, learner, tmp_path):
    learner.adopt(base(tmp_path / "base", 0), FACTS)
    delta = learner.learn(micro_batch(1, []))
    assert isinstance(delta, Delta)
    assert torch.equal(learner.model.encoder.item_popularity, registry.load().encoder.item_popularity)


# ---------------------------------------------------------------------------------------------------------------------
# What the actor does with an offer, whatever is killed when


class Nobody:
    """A rollout where no replica is alive."""

    def announce(self, version: int) -> Acknowledgements:
        return Acknowledgements([], 0, 0.0)


def started(registry: Registry) -> Learner:
    """The actor without its process and its thread."""
    actor = object.__new__(Learner)
    actor.workers, actor.progress = LearnerWorkers(registry.store.root, CONFIG), Progress()
    actor.learner = actor.workers.first
    actor.attempts = Attempts(registry.store)
    actor.item_attempts = Attempts(registry.store, ITEM_ATTEMPT_FILE)
    actor.rollout = Nobody()  # pyright: ignore[reportAttributeAccessIssue]
    actor.looked_for_offers, actor.stored_whole, actor.stopping = -OFFER_SECONDS, 0, threading.Event()
    actor.incomplete_since, actor.watchdog = None, Watchdog(inf)
    return actor


def test_an_offer_is_taken_over_and_gone(registry, tmp_path):
    registry.offers.add("first", model_folder(tmp_path / "base", 0))
    actor = started(registry)
    actor._take_over()
    assert actor.live is not None
    assert (actor.learner.version, actor.live.version, actor.live.base) == (2, 2, 2)
    assert registry.offers.names() == []
    actor.looked_for_offers = -OFFER_SECONDS
    actor._take_over()
    assert registry.head() == 2


class Slow:
    """A rollout to one replica that answers the first announcements too late, because it loads what was announced."""

    def __init__(self, late: int):
        self.late = late

    def announce(self, version: int) -> Acknowledgements:
        self.late -= 1
        if self.late >= 0:
            return Acknowledgements([], 1, 10.0)
        return Acknowledgements([Acknowledgement(version)], 0, 0.1)


def test_an_offer_is_gone_once_the_slowest_replica_has_it(registry, tmp_path, monkeypatch):
    registry.offers.add("first", model_folder(tmp_path / "base", 0))
    actor, rollout = started(registry), Slow(late=3)
    actor.rollout = rollout  # pyright: ignore[reportAttributeAccessIssue]
    withdraw, late = registry.offers.withdraw, []

    def withdrawn(name: str) -> None:
        late.append(rollout.late)
        withdraw(name)

    monkeypatch.setattr(actor.learner.registry.offers, "withdraw", withdrawn)
    actor._take_over()
    assert late == [-1]
    assert registry.offers.names() == []
    assert actor.progress.unreached == 0


def test_a_replica_that_is_never_reached_does_not_hold_learning_up_for_good(registry):
    actor = started(registry)
    actor.rollout = broken = Slow(late=10**9)  # pyright: ignore[reportAttributeAccessIssue]
    assert not actor._until_everywhere(broken.announce(1), patience=0.2)
    asked = broken.late
    assert not actor._until_everywhere(broken.announce(1), patience=0.2)
    assert broken.late == asked - 1, "it is not waited for again"
    assert actor.progress.unreached == 1
    actor.rollout = whole = Slow(late=0)  # pyright: ignore[reportAttributeAccessIssue]
    assert actor._until_everywhere(whole.announce(1), patience=0.2)
    assert actor.incomplete_since is None


def test_the_status_is_asked_for_while_the_learner_adds_to_it():
    progress, stop, interval = Progress(), threading.Event(), sys.getswitchinterval()

    def learn() -> None:
        while not stop.is_set():
            progress.steps.append({"learn_ms": 1.0, "push_ms": 2.0})
            progress.delays.extend([3.0] * 64)

    learning = threading.Thread(target=learn)
    sys.setswitchinterval(1e-6)
    try:
        learning.start()
        for _ in range(20):
            progress.freshness()
            progress.step_times()
    finally:
        stop.set()
        learning.join()
        sys.setswitchinterval(interval)
    assert progress.step_times() == {"learn_ms": 1.0, "push_ms": 2.0, "learn_ms_p99": 1.0, "push_ms_p99": 2.0}


def test_an_offer_whose_taker_died_before_it_was_gone_is_not_taken_over_again(registry, tmp_path):
    registry.offers.add("first", model_folder(tmp_path / "base", 0))
    NearlineLearner(registry, CONFIG).adopt(registry.offers.load("first"), FACTS)  # and here it dies
    actor = started(registry)
    actor._take_over()
    assert registry.head() == 2
    assert registry.offers.names() == []


def test_a_taker_that_dies_while_it_publishes_leaves_the_old_weights(registry, learner, tmp_path, monkeypatch):
    update(learner, 1)
    registry.offers.add("first", model_folder(tmp_path / "base", 0))

    def die_before_it_has_its_name(unfinished: Path, path: Path) -> None:
        assert (unfinished / "manifest.json").exists()
        assert path.name == "0000000003"
        raise KeyboardInterrupt

    monkeypatch.setattr("lib.versions.store.rename_durably", die_before_it_has_its_name)
    with pytest.raises(KeyboardInterrupt):
        started(registry)._take_over()
    monkeypatch.undo()
    assert_same_learners(NearlineLearner(registry, CONFIG), learner)
    assert registry.offers.names() == ["first"]
    actor = started(registry)
    actor._take_over()
    assert (actor.learner.version, actor.learner.log_offset) == (3, 0)
    assert_same_learners(NearlineLearner(registry, CONFIG), actor.learner)


def test_a_damaged_offer_is_withdrawn_and_learning_goes_on(registry, tmp_path):
    registry.offers.add("damaged", model_folder(tmp_path / "one", 0))
    registry.offers.add("whole", model_folder(tmp_path / "two", 0))
    (tmp_path / "store" / "offers" / "damaged" / "config.json").write_text("{")
    actor = started(registry)
    actor._take_over()
    assert registry.offers.names() == []
    assert registry.version_of_offer("damaged") is None
    assert registry.version_of_offer("whole") == actor.learner.version == 2
