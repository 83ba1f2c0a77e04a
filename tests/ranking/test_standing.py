"""Trends and ages of items: what is kept from version to version is what a fresh start would find."""

import numpy as np
import pytest

from lib.model.item_counts import HALF_LIVES, WINDOW, ItemCounts
from lib.model.rows import lengthened
from lib.ranking import standing as module
from lib.ranking.standing import KEPT, LEAST_TREND, MOST_TRENDING, Standing
from tests.helpers.tiny import trends_now


def count(counts: ItemCounts, items: list[int] | np.ndarray) -> np.ndarray:
    """Count one event of each after what was counted before; return the changed rows."""
    rows = np.asarray(items)
    times = int(counts.clock) + 1 + np.arange(len(rows))
    counts.count(np.zeros((len(rows), WINDOW), dtype=np.int64), rows, np.ones(len(rows)), times)
    return np.unique(rows)


def copied(counts: ItemCounts) -> dict[str, np.ndarray]:
    return {name: values.copy() for name, values in counts.arrays().items()}


def test_trends_and_ages_are_those_of_the_counts():
    counts = ItemCounts(8, 2)
    count(counts, [3, 3, 5])
    standing = Standing(counts.arrays())
    expected = np.array([np.exp2(-2 / HALF_LIVES) + np.exp2(-1 / HALF_LIVES), np.ones(len(HALF_LIVES))])
    assert np.allclose(standing.trends(np.array([3, 5])), np.log(expected), atol=1e-5)
    assert np.allclose(standing.trends(np.array([4])), np.log(LEAST_TREND))
    assert standing.age(np.array([3, 5, 4])).tolist() == [2, 0, 3]  # of 4 there was no event
    standing.update(counts.arrays(), count(counts, [5]))
    assert standing.age(np.array([3, 5])).tolist() == [3, 1]
    assert np.allclose(standing.trends(np.array([3]))[0], np.log(trends_now(counts, np.array([3]))[0]), atol=1e-5)


def test_what_trends_is_what_was_counted_most_of_late():
    counts = ItemCounts(40, 2)
    count(counts, [1] * 300 + [2] * 200 + list(range(3, 40)))
    standing = Standing(counts.arrays())
    assert {1, 2} <= set(standing.trending(None, 1).tolist())
    mask = np.zeros(40, dtype=bool)
    mask[[2, 7, 9]] = True
    assert standing.trending(mask, 1).tolist() == [2, 7, 9]
    assert len(standing.trending(None, 100)) == 39  # all there are, once each


def test_the_newest_come_first_and_what_has_no_event_is_not_new():
    counts = ItemCounts(8, 2)
    count(counts, [4, 2, 4, 6])
    standing = Standing(counts.arrays())
    assert standing.newest(None).tolist() == [6, 2, 4]
    assert standing.newest(None, 2).tolist() == [6, 2]
    assert standing.newest(np.arange(8) != 6).tolist() == [2, 4]
    assert Standing(ItemCounts(8, 2).arrays()).newest(None).tolist() == []
    assert Standing(ItemCounts(8, 2).arrays()).trending(None, 5).tolist() == []


def assert_same_standing(one: Standing, other: Standing, masks: list[np.ndarray | None]) -> None:
    rows = np.arange(len(one.counts["events"]))
    assert np.array_equal(one.trends(rows), other.trends(rows))
    assert np.array_equal(one.age(rows), other.age(rows))
    for mask in masks:
        for wanted in (1, MOST_TRENDING, KEPT + 50):
            assert np.array_equal(one.trending(mask, wanted), other.trending(mask, wanted))
        assert np.array_equal(one.newest(mask), other.newest(mask))


@pytest.mark.parametrize("table_rows", [0, 1 << 20])
def test_following_versions_is_the_same_as_starting_from_the_last(monkeypatch, table_rows):
    monkeypatch.setattr(module, "TABLE_ROWS", table_rows)
    generator = np.random.default_rng(0)
    counts = ItemCounts(500, 2)
    count(counts, np.arange(1, 500))
    standing = Standing(counts.arrays())
    for version in range(12):
        if version == 5:
            counts.replace_tables(lambda table, fill: lengthened(table, 600, fill))
        rows = count(counts, generator.integers(1, len(counts.events), 64))
        standing.update(counts.arrays(), rows)
        half = generator.random(len(counts.events)) < 0.5
        half[0] = False
        assert_same_standing(standing, Standing(counts.arrays()), [None, half])


def test_after_a_rollback_it_is_the_same_as_starting_from_there():
    counts = ItemCounts(900, 2)
    count(counts, np.arange(1, 600))
    before = copied(counts)
    standing = Standing(counts.arrays())
    rows = count(counts, np.concatenate([np.arange(1, 300), np.arange(600, 900)]))
    standing.update(counts.arrays(), rows)
    for name, values in counts.arrays().items():  # as a delta of a rollback does
        values[:] = before[name]
    standing.update(counts.arrays(), rows)
    assert_same_standing(standing, Standing(counts.arrays()), [None])
    assert standing.newest(None).tolist() == list(range(599, 599 - MOST_TRENDING, -1))


def test_few_rows_are_found_however_old_or_rare_they_are():
    counts = ItemCounts(1000, 2)
    count(counts, np.arange(1, 1000))
    count(counts, np.arange(500, 1000))
    mask = np.zeros(1000, dtype=bool)
    mask[[5, 9]] = True
    standing = Standing(counts.arrays())
    assert standing.trending(mask, 10).tolist() == [5, 9]
    assert standing.newest(mask).tolist() == [9, 5]
