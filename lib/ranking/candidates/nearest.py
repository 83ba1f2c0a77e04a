"""What the encoder finds: the items of the largest s = uT A v, from FAISS."""

import numpy as np

from lib.ranking.candidates.asked import Asked, Found

LEAST = 100  # candidates, for an answer of however few


def find(asked: Asked) -> Found:
    """Return everybody's best items by the encoder."""
    count = max(LEAST, 2 * asked.count)
    _, rows = asked.index.search(asked.queries, count, asked.mask, asked.excluded, asked.weights)
    return Found(np.repeat(np.arange(len(rows)), rows.shape[1]), np.maximum(rows, 0).ravel())
