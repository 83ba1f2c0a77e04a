"""Counters in shared memory by which the processes of one machine know whose history may have changed.

Asking the aggregator costs milliseconds; reading a counter costs a microsecond. Whoever changes a user's history marks
the user before it acknowledges the change; whoever holds a copy notes the counter before it asks for the copy. As long
as the counter stays, so does the history. Users share counters by the hash of their id, which costs a question now and
then and never an event.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ONE_MACHINE = "AFTERCLICK_ONE_MACHINE"  # set where no process of the cluster can ever be on another machine
SLOTS = 1 << 16  # half a megabyte; a hundred changed users make one copy in six hundred ask in vain
ITEMS = SLOTS  # the place of the counter of the catalog, behind those of the users


class ChangeBoard:
    """A file of counters, mapped into memory by each process that opens it."""

    def __init__(self, path: Path, counters: np.ndarray):
        self.path = path
        self._counters = counters

    @classmethod
    def create(cls, path: Path) -> "ChangeBoard":
        """The board at a path, to write on. All counters move on: what was changed before is not known to be marked."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (SLOTS + 1) * 8
        if not path.exists() or path.stat().st_size != size:
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_bytes(bytes(size))
            unfinished.rename(path)
        board = cls(path, np.memmap(path, dtype=np.uint64, mode="r+"))
        board._counters += np.uint64(1)
        return board

    @classmethod
    def open(cls, path: Path) -> "ChangeBoard":
        """The board that another process created, to read."""
        return cls(path, np.memmap(path, dtype=np.uint64, mode="r"))

    def mark_user(self, user_id: str) -> None:
        """Note that a user has another history now."""
        self._counters[_slot(user_id)] += np.uint64(1)

    def mark_items(self) -> None:
        """Note that the catalog has changed."""
        self._counters[ITEMS] += np.uint64(1)

    def users(self, user_ids: Iterable[str]) -> dict[str, int]:
        """The counter of each user."""
        return {user_id: int(self._counters[_slot(user_id)]) for user_id in user_ids}

    def items(self) -> int:
        """The counter of the catalog."""
        return int(self._counters[ITEMS])


def _slot(user_id: str) -> int:
    return zlib.crc32(user_id.encode()) % SLOTS
