"""The feedback aggregator: events in, durable; histories out; micro-batches to the learner.

One actor a cluster, or one for each shard of the users (lib/log/layout.py). An event's way: cleaning, log (fsync),
history, acknowledgement; then it is pending until the trigger releases a micro-batch (64 events, or 200 ms after the
first, whichever comes first). After a crash the histories are read again from the dataset and the log.
"""

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field
from ray.actor import ActorHandle

from lib.data.dataset import read_events
from lib.data.events import Event
from lib.data.guard import CleaningRules, FeedbackGuard
from lib.data.history import History
from lib.data.tables import events_of
from lib.data.user_histories import UserHistories
from lib.live.micro_batch import MicroBatch, SampleSizes, micro_batch
from lib.log.board import ChangeBoard
from lib.log.errors import LogWriteError
from lib.log.items import ItemChange, ItemLog
from lib.log.layout import LogLayout
from lib.log.log_file import LoggedEvent
from lib.log.one_machine import on_one_machine
from lib.log.shard import ONLY, Shard
from lib.settings import Settings
from serving.status import AggregatorStatus

ITEM_LOG_FILE = "items.sqlite"
BOARD_FILE = "changes"
DUPLICATE = "duplicate"
MOST_ARRIVALS = 100_000
DATASET_ROWS = 100_000  # of a dataset that are Python objects at once
NEWCOMER_EVENTS = 5  # with fewer in their history, somebody is new
TORN = "{}: the last commit was torn when the machine stopped, and is dropped; it was not acknowledged"


class Trigger(Settings):
    """When pending events are released to the learner as a micro-batch: whichever limit is reached first."""

    events: int = Field(default=64, ge=1, le=MOST_ARRIVALS, description="how many are pending")
    milliseconds: int = Field(default=200, ge=0, description="how long the oldest has been pending")


class AggregatorConfig(Settings):
    """What the aggregator keeps, cleans and releases."""

    trigger: Trigger = Trigger()
    largest_batch: int = Field(
        default=1024,
        ge=1,
        description="events of a micro-batch for a learner that is behind: more share an update's cost",
    )
    keep_events: int = Field(default=1000, ge=1, description="of each user's history, in memory")
    cleaning: CleaningRules = CleaningRules()
    seed: int = Field(default=0, ge=0, description="of the replay sample")


class Arrival(NamedTuple):
    """An event that is not yet released to the learner, and when it came: seconds of a clock that nobody sets."""

    offset: int
    at: float


class Aggregator:
    """Owns the log and the histories of its shard; the first one owns the changes of items, too.

    Elapsed time is monotonic: a clock that is set stalls and floods nobody.
    """

    def __init__(
        self,
        state: str,
        data: str | None = None,
        config: AggregatorConfig | None = None,
        shard: Shard = ONLY,
        layout: LogLayout | None = None,
    ):
        self.config = config or AggregatorConfig()
        self.state = state
        self.shard = shard
        folder = Path(state)
        folder.mkdir(parents=True, exist_ok=True)
        self.histories = UserHistories(self.config.keep_events)
        if data is not None:
            self._read_dataset(data)
        self.log = (layout or LogLayout()).open(folder, shard)
        for logged in self.log.replay():
            self.histories.append(logged.event, logged.offset)
        self.last_offset = self.log.last_offset()
        self.items = ItemLog(folder / ITEM_LOG_FILE) if shard.number == 0 else None
        self.damage = [TORN.format(log.path) for log in (self.log, self.items) if log is not None and log.torn]
        board = folder / shard.named(BOARD_FILE)  # its own, as counters have one writer
        self.changes = ChangeBoard.create(board) if on_one_machine() else None
        self.guard = FeedbackGuard(_rules_of(shard, self.config.cleaning))
        self.quarantined: set[int] = set()  # offsets of events that the learner has yet to pass by
        self.rejected: Counter[str] = Counter()
        self.accepted = 0
        self.duplicates = 0
        # not yet released to the learner; of more than that the oldest are forgotten here, and read from the log
        self.arrivals: deque[Arrival] = deque(maxlen=MOST_ARRIVALS)
        self.forgotten = 0  # of them
        self.learned_offset = 0  # as far as the learner has asked beyond
        self.arrived = asyncio.Event()
        self.generator = np.random.default_rng(self.config.seed)

    def _read_dataset(self, data: str) -> None:
        """Histories that were there before the first live event, oldest first."""
        table = read_events(data)
        oldest_first = table.take(pa.array(np.argsort(table["timestamp"].to_numpy(), kind="stable")))
        for batch in oldest_first.to_batches(DATASET_ROWS):
            for event in events_of(pa.Table.from_batches([batch])):
                if self.shard.has(event.user_id):
                    self.histories.append(event)

    async def append(
        self, events: Sequence[Event], named: Collection[str] = (), reject: Counter[str] | None = None
    ) -> list[str | None]:
        """Make events durable and part of the histories; per event None, or why it was not taken.

        `named` are the ids that a replica gave to events without any identity. Such an event cannot be in the log
        before: finding it there means that this call is repeated after a crash, and that the first had succeeded.
        `reject` counts the events that the replica rejected already.
        """
        self.rejected.update(reject or {})
        now = time.monotonic()
        objections = [self.guard.objection(event, int(now * 1000)) for event in events]
        kept = [event for event, objection in zip(events, objections, strict=True) if objection is None]
        try:
            result = await asyncio.wrap_future(self.log.append(kept)) if kept else None
        except LogWriteError:
            for event in events:  # who sends again what was not taken is no flood
                self.guard.take_back(event.user_id)
            raise
        offsets = iter(result.offsets if result is not None else ())
        others = deque(result.others if result is not None else ())
        answers: list[str | None] = []
        for event, objection in zip(events, objections, strict=True):
            if objection is not None:
                answers.append(objection.message)
                self.rejected[objection.reason] += 1
                continue
            offset = next(offsets)
            if offset is None:
                repeated = event.event_id in named
                answers.append(None if repeated else DUPLICATE)
                self.duplicates += not repeated
                continue
            while others and others[0].offset < offset:
                other = others.popleft()
                self._take(other.event, other.offset, now)
            self._notice(event, offset, int(now * 1000))
            self._take(event, offset, now)
            self.accepted += 1
            answers.append(None)
        for other in others:
            self._take(other.event, other.offset, now)
        if self.arrivals:
            self.arrived.set()
        return answers

    def _take(self, event: Event, offset: int, now: float) -> None:
        """Have a durable event in its user's history, and wait for the learner."""
        self.histories.append(event, offset)
        if self.changes is not None:
            self.changes.add(event, offset)
        self.forgotten += len(self.arrivals) == MOST_ARRIVALS
        self.arrivals.append(Arrival(offset, now))
        self.last_offset = offset

    def _notice(self, event: Event, offset: int, now: int) -> None:
        """Whether it is one of a crowd of newcomers, before its user's history grows."""
        newcomer = len(self.histories.get(event.user_id, NEWCOMER_EVENTS)) < NEWCOMER_EVENTS
        if newcomer and self.guard.crowded(event, now) and self.config.cleaning.quarantine:
            self.quarantined.add(offset)

    async def get_histories(self, user_ids: Sequence[str]) -> list[History]:
        """The histories of many users, in one call a batch."""
        return [self.histories.get(user_id) for user_id in user_ids]

    async def board(self) -> str | None:
        """Where the board is, which replicas on this machine may read; None on a cluster of several."""
        return None if self.changes is None else str(self.changes.path.absolute())

    async def newer(
        self, users: Sequence[tuple[str, int | None]], item_revision: int
    ) -> tuple[list[History | None], list[ItemChange]]:
        """What a replica lacks: for each (user, last offset that it has, or None) the events that came since, None
        where none did; and the items that changed after a revision.
        """
        histories = [self.histories.newer(user_id, last_offset) for user_id, last_offset in users]
        return histories, self._item_changes(item_revision)

    def _item_changes(self, revision: int) -> list[ItemChange]:
        return self.items.after(revision) if self.items is not None and revision < self.items.revision else []

    async def change_items(self, items: Sequence[tuple[str, dict[str, Any] | None]]) -> int:
        """Make changed and deleted (None) items durable; they are in every answer that is asked for from then on.

        Returns their revision. A repeated call records the same again.
        """
        assert self.items is not None, "items are changed at the first shard"
        revision = self.items.append(items)
        if self.changes is not None:
            self.changes.mark_items()
        self.arrived.set()
        return revision

    async def users(self, limit: int) -> list[tuple[str, int]]:
        """Some users with the number of their events."""
        return [(user_id, len(self.histories.get(user_id))) for user_id in self.histories.users(limit)]

    async def latest_users(self) -> list[str]:
        """Who acted last, the latest first."""
        return self.histories.latest_users()

    async def next_batch(
        self, after: int, item_revision: int, sample: SampleSizes, wait_ms: int = 500, up_to: int | None = None
    ) -> MicroBatch | list[ItemChange] | None:
        """The next micro-batch beyond a log offset, when the trigger fires; None after `wait_ms` without it.

        Items that changed after a revision come first, alone and at once. With `up_to` no event beyond that offset, up
        to which the log is known to have come, is in the batch; it is empty where all of them were erased.
        """
        if not await self.wait_until_due(after, item_revision, wait_ms):
            return None
        if changes := self._item_changes(item_revision):
            return changes
        # the log can be ahead of the histories by what was committed a moment ago
        read = self.log.read(after, self.config.largest_batch)
        events = [logged for logged in read if logged.offset <= min(up_to or self.last_offset, self.last_offset)]
        if not events:
            return None if up_to is None else MicroBatch(up_to, [], [], [], [], [])
        batch = micro_batch(events, after, self.histories, sample, self.generator)
        self.quarantined = {offset for offset in self.quarantined if offset > after}
        return replace(batch, received_at=self._received_at(events), quarantined=frozenset(self.quarantined))

    async def wait_until_due(self, after: int, item_revision: int, wait_ms: int = 500) -> bool:
        """Whether there is something for the learner, waiting up to `wait_ms` for it."""
        self.learned_offset = after
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            while self.arrivals and self.arrivals[0].offset <= after:
                self.arrivals.popleft()
                self.forgotten = 0
            due = self._due(after)
            if due <= 0 or self._item_changes(item_revision):
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), min(due, remaining))
            except TimeoutError:
                continue

    def _due(self, after: int) -> float:
        """Seconds until the trigger fires, 0 or less when it has; infinite without pending events."""
        if self.last_offset <= after:
            return float("inf")
        if not self.arrivals or self.arrivals[0].offset > after + 1 or len(self.arrivals) >= self.config.trigger.events:
            return 0.0  # enough events, or some that came before this process started
        return self.arrivals[0].at + self.config.trigger.milliseconds / 1000 - time.monotonic()

    def _received_at(self, events: list[LoggedEvent]) -> list[int]:
        """When events came, in milliseconds as the clock is set now; of those before this process, as it was then."""
        released = takewhile(lambda arrival: arrival.offset <= events[-1].offset, self.arrivals)
        behind = time.time() - time.monotonic()
        arrived = {arrival.offset: int((arrival.at + behind) * 1000) for arrival in released}
        return [arrived.get(logged.offset, logged.received_at) for logged in events]

    async def status(self) -> AggregatorStatus:
        """Return counts since the start of this process, and the log's offsets."""
        return AggregatorStatus(
            state=self.state,
            shard=self.shard.number,
            process=os.getpid(),
            log_offset=self.last_offset,
            learned_offset=self.learned_offset,
            pending=self.forgotten + len(self.arrivals),
            events=self.accepted,
            duplicates=self.duplicates,
            rejected=self.rejected,
            noticed=self.guard.noticed,
            users=len(self.histories),
            commits=self.log.commits,
            item_revision=self.items.revision if self.items is not None else 0,
            damage=self.damage,
        )

    async def close(self) -> None:
        """Write what waits and close the log."""
        self.log.close()
        if self.items is not None:
            self.items.close()


def _rules_of(shard: Shard, rules: CleaningRules) -> CleaningRules:
    """What one shard goes by: it sees its part of a crowd."""
    return rules.model_copy(update={"crowd_users": ceil(rules.crowd_users / shard.count)})


def aggregator_handle(shard: Shard = ONLY) -> ActorHandle:
    """The running aggregator, of a shard where there are several.

    Raises:
        ValueError: none is running.
    """
    return ray.get_actor(shard.named(AGGREGATOR), namespace=NAMESPACE)


def start_aggregator(
    state: str,
    data: str | None,
    config: AggregatorConfig | None = None,
    shard: Shard = ONLY,
    layout: LogLayout | None = None,
) -> ActorHandle:
    """The running aggregator, started if need be; Ray restarts it whenever its process dies, and repeats calls."""
    actor: Any = ray.remote(Aggregator).options(
        name=shard.named(AGGREGATOR),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
        num_cpus=0.5,
    )
    return actor.remote(state, data, config, shard, layout)


NAMESPACE = "afterclick"  # of the actors
AGGREGATOR = "aggregator"
