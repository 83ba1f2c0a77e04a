"""Every user's recent events in memory: what the next answer reads and what the learner trains on."""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lib.data.events import Event
from lib.data.history import History

REMEMBERED_EVENTS = 1_000_000  # whose users are known to the replay sample
RECENT_USERS = 1024  # of whom is known in which order they acted last
LEAST_HELD_OUT = 5  # events of a user by whom an update is judged


class UserHistories:
    """user id -> history, of which the newest `keep` events are kept."""

    def __init__(self, keep: int = 1000):
        self.keep = keep
        self._histories: dict[str, History] = {}
        self._users: list[str] = []  # for sampling; a user's place never changes until an erasure
        self._totals: dict[str, int] = {}  # events of each user, those counted that are no longer kept
        self._event_users: list[str] = []  # of the latest events
        self._event_numbers = array("I")  # the place of each among its user's events
        self._recent: dict[str, None] = {}  # who acted last, the latest at the end

    def __len__(self) -> int:
        return len(self._histories)

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._histories

    def append(self, event: Event, offset: int = 0) -> None:
        """Add a user's newest event."""
        history = self._histories.get(event.user_id)
        if history is None:
            history = self._histories[event.user_id] = History(first_offset=offset)
            self._users.append(event.user_id)
        history.append(event, offset)
        number = self._totals.get(event.user_id, 0)
        self._totals[event.user_id] = number + 1
        self._event_users.append(event.user_id)
        self._event_numbers.append(number)
        # trimmed in large steps, so that appending stays cheap
        if len(history) > 2 * self.keep:
            self._histories[event.user_id] = history.newest(self.keep)
        if len(self._event_users) > 2 * REMEMBERED_EVENTS:
            del self._event_users[:REMEMBERED_EVENTS], self._event_numbers[:REMEMBERED_EVENTS]
        self._recent.pop(event.user_id, None)
        self._recent[event.user_id] = None
        if len(self._recent) > RECENT_USERS:
            del self._recent[next(iter(self._recent))]

    def get(self, user_id: str, count: int | None = None) -> History:
        """A user's newest events (all that are kept, or `count`); empty for an unknown user."""
        history = self._histories.get(user_id)
        return History() if history is None else history.newest(count or self.keep)

    def newer(self, user_id: str, last_offset: int | None) -> History | None:
        """What a copy that ends at a log offset lacks of a user's history: None for nothing, all without a copy."""
        history = self._histories.get(user_id)
        if last_offset is None:
            return self.get(user_id)
        if history is None or history.last_offset == last_offset:
            return None
        return history.slice(bisect_right(history.offsets, last_offset), len(history)).newest(self.keep)

    def users(self, count: int) -> list[str]:
        """The first `count` users."""
        return self._users[:count]

    def latest_users(self) -> list[str]:
        """Who acted last, the latest first; RECENT_USERS at most."""
        return [*reversed(self._recent)]

    def sample(self, count: int, generator: np.random.Generator) -> list[str]:
        """Users drawn uniformly with replacement; fewer than asked only when there are none."""
        if not self._users:
            return []
        return [self._users[index] for index in generator.integers(0, len(self._users), count)]

    def windows(self, sample: "ReplaySample", length: int, up_to: int, generator: np.random.Generator) -> list[History]:
        """Windows of at most `length` events, each around an event drawn from the latest; none beyond a log offset.

        Users come in proportion to their events, and any part of a history may be drawn: a sample of users' newest
        events alone teaches just how histories end.
        """
        drawn: list[History] = []
        room, last = sample.events, len(self._event_users)
        while room > 0 and last > 0:
            recent = min(sample.recent_events if generator.random() < sample.recent_share else last, last)
            place = last - 1 - int(generator.integers(0, max(recent, 1)))
            window = self._window(place, length, up_to, generator)
            room -= max(len(window), 1)
            if len(window) >= 2:  # without an event before it, nothing is learned of one
                drawn.append(window)
        return drawn

    def _window(self, place: int, length: int, up_to: int, generator: np.random.Generator) -> History:
        """Events around that at a place among the latest, up to half of them later ones."""
        user_id = self._event_users[place]
        history = self._histories.get(user_id)
        if history is None:  # erased
            return History()
        number = self._event_numbers[place] - (self._totals[user_id] - len(history))
        stop = min(number + 1 + int(generator.integers(0, length // 2 + 1)), bisect_right(history.offsets, up_to))
        return history.slice(max(stop - length, 0), max(stop, 0))

    def held_out(
        self, count: int, length: int, without: Container[str], generator: np.random.Generator
    ) -> list[History]:
        """The newest `length` events of at most `count` users, by whose last event an update is judged.

        Half of them act now; the other half is drawn from all, so that a crowd of newcomers, however large, is not all
        that is heard. Each has some history, and few end at the same item.
        """
        recent = generator.permutation(list(islice(reversed(self._recent), 4 * count)))
        drawn = self.sample(2 * count, generator)
        found: dict[str, History] = {}
        items: Counter[str] = Counter()
        for most, users in ((count // 2, recent), (count, drawn), (count, recent)):
            for user_id in users:
                if len(found) >= most:
                    break
                history = self._histories[user_id]
                if user_id in without or user_id in found or len(history) < LEAST_HELD_OUT:
                    continue
                items[history.item_ids[-1]] += 1
                if items[history.item_ids[-1]] <= max(count // 16, 1):
                    found[user_id] = history.newest(length)
        return list(found.values())

    def erase(self, user_id: str) -> None:
        """Forget a user."""
        if self._histories.pop(user_id, None) is not None:
            self._users.remove(user_id)
            del self._totals[user_id]
            self._recent.pop(user_id, None)


@dataclass(frozen=True)
class ReplaySample:
    """Which events are learned again with the new ones."""

    events: int  # altogether
    recent_share: float = 0.0  # of the draws; the others are of all remembered events
    recent_events: int = 1  # how many of the latest events count as recent
