"""Many users' histories as flat columns of numpy; whoever only keeps histories need not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Histories:
    """Many users' events, oldest first, as flat columns; user i owns [offsets[i], offsets[i + 1])."""

    user_ids: list[str]
    offsets: np.ndarray  # (U + 1,) int64
    rows: np.ndarray  # (E,) int32, rows of the item table
    kinds: np.ndarray  # (E,) int8, place in the configuration's event_kinds + 1
    values: np.ndarray  # (E,) float32, NaN where the event has none
    timestamps: np.ndarray  # (E,) int64, milliseconds

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def lengths(self) -> np.ndarray:
        """The (U,) numbers of events of each user."""
        return np.diff(self.offsets)

    def take(self, users: np.ndarray) -> "Histories":
        """Return the histories of the given users, in that order."""
        return self.oldest(users, self.lengths[users])

    def oldest(self, users: np.ndarray, lengths: np.ndarray) -> "Histories":
        """Return the oldest `lengths` events of the given users, in that order; a user may be given more than once."""
        events = spans(self.offsets[users], lengths)
        return Histories(
            [self.user_ids[user] for user in users],
            np.concatenate([[0], np.cumsum(lengths)]),
            self.rows[events],
            self.kinds[events],
            self.values[events],
            self.timestamps[events],
        )

    def owners(self, events: np.ndarray) -> np.ndarray:
        """Return (E,) the place of the user of each event, given by its place in the columns."""
        return np.searchsorted(self.offsets, events, side="right") - 1

    def without_newest(self) -> "Histories":
        """Return the same users, each without the newest event."""
        keep = np.ones(len(self.rows), dtype=bool)
        keep[self.offsets[1:][self.lengths > 0] - 1] = False
        return self.select(keep)

    def select(self, keep: np.ndarray) -> "Histories":
        """Return the same users with only the events where `keep` (E,) is true."""
        owners = np.repeat(np.arange(len(self)), self.lengths)
        lengths = np.bincount(owners[keep], minlength=len(self))
        return Histories(
            self.user_ids,
            np.concatenate([[0], np.cumsum(lengths)]),
            self.rows[keep],
            self.kinds[keep],
            self.values[keep],
            self.timestamps[keep],
        )


def joined(parts: Sequence[Histories]) -> Histories:
    """Return the users of all parts, one part after another."""
    lengths = np.concatenate([part.lengths for part in parts])
    columns = [
        np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "kinds", "values", "timestamps")
    ]
    users = [user for part in parts for user in part.user_ids]
    return Histories(users, np.concatenate([[0], np.cumsum(lengths)]), *columns)


class Person(NamedTuple):
    """What the ranker reads of a history (lib/ranking/features.py); S distinct items."""

    recent: np.ndarray  # (W,) int64 rows of the newest distinct items that were not turned down, the newest first, or 0
    seen: np.ndarray  # (S,) int32 rows of all events, ascending
    times: np.ndarray  # (S,) float32 events of each
    ago: np.ndarray  # (S,) float32 events since its newest one; 0 is the newest of all
    length: int  # events that were not turned down
    kind: int  # code of the newest event's kind; 0: there is none


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the places starts[0], starts[0] + 1, ... of all spans one after another: (sum of lengths,) int64."""
    stops = np.cumsum(lengths)
    return np.repeat(starts - (stops - lengths), lengths) + np.arange(stops[-1] if len(stops) else 0)


def histories_of(table: pa.Table, row_of: Mapping[str, int], event_kinds: Sequence[str]) -> Histories:
    """Make histories of an event table, by time; events of equal times keep the table's order.

    Raises:
        KeyError, ValueError: an unknown item, an unknown kind of event.
    """
    table = table.combine_chunks()
    users = table["user_id"].combine_chunks().dictionary_encode()
    items = table["item_id"].combine_chunks().dictionary_encode()
    kinds = table["event"].combine_chunks().dictionary_encode()
    user_codes = users.indices.to_numpy()
    timestamps = table["timestamp"].to_numpy()
    order = np.lexsort((timestamps, user_codes))  # stable
    item_rows = np.array([row_of[item] for item in items.dictionary.to_pylist()], dtype=np.int32)
    kind_codes = np.array([event_kinds.index(kind) + 1 for kind in kinds.dictionary.to_pylist()], dtype=np.int8)
    counts = np.bincount(user_codes, minlength=len(users.dictionary))
    values = table["value"].to_numpy(zero_copy_only=False).astype(np.float32)
    return Histories(
        users.dictionary.to_pylist(),
        np.concatenate([[0], np.cumsum(counts)]),
        item_rows[items.indices.to_numpy()][order],
        kind_codes[kinds.indices.to_numpy()][order],
        values[order],
        timestamps[order],
    )
