"""A replica's copies of histories are what the aggregator has, and stay bounded."""

import pytest

from lib.events import Event
from lib.user_histories import History, UserHistories
from serving.history_cache import HistoryCache, last_offsets

KEEP = 5


@pytest.fixture
def histories() -> UserHistories:
    """What the aggregator has: a user of a dataset, one of the log, one of both."""
    histories = UserHistories(KEEP)
    for item in "ab":
        add(histories, "dataset", item)
        add(histories, "both", item)
    for offset, user in enumerate(("logged", "both", "logged"), start=1):
        add(histories, user, f"live-{offset}", offset)
    return histories


def add(histories: UserHistories, user_id: str, item_id: str, offset: int = 0) -> None:
    histories.append(Event(user_id, item_id, "click", None, 1000 + offset), offset)


def ask(cache: HistoryCache, histories: UserHistories, *user_ids: str) -> dict[str, History]:
    """What a replica does before a batch."""
    copies = cache.copies(user_ids)
    return cache.update(copies, [histories.newer(*asked) for asked in last_offsets(copies)])


def test_a_copy_follows_its_history(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    users = ("dataset", "logged", "both", "nobody")
    for offset in range(4, 20):
        current = ask(cache, histories, *users)
        assert current == {user: histories.get(user) for user in users}
        add(histories, users[offset % 4], f"live-{offset}", 2 * offset)
        add(histories, "both", f"more-{offset}", 2 * offset + 1)


def test_nothing_is_sent_where_nothing_came(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    before = ask(cache, histories, "dataset", "logged", "nobody")
    copies = cache.copies(["dataset", "logged", "nobody"])
    assert [histories.newer(*asked) for asked in last_offsets(copies)] == [None, None, None]
    after = ask(cache, histories, "dataset", "logged", "nobody")
    assert all(after[user] is before[user] for user in before), "what was made of a copy stays with it"


def test_a_copy_that_a_batch_is_reading_is_never_changed(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    reading = ask(cache, histories, "both")["both"]
    held = reading.slice(0, len(reading))
    add(histories, "both", "late", 50)
    assert ask(cache, histories, "both")["both"].item_ids[-1] == "late"
    assert reading == held


def test_two_batches_at_once_take_the_same_events_once(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    ask(cache, histories, "logged")
    add(histories, "logged", "late", 50)
    first, second = cache.copies(["logged"]), cache.copies(["logged"])
    for copies in (first, second):
        found = cache.update(copies, [histories.newer(*asked) for asked in last_offsets(copies)])
        assert found["logged"] == histories.get("logged")
    assert ask(cache, histories, "logged")["logged"] == histories.get("logged")


def test_the_users_who_asked_last_are_kept(histories):
    cache = HistoryCache(users=2, keep=KEEP)
    ask(cache, histories, "dataset", "logged")
    ask(cache, histories, "dataset")
    current = ask(cache, histories, "both")
    assert len(cache) == 2
    assert current["both"] == histories.get("both")
    copies = cache.copies(["dataset", "both", "logged"])
    assert [copies[user] is None for user in ("dataset", "both", "logged")] == [False, False, True]


def test_a_batch_larger_than_the_cache_is_answered_whole(histories):
    cache = HistoryCache(users=1, keep=KEEP)
    users = ("dataset", "logged", "both")
    assert ask(cache, histories, *users) == {user: histories.get(user) for user in users}
    assert len(cache) == 1
