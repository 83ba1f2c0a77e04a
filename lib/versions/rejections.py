"""The durable list of rejected updates, beside the versions: which events the weights have not learned from, and why.

An update is rejected by the gate, or set aside as learning raised each time that it was tried; so are changed items and
offered models, which are no events.

Lines of JSON, one a rejection, in files of at most LINES_A_FILE that are named by the number of their first line. A
file is written anew with each line, so that it is whole or not there, also on storage that cannot append.
"""

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lib.model.delta import Delta
from lib.versions.folder import LoadedVersion
from lib.versions.store import Store

REJECTIONS = "rejections"
LINES_A_FILE = 256


@dataclass(frozen=True)
class Rejection:
    """An update that failed its gate: nothing of it is left in the weights."""

    version: int  # that was live, and is so still
    after_offset: int  # of the log; the events are those beyond it,
    last_offset: int  # up to this one
    events: int
    events_rejected: int  # with those of all rejections before
    reason: str
    harmful: bool = True  # False: learning rests, whatever the events are; they may be replayed
    traceback: str | None = None  # where learning raised, every time that it was tried
    item_revision: int | None = None  # of the changed item that was set aside, where it is no events
    time: int = field(default_factory=lambda: time.time_ns() // 1_000_000, compare=False)  # milliseconds
    delta: Delta | None = field(default=None, compare=False)  # where earlier updates, too, had to be taken back

    def facts(self) -> dict[str, Any]:
        """Return what is stored and shown of it."""
        return {name: value for name, value in vars(self).items() if name != "delta"}


class Rejections:
    """The list in one registry; for its one learner."""

    def __init__(self, store: Store):
        self.store = store
        files = store.files(REJECTIONS)
        self.first = int(files[-1]) if files else 1  # number of the newest file's first line
        self.lines = store.read(f"{REJECTIONS}/{files[-1]}").decode().splitlines() if files else []
        # (S, 2) log offsets of what did harm, ascending and apart: behind the first of each, up to the second
        self._spans = np.zeros((0, 2), dtype=np.int64)
        self.set_aside: list[Rejection] = []  # those with a traceback, the oldest first
        self.item_revisions: set[int] = set()  # of changed items that were set aside
        self.remember(*self.all())

    def __len__(self) -> int:
        """Return how many updates were ever rejected."""
        return self.first - 1 + len(self.lines)

    @property
    def newest(self) -> Rejection | None:
        """The latest one."""
        return _rejection(self.lines[-1]) if self.lines else None

    def add(self, rejection: Rejection) -> None:
        """Make one durable."""
        full = len(self.lines) >= LINES_A_FILE
        first, lines = (self.first + len(self.lines), []) if full else (self.first, self.lines)
        lines = [*lines, json.dumps(rejection.facts())]
        self.store.write(f"{REJECTIONS}/{first:010d}", "\n".join([*lines, ""]).encode(), replace=True)
        self.first, self.lines = first, lines  # only now: where it could not be stored, it is tried again

    def remember(self, *rejections: Rejection) -> None:
        """Know of some; every worker of a learner does, and the first one also makes them durable."""
        self.set_aside += [each for each in rejections if each.traceback is not None]
        self.item_revisions |= {each.item_revision for each in rejections if each.item_revision is not None}
        spans = [(each.after_offset, each.last_offset) for each in rejections if each.harmful]
        joined: list[list[int]] = []
        for after, last in sorted([*map(tuple, self._spans.tolist()), *spans]):
            if joined and after <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], last)
            else:
                joined.append([after, last])
        self._spans = np.array(joined, dtype=np.int64).reshape(-1, 2)

    def passed_by(self, loaded: LoadedVersion) -> LoadedVersion:
        """Return a version that has passed by what was rejected since it was published, where none came after it."""
        newest = self.newest
        if newest is None or newest.version != loaded.version:
            return loaded
        facts = loaded.facts.model_copy(update={"events_rejected": newest.events_rejected})
        return replace(loaded, log_offset=newest.last_offset, facts=facts)

    def cover(self, offsets: np.ndarray) -> np.ndarray:
        """Return (E,) bool, which events are of a harmful update, by their log offsets (0: in no log)."""
        if len(self._spans) == 0:
            return np.zeros(len(offsets), dtype=bool)
        place = np.searchsorted(self._spans[:, 0], offsets) - 1  # of the newest span that begins before
        return (place >= 0) & (offsets <= self._spans[np.maximum(place, 0), 1])

    def all(self) -> list[Rejection]:
        """Return every one, the oldest first."""
        names = [f"{REJECTIONS}/{name}" for name in self.store.files(REJECTIONS)]
        lines = [line for name in names for line in self.store.read(name).decode().splitlines()]
        return [_rejection(line) for line in lines]


def _rejection(line: str) -> Rejection:
    """Read a line; what another release says beyond this one is left out."""
    said = json.loads(line)
    return Rejection(**{name: said[name] for name in Rejection.__dataclass_fields__ if name in said})
