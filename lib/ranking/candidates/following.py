"""What follows: the items that came next after the person's recent ones, the directed transitions of everybody."""

import numpy as np

from lib.model.item_counts import WINDOW
from lib.ranking.candidates.asked import Asked, Found, neighbours

HALF_LIFE = 2.0  # events of a history after which one weighs half
RECENCY = np.exp2(-np.arange(WINDOW) / HALF_LIFE).astype(np.float32)


def find(asked: Asked) -> Found:
    """Return what followed, by the share of all that followed each recent item, weighted by recency."""
    _, places, rows = asked.recent
    return neighbours(asked, "next", {"follows": RECENCY[places] / (asked.counts["followed"][rows] + 1)})
