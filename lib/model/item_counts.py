"""What items are counted with: what goes together, what follows what, what trends, and how old each item is.

Notable features:
- counts are rows of the weights like any other: versioned, pushed as deltas, undone, rolled back, equal to the bit on
  every replica; they never leave the CPU
- each item keeps its K strongest neighbours of each kind, so the memory is bounded by the catalog, not by the events
- an event touches the rows of its own item and of the newest items before it, and no others
- trends decay by several half-lives at once without a sweep: each row says when it was last counted

An event of item j after the distinct newest items i1, i2, ... of its user adds 1/k to "j follows ik" (so that what
follows at once weighs most) and 1 to "ik and j go together", in both rows. Of a list that is full a newcomer of weight
w takes the place of the smallest entry c with the chance w / (w + c), and takes over its count: the randomised
admission of Ben Basat et al. (2017). So what is met once seldom gets in, however many such items there are, and what
comes again and again does. Chance is drawn from the clock: the same events, counted in the same parts, give the same
lists. The entries of a list stand in order of strength, of its count or, of what goes together, of its cosine; a list
whose row is not counted keeps its order.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.histories import Histories, Person

WINDOW = 20  # newest distinct items of a user that an event is counted with
HALF_LIVES = np.array([100.0, 1_000.0, 10_000.0, 1e9], dtype=np.float64)  # events, of the trends; the last is none
EVENTS_AT_ONCE = 2048
NEVER = -1

COUNT_TENSORS = tuple(
    f"counts.{name}"
    for name in (
        "next_rows",
        "next_counts",
        "together_rows",
        "together_counts",
        "events",
        "followed",
        "trends",
        "counted_at",
        "first_at",
    )
)


class ItemCounts(nn.Module):
    """Counts of each row of the item table; K neighbours of each kind. Row 0 is padding and is never counted."""

    next_rows: Tensor  # (N, K) int32, what follows an item; 0 where there is none yet
    next_counts: Tensor  # (N, K) float32
    together_rows: Tensor  # (N, K) int32, what goes together with it
    together_counts: Tensor  # (N, K) float32
    events: Tensor  # (N,) float32, of the item
    followed: Tensor  # (N,) float32, the sum of all that was ever counted as following it
    trends: Tensor  # (N, H) float32, events of late by each of HALF_LIVES, as of `counted_at`
    counted_at: Tensor  # (N,) int64, the clock at the item's newest event
    first_at: Tensor  # (N,) int64, the clock at its first event; NEVER where it has none
    clock: Tensor  # (1,) int64, events that were counted

    def __init__(self, rows: int, neighbours: int):
        super().__init__()
        for name in ("next", "together"):
            self.register_buffer(f"{name}_rows", torch.zeros(rows, neighbours, dtype=torch.int32))
            self.register_buffer(f"{name}_counts", torch.zeros(rows, neighbours))
        self.register_buffer("events", torch.zeros(rows))
        self.register_buffer("followed", torch.zeros(rows))
        self.register_buffer("trends", torch.zeros(rows, len(HALF_LIVES)))
        self.register_buffer("counted_at", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("first_at", torch.full((rows,), NEVER, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros(1, dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Stay on the CPU, where lists are looked up, wherever the encoder goes."""
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tensors by name, sharing their memory."""
        return {name: tensor.numpy() for name, tensor in self.named_buffers()}

    def replace_tables(self, change: Callable[[Tensor, float], Tensor]) -> None:
        """Replace all tables by what a function makes of each, given what fills the lines of new rows."""
        for name, table in list(self.named_buffers()):
            if name != "clock":
                self.register_buffer(name, change(table, NEVER if name == "first_at" else 0))

    def rows_of(self, contexts: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return (R,) the rows that `count` changes for these events, ascending."""
        rows = np.union1d(contexts.ravel(), items)
        return rows[rows > 0].astype(np.int64)

    def count(self, contexts: np.ndarray, items: np.ndarray, weights: np.ndarray, times: np.ndarray) -> None:
        """Count E events.

        Args:
            contexts: (E, W) rows of the distinct newest items of each event's user before it, the newest first; 0 is
                none.
            items: (E,) rows, 0 where the event is of no known item.
            weights: (E,) float, what each event counts; 0 or below is not counted.
            times: (E,) int64, each event's place in the order of all events.
        """
        kept = (weights > 0) & (items > 0)
        contexts, items, weights, times = contexts[kept], items[kept].astype(np.int64), weights[kept], times[kept]
        if len(items) == 0:
            return
        own = self.arrays()
        self._count_items(own, items, weights, times)
        generator = np.random.default_rng(int(own["clock"][0]))
        events, places = contexts.nonzero()
        before, after = contexts[events, places].astype(np.int64), items[events]
        nearness = weights[events] / (places + 1)
        np.add.at(own["followed"], before, nearness.astype(np.float32))
        lists = own["next_rows"], own["next_counts"]
        _add(*lists, before, after, nearness, generator)
        _sort(*lists, before)
        other = before != after
        pair, weight = (before[other], after[other]), weights[events][other]
        owners, others = np.concatenate(pair), np.concatenate(pair[::-1])
        lists = own["together_rows"], own["together_counts"]
        _add(*lists, owners, others, np.concatenate([weight, weight]), generator)
        _sort(*lists, owners, own["events"])
        own["clock"][0] = max(own["clock"][0], times.max())

    @staticmethod
    def _count_items(own: dict[str, np.ndarray], items: np.ndarray, weights: np.ndarray, times: np.ndarray) -> None:
        np.add.at(own["events"], items, weights.astype(np.float32))
        rows, places = np.unique(items, return_inverse=True)
        newest = own["counted_at"][rows].copy()
        np.maximum.at(newest, places, times)
        added = np.zeros((len(rows), len(HALF_LIVES)))
        np.add.at(added, places, weights[:, None] * np.exp2((times - newest[places])[:, None] / HALF_LIVES))
        kept = own["trends"][rows] * np.exp2((own["counted_at"][rows] - newest)[:, None] / HALF_LIVES)
        own["trends"][rows] = kept + added
        own["counted_at"][rows] = newest
        first = np.full(len(rows), np.iinfo(np.int64).max)
        np.minimum.at(first, places, times)
        known = own["first_at"][rows]
        own["first_at"][rows] = np.where(known == NEVER, first, np.minimum(known, first))

    def count_histories(self, histories: Histories, weights: np.ndarray, times: np.ndarray) -> None:
        """Count all events of whole histories; weights (E,) and times (E,) as in `count`.

        What has no weight is no context of others either.
        """
        counted = histories.select(weights > 0)
        weights, times = weights[weights > 0], times[weights > 0]
        order = np.argsort(times, kind="stable")
        for begin in range(0, len(order), EVENTS_AT_ONCE):
            part = order[begin : begin + EVENTS_AT_ONCE]
            self.count_events(counted, part, weights[part], times[part])

    def count_events(
        self, histories: Histories, events: np.ndarray, weights: np.ndarray, times: np.ndarray
    ) -> np.ndarray:
        """Count some events of histories; return the rows (R,) that have changed, ascending.

        Args:
            histories: of whole users, without what is no context.
            events: (E,) places of the events in them.
            weights: (E,) as in `count`.
            times: (E,) as in `count`.
        """
        contexts, items = contexts_of(histories, events), histories.rows[events].astype(np.int64)
        self.count(contexts, items, weights, times)
        counted = weights > 0
        return self.rows_of(contexts[counted], items[counted])

    def sort(self) -> None:
        """Put all lists in order of strength, what is equally strong by row: the same order whatever it was before."""
        own = self.arrays()
        for start in range(0, len(own["events"]), EVENTS_AT_ONCE):
            part = slice(start, start + EVENTS_AT_ONCE)
            for name in ("next", "together"):
                rows, counts = own[f"{name}_rows"][part], own[f"{name}_counts"][part]
                strengths = _strengths(rows, counts, None if name == "next" else own["events"])
                order = np.lexsort((rows, -strengths), axis=1)
                for table in (rows, counts):
                    table[:] = np.take_along_axis(table, order, axis=1)

    def clear(self, rows: slice = slice(None)) -> None:
        """Forget all that was counted; of some rows alone the clock goes on."""
        for name, tensor in self.named_buffers():
            if name != "clock":
                tensor[rows] = NEVER if name == "first_at" else 0
            elif rows == slice(None):
                tensor.zero_()


def contexts_of(histories: Histories, events: np.ndarray) -> np.ndarray:
    """Return (E, WINDOW) int64 of the newest distinct rows before each event, by `newest_distinct`."""
    return newest_distinct(histories.rows, histories.offsets[histories.owners(events)], events)


def newest_distinct(rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return (E, WINDOW) int64 of the newest distinct rows before each place, the newest first, 0 where there are none.

    They are among the newest 2 * WINDOW events.

    Args:
        rows: (N,) of all events, one user after another, oldest first.
        starts: (E,) where each user's events start.
        stops: (E,) the places before which is looked.
    """
    if len(rows) == 0:
        return np.zeros((len(stops), WINDOW), dtype=np.int64)
    places = stops[:, None] - 1 - np.arange(2 * WINDOW)  # (E, 2 W), the newest first
    found = np.where(places >= starts[:, None], rows[np.maximum(places, 0)], 0).astype(np.int64)
    order = np.argsort(found, axis=1, kind="stable")
    ranked = np.take_along_axis(found, order, axis=1)
    again = np.zeros_like(found, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    absent = again | (found == 0)
    front = np.argsort(absent, axis=1, kind="stable")[:, :WINDOW]
    return np.where(np.take_along_axis(absent, front, axis=1), 0, np.take_along_axis(found, front, axis=1))


def _add(
    rows: np.ndarray,
    counts: np.ndarray,
    owners: np.ndarray,
    others: np.ndarray,
    weights: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Add weights (P,) of pairs to the lists (N, K) of their owners; the same pairs give the same lists to the bit."""
    keys = owners * len(rows) + others
    pairs, places = np.unique(keys, return_inverse=True)
    weights = np.bincount(places, weights)
    owners, others = np.divmod(pairs, len(rows))
    hits = rows[owners] == others[:, None]  # (P, K)
    known = hits.any(axis=1)
    slots = hits[known].argmax(axis=1)
    counts[owners[known], slots] += weights[known].astype(np.float32)
    owners, others, weights = owners[~known], others[~known], weights[~known].astype(np.float32)
    strongest = np.lexsort((others, -weights, owners))
    owners, others, weights = owners[strongest], others[strongest], weights[strongest]
    chances = generator.random(len(owners), dtype=np.float32)
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    turns = np.arange(len(owners)) - np.repeat(first, np.diff(first, append=len(owners)))
    for turn in range(int(turns.max(initial=-1)) + 1):  # one newcomer of each list after another
        now = np.flatnonzero(turns == turn)
        slots = counts[owners[now]].argmin(axis=1)
        sums = counts[owners[now], slots] + weights[now]
        admitted = chances[now] * sums < weights[now]  # always where the place is free
        now, slots = now[admitted], slots[admitted]
        rows[owners[now], slots] = others[now]
        counts[owners[now], slots] = sums[admitted]


def _sort(rows: np.ndarray, counts: np.ndarray, owners: np.ndarray, events: np.ndarray | None = None) -> None:
    """Put the lists (N, K) of owners in order of count, or of cosine where the items' events (N,) are given."""
    owners = np.unique(owners)
    order = np.argsort(-_strengths(rows[owners], counts[owners], events), axis=1, kind="stable")
    for table in (rows, counts):
        table[owners] = np.take_along_axis(table[owners], order, axis=1)


def _strengths(rows: np.ndarray, counts: np.ndarray, events: np.ndarray | None) -> np.ndarray:
    """Return what lists (L, K) stand in order of: their counts, or cosines where the items' events (N,) are given."""
    return counts if events is None else counts / np.sqrt(events[rows] + 1)


def people_of(histories: Histories, liked: Histories) -> list[Person]:
    """Return what the ranker reads of histories.

    Args:
        histories: of B people.
        liked: the same without what was turned down (lib/model/dislikes.py).
    """
    recent = newest_distinct(liked.rows, liked.offsets[:-1], liked.offsets[1:])
    people = []
    for place, (start, stop) in enumerate(zip(histories.offsets[:-1], histories.offsets[1:], strict=True)):
        newest_first = histories.rows[start:stop][::-1]
        seen, ago, times = np.unique(newest_first, return_index=True, return_counts=True)
        own = slice(liked.offsets[place], liked.offsets[place + 1])
        kinds = liked.kinds[own]
        people.append(
            Person(
                recent=recent[place].copy(),
                seen=seen,
                times=times.astype(np.float32),
                ago=ago.astype(np.float32),
                length=len(kinds),
                kind=int(kinds[-1]) if len(kinds) else 0,
            )
        )
    return people
