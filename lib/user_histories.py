"""Every user's recent events in memory: what the next answer reads and what the learner trains on."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.catalog import Catalog
from lib.events import Event
from lib.histories import Histories


@dataclass(frozen=True, slots=True)
class EncodedHistory:
    """A history as one encoder reads it; events of items or kinds that it does not know are left out."""

    codes: np.ndarray  # (4, T) int64 rows, kinds, gaps and values of the newest T events
    seen: np.ndarray  # (S,) int32 rows of all events, ascending
    reader: int  # number of the recommender that made it; to another one its rows mean nothing
    catalog_items: int  # of the catalog that it was made with
    complete: bool  # whether every event was known; what was unknown then may be known to a larger catalog


@dataclass(slots=True)
class History:
    """One user's events, oldest first, as columns; an offset of 0 means that the event is not in the log."""

    item_ids: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    timestamps: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    encoded: EncodedHistory | None = field(default=None, compare=False, repr=False)  # kept by who made it

    def __len__(self) -> int:
        return len(self.item_ids)

    def append(self, event: Event, offset: int = 0) -> None:
        """Add the newest event."""
        self.item_ids.append(event.item_id)
        self.events.append(event.event)
        self.values.append(event.value)
        self.timestamps.append(event.timestamp)
        self.offsets.append(offset)
        self.encoded = None

    def extend(self, newer: "History") -> None:
        """Add newer events."""
        for name in ("item_ids", "events", "values", "timestamps", "offsets"):
            getattr(self, name).extend(getattr(newer, name))
        self.encoded = None

    @property
    def last_offset(self) -> int:
        """Log offset of the newest event, 0 where none is in the log."""
        return self.offsets[-1] if self.offsets else 0

    def slice(self, start: int, stop: int) -> "History":
        """Events start..stop as a history of their own."""
        return History(
            self.item_ids[start:stop],
            self.events[start:stop],
            self.values[start:stop],
            self.timestamps[start:stop],
            self.offsets[start:stop],
        )

    def newest(self, count: int) -> "History":
        """The newest `count` events."""
        return self.slice(max(len(self) - count, 0), len(self))

    def up_to(self, last: int, after: int) -> tuple["History", int]:
        """The history up to log offset `last`, and how many of its newest events came after offset `after`."""
        stop = bisect_right(self.offsets, last)
        return self.slice(0, stop), stop - bisect_right(self.offsets, after, hi=stop)

    @classmethod
    def of(cls, events: Iterable[Event]) -> "History":
        """A history of events that are in no log."""
        history = cls()
        for event in events:
            history.append(event)
        return history


class UserHistories:
    """user id -> history, of which the newest `keep` events are kept."""

    def __init__(self, keep: int = 1000):
        self.keep = keep
        self._histories: dict[str, History] = {}
        self._users: list[str] = []  # for sampling; a user's place never changes until an erasure

    def __len__(self) -> int:
        return len(self._histories)

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._histories

    def append(self, event: Event, offset: int = 0) -> None:
        """Add a user's newest event."""
        history = self._histories.get(event.user_id)
        if history is None:
            history = self._histories[event.user_id] = History()
            self._users.append(event.user_id)
        history.append(event, offset)
        if len(history) > 2 * self.keep:  # trimmed in large steps, so that appending stays cheap
            self._histories[event.user_id] = history.newest(self.keep)

    def get(self, user_id: str, count: int | None = None) -> History:
        """A user's newest events (all that are kept, or `count`); empty for an unknown user."""
        history = self._histories.get(user_id)
        return History() if history is None else history.newest(count or self.keep)

    def newer(self, user_id: str, last_offset: int | None) -> History | None:
        """What a copy that ends at a log offset lacks of a user's history: None for nothing, all without a copy."""
        history = self._histories.get(user_id)
        if last_offset is None:
            return self.get(user_id)
        if history is None or history.last_offset == last_offset:
            return None
        return history.slice(bisect_right(history.offsets, last_offset), len(history)).newest(self.keep)

    def users(self, count: int) -> list[str]:
        """The first `count` users."""
        return self._users[:count]

    def sample(self, count: int, generator: np.random.Generator) -> list[str]:
        """Users drawn uniformly with replacement; fewer than asked only when there are none."""
        if not self._users:
            return []
        return [self._users[index] for index in generator.integers(0, len(self._users), count)]

    def erase(self, user_id: str) -> None:
        """Forget a user."""
        if self._histories.pop(user_id, None) is not None:
            self._users.remove(user_id)


@dataclass(frozen=True)
class SampleSizes:
    """What a learner wants with the new events."""

    history_length: int  # events of context before a user's new ones, and of a replayed history
    replay_events: int  # events of replayed histories altogether
    held_out_users: int
    held_out_length: int  # events before the held-out one


@dataclass
class MicroBatch:
    """What the trigger releases to the learner: new events in their users' histories, and what goes with them.

    The newest `new_counts[i]` events of `histories[i]` are new; what stands before them is context.
    """

    last_offset: int  # of the newest event in the batch
    histories: list[History]
    new_counts: list[int]
    received_at: list[int]  # milliseconds, of each new event
    replay: list[History]  # a sample of users, to learn from again
    held_out: list[History]  # another sample of users, for the gate


def to_histories(histories: Sequence[History], catalog: Catalog, kind_codes: dict[str, int]) -> Histories:
    """Flat columns for the encoder; events of items or kinds that it does not know are left out."""
    row_of = catalog.row_of
    rows: list[int] = []
    kinds: list[int] = []
    values: list[float | None] = []
    timestamps: list[int] = []
    offsets = [0]
    for history in histories:
        columns = zip(history.item_ids, history.events, history.values, history.timestamps, strict=True)
        for item_id, event, value, timestamp in columns:
            row, kind = row_of.get(item_id), kind_codes.get(event)
            if row is None or kind is None:
                continue
            rows.append(row)
            kinds.append(kind)
            values.append(value)
            timestamps.append(timestamp)
        offsets.append(len(rows))
    return Histories(
        [""] * len(histories),
        np.array(offsets, dtype=np.int64),
        np.array(rows, dtype=np.int32),
        np.array(kinds, dtype=np.int8),
        np.array(values, dtype=np.float32),  # None becomes NaN
        np.array(timestamps, dtype=np.int64),
    )
