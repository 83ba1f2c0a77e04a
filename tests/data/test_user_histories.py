"""Users' histories in memory: what is new, what is kept, what is forgotten."""

from collections import Counter

import numpy as np
import pytest

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.history import History, to_histories
from lib.data.user_histories import RECENT_USERS, ReplaySample, UserHistories
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
    found, count = logged(0, 0, 3, 5, 9).up_to(last, after)
    assert found.offsets == kept
    assert count == new


def test_consecutive_batches_see_every_event_once():
    made, seen = logged(0, 2, 3, 7, 8, 11), []
    for after, last in ((0, 3), (3, 7), (7, 10), (10, 11)):
        found, count = made.up_to(last, after)
        seen += found.offsets[len(found) - count :]
    assert seen == [2, 3, 7, 8, 11]


def test_users_grow_and_are_forgotten():
    histories = UserHistories()
    for number in range(5):
        histories.append(event("a", f"i{number}"), number)
    histories.append(event("b", "x"))
    assert len(histories) == 2
    assert "a" in histories
    assert histories.get("a", 2).item_ids == ["i3", "i4"]
    assert histories.get("a").offsets == [0, 1, 2, 3, 4]
    assert histories.get("nobody") == History()
    assert "nobody" not in histories
    assert histories.users(1) == ["a"]
    histories.erase("a")
    histories.erase("nobody")
    assert "a" not in histories
    assert histories.get("a") == History()
    assert histories.users(9) == ["b"]
    assert set(histories.sample(50, np.random.default_rng(0))) == {"b"}
    histories.append(event("a", "again"))
    assert histories.get("a").item_ids == ["again"]


def test_long_histories_are_trimmed_to_their_newest_events():
    histories = UserHistories(keep=10)
    for number in range(1, 200):
        histories.append(event("a", f"i{number}"), number)
        assert histories.get("a").offsets == list(range(max(1, number - 9), number + 1))
        assert len(histories._histories["a"]) <= 20
        found, new = histories.get("a").up_to(number, number - 1)
        assert (new, found.item_ids[-1]) == (1, f"i{number}")


def test_samples_are_uniform_over_users():
    histories = UserHistories()
    for user in range(10):
        for _ in range(1 + 20 * (user == 0)):  # the busy one is drawn no more often
            histories.append(event(f"u{user}", "x"))
    drawn = histories.sample(10_000, np.random.default_rng(0))
    counts = [drawn.count(f"u{user}") for user in range(10)]
    assert all(abs(count - 1000) < 150 for count in counts)
    assert UserHistories().sample(5, np.random.default_rng(0)) == []


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


def test_replayed_windows_are_drawn_by_events_from_any_part_of_a_history():
    histories = UserHistories()
    for number in range(90):
        histories.append(event("busy", f"b{number}", NOW + number))
    for number in range(10):
        histories.append(event("calm", f"c{number}", NOW + number))
    windows = histories.windows(ReplaySample(20_000), 5, 0, np.random.default_rng(0))
    assert {len(window) for window in windows} == {2, 3, 4, 5}
    assert 19_500 < sum(map(len, windows)) < 20_010  # a first event alone counts and teaches nothing
    busy = [window for window in windows if window.item_ids[0].startswith("b")]
    assert 0.87 < len(busy) / len(windows) < 0.93  # nine events of ten are theirs
    drawn = Counter(item for window in busy for item in window.item_ids)
    assert min(drawn[f"b{number}"] for number in range(5, 85)) > 0.5 * drawn["b40"]  # not the newest alone


def test_a_share_of_the_windows_is_of_the_latest_events():
    histories = UserHistories(keep=20)  # earlier events of each are trimmed away
    for number in range(300):
        histories.append(event(f"u{number // 50}", f"i{number}", NOW + number), number + 1)
    generator = np.random.default_rng(0)
    recent = histories.windows(ReplaySample(2000, recent_share=1.0, recent_events=10), 4, 300, generator)
    assert {item for window in recent for item in window.item_ids} <= {f"i{number}" for number in range(286, 300)}
    half = histories.windows(ReplaySample(2000, recent_share=0.5, recent_events=10), 4, 300, generator)
    share = sum(window.offsets[-1] > 290 for window in half) / len(half)
    assert 0.4 < share < 0.75


def test_what_is_not_learned_yet_or_is_erased_is_not_replayed():
    histories = UserHistories()
    for number in range(1, 41):
        histories.append(event(f"u{number % 2}", f"i{number}", NOW + number), number)
    histories.erase("u1")
    windows = histories.windows(ReplaySample(500), 6, 20, np.random.default_rng(0))
    offsets = {offset for window in windows for offset in window.offsets}
    assert offsets == set(range(2, 21, 2))
    assert UserHistories().windows(ReplaySample(500), 6, 20, np.random.default_rng(0)) == []


def test_who_acted_last_comes_first_and_only_so_many_are_known():
    histories = UserHistories()
    for number in range(RECENT_USERS + 2):
        histories.append(event(f"u{number}", "i"))
    histories.append(event("u5", "i"))
    latest = histories.latest_users()
    assert latest[:2] == ["u5", f"u{RECENT_USERS + 1}"]
    assert set(latest) == {f"u{number}" for number in range(2, RECENT_USERS + 2)}
