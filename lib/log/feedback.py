"""The durable log of feedback: what people did, in the order in which it was acknowledged.

Notable features:

- SQLite in WAL mode with synchronous=FULL: a future resolves only after its events are committed and fsynced.
- Group commit: one writer thread takes everything that waits and writes it in one transaction, so that many callers
  share one fsync.
- Duplicates are recognised exactly, within a batch and across the whole log, by a digest under a unique index that
  also finds a user's events.
- Offsets start at 1, are given without gaps, and are never given twice, not even after an erasure.
- One process writes (an advisory lock on the file beside the log, released by the kernel when its holder dies); any
  number of processes read.
- A damaged file, or one of another schema, is refused; it is never replaced by a new log. A last commit that was torn
  when the machine stopped is dropped: nobody was told that it is durable.
"""

import fcntl
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

from lib.data.events import Event
from lib.errors import InputError
from lib.log.write_ahead_log import read_tail

SCHEMA_VERSION = 1
APPLICATION_ID = 0x41464C47  # "AFLG" in the file header, so that another program's SQLite file is told apart

# One index does two jobs. A key is the digest of the user (16 bytes), then that of what makes the event the same event
# (16 bytes): unique for duplicates, and a range of it is a user's events. A new key lands on a random page of its
# index, and pages written are what a commit costs, so a second index on the user makes groups of 200 events 1.5 times
# slower. The highest offset ever given has its own row, which erasing a user does not touch. (AUTOINCREMENT would use
# one up for every duplicate, and the end of the log would then be an offset that no event has.)
SCHEMA = """
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
INSERT INTO given VALUES(0);
"""
INSERT = """
INSERT INTO events(offset, key, user_id, item_id, event, value, timestamp, event_id, request_id, received_at)
VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO NOTHING
"""
SELECT = "SELECT offset, user_id, item_id, event, value, timestamp, event_id, request_id, received_at FROM events"
NEWEST_OF_USER = "SELECT offset FROM events WHERE key BETWEEN ? AND ? ORDER BY offset DESC LIMIT ?"

# At SQLite's default of 1,000 pages a busy log pays for a checkpoint every few dozen commits, which puts it into the
# p99; at 4,000 (16 MB of WAL) it is out of it. A WAL much larger than that is slower again: growing a file costs more
# to fsync than overwriting it in place.
CHECKPOINT_PAGES = 4_000
CACHE_KIB = 64_000
BUSY_SECONDS = 5.0
REPLAY_EVENTS = 10_000  # events of one read transaction; a longer one would keep the WAL from being reused
INT64_MAX = 2**63 - 1
TEXT_FIELDS = ("user_id", "item_id", "event", "event_id", "request_id")
OPTIONAL_FIELDS = ("event_id", "request_id")


class LogWriteError(RuntimeError):
    """The log could not write; nothing of the request was acknowledged. The message names the path and the cause."""


class LogFull(LogWriteError):
    """The log could not write because its disk is full."""


class LogCorrupt(InputError):
    """The file is damaged or is not a feedback log of this schema; the message names the path."""


class LogLocked(InputError):
    """Another live process writes to this log; the message names the path and the process."""


class LoggedEvent(NamedTuple):
    """An event with its place in the log and the time of its append (milliseconds since 1970, UTC)."""

    offset: int
    event: Event
    received_at: int


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of a batch: one entry per event, its offset, or None where it was a duplicate.

    `others` came into the log unseen since the append before, in order: where a log is not written by one process
    alone, or a write can succeed without being known to (lib/log/kafka.py).
    """

    offsets: list[int | None]
    others: list[LoggedEvent] = field(default_factory=list, compare=False)

    @property
    def accepted(self) -> int:
        """Number of events that were new."""
        return len(self.offsets) - self.duplicates

    @property
    def duplicates(self) -> int:
        """Number of events that the log held already, or that came earlier in the same batch."""
        return self.offsets.count(None)


class Append(NamedTuple):
    """A batch that waits to be written, and who waits for it."""

    rows: list[tuple]  # (key, user_id, item_id, event, value, timestamp, event_id, request_id)
    future: Future[AppendResult]


class _Erase(NamedTuple):
    user_id: str
    future: Future[int]


class FeedbackLogReader:
    """Reads a log, also while another process writes to it; thread-safe.

    Raises InputError when there is no log at `path` and LogCorrupt when the file is damaged or of another schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"feedback log {self.path} does not exist")
        self._read_lock = threading.Lock()
        self._read_connection = _connect(self.path, "ro")

    @property
    def name(self) -> str:
        """What the log is called in messages."""
        return str(self.path)

    def read(self, after: int, limit: int) -> list[LoggedEvent]:
        """The first `limit` events whose offset is greater than `after`, in order of offset."""
        if limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        rows = self._query(f"{SELECT} WHERE offset > ? ORDER BY offset LIMIT ?", after, limit)
        return [_logged_event(row) for row in rows]

    def replay(self) -> Iterator[LoggedEvent]:
        """Every event that is in the log when the iteration starts, in order of offset, a chunk in memory at a time."""
        offset, end = 0, self.last_offset()
        while offset < end:
            chunk = self.read(offset, REPLAY_EVENTS)
            for logged in chunk:
                if logged.offset > end:
                    return
                yield logged
            if len(chunk) < REPLAY_EVENTS:
                return
            offset = chunk[-1].offset

    def user_events(self, user_id: str, limit: int | None = None) -> list[LoggedEvent]:
        """The newest `limit` events of a user (all of them without a limit), in order of offset: the newest last."""
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        newest = f"{SELECT} WHERE offset IN ({NEWEST_OF_USER}) ORDER BY offset"
        rows = self._query(newest, *_user_keys(user_id), -1 if limit is None else limit)
        return [_logged_event(row) for row in rows]

    def last_offset(self) -> int:
        """The highest offset ever given, 0 for a log that never held an event; an erasure does not lower it."""
        with self._reading() as connection:
            return last_offset_of(connection)

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        """Number of events in the log, of those with an offset greater than `after` and at most `up_to`."""
        end = INT64_MAX if up_to is None else up_to
        return self._query("SELECT COUNT(*) FROM events WHERE offset > ? AND offset <= ?", after, end)[0][0]

    def check(self) -> None:
        """Read the whole file for damage: 0.4 s for a million events.

        Raises:
            LogCorrupt: there is some.
        """
        with self._reading() as connection:
            _check_pages(self.path, connection)

    def close(self) -> None:
        """End reading."""
        with self._read_lock:
            self._read_connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock:
            try:
                yield self._read_connection
            except sqlite3.DatabaseError as error:
                raise _input_error(self.path, error) from error

    def _query(self, statement: str, *parameters: Any) -> list[tuple]:
        with self._reading() as connection:
            return connection.execute(statement, parameters).fetchall()


class FeedbackLog(FeedbackLogReader):
    """The log with its one writer; creates it (and its folder) when there is none at `path`.

    `wait_for_lock` is how many seconds to wait while another process holds the log (a restarted actor may overlap for
    a moment with its dying predecessor). `check` reads the whole file for damage first: 0.4 s for a million events.

    Raises LogLocked when another process writes to it, LogCorrupt when the file is damaged or of another schema, and
    InputError when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait_for_lock: float = 0.0, check: bool = True) -> None:
        path = Path(path)
        self.commits = 0  # transactions that wrote something, each with its fsync
        self._lock_descriptor = _lock(path, wait_for_lock)
        try:
            self.torn = last_commit_is_torn(path)  # it was dropped; what it held was never acknowledged
            if not path.exists():
                _create(path)
            self._connection = _open_for_writing(path, check)
            super().__init__(path)
        except BaseException:
            os.close(self._lock_descriptor)
            raise
        self._waiting: list[Append | _Erase] = []
        self._waiting_changed = threading.Condition()
        self._closed = False
        self._writer = threading.Thread(target=self._write_until_closed, name=f"feedback log {path.name}", daemon=True)
        self._writer.start()

    @classmethod
    def reader(cls, path: str | os.PathLike[str]) -> FeedbackLogReader:
        """Open a log for reading only, beside whichever process writes to it."""
        return FeedbackLogReader(path)

    def append(self, events: Sequence[Event]) -> Future[AppendResult]:
        """Write events; the future resolves once they are committed and fsynced. Does not block; thread-safe.

        An event is a duplicate when its user has an event with the same event_id, or, without an event_id, the same
        item, event and timestamp. The events of one call are written together or not at all, with consecutive
        offsets. A future that is cancelled while it still waits is not written.

        Raises InputError, and writes nothing, when an event cannot be stored as it is. The future fails with
        LogWriteError when the write failed (disk full, I/O error); the log can be used again afterwards.
        """
        rows = [row_of(index, event) for index, event in enumerate(events)]
        future: Future[AppendResult] = Future()
        if not rows:
            future.set_result(AppendResult([]))
            return future
        self._submit(Append(rows, future))
        return future

    def erase(self, user_id: str) -> int:
        """Delete all events of a user, in order with the appends; blocks, and returns how many there were.

        Their bytes are overwritten with zeros in the log (secure_delete) and the WAL is emptied, so that no copy stays
        behind in a file. Raises LogWriteError when that failed; erasing again is harmless.
        """
        future: Future[int] = Future()
        self._submit(_Erase(user_id, future))
        return future.result()

    def close(self) -> None:
        """Write what still waits, then close the files and let go of the lock; a second close does nothing."""
        with self._waiting_changed:
            if self._closed:
                return
            self._closed = True
            self._waiting_changed.notify()
        self._writer.join()
        super().close()  # before the write connection: the last one to close empties and removes the WAL
        self._connection.close()
        os.close(self._lock_descriptor)

    def _submit(self, request: Append | _Erase) -> None:
        with self._waiting_changed:
            if self._closed:
                raise LogWriteError(f"feedback log {self.name} is closed")
            self._waiting.append(request)
            self._waiting_changed.notify()

    def _take(self) -> list[Append | _Erase]:
        """Everything that waits, as soon as something does; empty when the log is closed and drained."""
        with self._waiting_changed:
            while not self._waiting and not self._closed:
                self._waiting_changed.wait()
            requests, self._waiting = self._waiting, []
            return requests

    def _write_until_closed(self) -> None:
        while requests := self._take():
            running = [request for request in requests if request.future.set_running_or_notify_cancel()]
            for kind, group in groupby(running, key=type):  # neighbours of one kind, so that the order is kept
                if kind is Append:
                    self._settle(list(group), self._append_group)
                    continue
                for erase in group:
                    self._settle([erase], self._erase_user)

    def _settle(self, group: list[Any], write: Any) -> None:
        """Do the work of a group and resolve its futures, each with its result or failure, or all with the one."""
        try:
            results = write(group)
        except Exception as error:  # whatever it was, those who wait must hear of it, and the thread must go on
            for request in group:
                failure = write_error(f"feedback log {self.name}", error)
                failure.__cause__ = error
                request.future.set_exception(failure)
            return
        for request, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                request.future.set_exception(result)
            else:
                request.future.set_result(result)

    def _append_group(self, group: list[Append]) -> Sequence[AppendResult | Exception]:
        received_at = time.time_ns() // 1_000_000
        results = []
        with transaction(self._connection) as connection:
            first = offset = last_offset_of(connection)
            for append in group:
                result = AppendResult(insert_rows(connection, offset, append.rows, received_at))
                offset += result.accepted
                results.append(result)
            if offset > first:  # without a change there is nothing to sync
                connection.execute("UPDATE given SET last_offset = ?", (offset,))
        self.commits += offset > first
        return results

    def _erase_user(self, group: list[_Erase]) -> list[int]:
        with transaction(self._connection) as connection:
            keys = _user_keys(group[0].user_id)
            erased = connection.execute("DELETE FROM events WHERE key BETWEEN ? AND ?", keys).rowcount
        self.commits += erased > 0
        # Also when nothing was deleted: an earlier erasure may have been kept from emptying the WAL.
        busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError(
                f"the events are deleted, but a reader keeps a copy in {self.path}-wal; end it and erase again"
            )
        return [erased]


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All that the block writes, or nothing."""
    if connection.in_transaction:  # the rollback of an earlier failure failed as well
        connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite rolls back by itself after some failures
            connection.execute("ROLLBACK")
        raise


def insert_rows(connection: sqlite3.Connection, after: int, rows: list[tuple], received_at: int) -> list[int | None]:
    """Write rows at the offsets that follow `after`; the offset of each, None for a duplicate."""
    offsets: list[int | None] = []
    for row in rows:
        new = connection.execute(INSERT, (after + 1, *row, received_at)).rowcount == 1
        after += new
        offsets.append(after if new else None)
    return offsets


def row_of(index: int, event: Event) -> tuple:
    """The columns of an event, checked here so that one bad event cannot fail the group that it would be written in."""
    for name in TEXT_FIELDS:
        text = getattr(event, name)
        if text is None and name in OPTIONAL_FIELDS:
            continue
        if not isinstance(text, str) or not text:
            raise InputError(f"event {index}: {name} must be a string that is not empty, not {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"event {index}: {name} {text!r} holds a lone surrogate; send valid UTF-8") from None
    if not isinstance(event.timestamp, int) or abs(event.timestamp) > INT64_MAX:
        raise InputError(f"event {index}: timestamp must be whole milliseconds since 1970, not {event.timestamp!r}")
    if event.value is None:
        return _key(event), *event
    # SQLite would keep NaN as "no value".
    if not isinstance(event.value, int | float) or not abs(event.value) <= sys.float_info.max:
        raise InputError(f"event {index}: value must be a finite number or be left out, not {event.value!r}")
    return _key(event), *event._replace(value=float(event.value))


def _key(event: Event) -> bytes:
    """The 32 bytes that duplicates share: the user's digest, then the digest of the rest of the identity."""
    rest = (event.event_id,) if event.event_id is not None else (event.item_id, event.event, str(event.timestamp))
    return _digest(event.user_id) + _digest(*rest)


def _user_keys(user_id: str) -> tuple[bytes, bytes]:
    """The least and the greatest key that an event of the user can have."""
    return _digest(user_id) + bytes(16), _digest(user_id) + b"\xff" * 16


def _digest(*fields: str) -> bytes:
    """16 bytes; every field goes in with its length, so that two lists of fields cannot run together to one text."""
    text = "".join([f"{len(field)}:{field}," for field in fields])
    return blake2b(text.encode(), digest_size=16).digest()


def _logged_event(row: tuple) -> LoggedEvent:
    return LoggedEvent(row[0], Event(*row[1:8]), row[8])


def last_offset_of(connection: sqlite3.Connection) -> int:
    """The highest offset ever given."""
    return connection.execute("SELECT last_offset FROM given").fetchone()[0]


def _lock(path: Path, wait_seconds: float) -> int:
    """Take the lock that belongs to the log at `path`; returns its descriptor, whose closing lets go of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays when the log is closed: removing it would let two processes lock two files of one name.
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"feedback log {path} cannot be opened for writing: {error.strerror}") from error
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = f"feedback log {path} is held by process {holder}; stop it first, or open the log for reading"
            raise LogLocked(message) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _create(path: Path) -> None:
    """Make an empty log. It gets its name only when it is whole, so an empty or partial file is always damage."""
    if Path(f"{path}-wal").exists():
        raise LogCorrupt(f"feedback log {path} is missing although {path}-wal is there; restore it from a copy")
    unfinished = Path(f"{path}.new")
    unfinished.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(unfinished, isolation_level=None)
        try:
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"feedback log {path} cannot be created: {_cause(error)}") from error
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name must survive a power loss as surely as what is written under it
    finally:
        os.close(folder)


def _open_for_writing(path: Path, check: bool) -> sqlite3.Connection:
    connection = _connect(path, "rw")
    for setting in (
        "synchronous = FULL",
        "fullfsync = ON",  # on macOS an fsync alone does not reach the disk; elsewhere this changes nothing
        "secure_delete = ON",
        f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
        f"cache_size = -{CACHE_KIB}",
    ):
        connection.execute(f"PRAGMA {setting}")
    if check:
        with _closed_on_error(path, connection):
            _check_pages(path, connection)
    return connection


def _check_pages(path: Path, connection: sqlite3.Connection) -> None:
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise LogCorrupt(f"feedback log {path} is damaged ({' '.join(damage.split())}); restore it from a copy")


def last_commit_is_torn(path: Path) -> bool:
    """Whether the newest commit of the SQLite file at `path` is not whole, so that opening the file drops it.

    Raises:
        LogCorrupt: commits that were durable would be dropped too.
    """
    tail = read_tail(Path(f"{path}-wal"))
    if tail.damaged:
        raise LogCorrupt(
            f"{path}-wal is damaged: behind its first {tail.commits} commits are some that were durable and cannot be"
            f" read; restore both files from a copy, or give these up with"
            f" `sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'`"
        )
    return tail.torn


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open the file with SQLite's mode "ro" or "rw", neither of which creates one, and check that it is a log."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except sqlite3.DatabaseError as error:
        raise _input_error(path, error) from error
    with _closed_on_error(path, connection):
        _check_schema(path, connection)
    return connection


@contextmanager
def _closed_on_error(path: Path, connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise _input_error(path, error) from error
        raise


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise LogCorrupt(f"{path} is not a feedback log; name another file, or restore the log from a copy")
    if version != SCHEMA_VERSION:
        raise LogCorrupt(f"feedback log {path} has schema version {version}; this release reads {SCHEMA_VERSION}")
    last_offset_of(connection)


def _input_error(path: Path, error: sqlite3.DatabaseError) -> InputError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # SQLITE_ERROR is a table or column that is missing, as the statements themselves are fixed.
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return LogCorrupt(f"feedback log {path} is damaged ({_cause(error)}); restore it from a copy")
    return InputError(f"feedback log {path} cannot be read: {_cause(error)}")


def write_error(log: str, error: Exception) -> LogWriteError:
    """What those who wait for a write of a log are told of its failure."""
    full = getattr(error, "sqlite_errorname", None) == "SQLITE_FULL"
    return (LogFull if full else LogWriteError)(f"{log} could not be written: {_cause(error)}")


def _cause(error: Exception) -> str:
    return f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
