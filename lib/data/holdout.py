"""The split of training and test: what is held out of training, so that evaluation is honest."""

import numpy as np

from lib.data.histories import Histories

LEAVE_ONE_OUT, TEMPORAL, NONE = "leave-one-out", "temporal", "none"
PROTOCOLS = (LEAVE_ONE_OUT, TEMPORAL)
TEST_SHARE = 0.2  # of the time span


def cutoff_time(timestamps: np.ndarray) -> int:
    """The time at which the newest 20% of the span begins."""
    first, last = int(timestamps.min()), int(timestamps.max())
    return first + int((last - first) * (1 - TEST_SHARE))


def training_part(histories: Histories, holdout: str) -> Histories:
    """The histories without what a protocol tests on."""
    if holdout == LEAVE_ONE_OUT:
        # who has a single event keeps it: there is nothing to predict it from, so it is no target
        newest = histories.offsets[1:][histories.lengths >= 2] - 1
        keep = np.ones(len(histories.rows), dtype=bool)
        keep[newest] = False
        return histories.select(keep)
    if holdout == TEMPORAL:
        return histories.select(histories.timestamps < cutoff_time(histories.timestamps))
    return histories
