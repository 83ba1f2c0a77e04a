"""The table of attributes: any puts give the filters that a catalog made at once would give, and indexes say so."""

import re

import numpy as np
import pyarrow as pa
import pytest

from lib.data.catalog import Catalog
from lib.data.column_index import LONGEST_INDEXED, SOON, WordIndex
from lib.data.item_table import ItemTable

WORDS = ["red", "blue", "The North Face", "a|b", "b, c", "x y", "", "red blue", "Crime Thriller|War", "é"]
LISTS = [["red"], ["x y", "blue"], ["a"], ["b", "a", "red"]]


def random_item(generator: np.random.Generator) -> dict:
    """Attributes of every kind, some of them not there."""
    item = {
        "text": str(generator.choice(WORDS)),
        "long": " ".join(generator.choice(WORDS, 40)),
        "tags": LISTS[generator.integers(len(LISTS))],
        "whole": int(generator.integers(-3, 4)),
        "number": float(generator.choice([0.5, 1.0, 19.99, -2.0])),
        "flag": bool(generator.integers(2)),
    }
    return {name: value for name, value in item.items() if generator.random() < 0.8}


def meets(value, condition) -> bool:
    """What README.md says of a condition, one item at a time."""
    if value is None:
        return False
    if isinstance(condition, dict):
        return condition.get("min", -np.inf) <= value <= condition.get("max", np.inf)
    wanted = condition if isinstance(condition, list) else [condition]
    if isinstance(value, list):
        return any(member in wanted for member in value)
    if isinstance(value, str):
        parts = [part.strip() for part in re.split(r"[|,;]", value)]
        found = {value, *(part for part in parts if part), *filter(None, re.split(r"[ \t\n\r\f|,;]", value))}
        return any(text in found for text in wanted)
    return any(type(value) is type(one) and value == one for one in wanted)


CONDITIONS = [
    {"text": "red"},
    {"text": ["The North Face", "b", "c"]},
    {"text": ""},
    {"text": "Crime Thriller"},
    {"text": "North Face"},
    {"long": "Thriller"},
    {"long": "a"},
    {"tags": "red"},
    {"tags": ["x y", "nothing"]},
    {"tags": "x"},
    {"whole": 2},
    {"whole": [0, 3]},
    {"whole": {"min": -1, "max": 2}},
    {"number": 19.99},
    {"number": {"max": 1.0}},
    {"number": {"min": 19.98, "max": 20}},
    {"flag": False},
    {"text": "red", "number": {"min": 0}, "flag": True},
]


@pytest.mark.parametrize("soon", [5, 100, SOON])  # from it on, texts are indexed together
@pytest.mark.parametrize("seed", range(8))
def test_any_puts_give_what_the_items_say_one_by_one(tmp_path, monkeypatch, seed, soon):
    monkeypatch.setattr("lib.data.column_index.SOON", soon)
    generator = np.random.default_rng(seed)
    names = [f"i{number}" for number in range(60)]
    items = {name: random_item(generator) for name in names[: generator.integers(0, 40)]}
    loaded = [{"item_id": name, **attributes} for name, attributes in items.items()]
    types = {"text": pa.string(), "long": pa.large_string(), "tags": pa.list_(pa.string()), "whole": pa.int32()}
    schema = pa.schema([("item_id", pa.string()), *types.items(), ("number", pa.float64()), ("flag", pa.bool_())])
    catalog = Catalog(names[:30], pa.Table.from_pylist(loaded, schema) if loaded else None)
    for round in range(6):
        if round == 3:
            catalog.extend(names)
        for conditions in CONDITIONS if round % 2 else CONDITIONS[round::3]:  # some indexes are made late
            expected = [
                catalog.row_of[name]
                for name, own in items.items()
                if name in catalog.row_of and all(meets(own.get(column), value) for column, value in conditions.items())
            ]
            assert np.flatnonzero(catalog.mask(conditions)).tolist() == sorted(expected), conditions
        for name in generator.choice(names, 8):
            items[str(name)] = random_item(generator)
            catalog.change({str(name): items[str(name)]})
        if round == 4:
            catalog.save(tmp_path / "catalog.parquet")
            catalog = Catalog.load(tmp_path / "catalog.parquet")
            known = {name: own for name, own in items.items() if name in catalog.row_of}
            for name, own in known.items():
                assert {k: v for k, v in catalog.table.attributes_of(name).items() if v != []} == own
    table, loaded = catalog.attributes, catalog.table.loaded
    assert table is not None
    assert loaded is not None
    assert len(set(table["item_id"].to_pylist())) == len(table)
    put = set(catalog.table.put_ids())
    rows = [0 if item_id in put else catalog.row_of.get(item_id, 0) for item_id in loaded["item_id"].to_pylist()]
    assert catalog.rows_of_loaded().tolist() == rows


def test_a_put_touches_neither_the_table_nor_its_index():
    table = ItemTable(pa.table({"item_id": [f"i{n}" for n in range(1000)], "colour": ["red", "blue"] * 500}))
    index, loaded = table.words("colour"), table.loaded
    for number in range(500):
        table.put(f"i{number}", {"colour": "green"})
        table.put(f"new{number}", {"colour": "green", "size": number})
        table.catch_up()
    assert table.words("colour") is index
    assert table.loaded is loaded
    assert len(table) == 2000
    for number in range(500):  # once more: the line of a changed item is its own for good
        table.put(f"i{number}", {"colour": "white"})
        table.catch_up()
    assert len(table) == 2000
    assert index.count("white") == 500
    assert len(index.lines(["green"])) == 500


def test_much_text_that_was_put_finds_its_items_once_it_was_read():
    items = pa.table({"item_id": ["a", "b", "c"], "about": ["old words", "old", None], "colour": ["red"] * 3})
    catalog = Catalog(["a", "b", "c"], items)

    def found(column: str, word: str) -> list[str]:
        return [catalog.item_ids[row] for row in np.flatnonzero(catalog.mask({column: word}))]

    assert (found("about", "old"), found("colour", "blue")) == (["a", "b"], [])
    index, filler = catalog.table.words("about"), " more" * SOON
    catalog.change({"a": {"about": f"new{filler}", "colour": "blue"}, "b": {"about": "little"}}, texts_later=True)
    assert catalog.table.late
    assert not catalog.table.is_prepared({"about": "new"})
    assert catalog.table.is_prepared({"colour": "blue"})  # only the column of the long text is late
    assert (found("about", "new"), found("about", "old"), found("about", "little")) == ([], [], [])
    assert found("colour", "blue") == ["a"]
    catalog.table.catch_up()
    assert not catalog.table.late
    assert catalog.table.words("about") is index
    assert (found("about", "new"), found("about", "old"), found("about", "little")) == (["a"], [], ["b"])
    assert found("about", f"new{filler}") == ["a"]
    catalog.change({"a": {"about": f"newer{filler}"}, "c": {"about": f"third{filler}"}})
    assert (found("about", "new"), found("about", "newer"), found("about", "third")) == ([], ["a"], ["c"])
    assert (found("about", "more"), found("about", f"new{filler}")) == (["a", "c"], [])
    catalog.change({"a": {}, "c": {"about": "short"}})
    assert (found("about", "more"), found("about", "short")) == ([], ["c"])


def test_texts_that_change_while_others_are_read_are_read_next(monkeypatch):
    table = ItemTable(pa.table({"item_id": ["a", "b"], "about": ["one", "two"]}))
    index, add_part = table.words("about"), WordIndex._add_part

    def add_and_change(self: WordIndex, values: dict[int, str]) -> None:
        monkeypatch.setattr(WordIndex, "_add_part", add_part)
        table.put("a", {"about": "later"})  # as a request does, on another thread
        assert index.lines(["two"]).tolist() == [1]  # what answers look up meanwhile
        add_part(self, values)

    monkeypatch.setattr(WordIndex, "_add_part", add_and_change)
    table.put("a", {"about": "sooner " * SOON})
    table.catch_up()
    assert table.late
    assert index.lines(["sooner"]).tolist() == []  # the line has another text by now
    table.catch_up()
    assert (index.lines(["sooner"]).tolist(), index.lines(["later"]).tolist()) == ([], [table.line_of["a"]])


def test_long_texts_are_found_as_a_whole_too():
    long = "word " * 40 + "end"
    assert len(long) > LONGEST_INDEXED
    column = pa.chunked_array([[long, "end", None, "x" * 200], [f"{long} more"]])
    index = WordIndex(column)
    assert index.lines([long]).tolist() == [0]
    assert sorted(index.lines(["end"]).tolist()) == [0, 1, 4]
    assert index.lines(["x" * 200]).tolist()[0] == 3
    assert index.lines(["word end"]).tolist() == []


def test_a_column_without_values_is_indexed():
    for column in (
        pa.chunked_array([], pa.string()),
        pa.chunked_array([[]], pa.string()),
        pa.chunked_array([[None, None]], pa.null()),
    ):
        assert WordIndex(column).lines(["x"]).tolist() == []


def test_a_column_that_an_earlier_program_fixed_without_a_value_takes_any_kind(tmp_path):
    for value, other in (("x", "y"), (["x"], ["y"]), (2.5, 3), (True, False)):
        empty = pa.table({"item_id": ["a", "b"], "tags": pa.array([[], None]), "none": pa.nulls(2)})
        catalog = Catalog(["a", "b"], empty)
        assert np.flatnonzero(catalog.mask({"tags": "x"})).tolist() == []
        catalog.change({"a": {"tags": value, "none": value}, "b": {"tags": other}})
        catalog.save(tmp_path / "catalog.parquet")
        for one in (catalog, Catalog.load(tmp_path / "catalog.parquet")):
            wanted = value[0] if isinstance(value, list) else value
            for column in ("tags", "none"):
                assert np.flatnonzero(one.mask({column: wanted})).tolist() == [1]
            assert one.table.attributes_of("a") == {"tags": value, "none": value}
            if value == 2.5:
                assert np.flatnonzero(one.mask({"tags": {"min": 2.5}})).tolist() == [1, 2]


def test_numbers_beyond_all_bounds():
    catalog = Catalog(list("abcde"), pa.table({"item_id": list("abcde"), "n": [-np.inf, 1.0, np.nan, np.inf, 2.0]}))
    assert np.flatnonzero(catalog.mask({"n": {"min": 1}})).tolist() == [2, 4, 5]
    assert np.flatnonzero(catalog.mask({"n": {"max": 10**400}})).tolist() == [1, 2, 4, 5]
    assert np.flatnonzero(catalog.mask({"n": {"min": -(10**400), "max": 1}})).tolist() == [1, 2]
    assert np.flatnonzero(catalog.mask({"n": [10**400, 2]})).tolist() == [4, 5]
    assert not catalog.mask({"n": {"min": float("nan")}}).any()
