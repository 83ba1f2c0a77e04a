"""The near-line learner: each event once, the same after a restart, and nothing left of a rejected update."""

from dataclasses import replace

import pytest
import torch

from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.history import History
from lib.data.popularity import LATER
from lib.errors import InputError
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.log.items import ItemChange
from lib.model.delta import ROW_TENSORS, Delta
from lib.model.fingerprint import fingerprint
from lib.model.folder import Manifest
from lib.ranking.recommender import Question
from lib.versions.registry import Registry
from tests.helpers.learners import (
    CONFIG,
    REPLAY,
    assert_same_learners,
    assert_same_optimizer,
    optimizer_of,
    recommender_of,
    training_batch_of,
    update,
)
from tests.helpers.tiny import (
    COUNTED,
    NOW,
    SECOND,
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

HELD_OUT = [history([7, 8, 9]), history([3, 1, 2, 6]), history([12, 13, 14]), history([20, 4]), history([5, 18, 22])]


@pytest.fixture(params=[{}, COUNTED], ids=["encoder", "counted"])
def made_of(request) -> dict[str, int]:
    """Settings of an encoder alone, and of one with counts and a ranker."""
    return request.param


@pytest.fixture
def registry(tmp_path, made_of) -> Registry:
    """A registry whose first version is such an encoder."""
    return started_registry(tmp_path / "store", dropout=0.3, **made_of)


@pytest.fixture
def learner(registry: Registry) -> NearlineLearner:
    return NearlineLearner(registry, CONFIG)


def logged_at(offset: int, *items: int | str) -> History:
    """Events whose newest has this offset in the log."""
    made = history(items)
    made.offsets = list(range(offset - len(items) + 1, offset + 1))
    return made


def rejected_update(learner: NearlineLearner, batch: MicroBatch, learning_rate: float = float("inf")) -> Rejection:
    """Learn with a learning rate that destroys any model."""
    learner.model.trainer.learning_rate = learning_rate
    outcome = learner.learn(batch)
    learner.model.trainer.learning_rate = learner.model.trainer.config.learning_rate
    assert isinstance(outcome, Rejection), outcome
    return outcome


# ---------------------------------------------------------------------------------------------------------------------
# One update


def test_an_update_is_a_delta_that_brings_a_replica_to_the_learners_state(registry, learner):
    replica = recommender_of(registry)
    before = copied_state(learner.model.encoder)
    for number in range(1, 4):
        delta = update(learner, number)
        replica.apply(Delta.from_bytes(delta.to_bytes()))
        assert (delta.version, delta.parent) == (number + 1, number)
        assert replica.checksum == learner.model.checksum == delta.checksum == fingerprint(learner.model.encoder)
        assert_same_state(copied_state(learner.model.encoder), copied_state(replica.encoder))
    assert not torch.equal(before["interest_to_item"], learner.model.encoder.interest_to_item)


def test_learning_makes_what_happened_more_likely(registry):
    learner = NearlineLearner(registry, CONFIG.model_copy(update={"learning_rate": 1e-2}))
    context = history([1, 2])

    def place() -> int:
        items = recommender_of(registry).recommend([Question(context, 24)])[0]
        return [item.item_id for item in items].index("i9")

    before = place()
    for number in range(1, 16):
        update(learner, number, 1, 2, 9)
    assert before > 3
    assert place() == 0


def test_a_push_of_a_large_model_holds_the_uppermost_weights_alone(tmp_path):
    registry = started_registry(tmp_path / "store", num_hidden_layers=2)
    before = copied_state(registry.load().encoder)
    head = before["interest_to_item"].nbytes + before["final_norm.weight"].nbytes
    block = sum(tensor.nbytes for name, tensor in before.items() if name.startswith("blocks.1."))
    learner = NearlineLearner(registry, CONFIG.model_copy(update={"trained_bytes": head + block}))
    recommender = recommender_of(registry)
    for number in (1, 2):
        delta = update(learner, number)
        pushed = {name for name in delta.tensors if name.startswith(("blocks.0.", "position", "kind", "gap", "value"))}
        assert not pushed
        recommender.apply(Delta.from_bytes(delta.to_bytes()))
    assert any(name.startswith("blocks.1.") for name in delta.tensors)
    assert recommender.checksum == learner.model.checksum
    assert fingerprint(registry.load().encoder) == learner.model.checksum


def test_the_rate_falls_with_the_width_unless_it_is_set(tmp_path):
    wide = started_registry(tmp_path / "wide", hidden_size=256)
    assert NearlineLearner(wide, CONFIG).model.trainer.learning_rate == pytest.approx(5e-4)
    assert NearlineLearner(wide, CONFIG.model_copy(update={"learning_rate": 3e-4})).model.trainer.learning_rate == 3e-4
    assert NearlineLearner(started_registry(tmp_path / "narrow"), CONFIG).model.trainer.learning_rate == 1e-3


def test_only_the_new_events_and_the_replay_are_targets(learner):
    batch = micro_batch(5, [history([1, 2, 3, 4, 5])], [2], replay=[history([6, 7, 8])])
    trained = training_batch_of(learner, batch)
    assert trained is not None
    targets = {}
    for line, place in trained.target_weights.nonzero().tolist():
        targets[int(trained.target_rows[line, place])] = float(trained.target_weights[line, place])
    assert targets == pytest.approx({4: 1.0, 5: 1.0, 7: CONFIG.replay.weight, 8: CONFIG.replay.weight})
    assert trained.rows[0, :4].tolist() == [1, 2, 3, 4]  # with their context


def test_a_late_event_is_predicted_from_what_was_before_it_in_time(learner):
    batch = micro_batch(9, [history([1, 2, 3, 4, 5, 6])])
    batch.new = [[2, 4]]
    trained = training_batch_of(learner, batch)
    assert trained is not None
    assert trained.rows[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert trained.target_rows[trained.target_weights > 0].tolist() == [3, 5]


def test_many_new_events_of_one_user_are_all_targets(learner):
    long = history([1 + number % 24 for number in range(40)])
    trained = training_batch_of(learner, micro_batch(5, [long], [39]))
    assert trained is not None
    assert int((trained.target_weights > 0).sum()) == 39


def test_events_of_an_unknown_kind_do_not_shift_what_is_new(tmp_path):
    registry = started_registry(tmp_path / "store", event_kinds=["click"])
    learner = NearlineLearner(registry, CONFIG)
    mixed = history([1, 2, 3])
    mixed.add(Event("u", "i4", "purchase", None, NOW + 1000 * SECOND))
    trained = training_batch_of(learner, micro_batch(5, [mixed], [2]))
    assert trained is not None
    assert trained.target_rows[trained.target_weights > 0].tolist() == [3]


@pytest.mark.parametrize("kind", ["dislike", "skip"])
def test_dislikes_and_skips_are_pushed_away_from(learner, kind):
    disliked = history([1, 2])
    disliked.add(Event("u", "i3", kind, None, NOW + 1000 * SECOND))
    batch = training_batch_of(learner, micro_batch(1, [disliked]))
    assert batch is not None
    assert batch.target_rows[batch.target_weights < 0].tolist() == [3]
    assert not (batch.target_weights > 0).any()


def test_live_ratings_are_on_the_scale_of_the_model(tmp_path):
    learner = NearlineLearner(started_registry(tmp_path / "store", rating_scale="1-10"), CONFIG)
    rated = history([1, 2])
    for item, mark in (("i3", 4.0), ("i4", 5.0)):
        rated.add(Event("u", item, "rating", mark, NOW + 1000 * SECOND))
    batch = training_batch_of(learner, micro_batch(2, [rated], [2]))
    assert batch is not None
    assert batch.target_rows[batch.target_weights < 0].tolist() == [3]
    assert batch.target_rows[batch.target_weights > 0].tolist() == [4]


def test_a_batch_in_which_nothing_can_be_trained(registry, learner, made_of):
    update(learner, 1)
    replica, before = recommender_of(registry), copied_state(learner.model.encoder)
    outcome = learner.learn(micro_batch(4, [history([5]), history(["new"])]))  # first events of new users
    assert isinstance(outcome, Delta)
    assert outcome.facts.loss is None
    after = copied_state(learner.model.encoder)
    changed = {name for name in before if not torch.equal(before[name], after[name][: len(before[name])])}
    known = {name for name in changed if not name.startswith(("counts.", "ranker."))}
    assert known == {"item_popularity"}
    assert ("counts.events" in changed) == bool(made_of)
    assert outcome.rows.tolist() == [5, 25]
    assert after["item_popularity"][5] > before["item_popularity"][5]
    assert (learner.log_offset, learner.lineage.events_trained, learner.version) == (4, 3, 3)
    assert "new" in learner.model.catalog.row_of
    replica.apply(Delta.from_bytes(outcome.to_bytes()))
    assert replica.checksum == learner.model.checksum == fingerprint(learner.model.encoder)
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_a_batch_without_events_moves_the_offset_alone(registry, learner):
    update(learner, 1)
    before, optimizer = copied_state(learner.model.encoder), optimizer_of(learner)
    replica = recommender_of(registry)
    outcome = learner.learn(micro_batch(9, [], replay=REPLAY, held_out=HELD_OUT))  # all its users were erased
    assert isinstance(outcome, Delta)
    assert outcome.rows.tolist() == []
    assert_same_state(before, copied_state(learner.model.encoder))
    assert_same_optimizer(optimizer, optimizer_of(learner))
    assert (learner.log_offset, learner.lineage.events_trained) == (9, 1)
    replica.apply(Delta.from_bytes(outcome.to_bytes()))
    assert replica.log_offset == 9
    assert NearlineLearner(registry, CONFIG).log_offset == 9


# ---------------------------------------------------------------------------------------------------------------------
# Exactly once


def test_the_offset_and_the_count_of_events_advance_together(registry, learner):
    trained = 0
    for offset, new in ((3, [1, 2]), (7, [4]), (20, [1, 1, 1])):
        histories = [history([1, 2, 3, 4, 5]) for _ in new]
        learner.learn(micro_batch(offset, histories, new))
        trained += sum(new)
        stored = registry.load()
        assert (stored.log_offset, stored.facts.events_trained) == (offset, trained)
        assert (learner.log_offset, learner.lineage.events_trained) == (offset, trained)
        restarted = NearlineLearner(registry, CONFIG)
        assert (restarted.log_offset, restarted.lineage.events_trained) == (offset, trained)


@pytest.mark.parametrize("snapshot_every", [2, 1000])
def test_a_restarted_learner_makes_the_same_updates_to_the_bit(tmp_path, snapshot_every):
    # with dropout, new items, a moved popularity reference and snapshots in between
    config = CONFIG.model_copy(update={"snapshot_every": snapshot_every})
    steady, restarted = (
        NearlineLearner(started_registry(tmp_path / name, dropout=0.3), config) for name in ("steady", "restarted")
    )
    for number in range(1, 6):
        items = (1, 2 + number, f"new{number}")
        one = update(steady, number, *items)
        torch.manual_seed(number)  # another process is not where this one is in its random numbers
        other = update(restarted, number, *items)
        assert one.checksum == other.checksum
        restarted = NearlineLearner(restarted.registry, config)
        assert_same_learners(steady, restarted)


def test_an_update_that_was_not_published_is_made_again_and_alike(registry, monkeypatch):
    dying, batch = NearlineLearner(registry, CONFIG), micro_batch(3, [history([1, 2, "new"])], replay=REPLAY)

    def fail(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "publish_delta", fail)
        with pytest.raises(OSError, match="disk full"):
            dying.learn(batch)
    restarted = NearlineLearner(registry, CONFIG)
    assert (restarted.version, restarted.log_offset, restarted.lineage.events_trained) == (1, 0, 0)
    outcome = restarted.learn(batch)
    assert isinstance(outcome, Delta)
    assert restarted.lineage.events_trained == 1
    assert outcome.checksum == fingerprint(dying.model.encoder)


# ---------------------------------------------------------------------------------------------------------------------
# New items


def test_a_new_item_gets_a_row_and_is_recommended(registry, learner):
    replica = recommender_of(registry)
    assert "new" not in replica.catalog.row_of
    for number in range(1, 4):
        delta = update(learner, number, 1, 2, "new")
        replica.apply(Delta.from_bytes(delta.to_bytes()))
        assert delta.new_items == (["new"] if number == 1 else [])
    assert replica.catalog.row_of["new"] == 25
    assert replica.checksum == learner.model.checksum
    everything = {item.item_id for item in replica.recommend([Question(history([1, 2]), 100)])[0]}
    assert "new" in everything
    assert len(everything) == 23  # 25 items less the two that were seen
    assert [item.item_id for item in replica.similar("new", 3)]
    assert replica.recommend([Question(history(["new"]), 1)])[0][0].reason is None  # it counts as a history


def test_the_catalog_outgrows_its_table_and_uses_its_spare_rows_first(registry, learner):
    replica = recommender_of(registry)
    sizes = []
    for number in range(1, 9):
        names = [f"n{number}.{place}" for place in range(4)]
        outcome = learner.learn(micro_batch(number, [history([1, *names])], [4]))
        assert isinstance(outcome, Delta)
        replica.apply(Delta.from_bytes(outcome.to_bytes()))
        sizes.append(outcome.item_rows)
        assert len(replica.index) == outcome.item_rows == len(replica.encoder.item_embeddings.weight)
    assert len(learner.model.catalog) == len(replica.catalog) == 24 + 32
    assert sizes == sorted(sizes)
    assert 1 < len(set(sizes)) < 8
    assert replica.checksum == learner.model.checksum
    assert len(replica.recommend([Question(history([1]), 100)])[0]) == 55  # spare rows are no items
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_new_items_start_near_the_mean_of_all(learner):
    mean = learner.model.encoder.item_embeddings.weight[1:25].mean(dim=0)
    learner.learn(micro_batch(1, [history(["a"]), history(["b"])]))  # first events: nothing is trained
    a, b = learner.model.encoder.item_embeddings.weight[25:27]
    assert (a - mean).abs().max() < 0.1
    assert (b - mean).abs().max() < 0.1
    assert not torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def test_a_rejected_update_leaves_everything_as_it_was(registry, learner):
    update(learner, 1)
    before, optimizer = copied_state(learner.model.encoder), optimizer_of(learner)
    checksum, trained = learner.model.checksum, learner.lineage.events_trained
    arrived = [history([1, 2, 3]), history([4, 5, 6]), history([20])]  # the last is a first event: it is counted alone
    rejection = rejected_update(learner, micro_batch(8, arrived, [2, 1, 1], replay=REPLAY, held_out=HELD_OUT), 5.0)
    assert rejection.last_offset == 8
    assert rejection.events == 4
    assert "held-out" in rejection.reason
    assert_same_state(before, copied_state(learner.model.encoder))
    assert_same_optimizer(optimizer, optimizer_of(learner))
    assert (learner.model.checksum, learner.lineage.events_trained, learner.lineage.events_rejected) == (
        checksum,
        trained,
        4,
    )
    assert learner.version == registry.head() == 2
    assert learner.log_offset == 8  # it is not tried for ever


def test_an_update_that_is_not_finite_is_rejected(learner, monkeypatch):
    step = learner.model.trainer.step

    def poisoned(batch):
        result = step(batch)
        learner.model.encoder.item_embeddings.weight[int(result.rows[0])] = float("nan")
        return result

    before, optimizer = copied_state(learner.model.encoder), optimizer_of(learner)
    monkeypatch.setattr(learner.model.trainer, "step", poisoned)
    outcome = learner.learn(micro_batch(2, [history([1, 2, 3])]))  # no held-out users: still noticed
    assert isinstance(outcome, Rejection)
    assert "not finite" in outcome.reason
    assert_same_state(before, copied_state(learner.model.encoder))
    assert_same_optimizer(optimizer, optimizer_of(learner))


def test_a_dense_tensor_or_a_loss_that_is_not_finite_is_rejected(learner, monkeypatch):
    step = learner.model.trainer.step

    def poisoned(batch):
        result = step(batch)
        with torch.no_grad():
            learner.model.encoder.interest_to_item[0, 0] = float("inf")
        return result

    monkeypatch.setattr(learner.model.trainer, "step", poisoned)
    assert isinstance(learner.learn(micro_batch(2, [history([1, 2, 3])])), Rejection)
    monkeypatch.setattr(learner.model.trainer, "step", lambda batch: replace(step(batch), loss=float("nan")))
    assert isinstance(learner.learn(micro_batch(3, [history([1, 2, 3])])), Rejection)
    assert learner.version == 1


def test_learning_goes_on_after_a_rejection(registry, learner, made_of):
    twin = NearlineLearner(started_registry(f"{registry.store.root}-twin", dropout=0.3, **made_of), CONFIG)
    rejected_update(learner, micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT))
    one, other = update(learner, 2, 4, 5, 6), update(twin, 2, 4, 5, 6)
    assert one.checksum == other.checksum  # as if the rejected one had never been
    assert one.facts.events_rejected == 1
    assert_same_optimizer(optimizer_of(learner), optimizer_of(twin))
    assert NearlineLearner(registry, CONFIG).lineage.events_rejected == 1


def test_the_popularity_of_a_rejected_update_is_taken_back_with_its_reference(learner):
    update(learner, 1)
    before = copied_state(learner.model.encoder)
    far = int(25 * learner.model.popularity_half_life)
    rejected_update(learner, micro_batch(far, [logged_at(far, 1, 2, 3)], held_out=HELD_OUT))
    assert_same_state(before, copied_state(learner.model.encoder))


@pytest.mark.parametrize("through", ["update", "empty", "rollback", "put"])
def test_the_rows_of_a_rejected_update_are_given_back_and_used_again(registry, learner, through):
    update(learner, 1)
    replica, known = recommender_of(registry), copied_state(learner.model.encoder)
    for number in range(2, 6):
        rejected_update(
            learner, micro_batch(number, [history([1, f"a{number}", f"b{number}"])], [2], held_out=HELD_OUT)
        )
        assert len(learner.model.catalog) == 24
    outcome = {
        "update": lambda: update(learner, 6, 4, 5, "late"),
        "empty": lambda: learner.learn(micro_batch(6, [])),
        "rollback": lambda: learner.restore(2),
        "put": lambda: learner.change_items([ItemChange(1, "late", {})]),
    }[through]()
    assert isinstance(outcome, Delta)
    assert outcome.new_items == (["late"] if through in ("update", "put") else [])
    replica.apply(Delta.from_bytes(outcome.to_bytes()))
    assert replica.checksum == learner.model.checksum == fingerprint(learner.model.encoder)
    assert replica.catalog.item_ids == learner.model.catalog.item_ids
    spare = len(learner.model.catalog) + 1
    for name in ROW_TENSORS:
        assert not copied_state(learner.model.encoder)[name][spare:].any()
    assert outcome.item_rows < 2 * len(known["item_popularity"]), "the table has not grown with every rejection"
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))
    assert update(learner, 7, 1, "early").new_items == ["early"]


# ---------------------------------------------------------------------------------------------------------------------
# Rollback


def test_a_rollback_is_a_new_version_with_the_weights_of_the_old(registry, learner):
    states = {learner.version: copied_state(learner.model.encoder)}
    for number in range(1, 5):
        update(learner, number)
        states[learner.version] = copied_state(learner.model.encoder)
    replica = recommender_of(registry)
    delta = learner.restore(3)
    assert (delta.version, delta.parent) == (6, 5)
    assert delta.facts.kind == "rollback"
    assert delta.facts.restored == 3
    assert_same_state(states[3], copied_state(learner.model.encoder))
    replica.apply(Delta.from_bytes(delta.to_bytes()))
    assert_same_state(states[3], copied_state(replica.encoder))
    # what was learned stays learned from: no event is read twice
    assert (learner.log_offset, learner.lineage.events_trained) == (4, 4)
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))
    learner.restore(5)  # and forth again
    assert_same_state(states[5], copied_state(learner.model.encoder))
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_learning_goes_on_after_a_rollback_as_it_would_have_from_that_version(registry, learner):
    update(learner, 1)
    before = optimizer_of(learner)
    update(learner, 2)
    update(learner, 3)
    learner.restore(2)
    assert_same_optimizer(before, optimizer_of(learner))
    replica = recommender_of(registry)
    delta = update(learner, 4)
    assert delta.version == 6
    replica.apply(Delta.from_bytes(delta.to_bytes()))
    assert replica.checksum == learner.model.checksum
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_items_that_came_after_the_restored_version_stay(registry, learner):
    update(learner, 1)
    for number in range(2, 5):
        learner.learn(micro_batch(number, [history([1, f"new{number}", f"more{number}"])], [2]))
    rows = copied_state(learner.model.encoder)["item_embeddings.weight"][25:]
    delta = learner.restore(2)
    assert torch.equal(learner.model.encoder.item_embeddings.weight[25:], rows)
    assert "new4" in learner.model.catalog.row_of
    assert delta.item_rows == len(learner.model.encoder.item_embeddings.weight)
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))
    update(learner, 5, 1, "new4", "new2")
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_popularity_keeps_its_meaning_when_a_rollback_crosses_a_move_of_the_reference(registry, learner):
    update(learner, 1, 1, 2, 3)
    far = int(25 * learner.model.popularity_half_life)  # beyond 20 half-lives: the reference moves
    learner.learn(micro_batch(far, [logged_at(far, "new")]))
    learner.restore(2)
    popularity = learner.model.encoder.item_popularity
    assert popularity[25] > 1000 * popularity[3] > 0  # the new item is the recent one


def test_a_version_that_is_not_stored_cannot_be_restored(learner):
    update(learner, 1)
    before = copied_state(learner.model.encoder)
    with pytest.raises(InputError, match="version: 9 is not stored"):
        learner.restore(9)
    assert_same_state(before, copied_state(learner.model.encoder))
    assert learner.version == 2


# ---------------------------------------------------------------------------------------------------------------------
# Popularity


def test_popularity_counts_the_new_events_and_halves_with_those_that_follow(learner):
    half_life = int(learner.model.popularity_half_life)
    learner.learn(micro_batch(1, [logged_at(1, 1)]))
    learner.learn(micro_batch(3, [logged_at(3, 3, 2)], [1]))  # 3 is context: counted before, or never
    later = 3 + half_life
    learner.learn(micro_batch(later, [logged_at(later - 1, 4), logged_at(later, 4)]))
    popularity = learner.model.encoder.item_popularity
    assert popularity[3] == 0
    assert float(popularity[1] / popularity[2]) == pytest.approx(1, rel=1e-2)
    assert float(popularity[4] / popularity[1]) == pytest.approx(4, rel=1e-2)  # two events, each worth twice as much


def test_what_newcomers_start_with_counts_more_than_what_they_go_on_with(learner):
    newcomer, known = logged_at(3, 1, 2, 3), logged_at(4, 4)
    newcomer.first_offset = 1  # that of the known user is not in the log: it came with the dataset
    before = learner.model.encoder.item_popularity.clone()
    learner.learn(micro_batch(4, [newcomer, known], [3, 1]))
    counted = (learner.model.encoder.item_popularity - before)[1:5]
    assert torch.allclose(counted / counted[0], torch.tensor([1, LATER, LATER, LATER]), rtol=1e-2)


def test_popularity_survives_any_number_of_events_without_overflow(registry, learner):
    step = int(13 * learner.model.popularity_half_life)
    for number in range(1, 30):
        learner.learn(micro_batch(number * step, [logged_at(number * step, number % 24 + 1)]))
    popularity = learner.model.encoder.item_popularity
    assert torch.isfinite(popularity).all()
    newest, before = 29 % 24 + 1, 28 % 24 + 1
    assert popularity.argmax() == newest
    assert float(popularity[newest] / popularity[before]) == pytest.approx(2**13, rel=1e-2)
    assert popularity.topk(2).indices.tolist() == [newest, before]


def test_a_move_of_the_reference_is_pushed_as_one_number(registry, learner):
    update(learner, 1)
    replica, before = recommender_of(registry), learner.model.encoder.item_popularity.clone()
    far = int(25 * learner.model.popularity_half_life)
    delta = learner.learn(micro_batch(far, [logged_at(far, 5)]))
    assert isinstance(delta, Delta)
    assert delta.rows.tolist() == [5]
    assert 0 < delta.popularity_scale < 2**-20
    replica.apply(Delta.from_bytes(delta.to_bytes()))
    assert replica.checksum == learner.model.checksum == fingerprint(learner.model.encoder)
    expected = before * delta.popularity_scale
    assert torch.equal(replica.encoder.item_popularity[4], expected[4])
    assert expected[4] > 0
    replica.apply(update(learner, far + 1))
    assert replica.checksum == learner.model.checksum == fingerprint(registry.load().encoder)
    assert_same_learners(learner, NearlineLearner(registry, CONFIG))


def test_a_restart_with_more_items_goes_on_with_the_same_half_life(registry, learner):
    learner.model.popularity_half_life = learner.model.counted_half_life = 3.0  # as of a larger or smaller catalog
    update(learner, 1)
    update(learner, 2, 1, "new")
    again = NearlineLearner(registry, CONFIG)
    assert again.model.popularity_half_life == again.model.counted_half_life == 3.0
    learner.store_whole()
    assert NearlineLearner(registry, CONFIG).model.popularity_half_life == 3.0


@pytest.mark.parametrize("half_life", [20.0, 5000.0])
def test_another_half_life_that_is_set_goes_on_where_the_first_ended(registry, learner, half_life):
    for offset in range(1, 400, 3):
        learner.learn(micro_batch(offset, [logged_at(offset, 1)]))
    last = learner.log_offset
    changed = NearlineLearner(registry, CONFIG.model_copy(update={"popularity_half_life": half_life}))
    popularity = changed.model.encoder.item_popularity
    before = copied_state(changed.model.encoder)
    rejected_update(changed, micro_batch(last + 1, [logged_at(last + 1, 2, 3, 4)], held_out=HELD_OUT))
    assert_same_state(before, copied_state(changed.model.encoder))
    assert changed.model.counted_half_life == learner.model.counted_half_life == 1000
    one = popularity.clone()
    changed.learn(micro_batch(last + 2, [logged_at(last + 2, 1)]))
    worth = float(popularity[1] - one[1])
    assert worth == pytest.approx(LATER * 2 ** (last / 1000), rel=0.05), "as one just before the change"
    later = last + 2 + int(half_life)
    one = popularity.clone()
    changed.learn(micro_batch(later, [logged_at(later, 1)]))
    assert float(popularity[1] - one[1]) == pytest.approx(2 * worth, rel=0.05)
    assert registry.load().facts.half_life == half_life
    assert fingerprint(registry.load().encoder) == changed.model.checksum


def test_half_of_what_is_popular_is_as_many_events_old_as_there_are_items(registry):
    assert NearlineLearner(registry, CONFIG).model.popularity_half_life == 1000  # few items: chance must not decide
    assert (
        NearlineLearner(registry, CONFIG.model_copy(update={"popularity_half_life": 50.0})).model.popularity_half_life
        == 50
    )
    registry.publish_snapshot(tiny_encoder(3000), Catalog(item_ids(3000)), Manifest(version=2), None)
    assert NearlineLearner(registry, CONFIG).model.popularity_half_life == 3000


def test_what_the_learner_asks_for(learner):
    sizes = learner.sample_sizes
    assert (sizes.history_length, sizes.held_out_users) == (8, 64)
    assert sizes.replay.events == 1000
    assert sizes.held_out_length == 20
