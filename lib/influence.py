"""How much any one user or item may move the weights: limits on what a micro-batch's targets count.

The gate tells whether an update did harm; these limits keep small what a flood of feedback can do while it does none
that can be measured. They leave honest feedback nearly as it is: most users have a few events in a micro-batch, and most
items no more than their share of all events makes likely.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lib.events import InputError
from lib.histories import Histories

OPINIONS = ("like", "dislike", "rating")  # of the same item, only a user's last one counts


@dataclass(frozen=True)
class InfluenceLimits:
    """What counts in full; beyond it the total grows with the square root (a user) or not at all (an item)."""

    user_limit: float = 16.0  # of one user's new events in a micro-batch, where a click counts 1
    item_limit: float = 4.0  # of one item as a target in a micro-batch
    item_share: float = 4.0  # or so many times what its share of all events makes likely, if that is more

    def __post_init__(self) -> None:
        for name in ("user_limit", "item_limit", "item_share"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give more than 0")


def limited(
    weights: np.ndarray,
    new: np.ndarray,
    owners: np.ndarray,
    rows: np.ndarray,
    popularity: np.ndarray,
    limits: InfluenceLimits,
) -> np.ndarray:
    """(E,) float32 what is left of each event's weight, 0 to 1, so that no user and no item exceeds the limits.

    Args:
        weights: (E,) what each event counts; below 0 where it is pushed away from.
        new: (E,) whether it is new; the others are learned again, and bounded by item alone.
        owners: (E,) number of its user.
        rows: (E,) row of its item.
        popularity: (R,) of each row of the item table, in any unit.
        limits: what counts in full.
    """
    weights = np.abs(weights)
    of_user = np.bincount(owners, weights * new)
    left = np.where(new, np.sqrt(_share(limits.user_limit, of_user))[owners], 1.0)
    of_item = np.bincount(rows, weights * left, minlength=len(popularity))
    likely = popularity * (of_item.sum() / max(float(popularity.sum()), 1e-9))
    most = np.maximum(limits.item_limit, limits.item_share * likely)
    return (left * _share(most, of_item)[rows]).astype(np.float32)


def _share(most: np.ndarray | float, total: np.ndarray) -> np.ndarray:
    """What is left of a total if it is to be at most `most`: a factor of at most 1."""
    return np.minimum(1.0, most / np.maximum(total, 1e-9))


def last_opinions(flat: Histories, owners: np.ndarray, kind_codes: Mapping[str, int]) -> np.ndarray:
    """(E,) bool, false for a like, a dislike or a rating where its user has a later one of the same item."""
    counts = np.ones(len(flat.rows), dtype=bool)
    codes = [kind_codes[kind] for kind in OPINIONS if kind in kind_codes]
    opinions = np.flatnonzero(np.isin(flat.kinds, codes))
    opinions = opinions[np.lexsort((opinions, flat.rows[opinions], owners[opinions]))]
    earlier, later = opinions[:-1], opinions[1:]
    counts[earlier[(flat.rows[earlier] == flat.rows[later]) & (owners[earlier] == owners[later])]] = False
    return counts
