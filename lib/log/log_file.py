"""The SQLite file of a feedback log: its table of events, and how their rows are written and read."""

import sqlite3
import sys
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from lib.data.events import EVENT_FIELDS, Event
from lib.errors import InputError
from lib.log.errors import LogCorrupt, cause_of
from lib.sqlite import Database, create

SCHEMA_VERSION = 1  # another one once an event has another field: the table has a column for each
APPLICATION_ID = 0x41464C47  # "AFLG" in the file header, so that another program's SQLite file is told apart
SQL_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}
COLUMNS = ", ".join(Event._fields)
COLUMN_DEFINITIONS = ", ".join(
    f"{field.name} {SQL_TYPES[field.kind]}{'' if field.optional else ' NOT NULL'}" for field in EVENT_FIELDS
)

# One index does two jobs. A key is the digest of the user (16 bytes), then that of what makes the event the same event
# (16 bytes): unique for duplicates, and a range of it is a user's events. A new key lands on a random page of its
# index, and pages written are what a commit costs, so a second index on the user makes groups of 200 events 1.5 times
# slower. The highest offset ever given has its own row, which erasing a user does not touch. (AUTOINCREMENT would use
# one up for every duplicate, and the end of the log would then be an offset that no event has.)
SCHEMA = f"""
CREATE TABLE events(
    offset INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, {COLUMN_DEFINITIONS}, received_at INTEGER NOT NULL
);
CREATE TABLE given(last_offset INTEGER NOT NULL);
INSERT INTO given VALUES(0);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
INSERT = (
    f"INSERT INTO events(offset, key, {COLUMNS}, received_at) VALUES({', '.join('?' * (len(EVENT_FIELDS) + 3))})"
    " ON CONFLICT(key) DO NOTHING"
)
SELECT = f"SELECT offset, {COLUMNS}, received_at FROM events"

INT64_MAX = 2**63 - 1
TEXT_FIELDS = [field for field in EVENT_FIELDS if field.kind is str]

Row = tuple  # key, then the fields of the event


class LoggedEvent(NamedTuple):
    """An event with its place in the log and the time of its append (milliseconds since 1970, UTC)."""

    offset: int
    event: Event
    received_at: int


def create_log_file(path: Path) -> None:
    """Make the file of an empty log.

    Raises:
        LogCorrupt: its write-ahead log is there, so that there was one.
        InputError: it cannot be made.
    """
    if Path(f"{path}-wal").exists():
        raise LogCorrupt(f"feedback log {path} is missing although {path}-wal is there; restore it from a copy")
    try:
        create(path, SCHEMA)
    except sqlite3.Error as error:
        raise InputError(f"feedback log {path} cannot be created: {cause_of(error)}") from error


def open_log_file(
    path: Path, mode: Literal["ro", "rw"], synchronous: Literal["FULL", "NORMAL"] = "FULL", check: bool = False
) -> Database:
    """Open the file of a log; `check` reads the whole of it for damage first.

    Raises:
        LogCorrupt: it is damaged, or not a log of this schema.
        InputError: it cannot be opened.
    """
    database = Database(path, mode, partial(_error, path), synchronous)
    with database.opening():
        _check_schema(path, database.connection)
        if check:
            check_pages(database)
    return database


def check_pages(database: Database) -> None:
    """Read the whole file of a log for damage.

    Raises:
        LogCorrupt: there is some.
    """
    damage = database.damage()
    if damage is not None:
        raise LogCorrupt(f"feedback log {database.path} is damaged ({damage}); restore it from a copy")


def last_offset_of(connection: sqlite3.Connection) -> int:
    """Return the highest offset ever given, 0 for none."""
    return connection.execute("SELECT last_offset FROM given").fetchone()[0]


def insert_rows(connection: sqlite3.Connection, batches: Sequence[tuple[list[Row], int]]) -> list[list[int | None]]:
    """Write batches of rows, each with the time when it was received, at the offsets that follow the last one.

    Returns:
        For each batch the offsets of its rows, None for a duplicate.
    """
    before = last = last_offset_of(connection)
    offsets: list[list[int | None]] = []
    for rows, received_at in batches:
        given: list[int | None] = []
        for row in rows:
            new = connection.execute(INSERT, (last + 1, *row, received_at)).rowcount == 1
            last += new
            given.append(last if new else None)
        offsets.append(given)
    if last > before:  # without a change there is nothing to sync
        connection.execute("UPDATE given SET last_offset = ?", (last,))
    return offsets


def row_of(index: int, event: Event) -> Row:
    """Return the row of an event, the `index`-th of its batch; checked here, one that is bad fails its own batch alone.

    Raises:
        InputError: it cannot be stored as it is; the message names its index and the field.
    """
    for name, _, optional in TEXT_FIELDS:
        text = getattr(event, name)
        if text is None and optional:
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
        return key_of(event), *event
    # SQLite would keep NaN as "no value".
    if not isinstance(event.value, int | float) or not abs(event.value) <= sys.float_info.max:
        raise InputError(f"event {index}: value must be a finite number or be left out, not {event.value!r}")
    return key_of(event), *event._replace(value=float(event.value))


def event_of(row: Row) -> Event:
    """Return the event of a row."""
    return Event(*row[1:])


def logged_event(found: tuple) -> LoggedEvent:
    """Return the event that SELECT found."""
    return LoggedEvent(found[0], Event(*found[1:-1]), found[-1])


def key_of(event: Event) -> bytes:
    """Return the 32 bytes that duplicates share: the user's digest, then the digest of the rest of the identity."""
    rest = (event.event_id,) if event.event_id is not None else (event.item_id, event.event, str(event.timestamp))
    return _digest(event.user_id) + _digest(*rest)


def keys_of_user(user_id: str) -> tuple[bytes, bytes]:
    """Return the least and the greatest key that an event of the user can have."""
    return _digest(user_id) + bytes(16), _digest(user_id) + b"\xff" * 16


def _digest(*fields: str) -> bytes:
    """Return 16 bytes; every field goes in with its length, so that no two lists of fields give the same text."""
    text = "".join([f"{len(field)}:{field}," for field in fields])
    return blake2b(text.encode(), digest_size=16).digest()


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise LogCorrupt(f"{path} is not a feedback log; name another file, or restore the log from a copy")
    if version != SCHEMA_VERSION:
        raise LogCorrupt(f"feedback log {path} has schema version {version}; this release reads {SCHEMA_VERSION}")
    last_offset_of(connection)


def _error(path: Path, error: sqlite3.Error) -> InputError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # SQLITE_ERROR is a table or column that is missing, as the statements themselves are fixed.
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return LogCorrupt(f"feedback log {path} is damaged ({cause_of(error)}); restore it from a copy")
    return InputError(f"feedback log {path} cannot be read: {cause_of(error)}")
