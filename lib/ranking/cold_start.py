"""Cold start: people of whom nothing is known get what is popular of late."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

KEPT = 1000  # of the most popular rows, in their order


def most_popular(
    popularity: np.ndarray, mask: np.ndarray, k: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return popularity and rows of the k most popular items, best first; row 0 and masked rows never come.

    Args:
        popularity: (R,) of every row.
        mask: (R,) bool, the rows that may come.
        k: how many.
        weights: (R,) added to the popularity to find and order them; what is returned is without it.
    """
    merit = popularity if weights is None else popularity + weights
    allowed = mask.copy()
    allowed[0] = False
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        rows = rows[np.argpartition(-merit[rows], k - 1)[:k]]
    rows = rows[np.argsort(-merit[rows], kind="stable")]
    return popularity[rows], rows


@dataclass(frozen=True)
class Popularity:
    """What is popular by one version."""

    shares: np.ndarray  # (R,) of the largest popularity

    @cached_property
    def _top(self) -> np.ndarray:
        return most_popular(self.shares, np.ones(len(self.shares), dtype=bool), KEPT)[1]

    def best(self, count: int, mask: np.ndarray | None = None, weights: np.ndarray | None = None) -> np.ndarray:
        """Return (M,) rows of the most popular items, M at most `count`, the best first.

        Args:
            count: how many.
            mask: (R,) bool, the rows that may come; None for those that are popular at all.
            weights: (R,) added to the shares to find and order them.
        """
        allowed = self.shares > 0 if mask is None else mask
        if weights is None:
            kept = self._top[allowed[self._top]]
            if len(kept) >= count:
                return kept[:count]
        return most_popular(self.shares, allowed, count, weights)[1]
