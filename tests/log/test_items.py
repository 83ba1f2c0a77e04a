"""The record of changed items: durable, each item once with its newest state, in the order of change."""

from pathlib import Path

import pytest

from lib.errors import InputError
from lib.log.items import ItemChange, ItemLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "items.sqlite"


def test_each_item_is_read_once_with_its_newest_state(path):
    log = ItemLog(path)
    assert log.revision == 0
    assert log.after(0) == []
    assert log.append([("a", {"price": 1.5, "tags": ["x", "é"]}), ("b", {})]) == 2
    assert log.append([("a", None)]) == 3
    assert log.append([("c", {"new": True})]) == 4
    assert log.after(0) == [ItemChange(2, "b", {}), ItemChange(3, "a", None), ItemChange(4, "c", {"new": True})]
    assert log.after(3) == [ItemChange(4, "c", {"new": True})]
    assert log.after(4) == []


def test_what_was_recorded_is_there_after_a_restart_and_revisions_go_on(path):
    log = ItemLog(path)
    log.append([("a", {"n": 1}), ("a", {"n": 2})])
    again = ItemLog(path)  # the first is not closed: its process was killed
    assert again.after(0) == [ItemChange(2, "a", {"n": 2})]
    assert again.append([("b", None)]) == 3
    again.close()
    assert ItemLog(path).revision == 3


def test_a_call_that_fails_records_nothing(path):
    log = ItemLog(path)
    log.append([("a", {})])
    with pytest.raises(InputError, match="unwritable"):
        log.append([("b", {}), ("c", {"unwritable": object()})])
    assert log.append([("d", {})]) == 2
    assert [change.item_id for change in log.after(0)] == ["a", "d"]


def test_a_file_that_is_no_log_is_refused_with_its_name(path):
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=r"items\.sqlite"):
        ItemLog(path)


def kinds_of(path: Path) -> dict[str, str]:
    return ItemLog(path).kinds


def test_the_first_of_two_kinds_is_taken_and_the_other_refused(path):
    log = ItemLog(path)
    assert log.append([("a", {"size": "XL"})]) == 1
    with pytest.raises(InputError, match=r"^size: 42 of item 'b' does not go with the text .*; send text, or give"):
        log.append([("c", {"n": 1}), ("b", {"size": 42})])
    assert [change.item_id for change in log.after(0)] == ["a"]
    assert log.kinds == kinds_of(path) == {"size": "text"}
    assert log.append([("b", {"size": "42", "n": 1})]) == 2
    assert log.kinds == kinds_of(path) == {"size": "text", "n": "whole numbers"}


def test_two_kinds_in_one_call_are_refused(path):
    with pytest.raises(InputError, match=r"^size: 'XL' of item 'b'"):
        ItemLog(path).append([("a", {"size": 42}), ("b", {"size": "XL"})])
    assert ItemLog(path).after(0) == []


def test_whole_numbers_widen_for_good(path):
    log = ItemLog(path)
    log.append([("a", {"price": 20})], {"price": "whole numbers"})
    log.append([("b", {"price": 19.99})], {"price": "whole numbers"})
    assert kinds_of(path) == {"price": "numbers"}
    log.append([("a", {"price": 20})], {"price": "whole numbers"})
    assert kinds_of(path) == {"price": "numbers"}
    with pytest.raises(InputError, match="price: 9007199254740993 of item 'a' is not exact among numbers"):
        log.append([("a", {"price": 2**53 + 1})])
    with pytest.raises(InputError, match="price: 'free'"):
        log.append([("a", {"price": "free"})])


def test_an_empty_list_and_null_are_of_no_kind(path):
    log = ItemLog(path)
    log.append([("a", {"tags": []}), ("b", {"tags": None})])
    assert log.kinds == {}
    log.append([("a", {"tags": ["x"]}), ("b", {"tags": []}), ("c", {"tags": None})])
    assert log.kinds == {"tags": "lists of texts"}
    with pytest.raises(InputError, match="tags: 'x' of item 'a' does not go with the lists of texts"):
        log.append([("a", {"tags": "x"})])


def test_the_kinds_of_the_served_catalog_come_first(path):
    log = ItemLog(path)
    with pytest.raises(InputError, match="size: 'XL' of item 'a' does not go with the whole numbers"):
        log.append([("a", {"size": "XL"})], {"size": "whole numbers"})
    log.append([("a", {"size": "XL"})])
    log.append([("a", {"size": 42})], {"size": "whole numbers"})  # another model is served since
    assert kinds_of(path) == {"size": "whole numbers"}
    with pytest.raises(InputError, match=r"moment: .* does not go with the timestamp"):
        log.append([("a", {"moment": "2026-01-01"})], {"moment": "timestamp[ms]"})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"price": float("nan")}, "price: nan is no number; leave it out"),
        ({"price": float("inf")}, "price: inf is no number; leave it out"),
        ({"price": 2**63}, "price: 9223372036854775808 is too large for a whole number; send a text"),
        ({"colour": "\ud800"}, "colour: .* is no valid Unicode"),
        ({"tags": ["fine", "\ud800"]}, "tags: .* is no valid Unicode"),
        ({"\ud800": 1}, "is no valid Unicode"),
        ({"nested": {"a": 1}}, "nested: .* is no attribute; send a text, a number"),
        ({"tags": ["a", 1]}, "tags: .* is no attribute"),
        ({"item_id": "b"}, "item_id: it is no attribute"),
        ({"n" * 257: 1}, "a name has at most 256 characters"),
        ({"": 1}, "'': a name is not blank and has no control characters"),
        ({"x\0y": 1}, r"'x\\x00y': a name is not blank"),
        ({"text": "ü " * 50_000}, "items: the attributes of item 'a' have 100012 characters, more than 100000"),
        ({"tags": [f"t{number}" for number in range(20_000)]}, "more than 100000; leave out"),
        ({f"a{number}": 1 for number in range(1001)}, "items: 1001 different attributes are more than the 1000"),
    ],
)
def test_what_readers_could_not_take_is_never_recorded(path, attributes, message):
    log = ItemLog(path)
    with pytest.raises(InputError, match=message):
        log.append([("a", attributes)])
    assert log.after(0) == []
    assert log.append([("a", {"fine": 1})]) == 1


def test_a_record_without_kinds_is_opened_and_decides_by_its_oldest_items(path):
    """One of an earlier program, with two kinds that concurrent requests left in it."""
    log = ItemLog(path)
    log.append([("a", {"size": "XL", "price": 3}), ("b", {"price": 2.5})])
    log._database.connection.execute("DROP TABLE columns")
    text = '{"size": 42, "colour": "red"}'
    log._database.connection.execute("INSERT INTO items VALUES('c', 3, ?)", (text,))
    log.close()
    log = ItemLog(path)
    assert log.kinds == {"size": "text", "price": "numbers", "colour": "text"}
    assert [change.attributes for change in log.after(2)] == [{"size": 42, "colour": "red"}]
    with pytest.raises(InputError, match="size: 43"):
        log.append([("d", {"size": 43})])
    assert log.append([("d", {"size": "M", "price": 1})]) == 4
