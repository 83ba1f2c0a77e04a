"""One user's events, oldest first: as they are kept, and as an encoder reads them.

Oldest is meant by the events' own times, and of equal times by arrival, so that what an app sends once it is online
again is read where it was. How late an event may come is bounded: one that is older still, as when a phone's clock was
never set, is placed as if it were just that late.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np

from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.guard import LATENESS_MS
from lib.data.histories import Histories, Person


class Opinions(NamedTuple):
    """What somebody thought of late of T items, some of which they turned down (lib/model/dislikes.py)."""

    rows: np.ndarray  # (T,) int32, oldest first
    weights: np.ndarray  # (T,) float32, by recency; below 0 for a dislike, 0 for what was turned down later


@dataclass(frozen=True, slots=True)
class EncodedHistory:
    """A history as one encoder reads it; events of items or kinds that it does not know are left out."""

    codes: np.ndarray  # (4, T) int64 rows, kinds, gaps and values of the newest T events
    person: Person
    opinions: Opinions | None  # None where nothing was turned down of late
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
    first_offset: int = field(default=0, compare=False)  # of the user's first event of all, also where it is not here
    last_offset: int = field(default=0, compare=False)  # of the event that came last, also where it is not here
    encoded: EncodedHistory | None = field(default=None, compare=False, repr=False)  # kept by who made it

    def __len__(self) -> int:
        return len(self.item_ids)

    def is_late(self, event: Event) -> bool:
        """Return whether the history has an event of a later time."""
        return bool(self.timestamps) and event.timestamp < self.timestamps[-1]

    def add(self, event: Event, offset: int = 0, lateness_ms: int = LATENESS_MS) -> int:
        """Put an event that has just come where its time belongs; return its place.

        Args:
            event: of this user.
            offset: in the log, 0 where it is in none.
            lateness_ms: above 0, how much older than the newest event it may be and still be placed by its time.
        """
        place = len(self)
        if self.is_late(event):
            # events that came even later are out of order, but no event before the place is above the bound
            place = bisect_right(self.timestamps, max(event.timestamp, self.timestamps[-1] - lateness_ms))
        self.item_ids.insert(place, event.item_id)
        self.events.insert(place, event.event)
        self.values.insert(place, event.value)
        self.timestamps.insert(place, event.timestamp)
        self.offsets.insert(place, offset)
        self.last_offset = max(self.last_offset, offset)
        self.encoded = None
        return place

    def extend(self, newer: "History") -> None:
        """Add events that are all newer."""
        self.item_ids.extend(newer.item_ids)
        self.events.extend(newer.events)
        self.values.extend(newer.values)
        self.timestamps.extend(newer.timestamps)
        self.offsets.extend(newer.offsets)
        self.last_offset = newer.last_offset
        self.encoded = None

    def slice(self, start: int, stop: int) -> "History":
        """Return the events [start, stop) as a history of their own."""
        return History(
            self.item_ids[start:stop],
            self.events[start:stop],
            self.values[start:stop],
            self.timestamps[start:stop],
            self.offsets[start:stop],
            self.first_offset,
            self.last_offset,
        )

    def newest(self, count: int) -> "History":
        """Return the newest `count` events."""
        return self.slice(max(len(self) - count, 0), len(self))

    def up_to(self, last_offset: int) -> "History":
        """Return the events up to a log offset, and those that are in no log."""
        if self.last_offset <= last_offset:
            return self.slice(0, len(self))
        kept = [offset <= last_offset for offset in self.offsets]
        return History(
            list(compress(self.item_ids, kept)),
            list(compress(self.events, kept)),
            list(compress(self.values, kept)),
            list(compress(self.timestamps, kept)),
            list(compress(self.offsets, kept)),
            self.first_offset,
            last_offset,
        )

    @classmethod
    def of(cls, events: Iterable[Event]) -> "History":
        """Return a history of events that are in no log, ordered by their times, however far apart they are."""
        history = cls()
        for event in sorted(events, key=lambda event: event.timestamp):
            history.add(event)
        return history


def to_histories(histories: Sequence[History], catalog: Catalog, kind_codes: dict[str, int]) -> Histories:
    """Return flat columns for the encoder, without events of items or kinds that it does not know."""
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
