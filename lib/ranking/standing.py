"""Where items stand of late: their trends and ages, kept so that a version costs as much as its changed rows.

All trends of one half-life decay alike, so log(trend) + clock * ln 2 / half_life of a row is the same at any time until
the row is counted again: the order of rows that are not counted never changes.
"""

from collections.abc import Mapping

import numpy as np

from lib.model.item_counts import HALF_LIVES, NEVER

KEPT = 200  # rows of the highest trend of each half-life, and of the newest ones
MOST_TRENDING = 20  # candidates of each half-life, for an answer of up to half as many
TABLE_ROWS = 20_000  # up to which the trends of all rows are worked out once a version
LEAST_TREND = 0.01  # what a trend below it counts
DECAY = np.log(2) / HALF_LIVES


class Standing:
    """Trends and ages of the rows of one version; `update` follows the next one."""

    def __init__(self, counts: Mapping[str, np.ndarray]):
        self.counts = counts
        rows = len(counts["events"])
        self._levels = np.full((rows, len(HALF_LIVES)), -np.inf)  # log(trend) + clock * ln 2 / half_life
        self._firsts = np.full(rows, -np.inf)  # the clock at each row's first event
        self._top = [np.zeros(0, dtype=np.int64) for _ in HALF_LIVES]
        self._newest = np.zeros(0, dtype=np.int64)
        self.update(counts, np.arange(rows))

    def update(self, counts: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        """Follow counts of which these rows have changed."""
        self.counts = counts
        grown = len(counts["events"]) - len(self._levels)
        if grown > 0:
            self._levels = np.concatenate([self._levels, np.full((grown, len(HALF_LIVES)), -np.inf)])
            self._firsts = np.concatenate([self._firsts, np.full(grown, -np.inf)])
        with np.errstate(divide="ignore"):
            trends = np.log(counts["trends"][rows].astype(np.float64))
        levels = trends + counts["counted_at"][rows][:, None] * DECAY
        for place, top in enumerate(self._top):
            self._top[place] = _follow(self._levels[:, place], top, rows, levels[:, place])
        first = counts["first_at"][rows]
        self._newest = _follow(self._firsts, self._newest, rows, np.where(first == NEVER, -np.inf, first))
        self._trends: np.ndarray | None = None  # of all rows as of now, where a table of them is cheap
        # what was found last, and for which mask and count: most questions have the same ones
        self._found: tuple[np.ndarray | None, int, np.ndarray] | None = None

    def trends(self, rows: np.ndarray) -> np.ndarray:
        """Return (P, H) float32 the logarithms of the trends of rows as of now."""
        if len(self._levels) > TABLE_ROWS:
            return self._trends_of(self._levels[rows])
        if self._trends is None:
            self._trends = self._trends_of(self._levels)
        return self._trends[rows]

    def _trends_of(self, levels: np.ndarray) -> np.ndarray:
        now = levels - float(self.counts["clock"][0]) * DECAY
        return np.maximum(now, np.log(LEAST_TREND)).astype(np.float32)

    def age(self, rows: np.ndarray) -> np.ndarray:
        """Return (P,) float32 the events since each item came, which is its first event, or when it was put.

        One that was there before all events, and has none, is as old as they are.
        """
        since = self.counts["clock"][0] - np.maximum(self.counts["first_at"][rows], 0)
        return np.maximum(since, 0).astype(np.float32)  # a rollback sets the clock back, and later items stay

    def trending(self, mask: np.ndarray | None, count: int) -> np.ndarray:
        """Return (M,) rows of the highest trends among those of a mask (R,), each once."""
        count = max(count, MOST_TRENDING)
        if self._found is not None and self._found[0] is mask and self._found[1] == count:
            return self._found[2]
        found = []
        for place, top in enumerate(self._top):
            kept = top if mask is None else top[mask[top]]
            if mask is not None and len(kept) < count and len(top) == KEPT:
                kept = _largest(self._levels[:, place], np.flatnonzero(mask), count)
            elif count > KEPT:
                among = np.arange(1, len(self._levels)) if mask is None else np.flatnonzero(mask)
                kept = _largest(self._levels[:, place], among, count)
            found.append(kept[:count])
        self._found = mask, count, np.unique(np.concatenate(found))
        return self._found[2]

    def newest(self, mask: np.ndarray | None, count: int = MOST_TRENDING) -> np.ndarray:
        """Return (M,) rows of the newest items among those of a mask (R,)."""
        kept = self._newest if mask is None else self._newest[mask[self._newest]]
        if mask is not None and len(kept) < count and len(self._newest) == KEPT:
            kept = _largest(self._firsts, np.flatnonzero(mask), count)
        return kept[:count]


def _follow(values: np.ndarray, top: np.ndarray, rows: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Write changed values (M,) of rows into those of all (R,); return the rows of the KEPT largest of all.

    Where one of the largest falls, as at a rollback, others that were not kept may take its place.
    """
    fell = len(top) == KEPT and bool((changed < values[rows])[np.isin(rows, top)].any())
    values[rows] = changed
    among = np.arange(len(values)) if fell else np.union1d(top, rows)
    return _largest(values, among[among > 0], KEPT)


def _largest(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the largest finite values (R,), the largest first."""
    rows = rows[np.isfinite(values[rows])]
    if len(rows) > count:
        rows = rows[np.argpartition(-values[rows], count)[:count]]
    return rows[np.argsort(-values[rows], kind="stable")]
