"""One user's history: as it came, up to an offset, and as flat columns."""

import numpy as np
import pytest

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.history import History, to_histories
from tests.helpers.tiny import NOW, history, item_ids

CODES = {kind: place + 1 for place, kind in enumerate(EVENT_KINDS)}


def event(user: str, item: str, timestamp: int = NOW, kind: str = "click", value: float | None = None) -> Event:
    return Event(user, item, kind, value, timestamp)


def logged(*offsets: int) -> History:
    """A history with these offsets; each item is named after its offset."""
    made = History()
    for offset in offsets:
        made.append(event("u", f"i{offset}"), offset)
    return made


def test_a_history_keeps_all_of_an_event():
    made = History.of([event("u", "a", NOW, "rating", 4.0), event("u", "b", NOW - 5)])
    assert made == History(["a", "b"], ["rating", "click"], [4.0, None], [NOW, NOW - 5], [0, 0])
    assert len(made) == 2


def test_newest():
    made = history([1, 2, 3])
    assert made.newest(2).item_ids == ["i2", "i3"]
    assert made.newest(9) == made
    assert made.newest(0) == History()
    made.newest(9).append(event("u", "other"))
    assert len(made) == 3  # a copy


@pytest.mark.parametrize(
    ("last", "after", "kept", "new"),
    [
        (9, 0, [0, 0, 3, 5, 9], 3),
        (9, 3, [0, 0, 3, 5, 9], 2),
        (8, 3, [0, 0, 3, 5], 1),  # 9 is for the next batch
        (9, 9, [0, 0, 3, 5, 9], 0),
        (2, 0, [0, 0], 0),
        (7, 6, [0, 0, 3, 5], 0),
        (100, 4, [0, 0, 3, 5, 9], 2),
    ],
)
def test_what_is_new_after_an_offset_and_up_to_another(last, after, kept, new):
    found = logged(0, 0, 3, 5, 9).up_to(last)
    assert found.offsets == kept
    assert len(found) - len(found.up_to(after)) == new


def test_consecutive_batches_see_every_event_once():
    made, seen = logged(0, 2, 3, 7, 8, 11), []
    for after, last in ((0, 3), (3, 7), (7, 10), (10, 11)):
        found = made.up_to(last)
        seen += found.offsets[len(found.up_to(after)) :]
    assert seen == [2, 3, 7, 8, 11]


def test_flat_columns_leave_out_what_the_model_does_not_know():
    known = Catalog(item_ids(3))
    mixed = History.of(
        [
            event("u", "i2", NOW, "rating", 3.5),
            event("u", "unknown", NOW + 1),
            event("u", "i1", NOW + 2, "wish"),
            event("u", "i3", NOW + 3, "purchase"),
        ]
    )
    flat = to_histories([History(), mixed, history(["unknown"]), history([1])], known, CODES)
    assert flat.offsets.tolist() == [0, 0, 2, 2, 3]
    assert flat.rows.tolist() == [2, 3, 1]
    assert flat.kinds.tolist() == [CODES["rating"], CODES["purchase"], CODES["click"]]
    assert flat.values[0] == 3.5
    assert np.isnan(flat.values[1:]).all()
    assert flat.timestamps.tolist() == [NOW, NOW + 3, NOW]
    assert len(to_histories([], known, CODES)) == 0
