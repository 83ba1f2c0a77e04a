"""The split of training and test: what is held out of training, so that evaluation is honest."""

from typing import Literal, get_args

import numpy as np

from lib.data.histories import Histories

Holdout = Literal["leave-one-out", "temporal", "none"]
HOLDOUTS: tuple[Holdout, ...] = get_args(Holdout)
LEAVE_ONE_OUT, TEMPORAL, NONE = HOLDOUTS
PROTOCOLS = (LEAVE_ONE_OUT, TEMPORAL)  # of evaluation, each named after the holdout that it tests on
TEST_SHARE = 0.2  # of the time span


def cutoff_time(timestamps: np.ndarray) -> int:
    """Return the time at which the newest 20% of the span begins."""
    first, last = int(timestamps.min()), int(timestamps.max())
    return first + int((last - first) * (1 - TEST_SHARE))


def training_part(histories: Histories, holdout: str) -> Histories:
    """Return the histories without what a protocol tests on."""
    if holdout == LEAVE_ONE_OUT:
        # a user with a single event keeps it: nothing comes before it, so it is no target
        newest = histories.offsets[1:][histories.lengths >= 2] - 1
        keep = np.ones(len(histories.rows), dtype=bool)
        keep[newest] = False
        return histories.select(keep)
    if holdout == TEMPORAL:
        return histories.select(histories.timestamps < cutoff_time(histories.timestamps))
    return histories
