"""Users' histories in memory: what is new, what is kept, what is forgotten."""

from collections import Counter

import numpy as np

from lib.data.events import Event
from lib.data.history import History
from lib.data.replay import ReplaySample
from lib.data.user_histories import LEAST_HELD_OUT, RECENT_USERS, UserHistories
from tests.helpers.tiny import NOW


def event(user: str, item: str, timestamp: int = NOW, kind: str = "click", value: float | None = None) -> Event:
    return Event(user, item, kind, value, timestamp)


def test_users_grow_and_are_forgotten():
    histories = UserHistories()
    for number in range(5):
        histories.append(event("a", f"i{number}"), number)
    histories.append(event("b", "x"))
    assert len(histories) == 2
    assert "a" in histories.users(9)
    assert histories.get("a", 2).item_ids == ["i3", "i4"]
    assert histories.get("a").offsets == [0, 1, 2, 3, 4]
    assert histories.get("nobody") == History()
    assert "nobody" not in histories.users(9)
    assert histories.users(1) == ["a"]
    histories.erase("a")
    histories.erase("nobody")
    assert "a" not in histories.users(9)
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
        found = histories.get("a").up_to(number)
        assert (len(found) - len(found.up_to(number - 1)), found.item_ids[-1]) == (1, f"i{number}")


def test_samples_are_uniform_over_users():
    histories = UserHistories()
    for user in range(10):
        for _ in range(1 + 20 * (user == 0)):  # the busy one is drawn no more often
            histories.append(event(f"u{user}", "x"))
    drawn = histories.sample(10_000, np.random.default_rng(0))
    counts = [drawn.count(f"u{user}") for user in range(10)]
    assert all(abs(count - 1000) < 150 for count in counts)
    assert UserHistories().sample(5, np.random.default_rng(0)) == []


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


def test_windows_are_in_order_of_time_and_hold_nothing_that_is_not_learned():
    histories = UserHistories()
    for number in range(1, 41):  # every third comes five late
        histories.append(event("u", f"i{number}", NOW + 10 * number - 55 * (number % 3 == 0)), number)
    windows = histories.windows(ReplaySample(500), 6, 20, np.random.default_rng(0))
    assert all(window.timestamps == sorted(window.timestamps) for window in windows)
    assert {offset for window in windows for offset in window.offsets} == set(range(1, 21))


def test_what_a_copy_lacks_is_the_end_of_the_history_or_all_of_it():
    histories = UserHistories(keep=4, lateness_ms=50)
    for offset, time in enumerate([10, 20, 30], start=1):
        histories.append(event("u", f"i{offset}", NOW + time), offset)
    newer = histories.newer("u", 2)
    assert newer is not None
    assert newer.offsets == [3]
    histories.append(event("u", "late", NOW + 15), 4)
    newer = histories.newer("u", 3)
    assert newer == histories.get("u")
    assert newer is not None
    assert (newer.offsets, newer.last_offset) == ([1, 4, 2, 3], 4)
    assert histories.newer("u", 4) is None
    histories.append(event("u", "older than all that is kept", NOW - 20), 5)
    newer = histories.newer("u", 4)
    assert newer is not None
    assert (newer.offsets, newer.last_offset) == ([1, 4, 2, 3], 5)
    histories.append(event("u", "beyond the bound", NOW - 1000), 6)
    assert histories.get("u").offsets == [1, 4, 2, 3]
    histories.append(event("u", "now", NOW + 40), 7)
    assert histories.get("u").offsets == [4, 2, 3, 7]


def test_users_of_any_name_are_held_out():
    histories = UserHistories()
    users = ["a", "a\x00", "b\x00\x00", "c\n", "\x00"]
    for number, user in enumerate(users):
        for _ in range(LEAST_HELD_OUT):
            histories.append(event(user, f"i{number}"))
    found = histories.held_out(2 * len(users), 3, (), np.random.default_rng(0))
    assert sorted(window.item_ids[-1] for window in found) == [f"i{number}" for number in range(len(users))]


def test_who_acted_last_comes_first_and_only_so_many_are_known():
    histories = UserHistories()
    for number in range(RECENT_USERS + 2):
        histories.append(event(f"u{number}", "i"))
    histories.append(event("u5", "i"))
    latest = histories.latest_users()
    assert latest[:2] == ["u5", f"u{RECENT_USERS + 1}"]
    assert set(latest) == {f"u{number}" for number in range(2, RECENT_USERS + 2)}
