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
    with pytest.raises(TypeError):
        log.append([("b", {}), ("c", {"unwritable": object()})])
    assert log.append([("d", {})]) == 2
    assert [change.item_id for change in log.after(0)] == ["a", "d"]


def test_a_file_that_is_no_log_is_refused_with_its_name(path):
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=r"items\.sqlite"):
        ItemLog(path)
