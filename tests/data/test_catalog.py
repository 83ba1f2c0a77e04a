"""The catalog: rows for good, and conditions on attributes."""

import numpy as np
import pyarrow as pa
import pytest

from lib.data.catalog import Catalog
from lib.errors import InputError

ITEMS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def catalog() -> Catalog:
    attributes = pa.table(
        {
            "item_id": ["c", "a", "b", "e", "unknown"],  # d is not described, and the order is another
            "title": ["Se7en (1995)", "Toy Story", "Heat", None, "Nowhere"],
            "genres": ["Crime Thriller", "Animation|Children's|Comedy", "Crime", "Comedy", "Comedy"],
            "year": pa.array([1995, 1995, 1996, None, 1995], pa.int64()),
            "price": pa.array([9.5, 20.0, 3.25, 7.0, None], pa.float64()),
            "tags": pa.array([["dark", "rain"], ["toys"], [], None, ["dark"]], pa.list_(pa.string())),
            "sizes": pa.array([[40, 41], [42], None, [41], None], pa.large_list(pa.int64())),
            "available": pa.array([True, False, True, None, True]),
            "shelf": pa.array(["x", "y", "x", "z", "x"]).dictionary_encode(),
            "dimensions": pa.array([{"w": 1}, {"w": 2}, None, {"w": 3}, None]),
        }
    )
    return Catalog(ITEMS, attributes)


def found(catalog: Catalog, **conditions) -> str:
    mask = catalog.mask(conditions)
    assert mask.shape == (len(catalog) + 1,)
    assert not mask[0]
    return "".join(catalog.item_ids[row] for row in np.flatnonzero(mask))


def test_rows_are_given_in_order_and_kept():
    catalog = Catalog(["x", "y", "x"])
    assert len(catalog) == 2
    assert catalog.extend(["z", "y", "z", "w"]) == ["z", "w"]
    assert catalog.item_ids == ["", "x", "y", "z", "w"]
    assert catalog.row_of == {"x": 1, "y": 2, "z": 3, "w": 4}
    assert catalog.extend([]) == []


@pytest.mark.parametrize(
    ("conditions", "items"),
    [
        ({"genres": "Crime"}, "bc"),  # as a whole, or one of its words
        ({"genres": "Comedy"}, "ae"),
        ({"genres": "Children's"}, "a"),
        ({"genres": "Crim"}, ""),
        ({"genres": "crime"}, ""),
        ({"genres": "Crime Thriller"}, "c"),
        ({"genres": ["Thriller", "Animation"]}, "ac"),
        ({"title": "Se7en (1995)"}, "c"),  # not a pattern
        ({"title": "."}, ""),
        ({"year": 1995}, "ac"),
        ({"year": [1996, 1997]}, "b"),
        ({"year": {"min": 1996}}, "b"),
        ({"year": {"max": 1995}}, "ac"),
        ({"year": {"min": 1995, "max": 1996}}, "abc"),
        ({"year": {"min": 1997}}, ""),
        ({"price": {"max": 7}}, "be"),
        ({"price": {"min": 3.25, "max": 9.5}}, "bce"),
        ({"price": 20}, "a"),
        ({"price": 20.0}, "a"),
        ({"price": 3.25}, "b"),
        ({"year": 1995.0}, "ac"),
        ({"tags": "dark"}, "c"),
        ({"tags": ["rain", "toys"]}, "ac"),
        ({"tags": "dark rain"}, ""),
        ({"sizes": 41}, "ce"),
        ({"available": True}, "bc"),
        ({"available": False}, "a"),
        ({"shelf": "x"}, "bc"),
        ({"item_id": ["a", "e"]}, "ae"),
        ({"genres": "Crime", "year": 1995}, "c"),  # every condition
        ({}, "abce"),
    ],
)
def test_conditions(catalog, conditions, items):
    assert found(catalog, **conditions) == items


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"year": {}}, "filter.year: a range is written"),
        ({"year": {"from": 1990}}, "filter.year: a range is written"),
        ({"year": {"min": "1990"}}, "filter.year: min and max are numbers"),
        ({"year": {"min": None}}, "filter.year: min and max are numbers"),
        ({"year": []}, "filter.year: give a value, a list of values, or a range"),
        ({"year": None}, "filter.year: give a value, a list of values, or a range"),
        ({"year": [[1995]]}, "filter.year: give a value, a list of values, or a range"),
        ({"genres": {"min": 3}}, "filter.genres: a range needs numbers"),
        ({"tags": {"min": 3}}, "filter.tags: a range needs numbers"),
        ({"shelf": {"min": 3}}, "filter.shelf: a range needs numbers"),
        ({"dimensions": {"min": 3}}, "filter.dimensions: a range needs numbers"),
        ({"dimensions": "2"}, "filter.dimensions: .* cannot be filtered"),
    ],
)
def test_a_malformed_condition_names_the_attribute(catalog, conditions, message):
    with pytest.raises(InputError, match=message):
        catalog.mask(conditions)


def test_an_attribute_that_no_item_has_had_matches_nothing(catalog):
    assert found(catalog, colour="red") == ""
    assert found(catalog, colour={"min": 3}, genres="Crime") == ""
    assert found(Catalog(ITEMS), genres="Crime") == ""
    catalog.change({"d": {"colour": "red"}})
    assert found(catalog, colour="red") == "d"


def test_a_mask_follows_the_growth_of_the_catalog(catalog):
    assert found(catalog, genres="Comedy") == "ae"
    catalog.extend(["unknown", "other"])  # the first of them is described already
    assert found(catalog, genres="Comedy") == "aeunknown"
    assert len(catalog.mask({"genres": "Comedy"})) == 8


def test_conditions_of_one_text_and_different_types_are_told_apart():
    attributes = pa.table({"item_id": ["a", "b"], "flag": pa.array([True, False])})
    catalog = Catalog(["a", "b"], attributes)
    assert found(catalog, flag=True) == "a"
    assert found(catalog, flag="True") == ""


def test_titles(catalog):
    assert catalog.titles == {"c": "Se7en (1995)", "a": "Toy Story", "b": "Heat", "unknown": "Nowhere"}
    assert Catalog(["a"], pa.table({"item_id": ["a"], "name": ["Anna"]})).titles == {"a": "Anna"}
    assert Catalog(["a"], pa.table({"item_id": ["a"], "price": [1.0]})).titles == {}
    both = pa.table({"item_id": ["a", "b"], "name": ["Anna", "Ben"], "title": [None, "Benjamin"]})
    assert Catalog(["a", "b"], both).titles == {"a": "Anna", "b": "Benjamin"}, "as where they are put"
    assert Catalog(["a"]).titles == {}


def test_a_saved_catalog_has_the_same_rows_masks_and_titles(catalog, tmp_path):
    catalog.extend(["new"])
    catalog.save(tmp_path / "catalog.parquet")
    loaded = Catalog.load(tmp_path / "catalog.parquet")
    assert loaded.item_ids == catalog.item_ids
    assert loaded.row_of == catalog.row_of
    assert loaded.titles == {name: title for name, title in catalog.titles.items() if name != "unknown"}
    for conditions in ({"genres": "Crime"}, {"year": {"min": 1996}}, {"tags": "dark"}, {"available": True}):
        assert found(loaded, **conditions) == found(catalog, **conditions)
    assert loaded.attributes is not None
    assert loaded.attributes["item_id"].to_pylist() == catalog.item_ids[1:]
    loaded.save(tmp_path / "again.parquet")
    assert Catalog.load(tmp_path / "again.parquet").attributes == loaded.attributes


def test_a_catalog_without_attributes_is_saved_too(tmp_path):
    for items in ([], ["a", "ü\n"]):
        Catalog(items).save(tmp_path / "catalog.parquet")
        loaded = Catalog.load(tmp_path / "catalog.parquet")
        assert loaded.item_ids == ["", *items]
        assert loaded.attributes is None


def test_the_first_description_of_an_item_counts(tmp_path):
    attributes = pa.table({"item_id": ["a", "a"], "colour": ["red", "blue"]})
    Catalog(["a"], attributes).save(tmp_path / "catalog.parquet")
    loaded = Catalog.load(tmp_path / "catalog.parquet")
    assert found(loaded, colour="red") == "a"
    assert found(loaded, colour="blue") == ""
