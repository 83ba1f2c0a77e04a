"""Every user's recent events in memory: what the next answer reads and what the learner trains on."""

from collections import Counter
from collections.abc import Container
from itertools import islice

import numpy as np

from lib.data.events import Event
from lib.data.guard import LATENESS_MS
from lib.data.history import History
from lib.data.replay import LatestEvents, ReplaySample

RECENT_USERS = 1024  # whose order of acting is known
LEAST_HELD_OUT = 5  # events of a user by whom an update is judged


class UserHistories:
    """User id -> history, of which the newest `keep` events are kept; `lateness_ms` see History.add."""

    def __init__(self, keep: int = 1000, lateness_ms: int = LATENESS_MS):
        self.keep = keep
        self.lateness_ms = lateness_ms
        self._histories: dict[str, History] = {}
        self._users: list[str] = []  # for sampling; a user's place never changes until an erasure
        self._totals: dict[str, int] = {}  # events of each user, also those that are no longer kept
        self._latest = LatestEvents()
        self._recent: dict[str, None] = {}  # who acted last, the latest at the end

    def __len__(self) -> int:
        return len(self._histories)

    def append(self, event: Event, offset: int = 0) -> None:
        """Add an event that has just come to its user's history; an offset of 0 means that it is not in the log."""
        user_id = event.user_id
        history = self._histories.get(user_id)
        if history is None:
            history = self._histories[user_id] = History(first_offset=offset)
            self._users.append(user_id)
        history.add(event, offset, self.lateness_ms)
        # trimmed in large steps, so that appending stays cheap
        if len(history) > 2 * self.keep:
            self._histories[user_id] = history.newest(self.keep)
        number = self._totals.get(user_id, 0)
        self._totals[user_id] = number + 1
        self._latest.append(user_id, number)
        self._recent.pop(user_id, None)
        self._recent[user_id] = None
        if len(self._recent) > RECENT_USERS:
            del self._recent[next(iter(self._recent))]

    def get(self, user_id: str, count: int | None = None) -> History:
        """Return a user's newest events (all that are kept, or `count`); none for an unknown user."""
        history = self._histories.get(user_id)
        return History() if history is None else history.newest(count or self.keep)

    def up_to(self, user_id: str, last_offset: int) -> History:
        """Return a user's events up to a log offset, and those that are in no log; none for an unknown user."""
        history = self._histories.get(user_id)
        return History() if history is None else history.up_to(last_offset)

    def newer(self, user_id: str, last_offset: int | None) -> History | None:
        """Return what a copy of a user's history that ends at a log offset lacks.

        Args:
            user_id: whose history.
            last_offset: where the copy ends; None where there is no copy.

        Returns:
            The events after the offset; None for nothing. The whole history where there is no copy, or where one of
            those events came late, so that it is not behind all that the copy has, or is not kept.
        """
        history = self._histories.get(user_id)
        if last_offset is None:
            return self.get(user_id)
        if history is None or history.last_offset == last_offset:
            return None
        count = sum(offset > last_offset for offset in history.offsets)
        newest = history.newest(min(count, self.keep))
        follow = count > 0 and all(offset > last_offset for offset in newest.offsets)
        return newest if follow else self.get(user_id)

    def users(self, count: int) -> list[str]:
        """Return the first `count` users."""
        return self._users[:count]

    def latest_users(self) -> list[str]:
        """Return who acted last, the latest first; RECENT_USERS at most."""
        return [*reversed(self._recent)]

    def sample(self, count: int, generator: np.random.Generator) -> list[str]:
        """Draw users uniformly with replacement; fewer than `count` only where there are none."""
        if not self._users:
            return []
        return [self._users[index] for index in generator.integers(0, len(self._users), count)]

    def windows(self, sample: ReplaySample, length: int, up_to: int, generator: np.random.Generator) -> list[History]:
        """Draw windows of at most `length` events, each around an event drawn from the latest.

        Users come in proportion to their events, and any part of a history may be drawn: a sample of users' newest
        events alone teaches just how histories end. No event is beyond the log offset `up_to`.
        """
        drawn: list[History] = []
        room = sample.events
        while room > 0 and len(self._latest) > 0:
            window = self._window_around(*self._latest.draw(sample, generator), length, up_to, generator)
            room -= max(len(window), 1)
            if len(window) >= 2:  # a lone event has nothing before it to be predicted from
                drawn.append(window)
        return drawn

    def held_out(
        self, count: int, length: int, without: Container[str], generator: np.random.Generator
    ) -> list[History]:
        """Return the newest `length` events of at most `count` users, by whose last event an update is judged.

        Half of the users act now; the other half is drawn from all, so that a crowd of newcomers, however large, is
        never the only judge. Each has some history, and few end at the same item.
        """
        latest = list(islice(reversed(self._recent), 4 * count))
        # places are permuted: an array of strings loses the NULs at their end, so that it names other users
        recent = [latest[place] for place in generator.permutation(len(latest))]
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

    def _window_around(
        self, user_id: str, number: int, length: int, up_to: int, generator: np.random.Generator
    ) -> History:
        """Return events around the `number`-th of a user, up to half of them later ones."""
        history = self._histories.get(user_id)
        if history is None:  # erased
            return History()
        place = number - (self._totals[user_id] - len(history))
        learned = history.up_to(up_to)
        stop = min(place + 1 + int(generator.integers(0, length // 2 + 1)), len(learned))
        return learned.slice(max(stop - length, 0), max(stop, 0))
