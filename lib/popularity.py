"""What is popular of late: counts that halve with every half-life, without ever touching all of them.

Forward decay (Cormode et al. 2009, "Forward decay: a practical time decay model for streaming systems"): an event
counts 2^((t - reference) / half_life), so an old count need not be lowered when time passes. The reference moves up
when the weights grow large, and only then are all counts scaled. Time is that of the events in a dataset, and in the
feedback log the offset: with every so many events a live count halves, whether the day is busy or quiet and whatever
the clocks say.
"""

import math

import numpy as np

DAY = 86_400_000  # milliseconds
LARGEST_EXPONENT = 40.0


def event_counts(times: np.ndarray, reference: int, half_life: float) -> np.ndarray:
    """(E,) what each event counts relative to one at `reference`; all in milliseconds, or all in log offsets."""
    exponents = (times - reference) / half_life
    return np.exp2(np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT))


def moved_reference(newest: int, reference: int, half_life: float) -> tuple[int, float]:
    """The reference to use for events up to `newest`, and what present counts are to be multiplied by."""
    if (newest - reference) / half_life <= LARGEST_EXPONENT / 2:
        return reference, 1.0
    return newest, float(np.exp2(-min((newest - reference) / half_life, 120.0)))


def steady_total(half_life: float) -> float:
    """What all counts together tend to when each event counts 1 and halves with every `half_life` later ones."""
    return half_life / math.log(2)
