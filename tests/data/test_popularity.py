"""What is popular by whole histories, as pretraining and a daily fine-tune count it."""

import numpy as np
import pytest

from lib.data.histories import Histories
from lib.data.popularity import LATER, event_counts, popularity_of, same_reference, steady_total

HOUR = 3_600_000


def histories(*users: list[int]) -> Histories:
    """Each user's item rows, an hour apart; all start at the same time."""
    rows = np.array([row for user in users for row in user], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    times = np.array([number * HOUR for user in users for number in range(len(user))], dtype=np.int64)
    kinds = np.ones(len(rows), dtype=np.int8)
    return Histories([str(n) for n in range(len(users))], offsets, rows, kinds, np.full(len(rows), np.nan), times)


def test_first_events_weigh_more_and_old_ones_less():
    found = popularity_of(histories([1, 2], [], [3], [2, 1, 1]), reference=2 * HOUR, half_life=HOUR, rows=5)
    assert found == pytest.approx([0, 0.25 + LATER / 2 + LATER, LATER / 2 + 0.25, 0.25, 0])


@pytest.mark.parametrize("first_every", [1, 2, 5])
def test_the_total_of_a_steady_stream(first_every):
    half_life, events = 50.0, 2000
    counts = event_counts(np.arange(events), events - 1, half_life)
    first = np.arange(events) % first_every == 0
    total = float(np.where(first, counts, LATER * counts).sum())
    assert total == pytest.approx(steady_total(half_life, 1 / first_every), rel=0.05)


def test_with_another_reference_an_event_counts_the_same_by_another_half_life():
    for now, reference, half_life, other in ((1000, 0, 100.0, 7.0), (1000, 900, 3.0, 4000.0), (5, 5, 1.0, 2.0)):
        moved = same_reference(now, reference, half_life, other)
        counts = [event_counts(np.array([now]), *unit)[0] for unit in ((reference, half_life), (moved, other))]
        assert counts[1] == pytest.approx(counts[0], rel=0.06)
