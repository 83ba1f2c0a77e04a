"""How much any one user, or a crowd of newcomers, may move the weights: limits on what a micro-batch's targets count.

The gate tells whether an update did harm; these limits keep small what a flood of feedback can do before harm can be
measured. Honest feedback they leave nearly as it is: most users have a few events in a micro-batch, what many newcomers
do at once is held against what newcomers usually do here, and what they do to one item, update after update, against
how popular it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from lib.data.histories import Histories
from lib.data.history import History
from lib.model.facts import NewcomerShare
from lib.settings import Settings

OPINIONS = ("like", "dislike", "rating")  # of the same item, only a user's last one counts
LEAST_CROWD = 4.0  # that newcomers may weigh however few others act; a micro-batch may hold nobody else
LEAST_SHARE = 0.1
MEMORY = 512  # updates that make up what is usual


class InfluenceLimits(Settings):
    """What counts in full; beyond it a user's total grows with the square root, a crowd's not at all."""

    user_limit: float = Field(
        default=64.0, gt=0, description="weight of one user's new events in a micro-batch, where a click counts 1"
    )
    newcomer_events: int = Field(
        default=100_000, gt=0, description="a user whose first event is among so many latest of the log is a newcomer"
    )
    newcomer_share: float = Field(default=2.0, gt=0, description="how many times their usual share newcomers may weigh")
    item_limit: float = Field(default=4.0, gt=0, description="clicks of newcomers on one item that may count")
    item_refill: float = Field(default=0.2, gt=0, description="by how many that grows again with every update")
    item_share: float = Field(
        default=4.0, gt=0, description="or how many times what the item's share of all events makes likely"
    )


@dataclass(frozen=True)
class Targets:
    """Events that are about to be learned, E of U users."""

    weights: np.ndarray  # (E,) what each counts; below 0 where it is pushed away from
    owners: np.ndarray  # (E,) number of its user
    rows: np.ndarray  # (E,) row of its item
    new: np.ndarray  # (E,) whether it is new, or learned again
    newcomers: np.ndarray  # (U,) whether the user is one


class Influence:
    """Limits targets, and remembers what part of new feedback is usually newcomers'."""

    def __init__(self, limits: InfluenceLimits, newcomers: NewcomerShare | None = None):
        newcomers = newcomers or NewcomerShare()
        self.limits = limits
        self.usual = newcomers.usual  # share of newcomers in the weight of new events, a mean over the latest updates
        self.updates = newcomers.updates  # that it was taken over, up to MEMORY
        self.kept = 1.0  # of the weight of the new events at hand
        self._share: float | None = None  # of newcomers in it
        self.taken: dict[int, float] = {}  # by row, what newcomers weighed on an item of late
        self._taking: dict[int, float] = {}  # in the update at hand

    @property
    def newcomers(self) -> NewcomerShare:
        """What part of new feedback is usually newcomers', for the next version to say."""
        return NewcomerShare(usual=self.usual, updates=self.updates)

    def limited(self, targets: Targets, popularity: np.ndarray) -> np.ndarray:
        """Return (E,) the weights of the targets of an update within the limits; popularity (R,) of each item row."""
        left = self.left(targets, popularity)
        new = np.abs(targets.weights) * targets.new
        total = float(new.sum())
        self.kept = float((new * left).sum()) / total if total else 1.0
        crowd = targets.newcomers[targets.owners]
        self._share = float(new[crowd].sum()) / total if total else None
        rows, places = np.unique(targets.rows[crowd], return_inverse=True)
        weights = np.bincount(places, (new * left)[crowd], minlength=len(rows))
        self._taking = dict(zip(rows.tolist(), weights.tolist(), strict=True))
        return targets.weights * left

    def passed(self) -> None:
        """Count the newcomers of the update, which was published, as usual, as far as they are within the limit."""
        refill = self.limits.item_refill
        self.taken = {row: weight - refill for row, weight in self.taken.items() if weight > refill}
        self.taken |= {row: self.taken.get(row, 0.0) + weight for row, weight in self._taking.items() if weight > 0}
        self._taking = {}
        if self._share is None:
            return
        if self._share > self._most():  # a crowd; one that stays is usual in the end
            self.usual += (self._share - self.usual) / MEMORY
        else:
            self.updates = min(self.updates + 1, MEMORY)
            self.usual += (self._share - self.usual) / self.updates
        self._share = None

    def left(self, targets: Targets, popularity: np.ndarray) -> np.ndarray:
        """Return (E,) float32 from 0 to 1, what is left of each weight; popularity (R,) of item rows, in any unit."""
        weights = np.abs(targets.weights)
        of_user = np.bincount(targets.owners, weights * targets.new, minlength=len(targets.newcomers))
        left = np.where(targets.new, np.sqrt(_part(self.limits.user_limit, of_user))[targets.owners], 1.0)
        newcomers = targets.newcomers[targets.owners]
        for both in (targets.new, ~targets.new):
            crowd = both & newcomers
            rows = targets.rows[crowd]
            of_item = np.bincount(rows, weights[crowd] * left[crowd], minlength=len(popularity))
            likely = popularity * (of_item.sum() / max(float(popularity.sum()), 1e-9))
            most = np.maximum(self._room(weights[crowd], len(popularity)), self.limits.item_share * likely)
            left[crowd] *= _part(most, of_item)[rows]
            left[crowd] *= self._crowd(weights * left, crowd, both & ~newcomers)
        return left.astype(np.float32)

    def _room(self, weights: np.ndarray, rows: int) -> np.ndarray:
        """Return (R,) what newcomers may still weigh on each item; the limit is of events that weigh as these (E,)."""
        counted = weights[weights > 0]
        room = np.full(rows, self.limits.item_limit * min(float(counted.mean()) if len(counted) else 1.0, 1.0))
        if self.taken:
            taken = np.fromiter(self.taken, int, len(self.taken))
            room[taken] = np.maximum(room[taken] - np.fromiter(self.taken.values(), float, len(self.taken)), 0.0)
        return room

    def _most(self) -> float:
        """Return the share of newcomers that is within the limit; the first update says what is usual."""
        if self.updates == 0:
            return 1.0
        return min(max(self.limits.newcomer_share * self.usual, LEAST_SHARE), 1.0)

    def _crowd(self, weights: np.ndarray, crowd: np.ndarray, others: np.ndarray) -> float:
        """Return the factor that leaves a crowd its share of the whole, and no more."""
        share = self._most()
        if share >= 1.0 or not crowd.any():
            return 1.0
        most = max(share / (1 - share) * float(weights[others].sum()), LEAST_CROWD)
        return float(_part(most, np.array(weights[crowd].sum())))


def _part(most: np.ndarray | float, total: np.ndarray) -> np.ndarray:
    """Return the factor, at most 1, that leaves `most` of a total that is larger."""
    return np.minimum(1.0, most / np.maximum(total, 1e-9))


def newcomers_of(histories: Sequence[History], last_offset: int, limits: InfluenceLimits) -> np.ndarray:
    """Return (U,) bool, whose first event is among the latest of the log: nobody can forge offsets, unlike times."""
    latest = max(last_offset - limits.newcomer_events, 0)
    return np.array([history.first_offset > latest for history in histories], dtype=bool)


def last_opinions(flat: Histories, owners: np.ndarray, kind_codes: Mapping[str, int]) -> np.ndarray:
    """Return (E,) bool, false for a like, dislike or rating where its user has a later one of the same item."""
    counts = np.ones(len(flat.rows), dtype=bool)
    codes = [kind_codes[kind] for kind in OPINIONS if kind in kind_codes]
    opinions = np.flatnonzero(np.isin(flat.kinds, codes))
    opinions = opinions[np.lexsort((opinions, flat.rows[opinions], owners[opinions]))]
    earlier, later = opinions[:-1], opinions[1:]
    counts[earlier[(flat.rows[earlier] == flat.rows[later]) & (owners[earlier] == owners[later])]] = False
    return counts
