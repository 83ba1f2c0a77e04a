"""What goes together: co-visitation neighbours of the person's recent items.

The similarity of two items is a cosine, n_ij / sqrt(n_i n_j) (Sarwar et al. 2001). It is summed over the recent items
twice, with a short memory and with a long one.
"""

from collections.abc import Mapping

import numpy as np

from lib.model.item_counts import WINDOW
from lib.ranking.candidates.asked import Asked, Found, neighbours

HALF_LIVES = {"together": 2.0, "together_long": 8.0}  # events of a history after which one weighs half


def find(asked: Asked) -> Found:
    """Return what goes together with recent items; the norm of the candidate itself is the features' to divide by."""
    norm = 1 / np.sqrt(asked.counts["events"][asked.recent] + 1)  # (B, W)

    def strength(counts: np.ndarray) -> Mapping[str, np.ndarray]:
        places = np.arange(WINDOW)
        shares = {name: norm * np.exp2(-places / half_life) for name, half_life in HALF_LIVES.items()}
        return {name: counts * share[..., None].astype(np.float32) for name, share in shares.items()}

    return neighbours(asked, "together", strength)
