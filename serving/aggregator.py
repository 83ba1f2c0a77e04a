"""The feedback aggregator: events in, durable; histories out; micro-batches to the learner.

There is one actor a cluster, or one for each shard of the users (lib/log/shard.py). The way of an event: cleaning, log
(fsync), history, acknowledgement; then it is pending until the trigger (AggregatorConfig.trigger) releases a
micro-batch. After a crash the histories are read again from the dataset and the log.
"""

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

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
from lib.errors import EventRejected, InputError
from lib.live.micro_batch import MicroBatch, SampleSizes, micro_batch
from lib.log.board import ChangeBoard
from lib.log.errors import LogUnavailable, LogWriteError
from lib.log.integrity import check_end
from lib.log.items import ItemChange, ItemLog
from lib.log.layout import ITEM_LOG_FILE, LogLayout
from lib.log.log_file import LoggedEvent, key_of
from lib.log.one_machine import on_one_machine
from lib.log.shard import ONLY, Shard
from lib.settings import Settings
from serving.learned_end import LearnedEnd
from serving.request_id import names_answer
from serving.status import AggregatorStatus
from serving.watchdog import Watchdog

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
NAMESPACE = "afterclick"  # of the actors
AGGREGATOR = "aggregator"
BOARD_FILE = "changes"
DUPLICATE = "duplicate"
UNKNOWN_REQUEST = "unknown_request_id"  # an event names an answer that there never was
FOREIGN = "foreign_message"  # among the reasons of refused events: messages of other programs in the log
MOST_ARRIVALS = 100_000  # pending events whose times of arrival are kept
DATASET_ROWS = 100_000  # of a dataset that are Python objects at once
MOST_CHANGES = 1000  # of items that one call returns
RETRY_SECONDS = 1.0  # after the log could not be opened
NEWCOMER_EVENTS = 5  # a user with fewer in the history is a newcomer
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
    stalled_seconds: float = Field(
        default=60.0, gt=0, description="that an append, or anything else, may take until the process is started again"
    )
    seed: int = Field(default=0, ge=0, description="of the replay sample")


class Arrival(NamedTuple):
    """A pending event: one that is not yet released to the learner."""

    offset: int
    at: float  # when it came, in seconds of a monotonic clock


def when_open(
    method: Callable[Concatenate["Aggregator", Arguments], Awaitable[Result]],
) -> Callable[Concatenate["Aggregator", Arguments], Coroutine[Any, Any, Result]]:
    """Have a method open the log first; it raises LogUnavailable where that cannot be done now."""

    @wraps(method)
    async def opened(self: "Aggregator", *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if not self.is_open:
            await self.open()
        return await method(self, *arguments, **named)

    return opened


class Aggregator:
    """Owns the log and the histories of its shard; the first one owns the changes of items, too.

    Elapsed time is monotonic: setting the clock neither stalls the trigger nor makes anybody a flood.
    """

    def __init__(
        self,
        state: str,
        data: str | None = None,
        config: AggregatorConfig | None = None,
        shard: Shard = ONLY,
        layout: LogLayout | None = None,
    ):
        """Store the arguments; the first call opens the log, as a constructor that fails is not called again."""
        self.config = config or AggregatorConfig()
        self.state = state
        self.data = data
        self.shard = shard
        self.layout = layout  # that the service has begun; None: the log is begun here
        self.is_open = False
        self.opening = asyncio.Lock()
        self.failure: Exception | None = None  # why the log could not be opened
        self.failed_at = 0.0
        self.refusal: InputError | None = None  # why the log must not be written to, for good
        self.learned_end = LearnedEnd(state, shard)
        self.appending: list[float] = []  # when each append began that has not finished, the oldest first
        self.guard = FeedbackGuard(_rules_of(shard, self.config.cleaning))
        self.writing: Counter[bytes] = Counter()  # keys of the events that the log is about to have
        self.quarantined: set[int] = set()  # offsets of events that the learner has yet to skip
        self.rejected: Counter[str] = Counter()
        self.accepted = 0
        self.duplicates = 0
        # pending events; of more than that the oldest are forgotten here, and read from the log
        self.arrivals: deque[Arrival] = deque(maxlen=MOST_ARRIVALS)
        self.forgotten = 0  # of the arrivals
        self.learned_offset = 0  # the highest that the learner has asked for events beyond
        self.arrived = asyncio.Event()
        self.generator = np.random.default_rng(self.config.seed)

    async def open(self) -> None:
        """Open the log, unless it is open; every other method does so first.

        Raises:
            LogUnavailable: it cannot be opened now; a call after RETRY_SECONDS tries again.
        """
        async with self.opening:
            if self.is_open:
                return
            if self.refusal is None and (self.failure is None or time.monotonic() > self.failed_at + RETRY_SECONDS):
                try:
                    await asyncio.to_thread(self._open, await self.learned_end.read())
                    self.watching = asyncio.create_task(self._watch())
                    self.checking = asyncio.create_task(self._check_end(self.last_offset))
                    return
                except Exception as error:  # whatever it is, a disk that comes back may mend it
                    self.failure, self.failed_at = error, time.monotonic()
                    logger.exception("the log of %s cannot be opened; it is tried again", self.state)
            raise LogUnavailable(str(self.failure) or repr(self.failure)) from self.failure

    async def _check_end(self, end: int) -> None:
        """Close the log for good if it was opened at an end before what was learned, once that can be known."""
        while self.learned_end.unknown is not None:
            await asyncio.sleep(RETRY_SECONDS)
            if (learned := await self.learned_end.read()) is None:
                continue
            try:
                check_end(self.state, learned, self.shard, end)
            except InputError as error:
                logger.error("no events are taken any more: %s", error)
                self.failure = self.refusal = error
                await self.close()
                self.is_open = False

    def _open(self, learned: int | None) -> None:
        """Open the log that was begun, and read the histories; what was opened is closed where something fails.

        `learned` is the offset that the log has to reach; None where it is not known yet.
        """
        folder = Path(self.state)
        with ExitStack() as opened:
            layout = self.layout or LogLayout()
            if self.layout is None:
                layout.begin(folder)
            layout.require(folder, self.shard)
            self.log = layout.open(folder, self.shard)
            opened.callback(self.log.close)
            check_end(folder, learned or 0, self.shard, self.log.last_offset())
            self.items = ItemLog(folder / ITEM_LOG_FILE) if self.shard.number == 0 else None
            if self.items is not None:
                opened.callback(self.items.close)
            self.histories = UserHistories(self.config.keep_events, self.config.cleaning.lateness_ms)
            if self.data is not None:
                self._read_dataset(self.data)
            for logged in self.log.replay():
                self.histories.append(logged.event, logged.offset)
            self.last_offset = self.log.last_offset()
            self.damage = [TORN.format(log.path) for log in (self.log, self.items) if log is not None and log.torn]
            board = folder / self.shard.named(BOARD_FILE)  # its own, as counters have one writer
            self.changes = ChangeBoard.create(board) if on_one_machine() else None
            opened.pop_all()
        self.is_open = True

    async def _watch(self) -> None:
        """Report that calls are answered, as long as they are and no append waits for too long."""
        watchdog = Watchdog(self.config.stalled_seconds)
        try:
            while not self.appending or time.monotonic() - self.appending[0] < self.config.stalled_seconds:
                watchdog.progress()
                await asyncio.sleep(self.config.stalled_seconds / 10)
            watchdog.end("the log does not finish an append")
        finally:
            watchdog.rest()

    def _read_dataset(self, data: str) -> None:
        """Begin with the histories of a dataset, which were there before the first live event."""
        table = read_events(data)
        oldest_first = table.take(pa.array(np.argsort(table["timestamp"].to_numpy(), kind="stable")))
        for batch in oldest_first.to_batches(DATASET_ROWS):
            for event in events_of(pa.Table.from_batches([batch])):
                if self.shard.has(event.user_id):
                    self.histories.append(event)

    @when_open
    async def append(
        self, events: Sequence[Event], named: Collection[str] = (), reject: Counter[str] | None = None
    ) -> list[str | None]:
        """Make events durable and part of the histories.

        Args:
            events: of users of this shard.
            named: the ids that a replica gave to events without any identity. Such an event is new: one that is in the
                log already means that this call is repeated after a crash, and that the first had succeeded.
            reject: the number of events that the replica rejected already, by reason.

        Returns:
            For each event None, or why it was not taken.

        Raises:
            LogWriteError: none of them could be written.
        """
        self.rejected.update(reject or {})
        now = time.monotonic()
        keys = [key_of(event) for event in events]
        objections = self._objections(events, keys, now)
        kept = [event for event, objection in zip(events, objections, strict=True) if objection is None]
        writing = Counter(key for key, objection in zip(keys, objections, strict=True) if objection is None)
        self.writing += writing
        self.appending.append(now)
        try:
            result = await asyncio.wrap_future(self.log.append(kept)) if kept else None
        except LogWriteError:
            for event in events:  # who sends again what was not taken is no flood
                self.guard.take_back(event)
            raise
        finally:
            self.writing -= writing
            self.appending.remove(now)
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
            if event.request_id is not None and not names_answer(event.request_id):
                self.guard.noticed[UNKNOWN_REQUEST] += 1
            self._take(event, offset, now)
            self.accepted += 1
            answers.append(None)
        for other in others:
            self._take(other.event, other.offset, now)
        if self.arrivals:
            self.arrived.set()
        return answers

    def _objections(self, events: Sequence[Event], keys: Sequence[bytes], now: float) -> list[EventRejected | None]:
        """Return the guard's objection to each event, None to one that the log has or is about to have: a duplicate."""
        try:
            known = self.log.known(keys)
        except InputError:  # the log cannot be read: whoever writes to it says why
            known = set()
        clock, elapsed = int(time.time() * 1000), int(now * 1000)
        objections: list[EventRejected | None] = []
        for event, key in zip(events, keys, strict=True):
            objection = None
            if key not in known and key not in self.writing:
                objection = self.guard.objection(event, elapsed, clock - event.timestamp)
            if objection is None:
                known.add(key)
            objections.append(objection)
        return objections

    def _take(self, event: Event, offset: int, now: float) -> None:
        """Add a durable event to its user's history and to the pending ones."""
        self.histories.append(event, offset)
        if self.changes is not None:
            self.changes.add(event, offset)
        self.forgotten += len(self.arrivals) == MOST_ARRIVALS
        self.arrivals.append(Arrival(offset, now))
        self.last_offset = offset

    def _notice(self, event: Event, offset: int, now: int) -> None:
        """Count an event of a newcomer, and quarantine one of a crowd, before its user's history grows."""
        newcomer = len(self.histories.get(event.user_id, NEWCOMER_EVENTS)) < NEWCOMER_EVENTS
        if newcomer and self.guard.crowded(event, now) and self.config.cleaning.quarantine:
            self.quarantined.add(offset)

    @when_open
    async def get_histories(self, user_ids: Sequence[str]) -> list[History]:
        """Return the histories of many users: one call for a batch of requests."""
        return [self.histories.get(user_id) for user_id in user_ids]

    @when_open
    async def board(self) -> str | None:
        """Return where the board is that replicas on this machine may read; None on a cluster of several machines."""
        return None if self.changes is None else str(self.changes.path.absolute())

    @when_open
    async def newer(
        self, users: Sequence[tuple[str, int | None]], item_revision: int
    ) -> tuple[list[History | None], list[ItemChange]]:
        """Return what a replica lacks.

        Args:
            users: each with the last offset of the replica's copy of the history, None where it has no copy.
            item_revision: the newest change of items that the replica knows.

        Returns:
            For each user the newer events, None where there are none; and the first MOST_CHANGES changes of items after
            the revision.
        """
        histories = [self.histories.newer(user_id, last_offset) for user_id, last_offset in users]
        return histories, await self._item_changes(item_revision)

    def _has_item_changes(self, revision: int) -> bool:
        return self.items is not None and revision < self.items.revision

    async def _item_changes(self, revision: int) -> list[ItemChange]:
        """Return the first MOST_CHANGES items that changed after a revision; others are answered meanwhile."""
        if self.items is None or not self._has_item_changes(revision):
            return []
        return await asyncio.to_thread(self.items.after, revision, MOST_CHANGES)

    @when_open
    async def change_items(
        self, items: Sequence[tuple[str, dict[str, Any] | None]], served: Mapping[str, str] | None = None
    ) -> int | str:
        """Make changed and deleted (None) items durable; return their revision, or why they are refused.

        They are in every answer to a request that comes after this call. A repeated call records the same again.
        `served` are the kinds of these attributes in the catalog that the caller serves (ItemLog.append).
        """
        assert self.items is not None, "items are changed at the first shard"
        began = time.monotonic()
        self.appending.append(began)
        try:
            revision = await asyncio.to_thread(self.items.append, items, served)
        except InputError as refusal:  # raised here, it would reach the caller with a traceback in its text
            return str(refusal)
        finally:
            self.appending.remove(began)
        if self.changes is not None:
            self.changes.mark_items()
        self.arrived.set()
        return revision

    @when_open
    async def users(self, limit: int) -> list[tuple[str, int]]:
        """Return the `limit` users who acted last (1,024 at most), the latest first, with the number of events."""
        return [(user_id, len(self.histories.get(user_id))) for user_id in self.histories.latest_users()[:limit]]

    @when_open
    async def latest_users(self) -> list[str]:
        """Return who acted last, the latest first."""
        return self.histories.latest_users()

    @when_open
    async def next_batch(
        self, after: int, item_revision: int, sample: SampleSizes, wait_ms: int = 500, up_to: int | None = None
    ) -> MicroBatch | list[ItemChange] | None:
        """Return the next micro-batch once the trigger fires, or at once the items that changed after a revision.

        Args:
            after: the log offset beyond which the batch begins.
            item_revision: the newest change of items that the learner knows.
            sample: what the learner wants with the new events.
            wait_ms: milliseconds to wait for the trigger.
            up_to: a log offset, known to be given, that no event of the batch may exceed; the batch is empty where all
                events up to it were erased.

        Returns:
            The batch, or changes of items alone; None where nothing came in time.
        """
        if not await self.wait_until_due(after, item_revision, wait_ms):
            return None
        if changes := await self._item_changes(item_revision):
            return changes
        # the log can be ahead of the histories by what was committed a moment ago
        read = await asyncio.to_thread(self.log.read, after, self.config.largest_batch)
        events = [logged for logged in read if logged.offset <= min(up_to or self.last_offset, self.last_offset)]
        if not events:
            return None if up_to is None else MicroBatch(up_to, [], [], [], [], [])
        batch = micro_batch(events, after, self.histories, sample, self.generator)
        self.quarantined = {offset for offset in self.quarantined if offset > after}
        return replace(batch, received_at=self._received_at(events), quarantined=frozenset(self.quarantined))

    @when_open
    async def wait_until_due(self, after: int, item_revision: int, wait_ms: int = 500) -> bool:
        """Return whether there is something for the learner; wait up to `wait_ms` for it."""
        self.learned_offset = after
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            while self.arrivals and self.arrivals[0].offset <= after:
                self.arrivals.popleft()
                self.forgotten = 0
            due = self._due(after)
            if due <= 0 or self._has_item_changes(item_revision):
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
        """Return the seconds until the trigger fires, 0 or less when it has; infinity without pending events."""
        if self.last_offset <= after:
            return float("inf")
        if not self.arrivals or self.arrivals[0].offset > after + 1 or len(self.arrivals) >= self.config.trigger.events:
            return 0.0  # enough events, or some that came before this process started
        return self.arrivals[0].at + self.config.trigger.milliseconds / 1000 - time.monotonic()

    def _received_at(self, events: list[LoggedEvent]) -> list[int]:
        """Return when events came, in milliseconds since 1970; the log says it of those of an earlier process."""
        released = takewhile(lambda arrival: arrival.offset <= events[-1].offset, self.arrivals)
        behind = time.time() - time.monotonic()
        arrived = {arrival.offset: int((arrival.at + behind) * 1000) for arrival in released}
        return [arrived.get(logged.offset, logged.received_at) for logged in events]

    @when_open
    async def status(self) -> AggregatorStatus:
        """Return counts since the start of this process, and the log's offsets."""
        passed_over, unknown = self.log.passed_over, self.learned_end.unknown
        return AggregatorStatus(
            state=self.state,
            shard=self.shard.number,
            process=os.getpid(),
            log_offset=self.last_offset,
            learned_offset=self.learned_offset,
            pending=self.forgotten + len(self.arrivals),
            events=self.accepted,
            duplicates=self.duplicates,
            rejected=self.rejected + Counter({FOREIGN: passed_over.count}),
            noticed=self.guard.noticed,
            users=len(self.histories),
            commits=self.log.commits,
            item_revision=self.items.revision if self.items is not None else 0,
            damage=[*self.damage, *([] if unknown is None else [unknown]), *passed_over.newest],
        )

    async def ping(self) -> None:
        """Answer, as long as the process can: also while the log is opened."""

    async def close(self) -> None:
        """Write what waits and close the log."""
        if not self.is_open:
            return
        self.log.close()
        if self.items is not None:
            self.items.close()


def _rules_of(shard: Shard, rules: CleaningRules) -> CleaningRules:
    """Return the rules of one shard, which sees its part of a crowd alone."""
    return rules.model_copy(update={"crowd_users": ceil(rules.crowd_users / shard.count)})


def aggregator_handle(shard: Shard = ONLY) -> ActorHandle:
    """Return the running aggregator, of a shard where there are several.

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
    """Return the running aggregator, started if need be.

    Ray restarts it whenever its process dies, and repeats the calls that it did not answer.
    """
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
