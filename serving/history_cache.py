"""A replica's copies of the histories of users who asked lately.

Before every batch the replica asks the aggregator, in one call, what its copies lack: mostly nothing, so that a batch
costs a message of a few bytes, and an acknowledged event is always behind the next answer. A copy also keeps what the
encoder reads of it (History.encoded), so it is never changed: a newer one takes its place.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from lib.user_histories import History


class HistoryCache:
    """user id -> history, of the `users` that were asked for last, each with at most `keep` events."""

    def __init__(self, users: int, keep: int):
        self.users = users
        self.keep = keep
        self._histories: OrderedDict[str, History] = OrderedDict()

    def __len__(self) -> int:
        return len(self._histories)

    def copies(self, user_ids: Iterable[str]) -> dict[str, History | None]:
        """The copy of each of these users, or None."""
        return {user_id: self._histories.get(user_id) for user_id in user_ids}

    def update(self, copies: Mapping[str, History | None], newer: Sequence[History | None]) -> dict[str, History]:
        """Histories from copies and what they lacked (None: nothing); they are the copies from now on."""
        current = {}
        for (user_id, copy), events in zip(copies.items(), newer, strict=True):
            current[user_id] = history = self._joined(copy, events)
            self._histories[user_id] = history
            self._histories.move_to_end(user_id)
        while len(self._histories) > self.users:
            self._histories.popitem(last=False)
        return current

    def _joined(self, copy: History | None, newer: History | None) -> History:
        if copy is None:
            return newer or History()
        if newer is None:
            return copy
        joined = copy.slice(0, len(copy))
        joined.extend(newer)
        return joined.newest(self.keep)


def last_offsets(copies: Mapping[str, History | None]) -> list[tuple[str, int | None]]:
    """What the aggregator is asked: each user with the log offset at which the copy ends, or None without a copy."""
    return [(user_id, None if copy is None else copy.last_offset) for user_id, copy in copies.items()]
