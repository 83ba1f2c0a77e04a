"""Retrieval equals brute force, follows updates in place, and ranking takes out what must not come."""

import numpy as np
import pyarrow as pa
import pytest

from lib.catalog import Catalog
from lib.events import InputError
from lib.ranking import ItemFilter, most_popular, without_seen
from lib.retrieval import ItemIndex


def unit(rows: int, seed: int = 0, width: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int, mask: np.ndarray | None = None) -> np.ndarray:
    scores = queries @ vectors.T
    if mask is not None:
        scores[:, ~mask] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("people", [1, 7, 64])  # FAISS computes few and many queries in different ways
@pytest.mark.parametrize("masked", [False, True])
def test_search_equals_brute_force(people, masked):
    vectors, queries = unit(300), unit(people, seed=1)
    mask = np.random.default_rng(2).random(300) < 0.3 if masked else None
    scores, rows = ItemIndex(vectors).search(queries, 20, mask)
    assert rows.shape == scores.shape == (people, 20)
    assert np.array_equal(rows, brute_force(vectors, queries, 20, mask))
    expected = np.take_along_axis(queries @ vectors.T, rows, axis=1)
    assert np.allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 9, 64, 65])
def test_a_mask_of_any_length_is_read_by_the_right_bits(rows):
    vectors = unit(rows)
    index = ItemIndex(vectors)
    for row in range(rows):
        mask = np.zeros(rows, dtype=bool)
        mask[row] = True
        _, found = index.search(vectors[:1], 3, mask)
        assert found[0].tolist() == [row, -1, -1]


def test_minus_one_where_fewer_exist():
    vectors = unit(5)
    assert ItemIndex(vectors).search(vectors[:1], 50)[1].shape == (1, 5)
    _, rows = ItemIndex(vectors).search(vectors[:2], 5, np.zeros(5, dtype=bool))
    assert (rows == -1).all()


def test_a_row_is_updated_in_place_and_found_by_the_next_search():
    vectors, query = unit(50), unit(1, seed=1)
    index = ItemIndex(vectors)
    assert index.search(query, 1)[1][0, 0] != 33
    index.update(np.array([33]), query)
    vectors[33] = query
    assert index.search(query, 1)[1][0, 0] == 33
    assert np.array_equal(index.vectors, vectors)
    assert len(index) == 50


def test_rows_beyond_the_end_extend_the_index():
    vectors = unit(20)
    index = ItemIndex(vectors[:10])
    changed = vectors.copy()
    changed[3] = unit(1, seed=9)[0]
    index.update(np.array([3, *range(10, 20)]), changed[[3, *range(10, 20)]])
    assert len(index) == 20
    assert np.array_equal(index.vectors, changed)
    queries = unit(4, seed=5)
    assert np.array_equal(index.search(queries, 20)[1], brute_force(changed, queries, 20))
    with pytest.raises(ValueError, match="do not follow the index's 20 rows"):
        index.update(np.array([22]), vectors[:1])
    index.update(np.zeros(0, dtype=np.int64), vectors[:0])
    assert len(index) == 20


def test_the_index_keeps_its_own_copy():
    vectors = unit(10)
    index = ItemIndex(vectors)
    before = index.vectors.copy()
    vectors[:] = 0
    assert np.array_equal(index.vectors, before)


# ---------------------------------------------------------------------------------------------------------------------
# Ranking


def test_seen_and_missing_candidates_are_taken_out_in_order():
    scores, rows = np.array([0.9, 0.8, 0.7, 0.6, -9.0]), np.array([4, 2, 7, 1, -1])
    found = without_seen(scores, rows, np.array([2, 9]), 2)
    assert (found[0].tolist(), found[1].tolist()) == ([0.9, 0.7], [4, 7])
    assert without_seen(scores, rows, np.array([]), 10)[1].tolist() == [4, 2, 7, 1]
    assert without_seen(scores, rows, np.array([1, 2, 4, 7]), 3)[1].tolist() == []


def test_the_most_popular_come_in_order_without_padding():
    popularity = np.array([99.0, 1.0, 5.0, 3.0, 0.0, 5.0])
    scores, rows = most_popular(popularity, None, 3)
    assert (scores.tolist(), rows.tolist()) == ([5.0, 5.0, 3.0], [2, 5, 3])
    mask = np.array([True, True, False, True, True, False])
    assert most_popular(popularity, mask, 10)[1].tolist() == [3, 1, 4]
    assert mask[0]  # the mask that was given stays as it is
    assert most_popular(popularity, np.zeros(6, dtype=bool), 3)[1].tolist() == []
    everything = np.random.default_rng(0).random(500)
    assert most_popular(everything, None, 20)[1].tolist() == (np.argsort(-everything[1:])[:20] + 1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Filters


@pytest.fixture
def catalog() -> Catalog:
    attributes = pa.table({"item_id": ["a", "b", "c"], "colour": ["red", "red", "blue"], "price": [1.0, 2.0, 3.0]})
    return Catalog(["a", "b", "c", "d"], attributes)


@pytest.mark.parametrize(
    ("written", "items"),
    [
        ({"colour": "red"}, "ab"),
        ({"colour": "red", "price": {"min": 2}}, "b"),
        ({"allow": ["a", "d", "unknown"]}, "ad"),
        ({"allow": []}, ""),
        ({"deny": ["a", "unknown"]}, "bcd"),
        ({"deny": []}, "abcd"),
        ({"allow": ["a", "b"], "deny": ["b"]}, "a"),
        ({"colour": "red", "allow": ["b", "c"]}, "b"),
        ({"colour": "red", "deny": ["b"]}, "a"),
    ],
)
def test_filters(catalog, written, items):
    filter = ItemFilter.of(written)
    assert filter is not None
    mask = filter.mask(catalog)
    assert mask.shape == (5,)
    assert "".join(catalog.item_ids[row] for row in np.flatnonzero(mask)) == items
    assert not mask[0]


def test_filters_of_equal_conditions_do_not_disturb_each_other(catalog):
    for written, items in (({"deny": ["b"]}, [1]), ({"allow": ["b"]}, [2]), ({}, [1, 2])):
        filter = ItemFilter.of({"colour": "red", **written})
        assert filter is not None
        assert np.flatnonzero(filter.mask(catalog)).tolist() == items


def test_no_filter():
    assert ItemFilter.of(None) is None
    assert ItemFilter.of({}) is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"allow": "a"}, "filter.allow: give a list of item ids"),
        ({"allow": None}, "filter.allow: give a list of item ids"),
        ({"deny": [1]}, "filter.deny: give a list of item ids"),
        ({"deny": {"a": 1}}, "filter.deny: give a list of item ids"),
        (["a"], "filter: give an object such as"),
        ("red", "filter: give an object such as"),
        ([], "filter: give an object such as"),
    ],
)
def test_a_malformed_filter_names_the_field(written, message):
    with pytest.raises(InputError, match=message):
        ItemFilter.of(written)


def test_an_unknown_attribute_is_named(catalog):
    filter = ItemFilter.of({"size": 3, "deny": ["a"]})
    assert filter is not None
    with pytest.raises(InputError, match=r"filter\.size: no such attribute; the catalog has item_id, colour, price"):
        filter.mask(catalog)


def test_equal_filters_are_one(catalog):
    one = ItemFilter.of({"colour": "red", "price": {"min": 1, "max": 2}})
    other = ItemFilter.of({"price": {"max": 2, "min": 1}, "colour": "red"})
    assert one == other
    assert len({one, other, None, ItemFilter.of({"colour": "blue"})}) == 3
