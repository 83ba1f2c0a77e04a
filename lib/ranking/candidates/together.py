"""What goes together: co-visitation neighbours of the person's recent items.

The similarity of two items is a cosine, n_ij / sqrt(n_i n_j) (Sarwar et al. 2001). It is summed over the recent items
twice, with a short memory and with a long one.
"""

import numpy as np

from lib.model.item_counts import WINDOW
from lib.ranking.candidates.asked import Asked, Found, neighbours

HALF_LIVES = {"together": 2.0, "together_long": 8.0}  # events of a history after which one weighs half
RECENCY = {name: np.exp2(-np.arange(WINDOW) / half).astype(np.float32) for name, half in HALF_LIVES.items()}


def find(asked: Asked) -> Found:
    """Return what goes together with recent items; the norm of the candidate itself is the features' to divide by."""
    _, places, rows = asked.recent
    norm = np.sqrt(asked.counts["events"][rows] + 1)
    return neighbours(asked, "together", {name: recency[places] / norm for name, recency in RECENCY.items()})
