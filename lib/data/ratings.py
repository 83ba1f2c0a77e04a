"""The scale of ratings, which says what a dislike is.

Values stay as they came, in datasets, in the log and in answers; the scale goes with a dataset (events.parquet) and
with a model (config.json), so that ratings that come live mean what those that were trained on meant.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from lib.data.events import EVENT_WEIGHTS, Event
from lib.errors import InputError

DISLIKED_SHARE = 0.375  # of a scale: 1 and 2 of 1 to 5, 1 to 4 of 1 to 10
STRAY_SHARE = 0.001  # of ratings at either end that may be mistakes: no scale follows from them
ENOUGH_RATINGS = 1000  # in which the best mark occurs
USUAL_BEST = (1, 5, 10, 100)  # marks, where ratings are too few to show theirs
ALL_BEST = (1, 2, 3, 4, 5, 6, 7, 10, 20, 100)
_SCALE = re.compile(r"(-?\d+(?:\.\d+)?)-(-?\d+(?:\.\d+)?)")
_IMPLICIT = "implicit"


@dataclass(frozen=True)
class RatingScale:
    """The worst and the best mark; equal where ratings are no opinions, as in data of which all are alike."""

    worst: float
    best: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes: 1-10, -1-1, implicit.

        Raises:
            InputError: it is no scale.
        """
        if text == _IMPLICIT:
            return cls(0.0, 0.0)
        found = _SCALE.fullmatch(text)
        if found is None or float(found[1]) >= float(found[2]):
            raise InputError(f"rating scale {text!r}: write the worst and the best mark as 1-10, or {_IMPLICIT}")
        return cls(float(found[1]), float(found[2]))

    def __str__(self) -> str:
        return _IMPLICIT if self.worst == self.best else f"{self.worst:g}-{self.best:g}"

    @property
    def dislikes_below(self) -> float:
        """Every lower rating is a dislike; minus infinity where none is."""
        if self.worst == self.best:
            return -np.inf
        return self.worst + DISLIKED_SHARE * (self.best - self.worst)


STARS = RatingScale(1.0, 5.0)  # where nothing says otherwise


def is_dislike(event: Event, ratings: RatingScale) -> bool:
    """Return whether a person turned an item down: a dislike, a skip, or a low rating."""
    low = event.event == "rating" and event.value is not None and event.value < ratings.dislikes_below
    return low or EVENT_WEIGHTS[event.event] < 0


def recognised_scale(ratings: Mapping[float, int]) -> RatingScale:
    """Return the scale that ratings show; `ratings` has how often each value occurs.

    Values that are all alike, and such beyond 100, which are counts or prices, are no opinions. With few ratings the
    best mark may not be among them, so it is a usual one.
    """
    values = np.array(sorted(ratings))
    counts = np.array([ratings[value] for value in values])
    stray = int(STRAY_SHARE * counts.sum())
    places = np.searchsorted(np.cumsum(counts), [stray, counts.sum() - 1 - stray], side="right")
    low, high = values[places].tolist()
    marks = ALL_BEST if counts.sum() >= ENOUGH_RATINGS else USUAL_BEST
    best = next((mark for mark in marks if mark >= max(high, -low)), None)
    if low == high or best is None:
        return RatingScale(0.0, 0.0)
    if low < 0:
        return RatingScale(-best, best)
    if low < 1 or best in (1, 20, 100):
        return RatingScale(0.5 if low >= 0.5 and best == 5 else 0.0, best)
    return RatingScale(1.0, best)


def rounded_counts(values: np.ndarray) -> Counter[float]:
    """Count values, to three digits: of numbers without steps there would be as many as ratings."""
    values = values[~np.isnan(values)].astype(np.float64)
    size = 10.0 ** (2 - np.floor(np.log10(np.maximum(np.abs(values), 1e-6))))
    distinct, counts = np.unique(np.round(values * size) / size, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))
