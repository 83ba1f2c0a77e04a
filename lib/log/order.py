"""One order of the events of several logs, so that a single offset says how far all of them have been learned.

Each shard of the feedback log numbers its own events as it makes them durable, and waits for no other shard. The
learner puts them in one order, a run of one shard's events at a time, and makes the order durable before it learns a
run: so offsets have no gaps, are given once, and mean the same event for good (Ding et al. 2020, "Scalog: seamless
reconfiguration and total order in a scalable shared log"). Versions, ledger, gate and popularity know no shards.
"""

import sqlite3
from pathlib import Path
from typing import NamedTuple, Self

from lib.errors import InputError
from lib.sqlite import Database, create

# Runs of one shard that follow each other are stored as one, so there are as many as the order has changes of shard.
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs(
    after  INTEGER PRIMARY KEY,
    shard  INTEGER NOT NULL,
    place  INTEGER NOT NULL,
    length INTEGER NOT NULL,
    UNIQUE(shard, place)
);
"""
SELECT = "SELECT after, shard, place, length FROM runs"


class Run(NamedTuple):
    """`length` events at the offsets that follow `after`: those that follow offset `place` in a shard's own log."""

    after: int
    shard: int
    place: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the last event."""
        return self.after + self.length

    @property
    def last_place(self) -> int:
        """Offset of the last event in the shard's own log."""
        return self.place + self.length

    def beyond(self, offset: int) -> "Run":
        """Return the part of the run that follows an offset in it."""
        passed = offset - self.after
        return Run(offset, self.shard, self.place + passed, self.length - passed)


class LogOrder:
    """The order in one file; thread-safe, and the same to any number of processes.

    Raises:
        InputError: the file is missing or damaged; the message names it.
        OSError: it cannot be read, or written, now; each method may raise the same.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"order of the feedback log {path} is missing; restore it from a copy")
        self.path = path
        self._database = Database(path, "rw", self._error)
        with self._database.opening():
            self._database.connection.execute(f"{SELECT} LIMIT 1")

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty order, unless there is one."""
        if not path.exists():
            create(path, SCHEMA)

    def end(self) -> int:
        """Return the last offset that was given, 0 for none."""
        last = self._run("ORDER BY after DESC LIMIT 1")
        return 0 if last is None else last.end

    def place(self, shard: int) -> int:
        """Return the offset in a shard's own log up to which its events are in the order."""
        last = self._run("WHERE shard = ? ORDER BY place DESC LIMIT 1", shard)
        return 0 if last is None else last.last_place

    def after(self, offset: int) -> Run | None:
        """Return the run that follows an offset; None where the order ends there."""
        run = self._run("WHERE after <= ? ORDER BY after DESC LIMIT 1", offset)
        return None if run is None or offset >= run.end else run.beyond(offset)

    def offset_of(self, shard: int, place: int) -> int:
        """Return the offset of an event that is in the order, by its place in its shard's own log."""
        run = self._run("WHERE shard = ? AND place < ? ORDER BY place DESC LIMIT 1", shard, place)
        assert run is not None, f"no event of shard {shard} has an offset"
        assert place <= run.last_place, f"place {place} of shard {shard} has no offset yet"
        return run.after + place - run.place

    def extend(self, shard: int, place: int, last_place: int) -> Run:
        """Give offsets to a shard's events after `place`, up to `last_place`; they are durable when it returns.

        Raises:
            InputError: the order of this shard does not end at `place`, because another learner extends it.
        """
        with self._database.errors(), self._database.transaction() as connection:
            last = _run_of(connection, "ORDER BY after DESC LIMIT 1")
            own = _run_of(connection, "WHERE shard = ? ORDER BY place DESC LIMIT 1", shard)
            if place != (0 if own is None else own.last_place):
                raise InputError(f"order of the feedback log {self.path}: another learner extends it; stop that first")
            run = Run(0 if last is None else last.end, shard, place, last_place - place)
            if last is not None and last == own:
                connection.execute("UPDATE runs SET length = length + ? WHERE after = ?", (run.length, last.after))
            else:
                connection.execute("INSERT INTO runs(after, shard, place, length) VALUES(?, ?, ?, ?)", run)
        return run

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, which: str, *parameters: int) -> Run | None:
        found = self._database.rows(f"{SELECT} {which}", *parameters)
        return Run(*found[0]) if found else None

    def _error(self, error: sqlite3.Error) -> Exception:
        if isinstance(error, sqlite3.OperationalError):
            return OSError(f"order of the feedback log {self.path} cannot be used ({error})")
        return InputError(f"order of the feedback log {self.path} is damaged ({error}); restore a copy")


def _run_of(connection: sqlite3.Connection, which: str, *parameters: int) -> Run | None:
    row = connection.execute(f"{SELECT} {which}", parameters).fetchone()
    return None if row is None else Run(*row)
