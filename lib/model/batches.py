"""Event tables to batches of histories, with next to no padding.

Histories are kept as flat columns with offsets (one user after another), cut into windows, and grouped so that a batch
holds windows of nearly the same length and a fixed budget of events: a step costs the same whether users have eight
events or eight hundred.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.data.events import EVENT_WEIGHTS
from lib.data.histories import Histories
from lib.data.ratings import STARS, RatingScale
from lib.model.encoder import PADDING_ROW, BehaviourEncoderConfig


def gap_buckets(timestamps: np.ndarray, first: np.ndarray, buckets: int) -> np.ndarray:
    """Return (E,) time since the event before: 0 for a first event, else 1 + log2 of the seconds, capped."""
    gaps = np.diff(timestamps, prepend=timestamps[:1]) / 1000.0
    codes = 1 + np.floor(np.log2(1.0 + np.maximum(gaps, 0.0))).astype(np.int64)
    codes[first] = 0
    return np.minimum(codes, buckets - 1)


def value_buckets(values: np.ndarray, boundaries: Sequence[float]) -> np.ndarray:
    """Return (E,) 0 where there is no value, else 1 + the number of boundaries at or below it."""
    codes = 1 + np.searchsorted(np.asarray(boundaries, dtype=np.float32), values, side="right")
    return np.where(np.isnan(values), 0, codes)


def value_boundaries(values: np.ndarray, buckets: int = 16) -> list[float]:
    """Return boundaries that split the present values into at most `buckets` quantile buckets."""
    present = values[~np.isnan(values)]
    if len(present) == 0:
        return []
    quantiles = np.quantile(present, np.linspace(0, 1, buckets + 1)[1:-1], method="higher")
    distinct = np.unique(quantiles.astype(np.float32))
    return [float(boundary) for boundary in distinct[distinct > present.min()]]


def target_weights(
    kinds: np.ndarray, values: np.ndarray, event_kinds: Sequence[str], ratings: RatingScale = STARS
) -> np.ndarray:
    """Return (E,) float32 what each event is worth as a target; below 0 for a dislike, a skip and a low rating.

    What is below 0 is never a target: it is pushed away from (lib/model/loss.py).
    """
    by_code = np.array([0.0] + [EVENT_WEIGHTS[kind] for kind in event_kinds], dtype=np.float32)
    weights = by_code[kinds]
    if "rating" in event_kinds:
        disliked = (kinds == event_kinds.index("rating") + 1) & (values < ratings.dislikes_below)
        weights[disliked] = EVENT_WEIGHTS["dislike"]
    return weights


@dataclass
class Batch:
    """Histories of nearly one length, oldest event first, padded on the right."""

    rows: Tensor  # (B, T) int64
    kinds: Tensor  # (B, T) int64
    gaps: Tensor  # (B, T) int64
    values: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64
    target_rows: Tensor  # (B, T) int64, the item of the next event
    target_weights: Tensor  # (B, T) float32, 0 where there is no target, below 0 where it was disliked

    def __getitem__(self, lines: slice) -> "Batch":
        """Return some of the histories."""
        return Batch(**{name: tensor[lines] for name, tensor in vars(self).items()})

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class SequenceBatches:
    """Makes training and inference batches of histories for one encoder configuration."""

    def __init__(self, histories: Histories, config: BehaviourEncoderConfig):
        assert config.event_kinds is not None
        assert config.value_boundaries is not None
        self.histories = histories
        self.max_length = config.max_length
        first = histories.offsets[:-1][histories.lengths > 0]
        self.gaps = gap_buckets(histories.timestamps, first, config.gap_buckets)
        self.values = value_buckets(histories.values, config.value_boundaries)
        self.weights = target_weights(histories.kinds, histories.values, config.event_kinds, config.ratings)
        # what was turned down is read without its item: the encoder would take it for an interest
        self.rows = np.where(self.weights < 0, PADDING_ROW, histories.rows)

    def codes(self) -> np.ndarray:
        """Return (4, E) int64 rows, kinds, gaps and values of all events."""
        return np.stack([self.rows, self.histories.kinds, self.gaps, self.values]).astype(np.int64)

    def windows(self, generator: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return starts and lengths of training windows of at most max_length + 1 events, cut from the newest end.

        Each event but a user's first is a target. Where a generator is given, long histories are cut at random places,
        and those events that then lie behind the last cut get one more window.
        """
        starts, lengths = [], []
        stride = self.max_length
        for start, stop in zip(self.histories.offsets[:-1], self.histories.offsets[1:], strict=True):
            end = stop
            if generator is not None and stop - start > stride + 1:
                end = stop - int(generator.integers(0, max(stride // 2, 1)))
                if end < stop:  # the newest events, with their full context
                    starts.append(stop - stride - 1)
                    lengths.append(stride + 1)
            while end - start >= 2:
                begin = max(start, end - stride - 1)
                starts.append(begin)
                lengths.append(end - begin)
                end = begin + 1
        return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)

    def groups(self, events_per_batch: int, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield starts and lengths of the windows of each batch of one epoch."""
        starts, lengths = self.windows(generator)
        for windows in group_by_length(lengths, events_per_batch, generator):
            yield starts[windows], lengths[windows]

    def epoch(
        self, events_per_batch: int, generator: np.random.Generator, shard: int = 0, shards: int = 1
    ) -> Iterator[Batch]:
        """Pass once over all windows in random order, in batches of about `events_per_batch` events.

        With `shards` workers every batch is dealt out window by window, so that all workers together see just the
        batches that one worker would see; a worker whose share is empty gets a window without targets.
        """
        for starts, lengths in self.groups(events_per_batch, generator):
            mine = slice(shard, None, shards)
            if shard < len(starts):
                yield self.training_batch(starts[mine], lengths[mine])
                continue
            batch = self.training_batch(starts[:1], lengths[:1])
            batch.target_weights.zero_()
            yield batch

    def training_batch(self, starts: np.ndarray, lengths: np.ndarray) -> Batch:
        """Make windows one batch: each event but the last is an input, each but the first a target."""
        return self._batch(starts, lengths - 1, targets=True)

    def inference(
        self, users: np.ndarray | None = None, events_per_batch: int = 8192
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yield pairs of users and a batch with the newest max_length events of every user who has any."""
        users = np.arange(len(self.histories)) if users is None else users
        lengths = np.minimum(self.histories.lengths[users], self.max_length)
        users, lengths = users[lengths > 0], lengths[lengths > 0]
        for group in group_by_length(lengths, events_per_batch):
            stops = self.histories.offsets[users[group] + 1]
            yield users[group], self._batch(stops - lengths[group], lengths[group], targets=False)

    def _batch(self, starts: np.ndarray, lengths: np.ndarray, targets: bool) -> Batch:
        width = max(int(lengths.max(initial=1)), 1)
        places = np.arange(width)[None, :]
        real = places < lengths[:, None]  # (B, T)
        events = np.where(real, starts[:, None] + places, 0)
        following = np.where(real, events + 1, 0) if targets else events

        def column(values: np.ndarray, where: np.ndarray = events) -> Tensor:
            return torch.from_numpy(np.where(real, values[where], 0).astype(np.int64))

        gaps = column(self.gaps)
        weights = np.where(real, self.weights[following], 0.0) if targets else np.zeros(events.shape)
        return Batch(
            column(self.rows),
            column(self.histories.kinds),
            gaps,
            column(self.values),
            torch.from_numpy(np.maximum(lengths, 1)),
            column(self.histories.rows, following),
            torch.from_numpy(weights.astype(np.float32)),
        )


def group_by_length(
    lengths: np.ndarray, events_per_batch: int, generator: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Yield indices of sequences in groups of like length and about `events_per_batch` events, padding counted.

    With a generator the members and the order of the groups are random; sorting happens within pools of 32 batches, so
    that length and order stay nearly independent.
    """
    if generator is None:
        yield from _cut(np.argsort(lengths, kind="stable"), lengths, events_per_batch)
        return
    order = generator.permutation(len(lengths))
    pool = np.searchsorted(
        np.cumsum(lengths[order]), np.arange(1, 1 + lengths.sum() // (32 * events_per_batch)) * 32 * events_per_batch
    )
    groups = []
    for part in np.split(order, pool):
        groups.extend(_cut(part[np.argsort(lengths[part], kind="stable")], lengths, events_per_batch))
    for index in generator.permutation(len(groups)):
        yield groups[index]


def _cut(order: np.ndarray, lengths: np.ndarray, events_per_batch: int) -> list[np.ndarray]:
    """Yield consecutive runs of `order` (sorted by length) whose padded size stays within the budget."""
    groups, begin = [], 0
    while begin < len(order):
        end = begin + 1
        # lengths rise along `order`, so the newest member sets the padded width
        while end < len(order) and lengths[order[end]] * (end + 1 - begin) <= events_per_batch:
            end += 1
        groups.append(order[begin:end])
        begin = end
    return groups
