"""The near-line learner as a long-lived actor: pull a micro-batch, learn, publish, push; again.

It yields to the replicas: lower priority, one thread, short steps, which several processes can share. Where a version
cannot be stored (a full disk), or an aggregator is away, it says so in its status and waits: nothing is pushed that a
restart would lose. Whatever goes wrong that it cannot handle ends the process, also while the state is opened; Ray
starts it again, and it continues from the registry, where weights, optimiser and log offset moved as one. Events,
a changed item or an offered model at which that happens again and again are set aside.
"""

import logging
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from lib.errors import InputError, origin_of
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.log.integrity import check_ends
from lib.log.items import ItemChange
from lib.log.layout import LogLayout
from lib.model.delta import Delta
from lib.versions.accounts import Accounts
from lib.versions.attempts import ITEM_ATTEMPT_FILE, Attempts
from lib.versions.registry import Registry
from serving.aggregator import NAMESPACE, aggregator_handle
from serving.batch_source import BatchSource, Released
from serving.learner_workers import LearnerWorkers, WorkerKilled, yield_to_replicas
from serving.rollout import LEARNER, Acknowledgements, PushCost, Rollout
from serving.status import (
    AggregatorStatus,
    FreshnessStatus,
    LearnerStatus,
    RejectionStatus,
    StoredVersionsStatus,
    Unavailable,
    UnknownItemsStatus,
)
from serving.watchdog import Watchdog

logger = logging.getLogger(__name__)
T = TypeVar("T")
ANNOUNCE_SECONDS = 1.0
OFFER_SECONDS = 2.0  # between two looks for a model that is to be taken over
RETRY_SECONDS = 0.05
PATIENCE_SECONDS, BASE_PATIENCE_SECONDS = 60.0, 900.0  # with replicas that do not get a version, or load a base
STORAGE_RETRY_SECONDS = 1.0
START_RETRY_SECONDS = 5.0  # until a learner that could not open its state ends, and is started again
SET_ASIDE_SHOWN = 3  # in the status, the newest
ASKED = "asked"  # calls that are answered at once, on threads of their own, however many rollbacks wait
GROUPS = {ASKED: 2}  # threads


class Waiting(NamedTuple):
    """What the learner waits for: storage or events."""

    what: str
    reason: str  # with the remedy


@dataclass
class Progress:
    """What the status says of the learner, besides its version."""

    pushes: int = 0
    loss: float | None = None  # of new events before they were learned, a running mean
    unreached: int = 0  # replicas that the newest push or announcement did not reach
    delays: deque[float] = field(default_factory=lambda: deque(maxlen=2000))  # ms, acknowledged to live everywhere
    delayed: int = 0
    steps: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=2000))  # of updates

    def freshness(self) -> FreshnessStatus | None:
        """Return the delays from an event's acknowledgement to its version live on all replicas."""
        delays = np.array(self.delays.copy())  # in one step, as another thread adds to it
        if not len(delays):
            return None
        median, slowest = np.quantile(delays, (0.5, 0.99)).tolist()
        return FreshnessStatus(last_ms=float(delays[-1]), p50_ms=median, p99_ms=slowest, count=self.delayed)

    def step_times(self) -> dict[str, float]:
        """Return what the latest updates took, for LearnerStatus (serving/status.py): the median and 99%."""
        steps = list(self.steps)  # in one step, as another thread adds to it
        if not steps:
            return {}
        names = list(steps[-1])
        columns = np.array([[step[name] for name in names] for step in steps])
        medians, slowest = np.quantile(columns, (0.5, 0.99), axis=0).tolist()
        return dict(zip(names, medians, strict=True)) | {
            f"{name}_p99": value for name, value in zip(names, slowest, strict=True)
        }


@dataclass(frozen=True)
class Live:
    """What is true of one moment of the learner; replaced as a whole, so that a status never mixes two."""

    version: int
    checksum: str
    base: int
    log_offset: int
    events_trained: int
    events_rejected: int
    rejected_updates: int
    last_rejection: RejectionStatus | None
    stored: StoredVersionsStatus
    unknown_items: UnknownItemsStatus
    set_aside_updates: int
    set_aside: list[RejectionStatus]

    @classmethod
    def of(cls, learner: NearlineLearner) -> "Live":
        """Return the learner's figures as they are now."""
        retention, unknown = learner.lineage.retention, learner.lineage.unknown_items
        newest, aside = learner.rejections.newest, learner.rejections.set_aside
        return cls(
            version=learner.version,
            checksum=learner.model.checksum,
            base=learner.lineage.base,
            log_offset=learner.log_offset,
            events_trained=learner.lineage.events_trained,
            events_rejected=learner.lineage.events_rejected,
            rejected_updates=len(learner.rejections),
            last_rejection=None if newest is None else RejectionStatus(**newest.facts()),
            stored=StoredVersionsStatus(bytes=retention.used, keep_bytes=retention.keep_bytes, pruned=retention.pruned),
            unknown_items=UnknownItemsStatus(waiting=len(unknown), rows=unknown.rows, refused=unknown.refused),
            set_aside_updates=len(aside),
            set_aside=[RejectionStatus(**each.facts()) for each in aside[-SET_ASIDE_SHOWN:]],
        )


class Learner:
    """The actor: one thread learns, the others answer what it is asked."""

    def __init__(self, state: str, config: LearnerConfig, workers: int = 1):
        """Store the arguments; the thread opens the state, as a constructor that fails is not called again."""
        yield_to_replicas()
        self.config = config
        self.state = state
        self.processes = workers
        self.stopping = threading.Event()
        self.started = threading.Event()  # or failed to
        self.failure: Exception | None = None  # why the state cannot be opened
        self.waiting: Waiting | None = None
        self.live: Live | None = None  # None until the state is open
        self.rollout = Rollout()
        self.progress = Progress()
        self.rollbacks: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self.announced = 0.0
        self.incomplete_since: float | None = None  # as long as some replica has not got the newest version
        self.stored_whole = 0  # the newest version that was, for replicas that could not catch up otherwise
        self.looked_for_offers = -OFFER_SECONDS
        self.learning: tuple[Attempts, int, int] | None = None  # behind which offset, and up to which, it learns now
        self.watchdog = Watchdog(config.stalled_seconds, self._stalled)
        self.thread = threading.Thread(target=self._run, name="learning", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._open()
            self.started.set()
            if self.learner.damage:
                logger.warning("learning goes on from version %d: %s", self.learner.version, self.learner.damage)
                self._store_whole()
            while not self.stopping.is_set():
                self._step()
            self.watchdog.rest()
        except Exception as error:
            if self.stopping.is_set():  # what was not stored is learned after the next start
                return
            logger.error("the learner ends and is started again:\n%s", traceback.format_exc())
            if not self.started.is_set():
                self.failure = error
                self.started.set()
                self.stopping.wait(START_RETRY_SECONDS)
            os._exit(1)

    def _open(self) -> None:
        """Load the newest version."""
        self.workers = LearnerWorkers(self.state, self.config, self._wait_for_storage, self.processes)
        self.learner = self.workers.first
        self.learner.lineage.before_snapshot = partial(self.watchdog.progress, BASE_PATIENCE_SECONDS)
        self.attempts = Attempts(self.learner.registry.store)
        self.item_attempts = Attempts(self.learner.registry.store, ITEM_ATTEMPT_FILE)
        self.batches = BatchSource(self.state)
        self.live = Live.of(self.learner)

    def _step(self) -> None:
        self.watchdog.progress(BASE_PATIENCE_SECONDS)
        self._roll_back()
        self._take_over()
        self.watchdog.rest()
        batch = self._next_batch()
        self.watchdog.progress()
        if isinstance(batch, MicroBatch):
            self._update(batch)
        elif batch is not None:
            self._change_items(batch)
        if time.monotonic() - self.announced > ANNOUNCE_SECONDS:
            acknowledgements = self.rollout.announce(self.learner.version)
            self._acknowledge(acknowledgements)
            self._help(acknowledgements)

    def _next_batch(self) -> Released:
        """Return what there is to learn; of events that failed before just those, to tell them from others."""
        learner = self.learner
        attempt = self.attempts.beyond(learner.log_offset)
        try:
            batch = self.batches.next(
                learner.log_offset,
                learner.item_revision,
                learner.sample_sizes,
                up_to=None if attempt is None else attempt.last_offset,
            )
        except OSError as error:  # the order of several shards' events could not be stored
            self._wait_for_storage(error)
            return None
        except (InputError, RayError, ValueError) as error:  # an aggregator cannot open its log, or there is none
            self._wait("events", f"no events can be had ({_cause(error)}); learning goes on once they can")
            return None
        self.waiting = None
        return batch

    def _change_items(self, changes: list[ItemChange]) -> None:
        """Take over changed items; those that were set aside are passed by, until they are changed again."""
        aside, attempt = self.learner.rejections.item_revisions, self.item_attempts.newest
        parts: list[list[ItemChange]] = [[], [], []]  # before what failed, which is tried apart, and behind it
        for change in changes:
            if change.revision not in aside:
                revision = change.revision
                later = 0 if attempt is None else (revision > attempt.after_offset) + (revision > attempt.last_offset)
                parts[later].append(change)
        for part in parts:
            if part:
                self._change_part(part)
        self.learner.item_revision = max(self.learner.item_revision, changes[-1].revision)
        self.live = Live.of(self.learner)

    def _change_part(self, part: list[ItemChange]) -> None:
        """Take over changed items; where several processes have failed at them, find the one to blame by halving."""
        attempts, revisions = self.item_attempts, [change.revision for change in part]
        after, store = revisions[0] - 1, self.learner.lineage.store
        attempt = attempts.beyond(after)
        if attempt is not None and attempt.is_last and len(part) > 1:
            half = len(part) // 2
            for some in (slice(None, half), slice(half, None)):
                narrowed = partial(attempts.narrow, revisions[some], attempt)
                store(narrowed)
                self._change_part(part[some])
            return
        if attempt is not None and attempt.is_last:
            what = f"the changed item {part[0].item_id!r}"
            logger.error("%s is set aside:\n%s", what, attempt.traceback)
            self.workers.set_aside_change(what, attempt.traceback, revisions[0])
            store(attempts.succeed)
            return
        delta = self._try(attempts, after, revisions[-1], lambda: self.workers.change_items(part))
        self.live = Live.of(self.learner)
        if delta is not None:
            self._push(delta)

    def _store_whole(self) -> None:
        """Store and push a version that loads without older files, for replicas that cannot read one of these."""
        self.watchdog.progress(BASE_PATIENCE_SECONDS)
        delta = self.workers.store_whole()
        self.live, self.stored_whole = Live.of(self.learner), delta.version
        self._push(delta)

    def _help(self, acknowledgements: Acknowledgements) -> bool:
        """Store the newest version whole, once, if a replica cannot catch up otherwise; returns whether it was done."""
        version = self.learner.version
        if self.stored_whole >= version or not acknowledgements.behind(version):
            return False
        self._store_whole()
        return True

    def _wait_for_storage(self, error: OSError) -> None:
        """Report that a version could not be stored, and return when it is time to try again."""
        self._wait("storage", f"a version cannot be stored ({error}); make room in {self.state}, and learning goes on")
        if self.stopping.is_set():
            raise error

    def _wait(self, what: str, reason: str) -> None:
        self.waiting = Waiting(what, reason)
        logger.error(reason)
        self.stopping.wait(STORAGE_RETRY_SECONDS)
        self.watchdog.progress()

    def _update(self, batch: MicroBatch) -> None:
        start = time.perf_counter()
        now, adopted = time.time_ns() / 1e6, self.learner.lineage.facts.adopted
        # what came before the present base was taken over was live once already
        waited = [now - received for received in batch.received_at if received > adopted]
        outcome = self._learn(batch)
        self.live = Live.of(self.learner)
        if isinstance(outcome, Rejection):
            self._reject(outcome)
            return
        learned = time.perf_counter()
        cost, everywhere = self._push(outcome)
        pushed = time.perf_counter()
        times = {"learn_ms": (learned - start) * 1e3, "push_ms": (pushed - learned) * 1e3}
        self.progress.steps.append(times | asdict(cost))
        if everywhere:
            # a clock that was set meanwhile changes neither part by more than it must
            self.progress.delays.extend(max(before, 0.0) + (pushed - start) * 1e3 for before in waited)
            self.progress.delayed += len(waited)
        loss = outcome.facts.loss
        if loss is not None:
            previous = self.progress.loss
            self.progress.loss = loss if previous is None else 0.95 * previous + 0.05 * loss

    def _learn(self, batch: MicroBatch) -> Delta | Rejection:
        """Learn a micro-batch, or set it aside where several processes have failed at it.

        Raises:
            Exception: learning raised it, and it is recorded.
        """
        after = self.learner.log_offset
        attempt = self.attempts.beyond(after)
        if attempt is None or not attempt.is_last:
            return self._try(self.attempts, after, batch.last_offset, lambda: self.workers.learn(batch))
        outcome = self.workers.set_aside(batch, attempt.traceback)
        logger.error("%s; %d events are set aside:\n%s", outcome.reason, batch.events, attempt.traceback)
        self.learner.lineage.store(self.attempts.succeed)
        self.attempts.proven = True
        return outcome

    def _try(self, attempts: Attempts, after: int, last: int, learn: Callable[[], T]) -> T:
        """Learn what is beyond an offset, or a revision, up to another, and have it counted where that fails.

        Raises:
            Exception: learning raised it, and it is recorded.
        """
        store, before = self.learner.lineage.store, attempts.newest
        # what comes before the items that failed leaves their record as it is
        begun = before is not None or not attempts.proven
        apart = attempts is self.item_attempts and before is not None and attempts.beyond(after) is None
        if begun and not apart:
            store(lambda: attempts.begin(after, last))
        self.learning = attempts, after, last
        try:
            outcome = learn()
        except OSError:  # the storage's: what is learned is not to blame
            if begun and not apart:
                store(attempts.take_back)
            raise
        except WorkerKilled:
            store(lambda: attempts.killed(after, last))
            raise
        except Exception:
            error = traceback.format_exc()
            store(lambda: attempts.fail(after, last, error))
            raise
        self.learning = None
        if not apart:
            store(attempts.succeed)
            attempts.proven = True
        return outcome

    def _stalled(self, stack: str) -> None:
        """Record where learning stalled, if it did there."""
        if self.learning is not None:
            attempts, after, last = self.learning
            attempts.fail(after, last, f"{stack}no progress for {self.config.stalled_seconds:g} s")

    def _push(self, delta: Delta) -> tuple[PushCost, bool]:
        """Send a delta and see it live on every replica; returns what that took, and False where none is alive."""
        self.waiting = None
        acknowledgements, cost = self.rollout.push(delta)
        return cost, self._until_everywhere(acknowledgements)

    def _until_everywhere(self, acknowledgements: Acknowledgements, patience: float = PATIENCE_SECONDS) -> bool:
        """See the newest version live on every replica; returns False where none is alive.

        A replica that is busy, or loads a base, is waited for. One that cannot have it, its disk being away, holds
        learning up for `patience` seconds, and then no more until all of them were reached again.
        """
        version = self.learner.version
        self._acknowledge(acknowledgements)
        while not (acknowledgements.nobody or acknowledgements.all_at(version) or self.stopping.is_set()):
            self.watchdog.progress()
            now = time.monotonic()
            self.incomplete_since = self.incomplete_since or now
            if now - self.incomplete_since > patience:
                logger.warning("version %d is not live on %d replicas", version, acknowledgements.lacking(version))
                break
            if self._help(acknowledgements):
                break
            # one that died is soon no longer counted among the live; one that was busy catches up
            time.sleep(RETRY_SECONDS)
            acknowledgements = self.rollout.announce(version)
            self._acknowledge(acknowledgements)
        self.progress.pushes += 1
        if acknowledgements.nobody or acknowledgements.all_at(version):
            self.incomplete_since = None
        return acknowledgements.all_at(version)

    def _acknowledge(self, acknowledgements: Acknowledgements) -> None:
        self.progress.unreached = acknowledgements.unreached
        self.announced = time.monotonic()

    def _reject(self, rejection: Rejection) -> None:
        logger.warning("update with %d events rejected: %s", rejection.events, rejection.reason)
        if rejection.delta is not None:
            self._push(rejection.delta)

    def _roll_back(self) -> None:
        while not self.rollbacks.empty():
            version, outcome = self.rollbacks.get()
            try:
                delta = self.workers.restore(version)
            except InputError as error:
                outcome.set_result({"error": str(error)})
                continue
            if delta is not None:
                self.live = Live.of(self.learner)
                self._push(delta)
            else:
                self._announce_base()
            outcome.set_result({"model_version": self.learner.version, "restored": version})

    def _take_over(self) -> None:
        """Make a model that was offered the next version; the offer goes when every replica has it.

        After a crash the offer is still there: the newest version says whether it was taken over before.
        """
        if time.monotonic() - self.looked_for_offers < OFFER_SECONDS:
            return
        self.looked_for_offers = time.monotonic()
        registry = self.learner.registry
        for name in registry.offers.names():
            if self.learner.lineage.facts.offer != name:
                try:
                    if not self._adopt_offer(name):
                        continue
                except InputError as error:
                    logger.error("the offered model %s cannot be taken over: %s", name, error)
                    registry.offers.withdraw(name)
                    continue
            self._announce_base()
            registry.offers.withdraw(name)

    def _adopt_offer(self, name: str) -> bool:
        """Take a model over, or set it aside where several processes have failed at it; returns whether it is live.

        Raises:
            InputError: it cannot be taken over, whatever is tried.
        """
        offers = self.learner.registry.offers
        attempts = offers.attempts(name)
        attempt = attempts.newest
        if attempt is not None and attempt.is_last:
            what = f"the offered model {name}"
            logger.error("%s is set aside:\n%s", what, attempt.traceback)
            self.workers.set_aside_change(what, attempt.traceback)
            self.live = Live.of(self.learner)
            offers.withdraw(name)
            return False

        def take_over() -> InputError | None:
            try:
                self.workers.take_over(name)
            except InputError as error:
                return error
            return None

        refusal = self._try(attempts, 0, 0, take_over)
        if refusal is not None:
            raise refusal
        return True

    def _announce_base(self) -> None:
        """Have every replica load a version that no delta leads to."""
        self.live, self.waiting = Live.of(self.learner), None
        self.incomplete_since = None
        self._until_everywhere(self.rollout.announce(self.learner.version), BASE_PATIENCE_SECONDS)

    def rollback(self, version: int) -> dict[str, Any]:
        """Bring a stored version's weights back; answers when every replica has them."""
        outcome: Future = Future()
        self.rollbacks.put((version, outcome))
        return outcome.result()

    @ray.method(concurrency_group=ASKED)
    def ping(self) -> None:
        """Answer, as long as the process can."""

    @ray.method(concurrency_group=ASKED)
    def status(self) -> LearnerStatus | Unavailable:
        """Return version, counts and delays; why there are none until the state is open."""
        if self.live is None:
            failure = self.failure
            return Unavailable(
                state="starting" if failure is None else f"cannot start ({_cause(failure)}), and is started again"
            )
        waiting, costs = self.waiting, cast("dict[str, Any]", self.progress.step_times())
        return LearnerStatus(
            state="running" if waiting is None else f"waiting for {waiting.what}",
            storage_error=None if waiting is None else waiting.reason,
            damage=self.learner.damage,
            **vars(self.live),
            pushes=self.progress.pushes,
            loss=self.progress.loss,
            unreached_replicas=self.progress.unreached,
            freshness=self.progress.freshness(),
            **costs,
            workers=1 + len(self.workers.others),
            process=os.getpid(),
        )

    def wait_until_started(self) -> LearnerStatus:
        """Return the status once the state is open.

        Raises:
            Exception: why it cannot be opened.
        """
        self.started.wait()
        if self.failure is not None:
            raise self.failure
        status = cast("Any", self.status)()  # Ray's type of a method in a group is not that of a method
        assert isinstance(status, LearnerStatus)
        return status

    def stop(self) -> None:
        """Finish the update at hand, then learn no more."""
        self.stopping.set()
        self.thread.join(timeout=10)


def _cause(error: BaseException) -> str:
    """Return what an error says in one line."""
    origin = origin_of(error)
    return " ".join(f"{origin}".split()) or type(origin).__name__


def start_learner(state: str, config: LearnerConfig | None = None, workers: int = 1) -> ActorHandle:
    """Start the learner if none runs; Ray restarts it whenever its process dies."""
    actor: Any = cast("Any", ray.remote)(concurrency_groups=GROUPS)(Learner).options(
        name=LEARNER,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=8,
        num_cpus=0.5,
    )
    return actor.remote(state, config or LearnerConfig(), workers)


def aggregators_of(state: str) -> list[ActorHandle]:
    """Return those that run, in the order of the shards.

    Raises:
        InputError: none does.
    """
    try:
        return [aggregator_handle(shard) for shard in LogLayout.of(state).shards()]
    except ValueError:
        raise InputError("model: nothing serves it here yet; begin with `serve deploy cluster/serve.yaml`") from None


def check_logs(state: str, statuses: Sequence[AggregatorStatus]) -> None:
    """Refuse to learn from aggregators of these statuses if their logs end before what versions have learned of them.

    Raises:
        InputError: they do.
    """
    check_ends(state, Accounts(Registry.of(state)).log_offset(), [status.log_offset for status in statuses])
