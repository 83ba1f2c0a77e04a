"""Filters say which items may come."""

import numpy as np
import pyarrow as pa
import pytest

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.ranking.filters import ItemFilter


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


def test_an_attribute_that_no_item_has_matches_nothing_and_is_noted(catalog):
    filter = ItemFilter.of({"size": 3, "colour": "red", "deny": ["a"]})
    assert filter is not None
    assert not filter.mask(catalog).any()
    assert filter.notes(catalog) == [
        "filter.size: no item has this attribute, so none matches; there are colour, price",
    ]
    catalog.change({"b": {"size": 3, "colour": "red"}})
    assert np.flatnonzero(filter.mask(catalog)).tolist() == [2]
    assert filter.notes(catalog) == []


def test_a_catalog_without_attributes_says_so():
    filter = ItemFilter.of({"size": 3})
    assert filter is not None
    [note] = filter.notes(Catalog(["a"]))
    assert note.endswith("there are no attributes yet")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"colour": [str(n) for n in range(1001)]}, r"filter\.colour: more than 1000 values in one filter"),
        ({"colour": ["x"] * 600, "price": [1] * 600}, r"filter\.price: more than 1000 values in one filter"),
        ({f"a{n}": 1 for n in range(51)}, "filter: 51 attributes are more than 50"),
        ({"allow": [str(n) for n in range(10_001)]}, r"filter\.allow: 10001 ids are more than 10000"),
        ({"deny": [str(n) for n in range(10_001)]}, r"filter\.deny: 10001 ids are more than 10000"),
        ({"colour": "\ud800"}, "filter: a part of it is no valid Unicode"),
        ({"\ud800": 1}, "filter: a part of it is no valid Unicode"),
        ({"deny": ["\udfff"]}, "filter: a part of it is no valid Unicode"),
        ({"size": 10**5000}, "filter: .* a number of thousands of digits"),
        ({"size": {"from": 3}}, r"filter\.size: a range is written"),
        ({"size": [[3]]}, r"filter\.size: give a value, a list of values, or a range"),
    ],
)
def test_what_a_filter_costs_is_bounded_when_it_is_read(written, message):
    with pytest.raises(InputError, match=message):
        ItemFilter.of(written)


def test_a_filter_of_500_values_is_read(catalog):
    filter = ItemFilter.of({"colour": [f"c{n}" for n in range(499)] + ["blue"]})
    assert filter is not None
    assert np.flatnonzero(filter.mask(catalog)).tolist() == [3]


def test_equal_filters_are_one(catalog):
    one = ItemFilter.of({"colour": "red", "price": {"min": 1, "max": 2}})
    other = ItemFilter.of({"price": {"max": 2, "min": 1}, "colour": "red"})
    assert one == other
    assert len({one, other, None, ItemFilter.of({"colour": "blue"})}) == 3
