"""Histories that are larger than memory: in buckets, each with all events of its users, that are trained on in turn.

Buckets take the place of the dataset, so batches are still made by lib/model/batches.py. Where there is a single
bucket, it is the dataset: the same items, the same histories in the same order, and so the same batches.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.data.holdout import TEMPORAL, cutoff_time, training_part
from lib.data.ratings import STARS, RatingScale
from lib.data.tables import partition_of
from lib.model.batches import Batch, SequenceBatches, target_weights, value_boundaries
from lib.model.encoder import BehaviourEncoderConfig

MOST_BUCKETS = 1024  # Arrow writes no more parts at once
SAMPLED_VALUES = 4_000_000  # that boundaries are chosen from; more than a bucket holds
MOST_MOMENTS = 4_000_000  # by which the order of all events is known, 32 MB: of fewer events it is exact

# one line a user, so that a bucket is offsets and columns, as Histories are
BUCKET_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("rows", pa.list_(pa.int32()), nullable=False),
        pa.field("kinds", pa.list_(pa.int8()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),  # NaN where an event has none
        pa.field("timestamps", pa.list_(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class BucketFigures:
    """What one bucket holds."""

    bucket: int
    events: int
    users_of_length: np.ndarray  # (longest + 1,) how many users have so many events
    rows: np.ndarray  # distinct rows of its events
    newest: int | None  # milliseconds; None where no event is left to train on
    values: np.ndarray  # float32, those that are there, or a sample
    repeated: int  # events with an item that their user had before
    liked: int  # events that were no dislikes
    newest_liked: int  # users of three events or more whose newest was none


@dataclass(frozen=True)
class Figures:
    """What must be known of all histories before they are trained on."""

    buckets: list[int]  # that have users
    events: int
    users_of_length: list[list[int]]  # (length, users with so many events), the length rising from 1
    items: int  # that have events
    newest: int  # milliseconds
    value_boundaries: list[float]
    repeated: int  # events with an item that their user had before
    liked: int  # events that were no dislikes
    newest_liked: int  # users of three events or more whose newest was none

    @property
    def users(self) -> int:
        """Users who have events."""
        return sum(users for _, users in self.users_of_length)

    @property
    def users_to_learn_from(self) -> int:
        """Users with two events or more."""
        return sum(users for length, users in self.users_of_length if length >= 2)


def bucket_count(events: int, events_per_bucket: int) -> int:
    """Return into how many buckets so many events are put."""
    return min(max(-(-events // events_per_bucket), 1), MOST_BUCKETS)


def with_bucket(events: pa.Table, buckets: int) -> pa.Table:
    """Return the events with a column `bucket` (int32), which follows from user_id alone."""
    return events.append_column("bucket", pa.array(partition_of(events["user_id"], buckets).astype(np.int32)))


def part_to_train(histories: Histories, holdout: str, oldest: int, newest: int) -> Histories:
    """Leave out what a protocol tests on; `oldest` and `newest` are times of all users' events, not only of these."""
    if holdout == TEMPORAL:
        return histories.select(histories.timestamps < cutoff_time(np.array([oldest, newest])))
    return training_part(histories, holdout)


def table_of(histories: Histories) -> pa.Table:
    """Return histories as a table of BUCKET_SCHEMA."""
    offsets = pa.array(histories.offsets.astype(np.int32))
    columns = (histories.rows, histories.kinds, histories.values, histories.timestamps)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in columns]
    return pa.Table.from_arrays([pa.array(histories.user_ids, pa.string()), *lists], schema=BUCKET_SCHEMA)


def histories_in(table: pa.Table) -> Histories:
    """Return the histories of a table that `table_of` made; their columns share its memory."""
    users, *lists = [column.combine_chunks() for column in table.columns]
    if isinstance(users, pa.ChunkedArray):  # what combine_chunks makes of no chunks
        return histories_in(pa.Table.from_arrays([pa.array([], field.type) for field in BUCKET_SCHEMA], BUCKET_SCHEMA))
    offsets = lists[0].offsets.to_numpy().astype(np.int64)
    columns = [column.flatten().to_numpy(zero_copy_only=True) for column in lists]
    return Histories(users.to_pylist(), offsets - offsets[0], *columns)


@dataclass(frozen=True)
class Moments:
    """Where events stand in the order of time of all events, whatever bucket they are in."""

    times: np.ndarray  # (M,) int64 milliseconds, ascending: every `step`th event of each bucket
    step: int

    def places(self, timestamps: np.ndarray) -> np.ndarray:
        """Return (E,) int64 how many of all events came up to each of these times, about; 1 or more."""
        return np.maximum(np.searchsorted(self.times, timestamps, side="right") * self.step, 1)

    @classmethod
    def of(cls, kept: Sequence[np.ndarray], step: int) -> Self:
        """Return them of what was kept of all buckets."""
        return cls(np.sort(np.concatenate(kept)), step)

    def save(self, path: Path) -> None:
        """Write a file."""
        np.savez(path, times=self.times, step=self.step)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        with np.load(path) as said:
            return cls(said["times"], int(said["step"]))


def step_of(events: int) -> int:
    """Return of how many events the time of one is kept, where there are so many in all."""
    return max(-(-events // MOST_MOMENTS), 1)


def kept_times(histories: Histories, step: int) -> np.ndarray:
    """Return the times of a bucket that are kept."""
    return np.sort(histories.timestamps)[step // 2 :: step]


def figures_of(
    bucket: int, histories: Histories, value_share: float = 1.0, seed: int = 0, ratings: RatingScale = STARS
) -> BucketFigures:
    """Count what a bucket holds, and keep that share of its values (1 or more: all of them)."""
    liked = target_weights(histories.kinds, histories.values, EVENT_KINDS, ratings) > 0
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    pairs = owners * (int(histories.rows.max(initial=0)) + 1) + histories.rows
    values = histories.values[~np.isnan(histories.values)]
    if value_share < 1:
        values = values[np.random.default_rng((seed, bucket)).random(len(values)) < value_share]
    return BucketFigures(
        bucket=bucket,
        events=len(histories.rows),
        users_of_length=np.bincount(histories.lengths),
        rows=np.unique(histories.rows),
        newest=int(histories.timestamps.max()) if len(histories.timestamps) else None,
        values=values,
        repeated=len(pairs) - len(np.unique(pairs)),
        liked=int(liked.sum()),
        newest_liked=int(liked[histories.offsets[1:][histories.lengths >= 3] - 1].sum()),
    )


def figures_of_all(parts: Sequence[BucketFigures]) -> Figures:
    """Sum up what all buckets hold."""
    users = np.zeros(max(len(part.users_of_length) for part in parts), dtype=np.int64)
    rows = np.zeros(1 + max(int(part.rows.max(initial=0)) for part in parts), dtype=bool)
    for part in parts:
        users[: len(part.users_of_length)] += part.users_of_length
        rows[part.rows] = True
    return Figures(
        buckets=sorted(part.bucket for part in parts),
        events=sum(part.events for part in parts),
        users_of_length=[[int(length), int(users[length])] for length in np.flatnonzero(users) if length > 0],
        items=int(rows.sum()),
        newest=max((part.newest for part in parts if part.newest is not None), default=0),
        value_boundaries=value_boundaries(np.concatenate([part.values for part in parts])),
        **{name: sum(getattr(part, name) for part in parts) for name in ("repeated", "liked", "newest_liked")},
    )


class BucketBatches:
    """Training batches of histories that come bucket by bucket, made as SequenceBatches makes them of one bucket."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], Iterable[Histories]],  # the histories of these buckets, in this order
        buckets: Sequence[int],
        config: BehaviourEncoderConfig,
    ):
        self.read = read
        self.buckets = buckets
        self.config = config

    def groups(self, events_per_batch: int, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield starts (in their bucket) and lengths of the windows of each batch of one epoch."""
        for batches in self._shuffled(generator):
            yield from batches.groups(events_per_batch, generator)

    def epoch(
        self, events_per_batch: int, generator: np.random.Generator, shard: int = 0, shards: int = 1
    ) -> Iterator[Batch]:
        """Pass once over all windows: buckets in random order, and in each its batches, dealt out to `shards` workers.

        Every worker reads every bucket, so that all of them together see just the batches that one would see.
        """
        for batches in self._shuffled(generator):
            yield from batches.epoch(events_per_batch, generator, shard, shards)

    def _shuffled(self, generator: np.random.Generator) -> Iterator[SequenceBatches]:
        # of a single bucket there is no order to draw, so that its batches are those of SequenceBatches
        order = [self.buckets[place] for place in generator.permutation(len(self.buckets))]
        for histories in self.read(order):
            yield SequenceBatches(histories, self.config)
