"""A replica's copies of the histories of users who asked lately.

Before every batch the replica asks the aggregator, in one call, what its copies lack, so that every answer knows the
events that were acknowledged before it. Where both are on one machine, the replica takes the newest events from shared
memory, and asks about nobody whose copy is known to be whole (lib/log/board.py). An event that came late is not at the
end of its user's history, so the copy is fetched anew. A copy also keeps what the encoder reads of it
(History.encoded), so it is never changed: a newer one takes its place.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lib.data.history import History
from lib.log.board import News


class Copy(NamedTuple):
    """A history as it was when the aggregator was asked."""

    history: History
    counter: int | None  # the user's counter of changes before that; None where there is no board


class HistoryCache:
    """User id -> copy, of the `users` that were asked for last, each with at most `keep` events."""

    def __init__(self, users: int, keep: int):
        self.users = users
        self.keep = keep
        self._copies: OrderedDict[str, Copy] = OrderedDict()

    def __len__(self) -> int:
        return len(self._copies)

    def split(
        self, user_ids: Iterable[str], counters: Mapping[str, int]
    ) -> tuple[dict[str, History], dict[str, History | None]]:
        """Return the histories of users whose copy is whole by its counter, and the copies, or None, of the others."""
        whole: dict[str, History] = {}
        others: dict[str, History | None] = {}
        for user_id in user_ids:
            copy = self._copies.get(user_id)
            if copy is None:
                others[user_id] = None
            elif copy.counter is not None and copy.counter == counters.get(user_id):
                whole[user_id] = copy.history
                self._copies.move_to_end(user_id)
            else:
                others[user_id] = copy.history
        return whole, others

    def take(self, news: Iterable[News]) -> None:
        """Add events to those copies that lack nothing else, and have nothing of a later time."""
        for counter, offset, event in news:
            copy = self._copies.get(event.user_id)
            if copy is None or copy.counter != counter - 1:
                continue
            history = copy.history
            if offset > history.last_offset:  # else it came after the counter was read, and the copy has it
                if history.is_late(event):
                    continue
                history = history.newest(self.keep - 1)
                history.add(event, offset)
            self._copies[event.user_id] = Copy(history, counter)

    def update(
        self, copies: Mapping[str, History | None], newer: Sequence[History | None], counters: Mapping[str, int]
    ) -> dict[str, History]:
        """Join copies with what they lacked; the results are the copies from now on.

        Args:
            copies: of users, None where there was none.
            newer: what each lacked, None for nothing; a whole history has events that the copy has, too.
            counters: of the users, as they were read before the aggregator was asked.

        Returns:
            The users' histories.
        """
        current = {}
        for (user_id, copy), events in zip(copies.items(), newer, strict=True):
            current[user_id] = history = self._joined(copy, events)
            self._copies[user_id] = Copy(history, counters.get(user_id))
            self._copies.move_to_end(user_id)
        while len(self._copies) > self.users:
            self._copies.popitem(last=False)
        return current

    def _joined(self, copy: History | None, newer: History | None) -> History:
        if newer is None:
            return History() if copy is None else copy
        if copy is None or min(newer.offsets, default=0) <= copy.last_offset:
            return newer
        joined = copy.slice(0, len(copy))
        joined.extend(newer)
        return joined.newest(self.keep)


def last_offsets(copies: Mapping[str, History | None]) -> list[tuple[str, int | None]]:
    """Return what the aggregator is asked: each user with the offset at which the copy ends, or None without a copy."""
    return [(user_id, None if copy is None else copy.last_offset) for user_id, copy in copies.items()]
