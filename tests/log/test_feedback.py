"""The promises of the feedback log on SQLite and on Kafka; tests with `sqlite_log` or `path` are of SQLite alone."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest

from lib.data.events import Event
from lib.errors import InputError
from lib.log.backend import LOG_FILE, SQLITE
from lib.log.errors import LogCorrupt, LogLocked, LogWriteError
from lib.log.feedback import FeedbackLog
from lib.log.layout import LogLayout
from lib.log.log_file import LoggedEvent, key_of
from lib.log.reader import FeedbackLogReader
from lib.log.shard import ONLY
from lib.log.store import AppendResult
from tests.helpers.logs import STREAM, connection_of, hold_the_writer, make_event, wait_until


@pytest.fixture
def path(tmp_path):
    return tmp_path / LOG_FILE


@pytest.fixture
def sqlite_log(path):
    with FeedbackLog.open(path) as log:
        yield log


@pytest.fixture(params=["sqlite", "kafka"])
def location(request: pytest.FixtureRequest) -> str:
    """Where a log is: in the state folder, or in a topic of its own."""
    return SQLITE if request.param == "sqlite" else request.getfixturevalue("kafka_topic")


@pytest.fixture
def open_again(location: str, tmp_path: Path) -> Callable[[], FeedbackLog]:
    return lambda: LogLayout(log=location).open(tmp_path, ONLY)


@pytest.fixture
def log(open_again: Callable[[], FeedbackLog]) -> Iterator[FeedbackLog]:
    with open_again() as log:
        yield log


def test_events_come_back_as_they_were_appended(log):
    events = [
        make_event(1),
        make_event(2, value=4.5, event="rating", event_id="e-2", request_id="r-2"),
        make_event(3, user="ünï \0 'quoted'; --", item_id="日本"),
    ]
    before = time.time_ns() // 1_000_000
    assert log.append(events).result() == AppendResult([1, 2, 3])
    logged = log.read(0, 10)
    assert [entry.offset for entry in logged] == [1, 2, 3]
    assert [entry.event for entry in logged] == events
    assert all(before <= entry.received_at <= time.time_ns() // 1_000_000 for entry in logged)


def test_read_pages_through_the_log(log):
    log.append([make_event(number) for number in range(25)]).result()
    assert [entry.offset for entry in log.read(0, 10)] == list(range(1, 11))
    assert [entry.offset for entry in log.read(20, 10)] == list(range(21, 26))
    assert log.read(25, 10) == []
    assert (log.count(), log.last_offset()) == (25, 25)
    with pytest.raises(InputError, match="limit"):
        log.read(0, 0)


def test_an_empty_log_and_an_empty_batch(log):
    assert (log.count(), log.last_offset(), log.read(0, 5), list(log.replay())) == (0, 0, [], [])
    assert log.append([]).result() == AppendResult([])
    assert log.commits == 0


def test_replay_streams_everything_in_order_over_several_chunks(log, monkeypatch):
    monkeypatch.setattr("lib.log.reader.REPLAY_EVENTS", 7)
    for count in (7, 14, 16):  # a full last chunk, and a partial one
        log.append([make_event(number) for number in range(count)]).result()
        assert [entry.event.item_id for entry in log.replay()] == [f"item-{number}" for number in range(count)]


def test_replay_ends_where_the_log_ended_when_it_began(log):
    log.append([make_event(1), make_event(2)]).result()
    replay = log.replay()
    first = next(replay)
    log.append([make_event(3)]).result()
    assert [entry.offset for entry in (first, *replay)] == [1, 2]


def test_it_says_which_events_it_has(log):
    events = [make_event(number, event_id=None if number % 2 else str(number)) for number in range(2000)]
    log.append(events[:1200]).result()
    keys = [key_of(event) for event in events]
    assert log.known(keys) == set(keys[:1200])
    assert log.known([key_of(events[0]._replace(item_id="other")), key_of(events[1]._replace(item_id="other"))]) == {
        keys[0]  # an event_id is all of an identity, without one the item is a part of it
    }
    assert log.known([]) == set()


def test_duplicates_in_one_batch_and_across_batches(log):
    first = log.append(
        [make_event(1), make_event(1), make_event(2, event_id="a"), make_event(3, event_id="a")]
    ).result()
    assert first == AppendResult([1, None, 2, None])
    assert (first.accepted, first.duplicates) == (2, 2)
    # The value is no part of the identity; another user's event_id, or no event_id at all, is another event.
    again = [make_event(1, value=3.0), make_event(2), make_event(9, event_id="a"), make_event(2, "other", event_id="a")]
    assert log.append(again).result() == AppendResult([None, 3, None, 4])
    assert log.append([make_event(1), make_event(1)]).result() == AppendResult([None, None])
    assert log.count() == log.last_offset() == 4


def test_keys_whose_fields_run_together_are_different_events(log):
    alike = [
        Event("ab", "c", "click", None, 1),
        Event("a", "bc", "click", None, 1),
        Event("a", "b", "cclick", None, 1),
        Event("a", "x", "click", None, 1, "b"),
        Event("ab", "x", "click", None, 1, "1"),
        Event("a", "x", "click", None, 1, "b1"),
        Event("1:a", "2:b", "click", None, 1),
        Event("1:a,2", "b", "click", None, 1),
    ]
    assert log.append(alike).result().offsets == list(range(1, 9))


def test_duplicates_are_found_after_reopening(open_again):
    with open_again() as log:
        log.append([make_event(1), make_event(2, event_id="a")]).result()
    with open_again() as log:
        batch = [make_event(1), make_event(5, event_id="a"), make_event(3)]
        assert log.append(batch).result() == AppendResult([None, None, 3])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"item_id": 7}, "item_id"),
        ({"event": None}, "event"),
        ({"event_id": ""}, "event_id"),
        ({"request_id": "\ud800"}, "request_id"),
        ({"user_id": "\udfff"}, "user_id"),
        ({"timestamp": 2**63}, "timestamp"),
        ({"timestamp": 1.5}, "timestamp"),
        ({"value": float("nan")}, "value"),
        ({"value": 10**400}, "value"),
        ({"value": "5"}, "value"),
    ],
)
def test_an_event_that_cannot_be_stored_is_refused_with_its_field(sqlite_log, changes, field):
    with pytest.raises(InputError, match=f"event 1: {field} "):
        sqlite_log.append([make_event(1), make_event(2, **changes)])
    assert sqlite_log.append([make_event(3)]).result() == AppendResult([1])


def test_waiting_requests_share_one_commit(log):
    outside = hold_the_writer(log)
    results: dict[int, AppendResult] = {}

    def call(number: int) -> None:
        results[number] = log.append([make_event(number)]).result()

    first = log.append([make_event(100)])
    wait_until(first.running)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(log._waiting) == 100)
    assert not results
    outside.execute("ROLLBACK")
    outside.close()
    for thread in threads:
        thread.join()
    assert log.commits == 2
    assert sorted(offset for result in results.values() for offset in result.offsets if offset) == list(range(2, 102))


def test_a_batch_of_duplicates_needs_no_commit(log):
    log.append([make_event(1)]).result()
    log.append([make_event(1)]).result()
    assert log.commits == 1


def test_many_threads_lose_and_repeat_nothing_and_keep_each_threads_order(log):
    def call(thread: int) -> None:
        generator = random.Random(thread)
        number = 0
        while number < 60:
            size = generator.randint(1, 5)
            log.append([make_event(number + place, user=f"user-{thread}") for place in range(size)]).result()
            number += size

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.offset for entry in log.replay()] == list(range(1, log.count() + 1))
    for thread in range(12):
        items = [entry.event.item_id for entry in log.replay() if entry.event.user_id == f"user-{thread}"]
        assert items == [f"item-{number}" for number in range(len(items))]
        assert len(items) >= 60


def test_appending_from_an_event_loop(log):
    async def call_all() -> list[AppendResult]:
        return await asyncio.gather(*[asyncio.wrap_future(log.append([make_event(n)])) for n in range(50)])

    results = asyncio.run(call_all())
    assert [result.offsets for result in results] == [[offset] for offset in range(1, 51)]


def test_a_cancelled_append_is_not_written_and_harms_nobody(log):
    outside = hold_the_writer(log)
    first = log.append([make_event(1)])
    wait_until(first.running)
    cancelled, last = log.append([make_event(2)]), log.append([make_event(3)])
    assert cancelled.cancel()
    assert not first.cancel()  # it is being written, so its outcome must be told
    outside.execute("ROLLBACK")
    outside.close()
    assert (first.result(), last.result()) == (AppendResult([1]), AppendResult([2]))
    assert [entry.event.item_id for entry in log.read(0, 9)] == ["item-1", "item-3"]


def test_a_full_disk_fails_the_group_and_leaves_the_log_usable(sqlite_log):
    sqlite_log.append([make_event(1)]).result()
    pages = connection_of(sqlite_log).execute("PRAGMA page_count").fetchone()[0]
    connection_of(sqlite_log).execute(f"PRAGMA max_page_count = {pages}")
    outside = hold_the_writer(sqlite_log)
    large = sqlite_log.append([make_event(number, request_id="r" * 500) for number in range(2, 50)])
    wait_until(large.running)
    outside.execute("ROLLBACK")
    outside.close()
    with pytest.raises(LogWriteError, match=r"feedback\.sqlite.*full") as failure:
        large.result()
    assert isinstance(failure.value.__cause__, sqlite3.OperationalError)
    assert (sqlite_log.count(), sqlite_log.last_offset(), sqlite_log.commits) == (1, 1, 1)
    connection_of(sqlite_log).execute("PRAGMA max_page_count = 100000")
    assert sqlite_log.append([make_event(2), make_event(3)]).result() == AppendResult([2, 3])


def test_a_group_that_fails_midway_leaves_nothing_behind(sqlite_log):
    with sqlite3.connect(sqlite_log.path) as outside:  # another program took the place of the third event
        outside.execute("INSERT INTO events VALUES(3, x'00', 'other', 'item', 'click', NULL, 1, NULL, NULL, 1)")
    outside.close()
    with pytest.raises(LogWriteError, match="UNIQUE constraint failed"):
        sqlite_log.append([make_event(number) for number in range(5)]).result()
    assert (sqlite_log.count(), sqlite_log.last_offset()) == (1, 0)
    assert sqlite_log.append([make_event(1), make_event(2)]).result() == AppendResult([1, 2])


def test_every_request_of_a_failed_group_hears_of_it(sqlite_log):
    pages = connection_of(sqlite_log).execute("PRAGMA page_count").fetchone()[0]
    connection_of(sqlite_log).execute(f"PRAGMA max_page_count = {pages}")
    outside = hold_the_writer(sqlite_log)
    first = sqlite_log.append([make_event(0)])
    wait_until(first.running)
    group: list[Future] = [sqlite_log.append([make_event(number, request_id="r" * 3000)]) for number in range(1, 9)]
    outside.execute("ROLLBACK")
    outside.close()
    wait([first, *group])
    assert first.result() == AppendResult([1])
    failures = [future.exception() for future in group]
    assert all(isinstance(failure, LogWriteError) for failure in failures)
    assert len({id(failure) for failure in failures}) == 8
    assert sqlite_log.count() == 1


LIMITED = """
import resource, sys
from lib.data.events import Event
from lib.log.errors import LogWriteError
from lib.log.feedback import FeedbackLog
with FeedbackLog.open(sys.argv[1]) as log:
    assert log.append([Event("user", "first", "click", None, 1)]).result().offsets == [1]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, unlimited[1]))
    try:
        log.append([Event("user", f"item-{n}", "click", None, n) for n in range(2_000)]).result()
    except LogWriteError as error:
        print(error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    print([logged.event.item_id for logged in log.replay()], log.last_offset(), flush=True)
    print(log.append([Event("user", "last", "click", None, 3)]).result().offsets, flush=True)
"""


def test_a_write_that_the_system_refuses_fails_and_leaves_the_log_usable(path, start_process):
    process = start_process(LIMITED, path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    failure, kept, offsets = output.splitlines()
    assert failure.startswith(f"feedback log {path} could not be written: ")
    assert (kept, offsets) == ("['first'] 1", "[2]")
    with FeedbackLog.open(path) as log:
        assert [entry.event.item_id for entry in log.replay()] == ["first", "last"]


def test_every_acknowledged_event_survives_kill_9_exactly_once(location, open_again, tmp_path, start_process):
    acknowledged, count = {}, 1500 if location == SQLITE else 500
    for life in range(3):
        process = start_process(STREAM, location, tmp_path, f"life-{life}")
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(count)]
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
        for line in lines:
            if line.endswith("\n") and len(line.split()) == 3:
                offset, user, event_id = line.split()
                assert acknowledged.setdefault(int(offset), (user, event_id)) == (user, event_id)
    assert len(acknowledged) >= 3 * count
    with open_again() as log:
        logged = {entry.offset: (entry.event.user_id, entry.event.event_id) for entry in log.replay()}
        assert len(logged) == log.count() == log.last_offset()
        assert len(set(logged.values())) == len(logged)
        assert acknowledged.items() <= logged.items()


def test_erasing_a_user_removes_every_byte_of_them_from_the_files(path, tmp_path):
    generator = random.Random(7)
    with FeedbackLog.open(path) as log:
        for start in range(0, 6000, 500):
            users = [
                "secret-person" if generator.random() < 0.2 else f"user-{generator.randrange(90)}" for _ in range(500)
            ]
            log.append(
                [
                    make_event(start + place, user, request_id=f"{user}-r{'x' * generator.randrange(60)}")
                    for place, user in enumerate(users)
                ]
            ).result()
        expected = [entry for entry in log.replay() if entry.event.user_id != "secret-person"]
        secrets = 6000 - len(expected)
        assert log.erase("secret-person") == secrets > 1000
        # Copied by another process: closing a file that SQLite has open drops this process's locks on it.
        subprocess.run(["cp", "-r", str(tmp_path), f"{tmp_path}-copy"], check=True)
        assert list(log.replay()) == expected
        assert log.erase("secret-person") == 0
    for file in Path(f"{tmp_path}-copy").iterdir():
        assert b"secret-person" not in file.read_bytes(), file
    shutil.rmtree(f"{tmp_path}-copy")


def test_offsets_are_not_given_again_after_erasing(path):
    with FeedbackLog.open(path) as log:
        log.append([make_event(1), make_event(2, "gone"), make_event(3, "gone")]).result()
        assert log.erase("gone") == 2
        assert (log.count(), log.last_offset()) == (1, 3)
    with FeedbackLog.open(path) as log:
        assert log.append([make_event(3, "gone")]).result() == AppendResult([4])
        assert [entry.offset for entry in log.replay()] == [1, 4]


def test_an_erasure_keeps_its_place_between_appends(sqlite_log):
    outside = hold_the_writer(sqlite_log)
    first = sqlite_log.append([make_event(1)])
    wait_until(first.running)
    before = sqlite_log.append([make_event(2)])
    erased: list[int] = []
    erasing = threading.Thread(target=lambda: erased.append(sqlite_log.erase("user")))
    erasing.start()
    wait_until(lambda: len(sqlite_log._waiting) == 2)
    after = sqlite_log.append([make_event(3)])
    outside.execute("ROLLBACK")
    outside.close()
    erasing.join()
    assert erased == [2]
    assert [future.result().offsets for future in (first, before, after)] == [[1], [2], [3]]
    assert [entry.offset for entry in sqlite_log.replay()] == [3]


def test_an_erasure_that_a_reader_keeps_from_finishing_says_so(sqlite_log, path):
    sqlite_log.append([make_event(1), make_event(2, "other")]).result()
    connection_of(sqlite_log).execute("PRAGMA busy_timeout = 10")
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT COUNT(*) FROM events").fetchone() == (2,)
    with pytest.raises(LogWriteError, match="end it and erase again"):
        sqlite_log.erase("user")
    reader.close()
    assert sqlite_log.erase("user") == 0
    assert Path(f"{path}-wal").stat().st_size == 0
    assert [entry.event.user_id for entry in sqlite_log.replay()] == ["other"]


def test_close_writes_what_waits_and_then_refuses(path):
    log = FeedbackLog.open(path)
    futures = [log.append([make_event(number)]) for number in range(200)]
    log.close()
    log.close()
    assert [future.result(timeout=0).offsets for future in futures] == [[offset] for offset in range(1, 201)]
    with pytest.raises(LogWriteError, match="closed"):
        log.append([make_event(1)])
    with pytest.raises(LogWriteError, match="closed"):
        log.erase("user")
    with FeedbackLog.open(path) as log:
        assert log.count() == 200


HOLD = """
import sys, threading
from lib.log.feedback import FeedbackLog
log = FeedbackLog.open(sys.argv[1])
print("held", flush=True)
threading.Event().wait()
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(path, start_process):
    process = start_process(HOLD, path)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LogLocked, match=f"{path} is held by process {process.pid};"):
        FeedbackLog.open(path)
    threading.Timer(0.3, process.kill).start()
    with FeedbackLog.open(path, wait_for_lock=20) as log:
        assert log.append([make_event(1)]).result() == AppendResult([1])
    assert issubclass(LogLocked, InputError)


def test_a_second_writer_in_the_same_process_is_refused(path):
    with FeedbackLog.open(path), pytest.raises(LogLocked, match=f"held by process {os.getpid()};"):
        FeedbackLog.open(path)
    FeedbackLog.open(path).close()


def test_a_reader_sees_what_is_acknowledged_while_the_log_is_written(path, sqlite_log):
    with FeedbackLogReader(path) as reader:
        assert reader.read(0, 5) == []
        sqlite_log.append([make_event(1)]).result()
        assert [entry.event for entry in reader.read(0, 5)] == [make_event(1)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._database.connection.execute("DELETE FROM events")


def test_a_reader_opens_what_a_killed_writer_left(path, start_process):
    process = start_process(STREAM, SQLITE, path.parent, "life")
    assert process.stdout
    offsets = [int(process.stdout.readline().split()[0]) for _ in range(100)]
    process.kill()
    process.wait()
    with FeedbackLogReader(path) as reader:
        assert set(offsets) <= {entry.offset for entry in reader.replay()}


def test_a_reader_needs_a_log(tmp_path):
    with pytest.raises(InputError, match=r"absent\.db does not exist"):
        FeedbackLogReader(tmp_path / "absent.db")
    assert list(tmp_path.iterdir()) == []


USERS = [f"user-{number}" for number in range(50)]


def fill(path: Path) -> None:
    with FeedbackLog.open(path) as log:
        log.append([make_event(number, USERS[number % 50]) for number in range(3000)]).result()


@pytest.mark.parametrize("kept", [0, 50, 4096, 100_000])
def test_a_truncated_file_is_refused_and_left_alone(path, kept):
    fill(path)
    os.truncate(path, kept)
    before = path.read_bytes()
    with pytest.raises(LogCorrupt, match=str(path)):
        FeedbackLog.open(path)
    assert path.read_bytes() == before


def test_a_damaged_page_is_refused(path):
    fill(path)
    with path.open("r+b") as file:
        file.seek(4096 * 20)
        file.write(os.urandom(4096))
    with pytest.raises(LogCorrupt, match="damaged"):
        FeedbackLog.open(path)
    # Without the check the damage is found by whoever reads it.
    with FeedbackLog.open(path, check=False) as log, pytest.raises(LogCorrupt, match="damaged"):
        log.known([key_of(logged.event) for logged in log.replay()])


def test_files_that_are_no_log_are_refused(path, tmp_path):
    path.write_text("user_id,item_id\n" * 500)
    with pytest.raises(LogCorrupt, match="damaged"):
        FeedbackLog.open(path)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE events(offset INTEGER PRIMARY KEY)")
    connection.close()
    for opened_by in (FeedbackLog.open, FeedbackLogReader):
        with pytest.raises(LogCorrupt, match="not a feedback log"):
            opened_by(other)
    with pytest.raises(InputError, match="cannot be"):
        FeedbackLog.open(tmp_path)


def test_another_schema_version_is_refused(path):
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(LogCorrupt, match="schema version 2; this release reads 1"):
        FeedbackLog.open(path)


FIRST_RELEASE = """
CREATE TABLE events(
    offset      INTEGER PRIMARY KEY,
    key         BLOB NOT NULL UNIQUE,
    user_id     TEXT NOT NULL,
    item_id     TEXT NOT NULL,
    event       TEXT NOT NULL,
    value       REAL,
    timestamp   INTEGER NOT NULL,
    event_id    TEXT,
    request_id  TEXT,
    received_at INTEGER NOT NULL
);
CREATE TABLE given(last_offset INTEGER NOT NULL);
INSERT INTO given VALUES(1);
INSERT INTO events VALUES(1, x'00', 'user', 'item', 'rating', 4.5, 7, 'e', NULL, 9);
PRAGMA application_id = 1095126087;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def test_a_file_of_the_first_release_has_the_same_table(path, tmp_path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(FIRST_RELEASE)
    first = connection.execute("PRAGMA table_info(events)").fetchall()
    connection.close()
    with FeedbackLog.open(path) as log:
        assert list(log.replay()) == [LoggedEvent(1, Event("user", "item", "rating", 4.5, 7, "e"), 9)]
        assert log.append([make_event(1)]).result() == AppendResult([2])
    with FeedbackLog.open(tmp_path / "new") as log:
        assert connection_of(log).execute("PRAGMA table_info(events)").fetchall() == first


def test_a_log_that_vanished_beside_its_wal_is_not_replaced(path, start_process):
    process = start_process(STREAM, SQLITE, path.parent, "life")
    assert process.stdout
    process.stdout.readline()
    process.kill()
    process.wait()
    path.unlink()
    with pytest.raises(LogCorrupt, match="missing"):
        FeedbackLog.open(path)
    assert not path.exists()


def test_a_refused_file_does_not_keep_the_lock(path):
    path.write_bytes(b"")
    with pytest.raises(LogCorrupt):
        FeedbackLog.open(path)
    path.unlink()
    FeedbackLog.open(path).close()


def test_an_interrupted_creation_is_started_anew(path):
    Path(f"{path}.new").write_bytes(b"half a file")
    with FeedbackLog.open(path) as log:
        assert log.append([make_event(1)]).result() == AppendResult([1])
    assert not Path(f"{path}.new").exists()


def test_the_log_syncs_each_commit_and_uses_write_ahead_logging(sqlite_log):
    names = ("journal_mode", "synchronous")
    pragma = {name: connection_of(sqlite_log).execute(f"PRAGMA {name}").fetchone()[0] for name in names}
    assert pragma == {"journal_mode": "wal", "synchronous": 2}


def test_missing_folders_are_made(tmp_path):
    with FeedbackLog.open(tmp_path / "a" / "b" / "feedback.db") as log:
        log.append([make_event(1)]).result()
        assert log.read(0, 1) == [LoggedEvent(1, make_event(1), log.read(0, 1)[0].received_at)]
