"""Cold start: people of whom nothing is known get what is popular of late."""

import numpy as np


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
