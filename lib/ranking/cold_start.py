"""Cold start: people of whom nothing is known get what is popular of late."""

import numpy as np


def most_popular(popularity: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows of the k most popular items, best first; row 0 and masked rows never come."""
    allowed = mask.copy()
    allowed[0] = False
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        rows = rows[np.argpartition(-popularity[rows], k - 1)[:k]]
    rows = rows[np.argsort(-popularity[rows], kind="stable")]
    return popularity[rows], rows
