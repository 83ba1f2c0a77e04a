"""The logs of all shards read as one, in their one order (lib/log/order.py)."""

from collections.abc import Iterator, Sequence
from typing import Self

from lib.log.feedback import INT64_MAX, REPLAY_EVENTS, FeedbackLogReader, LoggedEvent
from lib.log.order import LogOrder, Run


class ShardedLogReader:
    """What FeedbackLogReader is for one log; `logs` are those of the shards, by their number.

    What is durable and not yet in the order is counted, as what will follow its end, and cannot be read.
    """

    def __init__(self, logs: Sequence[FeedbackLogReader], order: LogOrder):
        self.logs = logs
        self.order = order

    def read(self, after: int, limit: int) -> list[LoggedEvent]:
        """The first `limit` events whose offset is greater than `after`, in order of offset."""
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
        """Every event that is in the order when the iteration comes to its end, a chunk in memory at a time."""
        after = 0
        while chunk := self.read(after, REPLAY_EVENTS):
            yield from chunk
            after = chunk[-1].offset

    def last_offset(self) -> int:
        """How many offsets the shards ever gave."""
        return sum(log.last_offset() for log in self.logs)

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        """Number of events with an offset greater than `after` and at most `up_to`."""
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
        """End reading."""
        for log in self.logs:
            log.close()
        self.order.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
