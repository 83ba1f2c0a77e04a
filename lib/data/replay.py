"""Which events are replayed: learned again with the new ones, so that the weights do not forget them."""

from array import array
from dataclasses import dataclass

import numpy as np

REMEMBERED_EVENTS = 1_000_000  # at least so many of the latest can be drawn


@dataclass(frozen=True)
class ReplaySample:
    """How much is replayed with a micro-batch, and from where."""

    events: int  # altogether
    recent_share: float = 0.0  # of the draws; the others are of all remembered events
    recent_events: int = 1  # how many of the latest events count as recent


class LatestEvents:
    """Whose the latest events of all users are, and the number of each among its user's events."""

    def __init__(self) -> None:
        self._user_ids: list[str] = []
        self._numbers = array("I")

    def __len__(self) -> int:
        return len(self._user_ids)

    def append(self, user_id: str, number: int) -> None:
        """Add the newest event of all."""
        self._user_ids.append(user_id)
        self._numbers.append(number)
        # trimmed in large steps, so that appending stays cheap
        if len(self._user_ids) > 2 * REMEMBERED_EVENTS:
            del self._user_ids[:REMEMBERED_EVENTS], self._numbers[:REMEMBERED_EVENTS]

    def draw(self, sample: ReplaySample, generator: np.random.Generator) -> tuple[str, int]:
        """Return an event as its user and its number: any one, or a recent one with probability `recent_share`."""
        last = len(self)
        recent = min(sample.recent_events if generator.random() < sample.recent_share else last, last)
        place = last - 1 - int(generator.integers(0, max(recent, 1)))
        return self._user_ids[place], self._numbers[place]
