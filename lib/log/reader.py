"""Reading the feedback log: of one file, or of the files of several shards in the one order of their events."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from lib.errors import InputError
from lib.log.log_file import (
    INT64_MAX,
    SELECT,
    LoggedEvent,
    check_pages,
    logged_event,
    open_log_file,
)
from lib.log.order import LogOrder, Run

KEYS_AT_ONCE = 500  # that one statement looks for
REPLAY_EVENTS = 10_000  # events of one read transaction; a longer one would keep the WAL from being reused


class FeedbackLogReader:
    """Reads a log, also while another process writes to it; thread-safe.

    Raises:
        InputError: there is no log at `path`; LogCorrupt where the file is damaged or of another schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"feedback log {self.path} does not exist")
        self._database = open_log_file(self.path, "ro")

    def read(self, after: int, limit: int) -> list[LoggedEvent]:
        """Return the first `limit` events whose offset is greater than `after`, in order of offset."""
        if limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        found = self._database.rows(f"{SELECT} WHERE offset > ? ORDER BY offset LIMIT ?", after, limit)
        return [logged_event(row) for row in found]

    def replay(self) -> Iterator[LoggedEvent]:
        """Yield every event that is in the log when the iteration starts, in order, a chunk in memory at a time."""
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

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those of the keys (lib.log.log_file.key_of) whose events the log has."""
        found: set[bytes] = set()
        for start in range(0, len(keys), KEYS_AT_ONCE):
            some = keys[start : start + KEYS_AT_ONCE]
            statement = f"SELECT key FROM events WHERE key IN ({', '.join('?' * len(some))})"
            found.update(key for (key,) in self._database.rows(statement, *some))
        return found

    def last_offset(self) -> int:
        """Return the highest offset ever given, 0 for a log that never held an event; an erasure does not lower it."""
        return self._database.rows("SELECT last_offset FROM given")[0][0]

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        """Count the events with an offset greater than `after` and at most `up_to`."""
        end = INT64_MAX if up_to is None else up_to
        return self._database.rows("SELECT COUNT(*) FROM events WHERE offset > ? AND offset <= ?", after, end)[0][0]

    def check(self) -> None:
        """Read the whole file for damage: 0.4 s for a million events.

        Raises:
            LogCorrupt: there is some.
        """
        check_pages(self._database)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ShardedLogReader:
    """Reads the logs of several shards as one, as FeedbackLogReader reads one; `logs` are in the order of the shards.

    Events that are durable and not yet in the order are counted, as those after its end, and cannot be read.
    """

    def __init__(self, logs: Sequence[FeedbackLogReader], order: LogOrder):
        self.logs = logs
        self.order = order

    def read(self, after: int, limit: int) -> list[LoggedEvent]:
        """Return the first `limit` events whose offset is greater than `after`, in order of offset."""
        found: list[LoggedEvent] = []
        while len(found) < limit and (run := self.order.after(after)) is not None:
            events = self._events_of(run, limit - len(found))
            found += events
            after = run.end if len(found) < limit else events[-1].offset
        return found

    def _events_of(self, run: Run, limit: int) -> list[LoggedEvent]:
        events = self.logs[run.shard].read(run.place, min(limit, run.length))
        shift = run.after - run.place
        return [event._replace(offset=event.offset + shift) for event in events if event.offset <= run.last_place]

    def replay(self) -> Iterator[LoggedEvent]:
        """Yield every event of the order, also what is added during the iteration, a chunk in memory at a time."""
        after = 0
        while chunk := self.read(after, REPLAY_EVENTS):
            yield from chunk
            after = chunk[-1].offset

    def last_offset(self) -> int:
        """Return how many offsets the shards ever gave."""
        return sum(log.last_offset() for log in self.logs)

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        """Count the events with an offset greater than `after` and at most `up_to`."""
        last = INT64_MAX if up_to is None else up_to
        found = 0
        while after < last and (run := self.order.after(after)) is not None:
            run = run._replace(length=min(run.length, last - after))
            found += self.logs[run.shard].count(run.place, run.last_place)
            after = run.end
        if after < last:
            found += sum(log.count(self.order.place(shard)) for shard, log in enumerate(self.logs))
        return found

    def close(self) -> None:
        """Close all files."""
        for log in self.logs:
            log.close()
        self.order.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


LogReader = FeedbackLogReader | ShardedLogReader
