"""The gate: what it lets pass, what it holds back, and what is left of what was held back."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.configuration import settings_from
from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.history import History, to_histories
from lib.data.user_histories import UserHistories
from lib.errors import InputError
from lib.live.gate import (
    FEWEST_LOSSES,
    FEWEST_PAIRS,
    FIRST_REST,
    Gate,
    GateConfig,
    Reference,
    Standing,
    first_new_events,
    standard_error,
)
from lib.live.influence import Influence, InfluenceLimits, Targets, last_opinions
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig, ReplayConfig
from lib.model.batches import SequenceBatches
from lib.model.delta import Delta, apply_delta, dense_state, grow_items, state_of
from lib.model.encoder import BehaviourEncoder
from lib.model.ranker import TEMPERATURE
from lib.model.trainer import Trainer, TrainingConfig
from lib.ranking.features import FEATURES
from lib.ranking.stage import stage_of
from lib.versions.rejections import LINES_A_FILE, Rejection, Rejections
from tests.helpers.learners import training_batch_of
from tests.helpers.tiny import (
    NOW,
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

HELD_OUT = [history([place, place + 1, place + 2]) for place in range(1, 21)]
CODES = {kind: place + 1 for place, kind in enumerate(EVENT_KINDS)}


def judged(gate: Gate, loss: float, *rows: int) -> str | None:
    """What the gate says of an update that changed these rows, and as far as the distance goes nothing else."""
    return gate.objection(loss, torch.tensor(rows, dtype=torch.long), state_of(gate.encoder))


@pytest.fixture(scope="module")
def trained() -> BehaviourEncoder:
    """One that knows that items follow each other: an untrained one cannot get worse."""
    encoder = tiny_encoder()
    flat = to_histories(
        [history([place, place + 1, place + 2]) for place in range(1, 23)], Catalog(item_ids(24)), CODES
    )
    batches = SequenceBatches(flat, encoder.config)
    trainer = Trainer(encoder, 24, TrainingConfig(learning_rate=1e-2, negatives=24))
    for step in range(100):
        for batch in batches.epoch(1024, np.random.default_rng(step)):
            trainer.step(batch)
    return encoder.eval()


@pytest.fixture
def encoder(trained: BehaviourEncoder) -> BehaviourEncoder:
    return copy.deepcopy(trained)


@pytest.fixture
def gate(encoder: BehaviourEncoder) -> Gate:
    return Gate(GateConfig(held_out_candidates=12), encoder, Catalog(item_ids(24)), CODES)


def test_what_changes_nothing_passes(gate):
    gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    assert gate.live.quality > 0.5
    assert judged(gate, 2.0) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_held_back(gate, loss):
    gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    assert judged(gate, loss) == "a loss or a weight is not finite"


def test_a_weight_that_is_not_finite_is_held_back(gate, encoder):
    gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    with torch.no_grad():
        encoder.item_embeddings.weight[5, 3] = float("nan")
    assert judged(gate, 1.0, 5) == "a loss or a weight is not finite"


def test_an_update_that_ranks_the_window_worse_is_held_back(gate, encoder):
    gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    with torch.no_grad():
        encoder.interest_to_item.mul_(-1.0)  # what was near is far
    reason = judged(gate, 1.0)
    assert reason is not None
    assert reason.startswith("the held-out ")


# ---------------------------------------------------------------------------------------------------------------------
# The ranked answer


@pytest.fixture
def counted(encoder: BehaviourEncoder) -> BehaviourEncoder:
    """One that has counted that items follow each other, too, and whose ranker asks for that alone."""
    encoder.add_ranker(8, len(FEATURES))
    assert encoder.counts is not None
    assert encoder.ranker is not None
    flat = to_histories(
        [history([place, place + 1, place + 2]) for place in range(1, 23)], Catalog(item_ids(24)), CODES
    )
    encoder.counts.count_histories(flat, np.ones(len(flat.rows)), np.arange(1, len(flat.rows) + 1))
    encoder.ranker.weights[: len(FEATURES)] = 0.0
    encoder.ranker.weights[FEATURES.index("follows")] = 5.0
    return encoder


@pytest.fixture
def answer_gate(counted: BehaviourEncoder) -> Gate:
    config = GateConfig(held_out_candidates=12)
    return Gate(config, counted, Catalog(item_ids(24)), CODES, stage=stage_of(counted))


def test_an_update_that_spoils_the_ranker_is_held_back(answer_gate, counted):
    answer_gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    assert answer_gate.live.quality > 0.9
    assert judged(answer_gate, 1.0) is None
    counted.ranker.weights[FEATURES.index("follows")] = -5.0
    assert (judged(answer_gate, 1.0) or "").startswith("the held-out ")


def test_an_update_that_spoils_the_counts_is_held_back(answer_gate, counted):
    answer_gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    counted.counts.next_rows[1:] = counted.counts.next_rows[1:].roll(7, dims=0)  # what follows is of other items
    answer_gate.stage.follow(np.arange(25))
    assert (judged(answer_gate, 1.0) or "").startswith("the held-out ")


def test_an_update_that_spoils_the_encoder_is_held_back_where_the_ranker_asks_it(answer_gate, counted):
    counted.ranker.weights[FEATURES.index("interest")] = 1 / TEMPERATURE
    counted.ranker.weights[FEATURES.index("follows")] = 0.0
    answer_gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    with torch.no_grad():
        counted.interest_to_item.mul_(-1.0)
    assert (judged(answer_gate, 1.0) or "").startswith("the held-out ")


@pytest.mark.parametrize("name", ["next_counts", "trends"])
def test_a_count_that_is_not_finite_is_held_back(answer_gate, counted, name):
    answer_gate.before(micro_batch(1, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
    getattr(counted.counts, name)[5] = float("inf")
    said = answer_gate.objection(1.0, torch.zeros(0, dtype=torch.long), state_of(counted), count_rows=np.array([5]))
    assert said == "a loss or a weight is not finite"


def test_a_target_that_is_not_found_is_last(answer_gate, counted):
    counted.counts.clear()
    answer_gate.stage.follow(np.arange(25))
    before = [history([place + 1, place, place + 1]) for place in range(1, 21)]  # who has seen it does not get it again
    answer_gate.before(micro_batch(1, [history([1, 2, 3])], held_out=before), 1, 0)
    assert answer_gate.live.quality == 0.0
    assert np.isfinite(answer_gate.live.losses).all()


def test_a_loss_of_one_user_and_one_within_chance_are_no_harm(answer_gate):
    for before, after in (([1.0], [9.0]), ([1.0, 1.0], [1.0, 9.0])):
        answer_gate.live = Standing(np.array(before), np.zeros(len(before)))
        assert answer_gate._worse(Standing(np.array(after), np.zeros(len(after)))) is None
    answer_gate.live = Standing(np.ones(3), np.zeros(3))
    assert "held-out loss rose from 1.000" in answer_gate._worse(Standing(np.array([8.0, 9.0, 9.0]), np.zeros(3)))


def test_items_that_the_stage_does_not_know_yet_are_left_out(answer_gate, counted):
    answer_gate.catalog.extend(["late"])
    grow_items(counted, 50)
    met_before = [history(["late", place, place + 1, place + 2]) for place in range(1, 21)]
    new = history([1, "late"])
    answer_gate.before(micro_batch(1, [new], held_out=[*met_before, new]), 1, 0)
    assert len(answer_gate.live.ndcg) == 21
    assert answer_gate.live.ndcg[:20].mean() > 0.9
    assert answer_gate.live.ndcg[20] == 0.0
    assert np.isfinite(answer_gate.live.losses).all()
    assert judged(answer_gate, 1.0) is None


def test_slow_harm_to_the_ranker_is_told_by_the_reference(answer_gate, counted):
    told = None
    for number in range(60):
        new = [history([place, place + 1, place + 2]) for place in range(1, 21)]
        answer_gate.before(micro_batch(number, new), number, number)
        if (told := answer_gate.harm()) is not None:
            break
        answer_gate.passed(20, number + 1, number + 1, [])
        counted.ranker.weights[FEATURES.index("follows")] -= 0.5  # a little each time
    assert told is not None
    assert "of new events the NDCG@10 is" in told


def test_weights_that_move_farther_are_held_back_until_that_is_usual(gate, encoder):
    weight, found = encoder.final_norm.weight, []
    for number in range(20 + gate.config.usual_updates):
        gate.before(micro_batch(number, [history([1, 2, 3])]), 1, 0)
        before = {name: tensor.clone() for name, tensor in dense_state(encoder).items()}
        with torch.no_grad():
            weight[0] += (-1) ** number * (0.01 if number < 20 else 0.2)
        found.append(gate.objection(None, torch.zeros(0, dtype=torch.long), before))
    assert found[:20] == [None] * 20
    assert found[20] == "the weights moved 20.0 times as far as they usually do"
    assert found[-1] is None
    assert 16 <= sum(reason is not None for reason in found) <= gate.config.usual_updates // 2 + 4


def test_a_loss_that_stands_out_is_held_back_until_it_is_usual(gate):
    generator = np.random.default_rng(0)
    found = []
    for number in range(FEWEST_LOSSES + 80):
        loss = 2.0 + 0.05 * generator.standard_normal() + (3.0 if number >= FEWEST_LOSSES + 5 else 0.0)
        gate.before(micro_batch(number, [history([1, 2, 3])], held_out=HELD_OUT), 1, 0)
        found.append(judged(gate, loss))
    before, after = found[: FEWEST_LOSSES + 5], found[FEWEST_LOSSES + 5 :]
    assert before == [None] * len(before)
    assert "is a spike: of late it was " in (after[0] or "")
    assert after[-1] is None


def test_slow_harm_is_told_by_the_reference(gate, encoder):
    told = None
    for number in range(60):
        new = [history([place, place + 1, place + 2]) for place in range(1, 21)]
        gate.before(micro_batch(number, new), number, number)
        told = gate.harm()
        if told is not None:
            break
        gate.passed(20, number + 1, number + 1, [])
        with torch.no_grad():
            encoder.interest_to_item.sub_(0.1 * torch.eye(16))  # a little each time
    assert told is not None
    assert "of new events the NDCG@10 is" in told


def test_the_reference_is_the_earlier_version_and_leaves_the_encoder_as_it_was(encoder):
    reference = Reference(encoder, 7, 3)
    before = copied_state(encoder)
    rows = torch.tensor([2, 9])
    reference.follow(rows, encoder.item_embeddings.weight.detach()[rows].clone())
    with torch.no_grad():
        encoder.item_embeddings.weight[rows] += 1.0
        encoder.interest_to_item += 0.5
    after = copied_state(encoder)
    with reference.in_place(encoder, torch.arange(25)):
        assert_same_state(copied_state(encoder), before)
    assert_same_state(copied_state(encoder), after)


def test_a_user_and_an_item_count_little_among_fresh_events():
    crowd = [history([3, 7], user_id=f"u{number}") for number in range(10)]
    regular = history([1, 2, 3, 4, 5, 6])
    found = first_new_events(micro_batch(9, [*crowd, regular]), 24)
    assert found[0].item_ids[-1] == "i6"  # who says most of themselves comes first
    assert sum(each.item_ids[-1] == "i7" for each in found) == 2


def test_one_user_counts_in_full_up_to_the_limit_and_then_with_the_square_root():
    influence = Influence(InfluenceLimits(user_limit=16.0))
    targets = Targets(np.ones(68), np.repeat([0, 1], [64, 4]), np.arange(68), np.ones(68, bool), np.zeros(2, bool))
    weights = influence.limited(targets, np.ones(68))
    assert weights[:64].sum() == pytest.approx(32)  # sqrt(64 * 16)
    assert weights[64:].tolist() == [1, 1, 1, 1]
    assert influence.kept == pytest.approx(36 / 68)


def test_a_crowd_of_newcomers_moves_an_item_no_further_than_its_limit():
    influence = Influence(InfluenceLimits(item_limit=4.0, item_refill=0.2))
    users = 200
    pushed = Targets(
        np.ones(users), np.arange(users), np.full(users, 5), np.ones(users, bool), np.ones(users, dtype=bool)
    )
    popularity = np.ones(10_000)
    assert influence.limited(pushed, popularity).sum() == pytest.approx(4.0, rel=1e-5)
    for _ in range(10):  # and what they took comes back little by little
        influence.passed()
        assert 0.0 < influence.limited(pushed, popularity).sum() < 0.3
    honest = replace(pushed, newcomers=np.zeros(users, dtype=bool))
    assert influence.limited(honest, popularity).sum() == pytest.approx(users)


def test_rejections_are_listed_for_good(tmp_path):
    registry = started_registry(tmp_path / "store")
    config = LearnerConfig(negatives=8, gate=GateConfig(held_out_candidates=12))
    learner = NearlineLearner(registry, config)
    assert isinstance(learner.learn(micro_batch(3, [history([1, 2, 3])])), Delta)
    before = copied_state(learner.model.encoder)
    learner.model.trainer.learning_rate = float("inf")
    learner.learn(micro_batch(9, [history([4, 5, 6])]))
    assert_same_state(copied_state(learner.model.encoder), before)
    (rejection,) = Rejections(registry.store).all()
    assert (rejection.after_offset, rejection.last_offset, rejection.events) == (3, 9, 1)
    assert rejection.reason == "a loss or a weight is not finite"
    restarted = NearlineLearner(registry, config)
    assert (restarted.log_offset, restarted.lineage.events_rejected) == (
        9,
        1,
    )  # they are not learned again, nor lost count of


def test_what_was_rejected_is_not_replayed(tmp_path):
    registry = started_registry(tmp_path / "store")
    learner = NearlineLearner(registry, LearnerConfig(negatives=8))
    learner.learn(micro_batch(3, [history([1, 2, 3])]))
    learner.model.trainer.learning_rate = float("inf")
    learner.learn(micro_batch(9, [history([4, 5, 6])]))  # offsets 4 to 9
    replayed, new = history([1, 2, 3, 4, 5]), history([6, 7])
    replayed.offsets, new.offsets = [0, 3, 4, 9, 10], [11, 12]
    for each in (learner, NearlineLearner(registry, learner.config)):
        batch = training_batch_of(each, replace(micro_batch(12, [new], [1]), replay=[replayed]))
        assert batch is not None
        assert sorted(batch.target_rows[batch.target_weights > 0].tolist()) == [2, 5, 7]


@pytest.mark.parametrize("spans", [[(0, 4), (4, 6), (10, 12)], [(10, 12), (2, 6), (0, 5)]])
def test_rejections_cover_the_offsets_behind_the_first(tmp_path, spans):
    listed = Rejections(started_registry(tmp_path / "store").store)
    offsets = np.arange(15)
    assert not listed.cover(offsets).any()
    for after, last in spans:
        listed.remember(Rejection(1, after, last, last - after, 0, "a reason"))
    assert offsets[listed.cover(offsets)].tolist() == [1, 2, 3, 4, 5, 6, 11, 12]


def test_a_rejection_that_a_crash_kept_from_the_list_is_listed_after_it(tmp_path, monkeypatch):
    registry = started_registry(tmp_path / "store")
    learner = NearlineLearner(registry, LearnerConfig(negatives=8, gate=GateConfig(held_out_candidates=12)))
    for number in range(1, 4):
        learner.learn(micro_batch(number, [history([1, 2, 3])]))
    learner.gate.pairs.extend([(3.0, 2.0, 0.1, 0.2)] * FEWEST_PAIRS)  # as if new events had become unlikely
    with monkeypatch.context() as patch:
        patch.setattr(learner.rejections, "add", lambda rejection: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learner.learn(micro_batch(4, [history([1, 2, 3])]))
    assert Rejections(registry.store).all() == []
    for _ in range(2):  # once, however often it starts
        restarted = NearlineLearner(registry, learner.config)
        (rejection,) = restarted.rejections.all()
        assert (rejection.after_offset, rejection.last_offset, rejection.events) == (0, 4, 4)
        assert (rejection.version, rejection.events_rejected) == (restarted.version, restarted.lineage.events_rejected)


def test_slow_harm_is_taken_back_and_learning_rests(tmp_path):
    registry = started_registry(tmp_path / "store")
    learner = NearlineLearner(registry, LearnerConfig(negatives=8, gate=GateConfig(held_out_candidates=12)))
    for number in range(1, 4):
        assert isinstance(learner.learn(micro_batch(number, [history([1, 2, 3])])), Delta)
    learned = copied_state(learner.model.encoder)
    replica = registry.load()
    learner.gate.pairs.extend([(3.0, 2.0, 0.1, 0.2)] * FEWEST_PAIRS)  # as if new events had become unlikely
    rejection = learner.learn(micro_batch(4, [history([1, 2, 3])]))
    assert isinstance(rejection, Rejection)
    assert rejection.delta is not None
    assert (rejection.after_offset, rejection.last_offset, rejection.events) == (0, 4, 4)
    assert not torch.equal(learned["interest_to_item"], learner.model.encoder.interest_to_item)
    apply_delta(replica.encoder, rejection.delta)
    assert_same_state(copied_state(replica.encoder), copied_state(learner.model.encoder))
    assert_same_state(copied_state(registry.load(1).encoder), copied_state(learner.model.encoder))
    assert (learner.lineage.events_trained, learner.lineage.events_rejected) == (
        3,
        1,
    )  # each event of the log is counted once
    for number in range(5, 5 + FIRST_REST):
        rested = learner.learn(micro_batch(number, [history([1, 2, 3])]))
        assert isinstance(rested, Rejection)
        assert "learning rests" in rested.reason
    assert learner.rejections.cover(np.arange(1, 7)).tolist() == [True] * 4 + [False] * 2, "a rest harms nobody"
    assert isinstance(learner.learn(micro_batch(20, [history([1, 2, 3])])), Delta)
    assert NearlineLearner(registry, learner.config).lineage.events_rejected == 1 + FIRST_REST


def test_what_the_gate_may_go_back_to_outlives_pruning(tmp_path):
    registry = started_registry(tmp_path / "store")
    gate = GateConfig(held_out_candidates=12)
    learner = NearlineLearner(registry, LearnerConfig(negatives=8, gate=gate, keep_bytes=1, snapshot_every=4))
    for number in range(1, 3):
        learner.learn(micro_batch(number, [history([1, 2, 3])]))
    learner.gate.forget()  # the next one before an update is the reference
    state = copied_state(learner.model.encoder)
    for number in range(3, 15):
        learner.learn(micro_batch(number, [history([1, 2, 3])]))
    assert learner.gate.reference is not None
    assert learner.gate.reference.version == 3
    with pytest.raises(InputError, match="any more"):
        registry.load(5)
    assert_same_state(state, copied_state(registry.load(3).encoder))
    learner.gate.pairs.extend([(3.0, 2.0, 0.1, 0.2)] * FEWEST_PAIRS)
    rejection = learner.learn(micro_batch(15, [history([1, 2, 3])]))
    assert isinstance(rejection, Rejection)
    assert rejection.delta is not None
    assert_same_state(state, copied_state(learner.model.encoder))


def test_many_rejections_fill_several_files(tmp_path):
    registry = started_registry(tmp_path / "store")
    listed = Rejections(registry.store)
    for number in range(1, LINES_A_FILE + 3):
        listed.add(Rejection(1, number - 1, number, 1, number, "a reason"))
    assert registry.store.files("rejections") == ["0000000001", f"{LINES_A_FILE + 1:010d}"]
    again = Rejections(registry.store)
    assert len(again) == LINES_A_FILE + 2
    assert [each.last_offset for each in again.all()] == list(range(1, LINES_A_FILE + 3))
    assert again.newest == again.all()[-1]


def test_of_several_opinions_the_last_one_counts():
    changing = History.of(
        Event("u", item, kind, value, NOW + place)
        for place, (item, kind, value) in enumerate(
            [("i1", "click", None), ("i2", "like", None), ("i3", "rating", 5.0), ("i2", "dislike", None)]
        )
    )
    same_item = History.of([Event("v", "i2", "like", None, NOW), Event("v", "i2", "click", None, NOW + 1)])
    flat = to_histories([changing, same_item], Catalog(item_ids(24)), CODES)
    counts = last_opinions(flat, np.array([0, 0, 0, 0, 1, 1]), CODES)
    assert counts.tolist() == [True, False, True, True, True, True]


def test_what_is_quarantined_is_not_learned_as_it_comes(tmp_path):
    learner = NearlineLearner(started_registry(tmp_path / "store"), LearnerConfig(negatives=8))
    logged = history([1, 2, 3, 4])
    logged.offsets = [1, 2, 3, 4]
    batch = replace(micro_batch(4, [logged], [3]), quarantined=frozenset({3}))
    training = training_batch_of(learner, batch)
    assert training is not None
    assert training.target_rows[training.target_weights > 0].tolist() == [2, 4]
    learner.learn(batch)
    counted = learner.model.encoder.item_popularity[:5].tolist()
    assert counted[3] == 0
    assert counted[2] > 0 < counted[4]


def test_few_of_the_window_come_from_one_item_and_half_of_it_from_all():
    histories = UserHistories()
    for user in range(200):
        for item in range(5):
            histories.append(Event(f"old{user}", f"i{(user + item) % 24}", "click", None, NOW))
    for user in range(1000):
        for item in (1, 2, 3, 4, 9):
            histories.append(Event(f"new{user}", f"i{item}", "click", None, NOW))
    window = histories.held_out(64, 21, {"old1"}, np.random.default_rng(0))
    ends = Counter(each.item_ids[-1] for each in window)
    assert ends["i9"] <= 4
    assert len(window) > 10


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("influence.user_limit", -1.0),
        ("gate.held_out_users", -1),
        ("steps", 0),
        ("snapshot_every", 0),
        ("replay.weight", ".nan"),
        ("replay.recent_share", 1.5),
        ("learning_rate", 0.0),
        ("popularity_half_life", ".inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, value):
    with pytest.raises(InputError, match=rf"^{setting}: input should be "):
        settings_from(LearnerConfig, None, [f"{setting}={value}"])


def test_settings_are_in_groups_and_an_old_flat_name_is_told_its_group():
    config = settings_from(LearnerConfig, None, ["gate.quality_tolerance=0.02", "replay.events=0", "steps=2"])
    assert config == LearnerConfig(steps=2, gate=GateConfig(quality_tolerance=0.02), replay=ReplayConfig(events=0))
    for old, new in (
        ("quality_tolerance", "gate.quality_tolerance"),
        ("user_limit", "influence.user_limit"),
        ("replay_weight", "replay.weight"),
    ):
        with pytest.raises(InputError, match=rf"^{old}: no such setting; it is {new}$"):
            settings_from(LearnerConfig, None, [f"{old}=0.02"])


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="held_out_length: input should be greater than or equal to 1, got 0"):
        GateConfig(held_out_length=0)
    with pytest.raises(InputError, match="user_limit: input should be greater than 0, got -1"):
        InfluenceLimits(user_limit=-1)
    assert standard_error(np.array([1.0])) == 0.0


def newcomers_of(*crowd: bool) -> Targets:
    """One event each, of users of whom some are newcomers."""
    users = len(crowd)
    return Targets(np.ones(users), np.arange(users), np.arange(users), np.ones(users, bool), np.array(crowd))


def test_newcomers_weigh_what_they_usually_do_twice_at_most():
    influence = Influence(InfluenceLimits(item_limit=1e9))
    few, many = newcomers_of(*[True] * 10, *[False] * 54), newcomers_of(*[True] * 60, *[False] * 4)
    for _ in range(100):
        assert influence.limited(few, np.ones(100)).sum() == pytest.approx(64)
        influence.passed()
    assert influence.limited(many, np.ones(100)).sum() < 10
    for _ in range(600):  # the place has become popular
        influence.limited(many, np.ones(100))
        influence.passed()
    assert influence.limited(many, np.ones(100)).sum() == pytest.approx(64)
