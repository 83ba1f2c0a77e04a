"""Items that feedback names and the catalog does not have: one gets a row once enough users have met it.

Anybody can send any id, and a row is for good. What waits is a part of the learner's state: it is stored with every
version, so that a restarted learner gives the same rows.
"""

import json
import logging
from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

from lib.data.user_hash import user_hash
from lib.live.micro_batch import MicroBatch
from lib.versions.folder import LoadedVersion

logger = logging.getLogger(__name__)
MOST_WAITING = 10_000  # items; beyond it the one that was met longest ago is forgotten
TENSOR = "unknown_items"  # beside the optimiser's tensors

Meeting = tuple[str, str]  # an item, and the hash of a user who met it


class UnknownItems:
    """Which users have met each item that has no row, in the order of its latest meeting."""

    def __init__(self, loaded: LoadedVersion, users: int, most_rows: int):
        """Go on from a version.

        Args:
            loaded: the version.
            users: that must have met an item before it gets a row.
            most_rows: that items may get in this way, since the base.
        """
        self.users = users
        self.most_rows = most_rows
        self.rows = loaded.facts.rows_by_events
        self.refused = 0  # times that an item was not given a row, as there was no room
        self.users_of: dict[str, list[str]] = {}
        self._unpublished: list[Meeting] = []
        for stored in chain([loaded.optimizer or {}], (tensors for _, tensors in loaded.optimizer_deltas)):
            if TENSOR in stored:
                said = json.loads(stored[TENSOR].tobytes())
                self.count(said["met"])
                self._drop(said["given"])
        self._unpublished = []

    def __len__(self) -> int:
        """Return how many items wait."""
        return len(self.users_of)

    def met(self, batch: MicroBatch, known: Collection[str]) -> list[Meeting]:
        """Return who meets which unknown item in a micro-batch; what is in quarantine says nothing."""
        found: dict[Meeting, None] = {}
        for user_id, history, places in zip(batch.user_ids, batch.histories, batch.new, strict=True):
            for place in places:
                item_id, offset = history.item_ids[place], history.offsets[place]
                if item_id not in known and offset not in batch.quarantined:
                    found[item_id, user_hash(user_id).hex()] = None
        return list(found)

    def ready(self, met: Sequence[Meeting]) -> list[str]:
        """Return the items that get a row when these meetings are counted, as far as there is room."""
        users_of = {item_id: set(self.users_of.get(item_id, ())) for item_id, _ in met}
        for item_id, user in met:
            users_of[item_id].add(user)
        ready = [item_id for item_id, users in users_of.items() if len(users) >= self.users]
        room = max(self.most_rows - self.rows, 0)
        if len(ready) > room:
            if self.refused == 0:
                logger.warning(
                    "new items get no rows: those that events named have %d since the base, as many as new_item_rows"
                    " allows; put an item to give it one, or fine-tune",
                    self.rows,
                )
            self.refused += len(ready) - room
        return ready[:room]

    def count(self, met: Sequence[Meeting]) -> None:
        """Count meetings of an update that is published."""
        self._unpublished.extend(met)
        for item_id, user in met:
            users = self.users_of.pop(item_id, [])
            known = user in users or len(users) >= self.users
            self.users_of[item_id] = users if known else [*users, user]
        while len(self.users_of) > MOST_WAITING:
            del self.users_of[next(iter(self.users_of))]

    def forget(self, known: Collection[str]) -> None:
        """Let no item wait that has a row, as another model that was taken over may have given it one."""
        self._drop([item_id for item_id in self.users_of if item_id in known])

    def publish(self, new_items: Sequence[str]) -> dict[str, np.ndarray]:
        """Return what is stored with the next version, whose catalog has these new items."""
        given = [item_id for item_id in new_items if item_id in self.users_of]
        self._drop(given)
        met, self._unpublished = self._unpublished, []
        return _tensor(met, given) if met or given else {}

    def whole(self) -> dict[str, np.ndarray]:
        """Return what is stored with a version that is stored whole."""
        return _tensor([(item_id, user) for item_id, users in self.users_of.items() for user in users], [])

    def _drop(self, item_ids: Sequence[str]) -> None:
        for item_id in item_ids:
            self.users_of.pop(item_id, None)


def _tensor(met: Sequence[Meeting], given: Sequence[str]) -> dict[str, np.ndarray]:
    return {TENSOR: np.frombuffer(json.dumps({"met": met, "given": given}).encode(), dtype=np.uint8)}
