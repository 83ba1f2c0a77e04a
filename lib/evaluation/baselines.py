"""Two recommenders without training, to compare a model with: what is popular, and what goes with recent items.

Both count the histories they are given and nothing else, in numpy alone. A score of -inf says "never recommended": an
item that was not counted, or that nothing in a person's history leads to. No catalog-by-catalog matrix is made:
co-occurrences are counted some items at a time, and each item keeps its nearest neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lib.data.histories import Histories, spans
from lib.data.popularity import event_counts

# window and half-life are those that did best on the second-newest events of ml-100k, amazon-beauty and yoochoose:
# a baseline that is easily beaten shows nothing
WINDOW = 50  # newest distinct items of a user that are counted as going together, and newest events that are scored
NEIGHBOURS = 200  # kept of each item
RECENCY_HALF_LIFE = 2.0  # events after which one weighs half in a score
PAIRS_AT_ONCE = 1 << 22  # co-occurrences in memory; each takes about 50 bytes


@dataclass(frozen=True)
class Popularity:
    """The same ranking for everybody: what was popular at the end of the counted events."""

    ranks: np.ndarray  # (N + 1,) float32, higher is more popular, equal where equally popular; -inf if never counted

    @classmethod
    def count(cls, histories: Histories, items: int, half_life: float) -> "Popularity":
        """Count with forward decay (lib/data/popularity.py), each event alike; half_life in milliseconds."""
        if len(histories.rows) == 0:
            return cls(np.full(items + 1, -np.inf, dtype=np.float32))
        counts = event_counts(histories.timestamps, int(histories.timestamps.max()), half_life)
        totals = np.bincount(histories.rows, weights=counts, minlength=items + 1)
        # a dense rank is exact where a float32 of the total would make ties of what is nearly as popular
        ranks = np.unique(totals, return_inverse=True)[1].astype(np.float32)
        return cls(np.where(totals > 0, ranks, -np.inf))

    def scores(self, inputs: Histories) -> np.ndarray:
        """Return (U, N + 1) float32 scores of all items, for each history."""
        return np.tile(self.ranks, (len(inputs), 1))


@dataclass(frozen=True)
class ItemToItem:
    """Items that the same people took, nearest first: item-based collaborative filtering (Sarwar et al. 2001).

    The similarity of two items is the cosine of their columns in the binary user-item matrix,
    |U_i and U_j| / sqrt(|U_i| |U_j|); a score is the sum of similarities to a person's events, weighted by recency.
    """

    offsets: np.ndarray  # (N + 2,) int64; item i owns [offsets[i], offsets[i + 1])
    neighbours: np.ndarray  # (P,) int32, rows, nearest first
    similarities: np.ndarray  # (P,) float32, in (0, 1]
    window: int = WINDOW
    half_life: float = RECENCY_HALF_LIFE

    @classmethod
    def count(
        cls, histories: Histories, items: int, window: int = WINDOW, neighbours: int = NEIGHBOURS
    ) -> "ItemToItem":
        """Count what goes together in each user's newest `window` distinct items."""
        users, rows = _newest_distinct(histories, items, window)
        found = list(_neighbour_lists(users, rows, items, neighbours))
        counts, others, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return cls(np.concatenate([[0], np.cumsum(counts)]), others, cosines, window)

    def scores(self, inputs: Histories) -> np.ndarray:
        """Return (U, N + 1) float32 scores of all items, for each history."""
        recent = np.minimum(inputs.lengths, self.window)
        events = spans(inputs.offsets[1:] - recent, recent)
        owners = np.repeat(np.arange(len(inputs)), recent)
        weights = np.exp2(-(inputs.offsets[1:][owners] - 1 - events) / self.half_life)
        rows = inputs.rows[events]
        counts = np.diff(self.offsets)[rows]
        places = spans(self.offsets[rows], counts)
        width = len(self.offsets) - 1
        totals = np.bincount(
            np.repeat(owners * width, counts) + self.neighbours[places],
            weights=np.repeat(weights, counts) * self.similarities[places],
            minlength=len(inputs) * width,
        ).astype(np.float32)
        return np.where(totals > 0, totals, -np.inf).reshape(len(inputs), width)


def _newest_distinct(histories: Histories, items: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return users (E,) and rows (E,) of each user's newest `window` distinct items, users rising."""
    users = np.repeat(np.arange(len(histories)), histories.lengths)[::-1]  # newest first
    rows = histories.rows[::-1].astype(np.int64)
    first = np.sort(np.unique(users * (items + 1) + rows, return_index=True)[1])  # an item's newest event
    users, rows = users[first][::-1], rows[first][::-1]
    stops = np.searchsorted(users, np.arange(len(histories)), side="right")
    recent = stops[users] - np.arange(len(users)) <= window
    return users[recent], rows[recent]


def _neighbour_lists(
    users: np.ndarray, rows: np.ndarray, items: int, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for some items at a time how many neighbours each has, their rows and their cosines, nearest first."""
    sizes = np.bincount(users)  # items of each user
    starts = np.cumsum(sizes) - sizes
    takers = users[np.argsort(rows, kind="stable")]  # the users of item 1, then those of item 2, ...
    norms = np.bincount(rows, minlength=items + 1)  # users of each item
    bounds = np.concatenate([[0], np.cumsum(norms)])  # item i's users are takers[bounds[i] : bounds[i + 1]]
    pairs = np.concatenate([[0], np.cumsum(sizes[takers])])[bounds]  # pairs of all items before item i
    begin = 0
    while begin <= items:
        end = max(begin + 1, int(np.searchsorted(pairs, pairs[begin] + PAIRS_AT_ONCE, side="right")) - 1)
        people = takers[bounds[begin] : bounds[end]]
        own = np.repeat(np.arange(begin, end), norms[begin:end])  # the item of each of these users
        item, other, together = _counted_pairs(
            np.repeat(own, sizes[people]), rows[spans(starts[people], sizes[people])], items
        )
        cosines = (together / np.sqrt(norms[item] * norms[other])).astype(np.float32)
        order = np.lexsort((-cosines, item))
        counts = np.bincount(item - begin, minlength=end - begin)
        place = np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = order[place < most]
        yield np.minimum(counts, most), other[kept].astype(np.int32), cosines[kept]
        begin = end


def _counted_pairs(own: np.ndarray, others: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Yield each pair of different items that occurs, in order, and how often it does."""
    keys = own * (items + 1) + others
    keys.sort()
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    together = np.diff(first, append=len(keys))
    item, other = np.divmod(keys[first], items + 1)
    different = item != other
    return item[different], other[different], together[different]
