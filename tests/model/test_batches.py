"""Event tables to batches: nothing is lost, little is padded, and shards deal out the same batch."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.data.events import EVENT_KINDS, EVENT_SCHEMA
from lib.data.histories import Histories, histories_of
from lib.data.ratings import RatingScale
from lib.model.batches import (
    Batch,
    SequenceBatches,
    gap_buckets,
    group_by_length,
    target_weights,
    value_boundaries,
    value_buckets,
)
from tests.helpers.tiny import NOW, SECOND, random_histories, tiny_config

KINDS = list(EVENT_KINDS)


def clicks(lengths: list[int]) -> Histories:
    """Users with so many clicks; each event has an item of its own, so that it can be found again."""
    count = sum(lengths)
    return Histories(
        [f"u{user}" for user in range(len(lengths))],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(1, count + 1, dtype=np.int32),
        np.full(count, KINDS.index("click") + 1, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * SECOND,
    )


def targets_of(batch: Batch) -> Counter[int]:
    return Counter(batch.target_rows[batch.target_weights > 0].tolist())


@pytest.mark.parametrize("max_length", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("drawn", [False, True])
def test_windows_make_every_event_but_a_users_first_a_target(max_length, drawn):
    random = np.random.default_rng(max_length)
    for seed in range(20):
        lengths = random.integers(0, 4 * max_length + 3, 12).tolist()
        histories = clicks(lengths)
        batches = SequenceBatches(histories, tiny_config(max_length=max_length))
        starts, sizes = batches.windows(np.random.default_rng(seed) if drawn else None)
        covered = Counter(
            event for start, size in zip(starts, sizes, strict=True) for event in range(start, start + size)[1:]
        )
        firsts = {int(start) for start, length in zip(histories.offsets, lengths, strict=False) if length}
        assert set(covered) == set(range(sum(lengths))) - firsts
        assert drawn or set(covered.values()) <= {1}
        owners = np.repeat(np.arange(len(lengths)), lengths)
        for start, size in zip(starts, sizes, strict=True):
            assert 2 <= size <= max_length + 1
            assert owners[start] == owners[start + size - 1], "a window spans two users"


def test_an_epoch_sees_every_target_and_each_with_its_own_context():
    histories = clicks([1, 2, 5, 9, 30, 3])
    config = tiny_config(items=len(histories.rows))
    seen: Counter[int] = Counter()
    for batch in SequenceBatches(histories, config).epoch(32, np.random.default_rng(1)):
        seen += targets_of(batch)
        wanted = batch.target_weights > 0
        assert torch.equal(batch.target_rows[wanted], batch.rows[wanted] + 1)  # the next event of the same user
        assert batch.rows.shape[1] <= config.max_length
    firsts = set((histories.offsets[:-1] + 1).tolist())
    assert set(seen) == set(histories.rows.tolist()) - firsts


def test_different_epochs_cut_and_order_differently():
    batches = SequenceBatches(clicks([30] * 40), tiny_config())
    one, other = ([batch.rows for batch in batches.epoch(64, np.random.default_rng(seed))] for seed in (1, 2))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=False))
    again = [batch.rows for batch in batches.epoch(64, np.random.default_rng(1))]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_padding_is_below_a_tenth_on_realistic_lengths():
    random = np.random.default_rng(0)
    lengths = np.minimum(2 + random.geometric(1 / 12, 3000), 400).tolist()  # most users short, a few very long
    batches = SequenceBatches(clicks(lengths), tiny_config(max_length=50))
    padded = real = 0
    for batch in batches.epoch(2048, random):
        padded += batch.rows.numel()
        real += int(batch.lengths.sum())
        assert batch.rows.numel() <= 2048 * 1.1
    assert 1 - real / padded < 0.10
    padded = real = 0
    for _, batch in batches.inference(events_per_batch=2048):
        padded += batch.rows.numel()
        real += int(batch.lengths.sum())
    assert 1 - real / padded < 0.10


def test_groups_keep_to_their_budget_and_hold_each_sequence_once():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    for generator in (None, np.random.default_rng(1)):
        groups = list(group_by_length(lengths, 300, generator))
        assert sorted(np.concatenate(groups).tolist()) == list(range(500))
        assert all(lengths[group].max() * len(group) <= 300 or len(group) == 1 for group in groups)
    assert list(group_by_length(np.zeros(0, dtype=np.int64), 300, np.random.default_rng(1))) == []


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_deal_out_the_single_workers_batch(shards):
    batches = SequenceBatches(clicks([1, 4, 30, 2, 9, 2, 2, 17, 3, 3, 3]), tiny_config())
    alone = list(batches.epoch(15, np.random.default_rng(5)))
    parts = [list(batches.epoch(15, np.random.default_rng(5), shard, shards)) for shard in range(shards)]
    assert {len(part) for part in parts} == {len(alone)}, "a worker would wait for the others for ever"
    lonely = 0
    for place, whole in enumerate(alone):
        dealt: Counter[int] = Counter()
        for part in parts:
            dealt += targets_of(part[place])
            lonely += not targets_of(part[place])
        assert dealt == targets_of(whole)
    assert lonely  # some batch had fewer windows than workers


def test_gap_buckets_are_powers_of_two_of_seconds():
    seconds = [5, 5, 6, 8, 15, 15 + 2**20, 15 + 2**20 - 9]  # the clock of the last went back
    codes = gap_buckets(np.array(seconds) * SECOND, np.array([0]), 32)
    assert codes.tolist() == [0, 1, 2, 2, 4, 21, 1]
    assert gap_buckets(np.array([0, 2**60]), np.array([0]), 8).tolist() == [0, 7]
    assert gap_buckets(np.array([0, 10, 10]) * SECOND, np.array([0, 2]), 8).tolist() == [0, 4, 0]
    assert gap_buckets(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 8).tolist() == []


def test_value_buckets_count_the_boundaries_at_or_below():
    values = np.array([np.nan, 0.5, 2.0, 2.5, 5.0, 9.0], dtype=np.float32)
    assert value_buckets(values, [2.0, 5.0]).tolist() == [0, 1, 2, 2, 3, 3]
    assert value_buckets(values, []).tolist() == [0, 1, 1, 1, 1, 1]


def test_value_boundaries_separate_ratings_and_stay_few_for_prices():
    ratings = np.array([1, 2, 3, 4, 5] * 50 + [np.nan] * 9, dtype=np.float32)
    assert value_boundaries(ratings) == [2.0, 3.0, 4.0, 5.0]
    prices = np.random.default_rng(0).lognormal(3, 1, 5000).astype(np.float32)
    boundaries = value_boundaries(prices)
    assert len(boundaries) == 15
    shares = np.bincount(value_buckets(prices, boundaries))[1:] / len(prices)
    assert (abs(shares - 1 / 16) < 0.01).all()
    assert value_boundaries(np.full(3, np.nan, dtype=np.float32)) == []
    assert value_boundaries(np.full(3, 7.0, dtype=np.float32)) == []


def test_dislikes_skips_and_low_ratings_are_inputs_without_their_item_and_count_against():
    histories = clicks([6])
    names = ["click", "dislike", "skip", "rating", "rating", "rating"]
    histories.kinds[:] = [KINDS.index(name) + 1 for name in names]
    histories.values[3:] = [2.0, 3.0, np.nan]
    assert target_weights(histories.kinds, histories.values, KINDS).tolist() == [1, -1, -1, -1, 1, 1]
    (batch,) = SequenceBatches(histories, tiny_config()).epoch(64, np.random.default_rng(0))
    assert batch.rows[0].tolist() == [1, 0, 0, 0, 5]
    assert batch.target_rows[0].tolist() == [2, 3, 4, 5, 6]
    assert batch.target_weights[0].tolist() == [-1, -1, -1, 1, 1]
    assert batch.values[0].tolist() == [0, 0, 0, 2, 3]
    marks = np.array([8.0, 8.0, 8.0, 2.0, 3.0, 5.0], dtype=np.float32)  # 1 to 10: below 4.375
    assert target_weights(histories.kinds, marks, KINDS, RatingScale(1, 10)).tolist() == [1, -1, -1, -1, -1, 1]
    # a low value matters for a rating alone
    assert target_weights(np.array([KINDS.index("cart") + 1], dtype=np.int8), np.array([1.0]), KINDS).tolist() == [2]


def test_a_purchase_is_worth_more_than_a_cart_and_a_cart_more_than_a_view():
    kinds = np.array([KINDS.index(name) + 1 for name in ("view", "cart", "purchase")], dtype=np.int8)
    view, cart, purchase = target_weights(kinds, np.full(3, np.nan), KINDS)
    assert 0 < view < cart < purchase


def test_padded_places_are_zero_and_no_targets():
    batches = SequenceBatches(clicks([3, 6]), tiny_config())
    batch = batches.training_batch(np.array([0, 3]), np.array([3, 6]))
    assert batch.lengths.tolist() == [2, 5]
    for column in (batch.rows, batch.kinds, batch.gaps, batch.values, batch.target_rows, batch.target_weights):
        assert (column[0, 2:] == 0).all()
    assert batch.rows[0, :2].tolist() == [1, 2]


def test_inference_reads_the_newest_events_of_those_who_have_any():
    histories = clicks([0, 3, 20, 0, 1])
    found = {}
    for users, batch in SequenceBatches(histories, tiny_config()).inference():
        for line, user in enumerate(users.tolist()):
            found[user] = batch.rows[line, : batch.lengths[line]].tolist()
        assert not batch.target_weights.any()
    assert found == {1: [1, 2, 3], 2: list(range(16, 24)), 4: [24]}


def table_of(rows: list[tuple]) -> pa.Table:
    columns = zip(*rows, strict=True)
    names = ("user_id", "item_id", "event", "value", "timestamp")
    arrays = {name: list(column) for name, column in zip(names, columns, strict=True)}
    empty = [None] * len(rows)
    return pa.table(arrays | {"event_id": empty, "request_id": empty}, schema=EVENT_SCHEMA)


def test_histories_of_keep_the_order_of_equal_times():
    rows = [
        ("b", "y", "click", None, NOW),
        ("a", "z", "rating", 4.0, NOW + 5),
        ("a", "x", "click", None, NOW),
        ("b", "x", "view", None, NOW),
        ("a", "y", "click", None, NOW),
        ("b", "z", "click", 2.5, NOW - 1),
    ]
    table = pa.concat_tables([table_of(rows[:3]), table_of(rows[3:])])  # several chunks
    histories = histories_of(table, {"x": 1, "y": 2, "z": 3}, KINDS)
    by_user = {
        user: histories.rows[start:stop].tolist()
        for user, start, stop in zip(histories.user_ids, histories.offsets[:-1], histories.offsets[1:], strict=True)
    }
    assert by_user == {"a": [1, 2, 3], "b": [3, 2, 1]}
    assert histories.timestamps.tolist() == [NOW - 1, NOW, NOW, NOW, NOW, NOW + 5]
    place = histories.user_ids.index("a")
    rating = histories.offsets[place + 1] - 1
    assert histories.values[rating] == 4.0
    assert histories.kinds[rating] == KINDS.index("rating") + 1
    assert np.isnan(histories.values).sum() == 4


def test_take_select_and_without_newest():
    histories = random_histories(9, 50, np.random.default_rng(0))
    taken = histories.take(np.array([4, 0, 4]))
    assert taken.user_ids == ["u4", "u0", "u4"]
    for line, user in enumerate((4, 0, 4)):
        own = slice(histories.offsets[user], histories.offsets[user + 1])
        there = slice(taken.offsets[line], taken.offsets[line + 1])
        for name in ("rows", "kinds", "timestamps"):
            assert getattr(taken, name)[there].tolist() == getattr(histories, name)[own].tolist()
    shorter = clicks([3, 1, 0, 2]).without_newest().without_newest()
    assert shorter.lengths.tolist() == [1, 0, 0, 0]
    assert shorter.rows.tolist() == [1]
    assert clicks([3, 1, 0, 2]).without_newest().rows.tolist() == [1, 2, 5]
    kept = clicks([2, 2]).select(np.array([False, False, True, False]))
    assert kept.lengths.tolist() == [0, 1]
    assert kept.rows.tolist() == [3]
