"""Shared memory in which the processes of one machine see each other's changes: counters, and the newest events.

Asking an aggregator costs milliseconds of CPU time in two processes; reading here costs microseconds. Whoever changes a
user's history counts up the user's counter before the change is acknowledged; whoever holds a copy notes the counter
before asking for the copy. While the counter stays the same, so does the history. Beside the counters, a ring holds the
newest events, each with the value that it set the counter to: with it, a copy whose counter is one less is whole again.
All other copies are asked for anew. So an event that was overwritten before it was read, or a counter that two users
share by the hash of their ids, costs a question and never an event.
"""

import marshal
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.events import Event
from lib.data.user_hash import part_of
from lib.durable import write_durably

SLOTS = 1 << 16  # counters of users: with a hundred changed users, one copy in six hundred is asked for in vain
ITEMS = SLOTS  # place of the catalog's counter, after those of the users
WRITTEN = SLOTS + 1  # place of the number of bytes that were ever written to the ring
RING = 1 << 20  # bytes: some ten thousand events
LARGEST = 1 << 14  # bytes of an event in the ring; a larger one is left out
HEAD = 8  # bytes before an event: its length, and its checksum


class News(NamedTuple):
    """An event that was just added to its user's history."""

    counter: int  # what the user's counter was set to with it
    offset: int  # in the log
    event: Event


class ChangeBoard:
    """A file of counters and events that processes map into memory; one of them writes."""

    def __init__(self, path: Path, memory: np.memmap):
        self.path = path
        self._counters = memory[: (WRITTEN + 1) * 8].view(np.uint64)
        self._ring = memory[(WRITTEN + 1) * 8 :]
        self._read = int(self._counters[WRITTEN])

    @classmethod
    def create(cls, path: Path) -> "ChangeBoard":
        """Open the board at a path, to write; count up all counters, as earlier changes may not have been counted."""
        size = (WRITTEN + 1) * 8 + RING
        if not path.exists() or path.stat().st_size != size:
            write_durably(path, bytes(size))
        board = cls(path, np.memmap(path, dtype=np.uint8, mode="r+"))
        board._counters[:WRITTEN] += np.uint64(1)
        return board

    @classmethod
    def open(cls, path: Path) -> "ChangeBoard":
        """Open the board that another process created, to read."""
        return cls(path, np.memmap(path, dtype=np.uint8, mode="r"))

    def add(self, event: Event, offset: int) -> None:
        """Say that this event was added to its user's history."""
        slot = _slot(event.user_id)
        counter = int(self._counters[slot]) + 1
        record = marshal.dumps((counter, offset, *event))
        if len(record) <= LARGEST:
            written = int(self._counters[WRITTEN])
            framed = len(record).to_bytes(4, "little") + zlib.crc32(record).to_bytes(4, "little") + record
            self._ring[(written + np.arange(len(framed))) % RING] = np.frombuffer(framed, dtype=np.uint8)
            self._counters[WRITTEN] = written + len(framed)  # after the bytes, so that who sees it sees them
        self._counters[slot] = counter

    def news(self) -> list[News]:
        """Return the events since the last call, oldest first; none where some of them were overwritten."""
        start, stop = self._read, int(self._counters[WRITTEN])
        if start == stop:
            return []
        self._read = stop
        if stop - start > RING:
            return []
        data = self._ring[np.arange(start, stop) % RING].tobytes()
        found, place = [], 0
        while place < len(data):
            length, checksum = (int.from_bytes(data[place + i : place + i + 4], "little") for i in (0, 4))
            record = data[place + HEAD : place + HEAD + length]
            if zlib.crc32(record) != checksum:  # overwritten meanwhile
                return []
            counter, offset, *fields = marshal.loads(record)
            found.append(News(counter, offset, Event(*fields)))
            place += HEAD + length
        return found

    def mark_items(self) -> None:
        """Say that the catalog has changed."""
        self._counters[ITEMS] += np.uint64(1)

    def users(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return the counter of each user."""
        return {user_id: int(self._counters[_slot(user_id)]) for user_id in user_ids}

    def items(self) -> int:
        """Return the counter of the catalog."""
        return int(self._counters[ITEMS])


def _slot(user_id: str) -> int:
    return part_of(user_id, SLOTS)
