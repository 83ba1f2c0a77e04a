"""Popularity and item-to-item recommendations, against values counted by hand and a dense reference."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lib.data.histories import Histories, spans
from lib.data.holdout import LEAVE_ONE_OUT, training_part
from lib.evaluation.baselines import ItemToItem, Popularity
from lib.evaluation.protocols import cases_of
from tests.helpers.tiny import NOW, SECOND, random_histories


def histories(*rows: list[int], step: int = SECOND) -> Histories:
    """Users' items, oldest first; all events `step` apart, one user after another."""
    lengths = [len(own) for own in rows]
    count = sum(lengths)
    return Histories(
        [f"u{user}" for user in range(len(rows))],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([row for own in rows for row in own], dtype=np.int32),
        np.ones(count, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * step,
    )


def neighbours(model: ItemToItem, item: int) -> dict[int, float]:
    own = slice(model.offsets[item], model.offsets[item + 1])
    return dict(zip(model.neighbours[own].tolist(), model.similarities[own].tolist(), strict=True))


def test_spans():
    assert spans(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert spans(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []


# ----------------------------------------------------------------------------------------------------------- popularity


def order(scores: np.ndarray) -> list[int]:
    """Rows that may be recommended, best first."""
    return [row for row in np.argsort(-scores, kind="stable").tolist() if np.isfinite(scores[row])]


def test_popularity_fades():
    events = histories([1, 1, 1, 1, 1, 2, 2, 2, 3])  # a second apart
    # without fading 5, 3 and 1 count; with a half-life of a second the newest is worth more than all before it
    assert order(Popularity.count(events, 5, half_life=1e9).scores(events)[0]) == [1, 2, 3]
    assert order(Popularity.count(events, 5, half_life=1.0 * SECOND).scores(events)[0]) == [3, 2, 1]


def test_equally_popular_items_are_tied_and_what_never_occurred_is_not_recommended():
    events = histories([1, 2, 4, 1, 2, 4, 4], step=0)
    scores = Popularity.count(events, 5, half_life=1.0).scores(histories([1], [2], []))
    assert scores.shape == (3, 6)
    assert scores.dtype == np.float32
    assert scores[0, 1] == scores[0, 2] < scores[0, 4]
    assert np.isneginf(scores[:, [0, 3, 5]]).all()


def test_large_counts_that_differ_by_one_are_not_tied():
    count = 20_000_000  # more than a float32 can count one by one
    counts = np.array([0, count, count + 1])
    events = Histories(
        ["u"],
        np.array([0, 2]),
        np.array([1, 2], dtype=np.int32),
        np.ones(2, dtype=np.int8),
        np.full(2, np.nan, dtype=np.float32),
        (NOW + 1e6 * np.log2(counts[1:] / counts[2])).astype(np.int64),
    )
    ranks = Popularity.count(events, 2, half_life=1e6).ranks
    assert ranks[2] > ranks[1]


def test_nothing_to_count():
    nothing = histories([], [])
    assert np.isneginf(Popularity.count(nothing, 3, half_life=1.0).scores(nothing)).all()
    assert np.isneginf(ItemToItem.count(nothing, 3).scores(histories([1, 2]))).all()


# --------------------------------------------------------------------------------------------------------- item to item


def test_cosines_by_hand():
    # users of 1: a b c; of 2: a b; of 3: a; of 4: d
    model = ItemToItem.count(histories([1, 2, 3], [2, 1], [1, 1], [4]), 5)
    assert neighbours(model, 1) == pytest.approx({2: 2 / math.sqrt(3 * 2), 3: 1 / math.sqrt(3)})
    assert neighbours(model, 2) == pytest.approx({1: 2 / math.sqrt(3 * 2), 3: 1 / math.sqrt(2)})
    assert neighbours(model, 3) == pytest.approx({1: 1 / math.sqrt(3), 2: 1 / math.sqrt(2)})
    assert [neighbours(model, item) for item in (0, 4, 5)] == [{}, {}, {}]
    # nearest first
    assert list(neighbours(model, 3)) == [2, 1]


def test_only_the_nearest_neighbours_are_kept():
    model = ItemToItem.count(histories([1, 2, 3], [2, 1], [1, 1], [4]), 5, neighbours=1)
    assert [list(neighbours(model, item)) for item in range(6)] == [[], [2], [1], [2], [], []]


def test_only_the_newest_distinct_items_go_together():
    # the newest two distinct items of the first user are 3 and 1: the repeated 1 counts where it was last
    model = ItemToItem.count(histories([1, 2, 3, 1], [2]), 3, window=2)
    assert neighbours(model, 1) == pytest.approx({3: 1.0})
    assert neighbours(model, 2) == {}
    assert neighbours(model, 3) == pytest.approx({1: 1.0})


def test_scores_are_sums_over_the_recent_events_that_fade():
    model = replace(ItemToItem.count(histories([1, 2, 3], [2, 1], [1, 1], [4]), 5), half_life=1.0)
    scores = model.scores(histories([1, 3], [4], []))
    from_1, from_3 = neighbours(model, 1), neighbours(model, 3)
    assert scores[0, 2] == pytest.approx(from_1[2] / 2 + from_3[2])  # the event before the newest weighs half
    assert scores[0, 1] == pytest.approx(from_3[1])
    assert scores[0, 3] == pytest.approx(from_1[3] / 2)
    assert np.isneginf(scores[0, [0, 4, 5]]).all()
    assert np.isneginf(scores[1:]).all()  # nothing goes with 4, and nothing is known of the last
    # what is older than the window does not count
    recent = replace(model, window=1).scores(histories([1, 3]))
    assert recent[0, 2] == pytest.approx(from_3[2])
    assert np.isneginf(recent[0, 3])


@pytest.mark.parametrize("pairs_at_once", [1, 50, 1 << 22])
def test_cosines_are_those_of_the_dense_matrix(monkeypatch, pairs_at_once):
    monkeypatch.setattr("lib.evaluation.baselines.PAIRS_AT_ONCE", pairs_at_once)
    random = random_histories(30, 20, np.random.default_rng(0))
    model = ItemToItem.count(random, 22, window=1000)
    took = np.zeros((30, 23))
    took[np.repeat(np.arange(30), random.lengths), random.rows] = 1
    together = took.T @ took
    norms = np.sqrt(np.diag(together))
    expected = together / np.maximum(np.outer(norms, norms), 1e-9)
    np.fill_diagonal(expected, 0.0)
    found = np.zeros((23, 23))
    found[np.repeat(np.arange(23), np.diff(model.offsets)), model.neighbours] = model.similarities
    assert found == pytest.approx(expected, abs=1e-6)


def test_baselines_never_see_the_targets():
    """Changing every target changes nothing that is counted."""
    random = random_histories(30, 20, np.random.default_rng(0))
    cases = cases_of(random, LEAVE_ONE_OUT)
    changed = replace(random, rows=random.rows.copy())
    changed.rows[random.offsets[cases.users] + cases.inputs] = 21
    for model in (lambda h: Popularity.count(h, 22, 1e9), lambda h: ItemToItem.count(h, 22)):
        one, other = (model(training_part(h, LEAVE_ONE_OUT)).scores(random) for h in (random, changed))
        assert np.array_equal(one, other)
