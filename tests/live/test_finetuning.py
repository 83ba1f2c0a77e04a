"""What a fine-tuning run learns from and is judged by: the right events, each once, and an honest comparison."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, EVENT_SCHEMA, Event
from lib.data.popularity import LATER
from lib.live.finetuning import (
    LEAST_HELD_OUT,
    Cut,
    MarkedHistories,
    TooFewEvents,
    WeightedBatches,
    count_popularity,
    cut_feedback,
    feedback,
    histories_around,
    judge,
    of_known_items,
    older_events,
)
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig
from lib.log.feedback import FeedbackLog
from lib.versions.registry import Registry
from tests.helpers.learners import CONFIG, update
from tests.helpers.tiny import NOW, SECOND, item_ids, started_registry, tiny_config, tiny_encoder

CATALOG = Catalog(item_ids(24))
LONG = LearnerConfig(negatives=8, snapshot_every=5, keep_bytes=1)


def event(number: int, user: str, item: int, kind: str = "click") -> Event:
    return Event(user, f"i{item}", kind, None, NOW + number * SECOND, str(number))


@pytest.fixture
def log(tmp_path) -> Iterator[FeedbackLog]:
    """A hundred events of ten users, in turn; the offset of an event is its number."""
    with FeedbackLog.open(tmp_path / "feedback.sqlite") as made:
        made.append([event(number, f"u{number % 10}", number % 24 + 1) for number in range(1, 101)]).result()
        yield made


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


def offsets(first: int, last: int) -> np.ndarray:
    return np.arange(first, last + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The cut


def test_the_newest_share_is_held_out_where_a_live_version_was_stored(registry):
    learner = NearlineLearner(registry, CONFIG)
    for number in range(1, 13):
        update(learner, 25 * number)  # versions 2 to 13 with log offsets 25 to 300
    cut = cut_feedback(registry, offsets(1, 300), registry.load(), 1, 0, 0.1, 1000)
    assert cut == Cut(since=1, after=0, until=275, last=300, rival=12)
    assert cut_feedback(registry, offsets(1, 300), registry.load(), 1, 0, 0.5, 1000).until == 150
    assert cut_feedback(registry, offsets(1, 300), registry.load(), 1, 0, 0.5, 60).until == 250
    later = cut_feedback(registry, offsets(101, 300), registry.load(), 5, 100, 0.2, 1000)
    assert later == Cut(since=5, after=100, until=250, last=300, rival=11)


def test_where_the_version_at_the_cut_was_pruned_the_cut_moves_to_one_that_is_there(registry):
    learner = NearlineLearner(registry, LONG)
    for number in range(1, 31):
        update(learner, 10 * number)
    first = registry.versions()[1]  # behind the base, which stays
    assert first.log_offset > 150
    assert cut_feedback(registry, offsets(1, 300), registry.load(), 1, 0, 0.5, 1000).until == first.log_offset


def test_without_a_live_version_at_the_cut_the_rival_is_the_newest(registry):
    never_learned = cut_feedback(registry, offsets(1, 100), registry.load(), 1, 0, 0.2, 1000)
    assert never_learned == Cut(since=1, after=0, until=80, last=100, rival=1)
    learner = NearlineLearner(registry, CONFIG)
    for number in range(1, 5):
        update(learner, 25 * number)
    learner.restore(2)
    rolled_back = cut_feedback(registry, offsets(1, 100), registry.load(), 1, 0, 0.2, 1000)
    assert rolled_back == Cut(since=1, after=0, until=80, last=100, rival=6)


def test_too_little_feedback_is_refused(registry):
    with pytest.raises(TooFewEvents, match=r"^since: 39 events came after version 1, and it takes at least 40 "):
        cut_feedback(registry, offsets(1, 39), registry.load(), 1, 0, 0.1, 1000)
    cut = cut_feedback(registry, offsets(1, 40), registry.load(), 1, 0, 0.1, 1000)
    assert (cut.until, cut.last) == (LEAST_HELD_OUT, 40)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


def test_new_events_stand_behind_the_older_ones_of_their_users(log):
    new = feedback(log, 80, 95)
    assert new["offset"].to_pylist() == list(range(81, 96))
    cut = Cut(1, 80, 90, 95, 1)
    users = pa.array(["u1", "u2"])
    older = older_events(log, None, cut, users, wanted=0, seed=0)
    assert set(older["user_id"].to_pylist()) == {"u1", "u2"}
    assert older["offset"].to_pylist() == [n for n in range(1, 81) if n % 10 in (1, 2)]
    marked = histories_around(pa.concat_tables([older, new]), 80, CATALOG, EVENT_KINDS, context=3)
    lengths = dict(zip(marked.histories.user_ids, marked.histories.lengths, strict=True))
    assert lengths == {"u1": 5, "u2": 5, "u3": 2, "u4": 2, "u5": 2, **dict.fromkeys(["u6", "u7", "u8", "u9", "u0"], 1)}
    assert int(marked.marked.sum()) == len(new)
    first = marked.histories.user_ids.index("u1")
    mine = slice(*marked.histories.offsets[first : first + 2])
    assert marked.marked[mine].tolist() == [False, False, False, True, True]
    assert marked.histories.rows[mine].tolist() == [n % 24 + 1 for n in (51, 61, 71, 81, 91)]


def test_events_that_came_late_are_where_they_were_in_time(log):
    late = [event(101, "u1", 5)._replace(timestamp=NOW + 65 * SECOND), event(102, "u2", 6)._replace(timestamp=NOW - 1)]
    log.append([*late, event(103, "u1", 7)]).result()
    marked = histories_around(feedback(log, 0, 103), 100, CATALOG, EVENT_KINDS, context=2)
    of_user = {}
    for user, start, stop in zip(
        marked.histories.user_ids, marked.histories.offsets[:-1], marked.histories.offsets[1:], strict=True
    ):
        of_user[user] = (marked.histories.rows[start:stop].tolist(), marked.marked[start:stop].tolist())
    rows = [n % 24 + 1 for n in range(100)]
    expected = [rows[51], rows[61], 5, *(rows[n] for n in (71, 81, 91)), 7]
    assert of_user["u1"] == (expected, [False, False, True, False, False, False, True])
    assert of_user["u2"] == ([6, *rows[2::10]], [True, *[False] * 10])
    assert of_user["u3"] == (rows[3::10], [False] * 10)


def test_older_behaviour_of_others_is_drawn_by_user_from_the_dataset_and_the_log(log, tmp_path):
    rows = [{"user_id": f"d{n % 50}", "item_id": "i1", "event": "view", "timestamp": NOW + n} for n in range(1000)]
    table = pa.Table.from_pylist(rows, schema=pa.schema([EVENT_SCHEMA.field(name) for name in rows[0]]))
    pq.write_table(table, tmp_path / "events.parquet", row_group_size=64)
    nobody, cut = pa.array([], pa.string()), Cut(1, 100, 100, 100, 1)
    drawn = older_events(log, tmp_path, cut, nobody, wanted=300, seed=1)
    assert 150 < len(drawn) < 500
    whole = {user: 20 if user.startswith("d") else 10 for user in drawn["user_id"].to_pylist()}
    assert len(drawn) == sum(whole.values()), "a user's events come all, or none"
    assert drawn.equals(older_events(log, tmp_path, cut, nobody, wanted=300, seed=1))
    assert not drawn.equals(older_events(log, tmp_path, cut, nobody, wanted=300, seed=2))
    assert len(older_events(log, tmp_path, cut, nobody, wanted=10_000, seed=1)) == 1100
    assert len(older_events(log, tmp_path, cut, nobody, wanted=0, seed=1)) == 0


def test_marked_histories_are_kept_in_a_file(log, tmp_path):
    marked = histories_around(feedback(log, 0, 100), 90, CATALOG, EVENT_KINDS)
    marked.save(tmp_path / "marked.parquet")
    again = MarkedHistories.load(tmp_path / "marked.parquet")
    assert again.histories.user_ids == marked.histories.user_ids
    assert np.array_equal(again.histories.rows, marked.histories.rows)
    assert np.array_equal(again.marked, marked.marked)
    assert int(again.marked.sum()) == 10


def test_an_older_event_counts_less_as_a_target(log):
    marked = histories_around(feedback(log, 0, 100), 90, CATALOG, EVENT_KINDS)
    batches = WeightedBatches(marked.histories, tiny_config(), np.where(marked.marked, 1.0, 0.25))
    batch = batches.training_batch(*batches.windows())
    weights = batch.target_weights.numpy()
    assert set(weights[weights > 0].tolist()) == {1.0, 0.25}
    assert int((weights == 1.0).sum()) == 10


def test_popularity_counts_what_is_learned_and_goes_on_from_its_log_offset(log):
    log.append([event(101, "new", 9), event(102, "new", 9), event(103, "new", 10)]).result()
    encoder = tiny_encoder()
    encoder.item_popularity.zero_()
    encoder.item_popularity[12] = 8.0
    encoder.popularity_reference.fill_(72)
    count_popularity(encoder, CATALOG, feedback(log, 0, 103), Cut(1, 90, 102, 103, 1), half_life=10)
    counted = encoder.item_popularity.numpy()
    assert int(encoder.popularity_reference) == 102
    assert counted[12] == pytest.approx(1)  # what was there has halved three times
    # event 92 was the first of its user and item, event 102 is one more of those of event 101, who is new
    assert counted[92 % 24 + 1] == pytest.approx(0.5 * LATER)
    assert counted[9] == pytest.approx(2**-0.1)
    assert set(np.flatnonzero(counted)) == {9, 12} | {n % 24 + 1 for n in range(91, 101)}


# ---------------------------------------------------------------------------------------------------------------------
# The judgement


def test_the_better_model_is_found_and_dislikes_are_no_targets(log):
    log.append([event(200 + n, f"u{n}", 24, "dislike") for n in range(10)]).result()
    held_out = histories_around(feedback(log, 0, 110), 80, CATALOG, EVENT_KINDS)
    assert int(held_out.marked.sum()) == 30
    good, bad = tiny_encoder(seed=1), tiny_encoder(seed=1)
    with np.errstate(all="raise"):
        bad.interest_to_item.data.neg_()
    comparison = judge((good, CATALOG), (bad, Catalog(item_ids(20))), held_out)
    live, base = comparison.results
    assert comparison.cases == 20
    assert (live.name, base.name) == ("live", "base")
    difference = base.differences["ndcg@10"]
    assert difference.value == pytest.approx(base.metrics["ndcg@10"].value - live.metrics["ndcg@10"].value)
    same = judge((good, CATALOG), (tiny_encoder(seed=1), CATALOG), held_out).results[1].differences["ndcg@10"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_events_that_nothing_comes_before_cannot_judge(log):
    first = histories_around(feedback(log, 0, 10), 0, CATALOG, EVENT_KINDS)
    model = tiny_encoder(), CATALOG
    with pytest.raises(TooFewEvents, match="no held-out event follows another one of its user"):
        judge(model, model, replace(first))


def test_an_id_that_one_user_alone_made_up_is_left_out(log):
    log.append([event(300, "u1", 99), event(301, "u1", 99), event(302, "u1", 98), event(303, "u2", 98)]).result()
    events = of_known_items(feedback(log, 90, 104), CATALOG, users=2)
    assert events["offset"].to_pylist() == [*range(91, 101), 103, 104]
    assert set(of_known_items(events, CATALOG, users=3)["offset"].to_pylist()) == set(range(91, 101))
