"""The shards of the feedback log: which of them a user belongs to.

All events of a user are in one shard, so that their order, their duplicates and the user's history need no other.
"""

from dataclasses import dataclass
from pathlib import Path

from lib.data.user_hash import part_of


@dataclass(frozen=True)
class Shard:
    """One of `count` shards, numbered from 0."""

    number: int = 0
    count: int = 1

    def named(self, name: str) -> str:
        """Return a name of the shard's own, "log.db" -> "log-2.db"; the only shard has the name as it is."""
        if self.count == 1:
            return name
        path = Path(name)
        return f"{path.stem}-{self.number}{path.suffix}"

    def has(self, user_id: str) -> bool:
        """Return whether the events of a user belong to this shard."""
        return shard_of(user_id, self.count) == self.number


ONLY = Shard()


def shard_of(user_id: str, count: int) -> int:
    """Return the number of a user's shard: the same in every process and on every machine, for good."""
    return 0 if count == 1 else part_of(user_id, count)
