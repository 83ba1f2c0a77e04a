"""One user's history: as it came, up to an offset, and as flat columns."""

import numpy as np
import pytest

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.guard import LATENESS_MS
from lib.data.history import History, to_histories
from tests.helpers.tiny import NOW, history, item_ids

CODES = {kind: place + 1 for place, kind in enumerate(EVENT_KINDS)}


def event(user: str, item: str, timestamp: int = NOW, kind: str = "click", value: float | None = None) -> Event:
    return Event(user, item, kind, value, timestamp)


def logged(*offsets: int) -> History:
    """A history with these offsets; each item is named after its offset."""
    made = History()
    for offset in offsets:
        made.add(event("u", f"i{offset}"), offset)
    return made


def test_a_history_keeps_all_of_an_event_and_orders_them_by_their_times():
    made = History.of([event("u", "a", NOW, "rating", 4.0), event("u", "b", NOW - 5), event("u", "c", NOW)])
    times = [NOW - 5, NOW, NOW]
    assert made == History(["b", "a", "c"], ["click", "rating", "click"], [None, 4.0, None], times, [0, 0, 0])
    assert len(made) == 3
    years = [NOW - 400 * LATENESS_MS * number for number in range(9)]
    assert History.of([event("u", "i", time) for time in years]).timestamps == years[::-1]


def test_an_event_that_comes_late_stands_where_it_was():
    made = logged(1, 2, 3)
    kept = made.slice(0, 3)
    late = event("u", "late", NOW - 5, "rating", 4.0)
    assert made.add(late, 4) == 0
    assert made.add(event("u", "tie", NOW - 5), 5) == 1
    assert made == History(
        ["late", "tie", "i1", "i2", "i3"],
        ["rating", *["click"] * 4],
        [4.0, *[None] * 4],
        [NOW - 5] * 2 + [NOW] * 3,
        [4, 5, 1, 2, 3],
    )
    assert made.last_offset == made.newest(3).last_offset == 5
    assert made.newest(3) == kept


@pytest.mark.parametrize("lateness", [1, 7, 40, 1000])
def test_how_late_an_event_may_come_is_bounded(lateness):
    generator = np.random.default_rng(lateness)
    for _ in range(200):
        made, newest, expected = History(), 0, []
        for offset, time in enumerate(generator.integers(1, 60, 12).tolist(), start=1):
            newest = max(newest, time)
            made.add(event("u", "i", time), offset, lateness)
            expected.append((max(time, newest - lateness), offset))
        assert made.offsets == [offset for _, offset in sorted(expected)]


def test_what_was_known_at_an_offset_keeps_its_order_by_time():
    made = History()
    for offset, time in enumerate([10, 30, 20, 5, 40], start=1):
        made.add(event("u", f"i{offset}", time), offset)
    assert made.up_to(3).offsets == [1, 3, 2]
    assert made.up_to(3).item_ids == ["i1", "i3", "i2"]
    assert made.up_to(9) == made
    assert made.up_to(0) == History()


def test_newest():
    made = history([1, 2, 3])
    assert made.newest(2).item_ids == ["i2", "i3"]
    assert made.newest(9) == made
    assert made.newest(0) == History()
    made.newest(9).add(event("u", "other"))
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
