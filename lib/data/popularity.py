"""What is popular of late: counts that halve with every half-life, without ever touching all of them.

Forward decay (Cormode et al. 2009, "Forward decay: a practical time decay model for streaming systems"): an event
counts 2^((t - reference) / half_life), so an old count need not be lowered when time passes. The reference moves up
when the weights grow large, and only then are all counts scaled. Time is that of the events in a dataset, and in the
feedback log the offset: with every so many events a live count halves, whether the day is busy or quiet and whatever
the clocks say.

It answers people of whom nothing is known, and they begin otherwise than others go on. So a user's first event weighs
more than the later ones: NDCG@10 of first events rises from 0.081 to 0.085 on yoochoose-100k, from 0.27 to 0.32 on
ml-100k.
"""

import math

import numpy as np

from lib.data.histories import Histories

DAY = 86_400_000  # milliseconds
LARGEST_EXPONENT = 40.0
LATER = 0.3  # of a user's first event weighs a later one


def event_counts(times: np.ndarray, reference: int, half_life: float) -> np.ndarray:
    """(E,) what each event counts relative to one at `reference`; all in milliseconds, or all in log offsets."""
    exponents = (times - reference) / half_life
    return np.exp2(np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT))


def start_weights(first: np.ndarray) -> np.ndarray:
    """(E,) what events weigh; `first` (E,) bool says which are the first ones of their users."""
    return np.where(first, 1.0, LATER)


def popularity_of(histories: Histories, reference: int, half_life: float, rows: int) -> np.ndarray:
    """(R,) float64 what is popular at `reference` by whole histories; both times in milliseconds."""
    first = np.zeros(len(histories.rows), dtype=bool)
    first[histories.offsets[:-1][histories.lengths > 0]] = True
    counts = event_counts(histories.timestamps, reference, half_life) * start_weights(first)
    return np.bincount(histories.rows, weights=counts, minlength=rows)


def moved_reference(newest: int, reference: int, half_life: float) -> tuple[int, float]:
    """The reference to use for events up to `newest`, and what present counts are to be multiplied by."""
    if (newest - reference) / half_life <= LARGEST_EXPONENT / 2:
        return reference, 1.0
    return newest, float(np.exp2(-min((newest - reference) / half_life, 120.0)))


def steady_total(half_life: float, users_per_event: float) -> float:
    """What all counts together tend to when they halve with every `half_life` later events."""
    return half_life / math.log(2) * (LATER + (1 - LATER) * users_per_event)
