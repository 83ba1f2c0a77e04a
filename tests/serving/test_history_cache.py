"""A replica's copies of histories are what the aggregator has, and stay bounded."""

import numpy as np
import pytest

from lib.data.events import Event
from lib.data.history import History
from lib.data.user_histories import UserHistories
from lib.log.board import LARGEST, RING, ChangeBoard
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
    whole, copies = cache.split(user_ids, {})
    assert whole == {}, "nobody counts"
    return cache.update(copies, [histories.newer(*asked) for asked in last_offsets(copies)], {})


def test_a_copy_follows_its_history(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    users = ("dataset", "logged", "both", "nobody")
    for offset in range(4, 20):
        current = ask(cache, histories, *users)
        assert current == {user: histories.get(user) for user in users}
        add(histories, users[offset % 4], f"live-{offset}", 2 * offset)
        add(histories, "both", f"more-{offset}", 2 * offset + 1)


def test_a_copy_is_whole_where_a_late_event_was_trimmed_away_as_it_came():
    cache, histories = HistoryCache(users=10, keep=KEEP), UserHistories(KEEP)
    for offset in range(1, 2 * KEEP + 1):  # as many as are ever kept
        add(histories, "u", f"live-{offset}", offset)
    ask(cache, histories, "u")
    histories.append(Event("u", "late", "click", None, 1000), 2 * KEEP + 1)
    assert ask(cache, histories, "u") == {"u": histories.get("u")}
    assert histories.get("u").item_ids == [f"live-{offset}" for offset in range(KEEP + 1, 2 * KEEP + 1)]


def test_nothing_is_sent_where_nothing_came(histories):
    cache = HistoryCache(users=10, keep=KEEP)
    before = ask(cache, histories, "dataset", "logged", "nobody")
    copies = cache.split(["dataset", "logged", "nobody"], {})[1]
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
    first, second = cache.split(["logged"], {})[1], cache.split(["logged"], {})[1]
    for copies in (first, second):
        found = cache.update(copies, [histories.newer(*asked) for asked in last_offsets(copies)], {})
        assert found["logged"] == histories.get("logged")
    assert ask(cache, histories, "logged")["logged"] == histories.get("logged")


def test_the_users_who_asked_last_are_kept(histories):
    cache = HistoryCache(users=2, keep=KEEP)
    ask(cache, histories, "dataset", "logged")
    ask(cache, histories, "dataset")
    current = ask(cache, histories, "both")
    assert len(cache) == 2
    assert current["both"] == histories.get("both")
    copies = cache.split(["dataset", "both", "logged"], {})[1]
    assert [copies[user] is None for user in ("dataset", "both", "logged")] == [False, False, True]


def test_a_batch_larger_than_the_cache_is_answered_whole(histories):
    cache = HistoryCache(users=1, keep=KEEP)
    users = ("dataset", "logged", "both")
    assert ask(cache, histories, *users) == {user: histories.get(user) for user in users}
    assert len(cache) == 1


def test_a_copy_is_whole_as_long_as_its_counter_stays(histories, tmp_path):
    written = ChangeBoard.create(tmp_path / "changes")
    board, cache = ChangeBoard.open(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)

    def split(*user_ids: str) -> tuple[dict[str, History], dict[str, History | None]]:
        return cache.split(user_ids, board.users(user_ids))

    def read(*user_ids: str) -> None:
        counters, (_, copies) = board.users(user_ids), split(*user_ids)
        cache.update(copies, [histories.newer(*asked) for asked in last_offsets(copies)], counters)

    assert split("logged", "both") == ({}, {"logged": None, "both": None})
    read("logged", "both")
    assert split("logged", "both") == ({"logged": histories.get("logged"), "both": histories.get("both")}, {})
    before = histories.get("both")
    add(histories, "both", "late", 50)
    written.add(Event("both", "late", "click", None, 1050), 50)
    assert split("logged", "both") == ({"logged": histories.get("logged")}, {"both": before})
    read("both")
    assert split("both") == ({"both": histories.get("both")}, {})


def test_a_change_between_the_counter_and_the_copy_makes_it_ask_again(histories, tmp_path):
    board, cache = ChangeBoard.create(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)
    counters, copies = board.users(["logged"]), {"logged": None}
    board.add(
        Event("logged", "late", "click", None, 1050), 50
    )  # acknowledged after the counter was read; the copy may or may not have it
    cache.update(copies, [histories.get("logged")], counters)
    assert cache.split(["logged"], board.users(["logged"]))[0] == {}


def test_an_event_that_came_with_the_answer_is_not_added_again_by_its_news(histories, tmp_path):
    written = ChangeBoard.create(tmp_path / "changes")
    board, cache = ChangeBoard.open(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)
    counters, copies = board.users(["logged"]), {"logged": None}
    event = Event("logged", "late", "click", None, 1050, "id")
    histories.append(event, 50)  # after the counter was read, before the aggregator was asked
    written.add(event, 50)
    cache.update(copies, [histories.newer("logged", None)], counters)
    cache.take(board.news())
    whole, lacking = cache.split(["logged"], board.users(["logged"]))
    assert (whole, lacking) == ({"logged": histories.get("logged")}, {})


def test_a_restarted_writer_makes_every_copy_ask_again(histories, tmp_path):
    path = tmp_path / "changes"
    first = ChangeBoard.create(path)
    reader = ChangeBoard.open(path)
    users, items = reader.users(["dataset", "nobody"]), reader.items()
    first.mark_items()
    assert (reader.users(["dataset", "nobody"]), reader.items()) == (users, items + 1)
    ChangeBoard.create(path)
    assert all(reader.users([user]) != {user: counter} for user, counter in users.items())
    assert reader.items() == items + 2


def test_the_newest_events_make_copies_whole_without_a_question(histories, tmp_path):
    written = ChangeBoard.create(tmp_path / "changes")
    board, cache = ChangeBoard.open(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)
    users = ["dataset", "both", "nobody"]
    cache.update(dict.fromkeys(users), [histories.newer(user, None) for user in users], board.users(users))
    for offset in range(10, 40):
        event = Event(users[offset % 3], f"live-{offset}", "click", None, 1000 + offset, "id")
        histories.append(event, offset)
        written.add(event, offset)
        cache.take(board.news())
        whole, lacking = cache.split(users, board.users(users))
        assert (whole, lacking) == ({user: histories.get(user) for user in users}, {})
    assert board.news() == []


def test_copies_have_late_events_where_the_history_has_them(histories, tmp_path):
    written = ChangeBoard.create(tmp_path / "changes")
    board, cache, other = ChangeBoard.open(tmp_path / "changes"), HistoryCache(10, KEEP), HistoryCache(10, KEEP)
    generator = np.random.default_rng(0)
    users, asked = ["dataset", "both", "nobody"], 0
    for offset in range(10, 300):
        time = 1000 + offset - int(generator.integers(0, 8)) * int(generator.integers(0, 2))
        event = Event(users[int(generator.integers(0, 3))], f"live-{offset}", "click", None, time)
        histories.append(event, offset)
        written.add(event, offset)
        if offset % 2:
            continue
        cache.take(board.news())
        counters = board.users(users)
        whole, lacking = cache.split(users, counters)
        asked += len(lacking)
        newer = [histories.newer(*each) for each in last_offsets(lacking)]
        assert whole | cache.update(lacking, newer, counters) == {user: histories.get(user) for user in users}
        assert ask(other, histories, *users) == {user: histories.get(user) for user in users}
    assert 50 < asked < 350  # of 435


def test_a_copy_that_lacks_something_else_is_asked_for(histories, tmp_path):
    board, cache = ChangeBoard.create(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)
    counters, before = board.users(["logged"]), histories.get("logged")
    for offset in (50, 51):
        add(histories, "logged", f"late-{offset}", offset)
        board.add(Event("logged", f"late-{offset}", "click", None, 1000 + offset), offset)
        if offset == 50:
            board.news()  # read by a batch while the copy was on its way, which does not have it
            cache.update({"logged": None}, [before], counters)
    cache.take(board.news())
    assert cache.split(["logged"], board.users(["logged"])) == ({}, {"logged": before})


@pytest.mark.parametrize("how", ["overwritten", "half overwritten", "too large"])
def test_an_event_that_cannot_be_read_is_asked_for(histories, tmp_path, how):
    written = ChangeBoard.create(tmp_path / "changes")
    board, cache = ChangeBoard.open(tmp_path / "changes"), HistoryCache(users=10, keep=KEEP)
    cache.update({"both": None}, [histories.get("both")], board.users(["both"]))
    add(histories, "both", "late", 50)
    written.add(Event("both", "x" * LARGEST if how == "too large" else "late", "click", None, 1050), 50)
    if how == "overwritten":
        for number in range(RING // 4096 + 1):
            written.add(Event("other", "x" * 4096, "click", None, 2000 + number), 100 + number)
    if how == "half overwritten":
        written._ring[20] ^= 1
    assert board.news() == []
    assert cache.split(["both"], board.users(["both"]))[0] == {}
    written.add(Event("other", "after", "click", None, 3000), 1000)
    assert [news.event.item_id for news in board.news()] == ["after"]
