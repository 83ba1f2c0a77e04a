"""The deployment that answers: HTTP, histories, encoder and index in one process, a batch at a time.

Requests that arrive while a batch runs form the next one; an idle replica answers at once. A batch is computed in the
event loop: on a thread of its own it would ask for the interpreter some forty times, and a replica that is refusing a
thousand requests a second would hardly answer any. Pushed deltas and catch-ups, which may take long, have a thread; a
lock keeps them and the batches apart, so every answer is of one version.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from lib.data.guard import CleaningRules
from lib.data.history import History
from lib.errors import InputError
from lib.log.items import ItemChange
from lib.log.layout import LogLayout
from lib.model.delta import Delta, DeltaMismatch
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, RankedItem, Recommender
from lib.ranking.rules import RankingRules
from lib.retrieval.index import use_threads
from lib.versions.registry import Registry
from serving.aggregator import AggregatorConfig
from serving.aggregators import Aggregators
from serving.batches import Batches, Overloaded
from serving.challenger import Answer, Challenger, load_challenger
from serving.decision_log import DecisionLog
from serving.errors import DeadlineMissed
from serving.experiment import PreparedChallenger, experiments_handle
from serving.fast_path import FastPath
from serving.history_cache import HistoryCache, last_offsets
from serving.http import http_application
from serving.rollout import APPLICATION, DEPLOYMENT, learner_handle

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds
WARMED_TOGETHER = 32  # users whose histories are fetched in one call: no one else waits for long
Asked = tuple[Question, str | None]  # the user id for whose history it is, if it does not come with the question
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaConfig:
    """How one replica works."""

    largest_batch: int = 32
    longest_wait: float = 1.0  # seconds; who would wait longer for an answer is told at once to try again
    threads: int = 1  # of torch and FAISS
    cached_users: int = 20_000  # whose histories are kept here
    cached_events: int = AggregatorConfig().keep_events  # of each of them
    actor_timeout: float = 20.0  # seconds to wait for the aggregator to come back before answering 503


class Recommendations:
    """One replica (serving/app.py makes it a deployment)."""

    def __init__(
        self,
        state: str,
        data: str | None,
        config: ReplicaConfig | None = None,
        rules: RankingRules | None = None,
        cleaning: CleaningRules | None = None,
        layout: LogLayout | None = None,
        challenger: PreparedChallenger | None = None,
    ):
        self.config = config or ReplicaConfig()
        self.rules = rules or RankingRules()
        use_threads(self.config.threads)
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.registry = Registry(state)
        explores = self.rules.exploration_temperature > 0
        self.decisions = DecisionLog(state, self.replica_id) if explores else None
        self.cleaning = cleaning or CleaningRules()
        aggregator = AggregatorConfig(cleaning=self.cleaning)
        self.aggregators = Aggregators(state, data, aggregator, layout or LogLayout(), self.config.actor_timeout)
        self.cache = HistoryCache(self.config.cached_users, self.config.cached_events)
        self.item_changes: dict[str, dict[str, Any] | None] = {}  # that were made while live; None: deleted
        self.item_revision = 0  # the newest of them
        self.items_counter: int | None = None  # of changes, before those of the catalog were asked for
        self.answers: Batches[Asked, Answer] = Batches(self._answer, self.config.largest_batch)
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="changes")
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self.loading = asyncio.Lock()  # held while a version is loaded beside the one that answers
        self.unchanging = asyncio.Lock()  # held by whoever reads or changes the recommender
        self.counts: Counter[str] = Counter()
        self.latency: Counter[float] = Counter()
        self.latency_sum = 0.0
        self.recommender = self._load({})
        self.experiment = None if challenger is None else challenger.name
        self.challenger = None if challenger is None else self._load_challenger(state, challenger)
        self.checked = False
        self.tasks: list[asyncio.Task] = []

    async def check_health(self) -> None:
        """Serve's health check, the first of which comes before the first request: catch up until then."""
        if not self.checked:
            await self.expect_version(self.registry.head() or 0)
            await self.aggregators.open_boards()
            self.tasks = [asyncio.create_task(self.answers.watch()), asyncio.create_task(self._warm_up())]
            if self.challenger is not None and not await self.challenger.tell():  # it was decided on before
                self.challenger = None
            if self.challenger is not None:
                self.tasks.append(asyncio.create_task(self._run_challenger(self.challenger)))
            self.checked = True

    def __serve_build_asgi_app__(self) -> FastPath:
        """Serve asks for the HTTP application once the replica is ready."""
        return http_application(self)

    def _load(self, item_changes: Mapping[str, Mapping[str, Any] | None]) -> Recommender:
        loaded = self.registry.load()
        for damage in loaded.damage:
            logger.warning("version %d is the newest whole one: %s", loaded.version, damage)
        recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset, self.rules)
        recommender.change_items(item_changes)
        return recommender

    def _load_challenger(self, state: str, prepared: PreparedChallenger) -> Challenger | None:
        """A challenger whose files were damaged meanwhile takes no replica with it."""
        try:
            return load_challenger(state, prepared, self.rules)
        except InputError as error:
            logger.error("the challenger cannot be loaded, so the live model answers its users, too: %s", error)
            return None

    # ------------------------------------------------------------------------------------------- the batched answer

    async def ask(self, question: Question, user_id: str | None = None, deadline: float | None = None) -> Answer:
        """The version and the ranked items for one person, within `deadline` seconds if there is one.

        Raises:
            Overloaded: the answer would take longer than ReplicaConfig.longest_wait.
            DeadlineMissed: it would take longer than the deadline, or did.
        """
        longest = self.config.longest_wait if deadline is None else min(deadline, self.config.longest_wait)
        try:
            self.answers.admit(longest)
            async with asyncio.timeout(deadline):
                return await self.answers.submit((question, user_id))
        except (Overloaded, TimeoutError) as error:
            self.counts["refused"] += 1
            if deadline is not None and (isinstance(error, TimeoutError) or error.wait > deadline):
                raise DeadlineMissed(deadline) from error
            raise

    async def _answer(self, asked: list[Asked]) -> list[Answer]:
        """One batch: read what is new, then encode, retrieve and rank."""
        histories = await self._read({user_id for _, user_id in asked if user_id is not None})
        questions = [
            question if user_id is None else question._replace(history=histories[user_id])
            for question, user_id in asked
        ]
        async with self.unchanging:
            if self.challenger is not None:
                return self.challenger.answer(self.recommender, questions, [user_id for _, user_id in asked])
            version = self.recommender.version
            return [Answer(version, items) for items in self.recommender.recommend(questions)]

    async def _read(self, user_ids: Set[str]) -> dict[str, History]:
        """These users' histories, and the changes of the catalog, as the aggregators have them now.

        One call to each that is concerned, or none where the boards say that nothing has changed.
        """
        self.cache.take(self.aggregators.news())
        counters, items = self.aggregators.counters(user_ids), self.aggregators.items_counter()
        histories, lacking = self.cache.split(user_ids, counters)
        items_known = items is not None and items == self.items_counter
        if not lacking and items_known:
            return histories
        newer, changes = await self.aggregators.newer(last_offsets(lacking), self.item_revision, not items_known)
        if changes:
            await self.on_thread(self._change_items, changes)
        self.items_counter = items
        return histories | self.cache.update(lacking, newer, counters)

    async def _warm_up(self) -> None:
        """Have copies of those who acted last, so that their first question takes no longer than the next."""
        try:
            users = (await self.aggregators.latest_users())[: self.config.cached_users]
            for start in range(0, len(users), WARMED_TOGETHER):
                await self._read({*users[start : start + WARMED_TOGETHER]})
        except (TimeoutError, RayActorError) as error:
            logger.warning("copies of histories are made as users ask: %r", error)

    async def _run_challenger(self, challenger: Challenger) -> None:
        """Let an experiment run to its end, after which there is one model again."""
        try:
            await challenger.run()
        except Exception:
            logger.exception("a challenger failed, so the live model answers its users, too")
        self.challenger = None

    def _change_items(self, changes: list[ItemChange]) -> None:
        # two reads may come back in the other order: what is older than what is known was answered already
        items = {change.item_id: change.attributes for change in changes if change.revision > self.item_revision}
        self.recommender.change_items(items)
        if self.challenger is not None:
            self.challenger.change_items(items)
        self.item_changes |= items
        self.item_revision = max(self.item_revision, changes[-1].revision)

    async def on_thread(self, function: Callable, *arguments: Any) -> Any:
        """Run on the thread that may change the recommender, while nobody reads it."""
        async with self.unchanging:
            return await asyncio.get_running_loop().run_in_executor(self.executor, partial(function, *arguments))

    async def similar(self, item_id: str, k: int) -> tuple[int, list[RankedItem]]:
        """The version, and the items nearest to an item; KeyError for one that the catalog does not have."""
        await self._read(set())
        async with self.unchanging:
            return self.recommender.version, self.recommender.similar(item_id, k)

    async def has_item(self, item_id: str) -> bool:
        """Whether the catalog has an item now, with or without a row."""
        await self._read(set())
        put = self.item_changes.get(item_id) is not None
        catalogs = [self.recommender.catalog]
        if self.challenger is not None:
            catalogs.append(self.challenger.recommender.catalog)
        return put or any(item_id in known.row_of and item_id not in known.removed for known in catalogs)

    async def check_items(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse attributes that the catalog cannot take.

        Raises:
            InputError: it names the item and the attribute.
        """
        await self._read(set())
        async with self.unchanging:
            self.recommender.catalog.check(items)

    async def check_filter(self, filter: ItemFilter) -> None:
        """Refuse a filter that the catalog does not understand: it is the asker's error, not the batch's.

        Raises:
            InputError: it names the attribute.
        """
        async with self.unchanging:
            self.recommender.mask(filter)

    async def rollback(self, version: int) -> dict[str, Any]:
        """Have the learner bring a stored version back; ValueError where no learner runs.

        The call is not repeated when the learner dies: the rollback may have been done, and more learned since.
        """
        call = learner_handle().rollback.options(max_task_retries=0).remote(version)
        return await asyncio.wait_for(call, self.config.actor_timeout)

    # ---------------------------------------------------------------------------------------------------- the status

    def count_answer(self, seconds: float) -> None:
        """Note an answer and how long it took."""
        self.counts["answers"] += 1
        self.latency_sum += seconds
        self.latency[next((bound for bound in LATENCY_BUCKETS if seconds <= bound), float("inf"))] += 1

    def record(self, request_id: str, user_id: str | None, answer: Answer) -> None:
        """Keep an explored answer; one that a full disk does not take is given all the same, and counted."""
        if self.decisions is None:
            return
        try:
            self.decisions.append(request_id, user_id, answer.version, answer.items, answer.arm)
        except OSError as error:
            self.counts["unrecorded"] += 1
            logger.error("an explored answer could not be recorded: %s", error)

    async def status(self) -> dict[str, Any]:
        """Versions per replica, freshness, log offsets, pushes and rejected updates, asked of every part."""
        replicas, aggregator, learner, experiment = await asyncio.gather(
            self._replicas(),
            self.aggregators.status(),
            _or_none(learner_handle, "status"),
            self._experiment_status(),
        )
        learner = learner or {"state": "restarting or not started"}
        versions = [replica["version"] for replica in replicas]
        return {
            "model_version": max([*versions, learner.get("version", 0)]),
            "replicas": replicas,
            "learner": learner,
            "aggregator": aggregator,
            "freshness": learner.get("freshness"),
            **experiment,
        }

    async def _experiment_status(self) -> dict[str, Any]:
        """What the status has besides where there is, or was, a challenger."""
        if self.experiment is None:
            return {}
        return {"experiment": await _or_none(experiments_handle, "status", self.experiment) or {"state": "restarting"}}

    async def _replicas(self) -> list[dict[str, Any]]:
        """What every live replica says of itself; one that is dying says nothing."""
        handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        try:
            answers = await handle.broadcast("describe").results_async(timeout_s=2.0, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):  # the latter until Serve has told this replica of itself
            answers = [await self.describe()]
        return sorted((answer for answer in answers if isinstance(answer, dict)), key=lambda r: r["replica_id"])

    # ------------------------------------------------------------------------------------ pushes, called by broadcast

    async def describe(self) -> dict[str, Any]:
        """Version, checksum and counts of one replica."""
        async with self.unchanging:
            return self._describe()

    def _describe(self) -> dict[str, Any]:
        return {
            "replica_id": self.replica_id,
            "process": os.getpid(),
            "version": self.recommender.version,
            "checksum": self.recommender.checksum,
            "log_offset": self.recommender.log_offset,
            "batches": self.answers.count,
            "users_cached": len(self.cache),
            **{
                name: self.counts[name]
                for name in ("answers", "refused", "unrecorded", "events", "deltas", "catch_ups", "mismatches")
            },
            "latency_buckets": [
                *((str(bound), self.latency[bound]) for bound in LATENCY_BUCKETS),
                ("+Inf", self.latency[float("inf")]),
            ],
            "latency_sum": self.latency_sum,
        }

    async def apply_delta(self, payload: list[ray.ObjectRef]) -> dict[str, Any]:
        """Take a pushed delta between two batches."""
        data = await payload[0]
        start = time.perf_counter()
        delta = Delta.from_bytes(bytes(data))
        await self.on_thread(self._apply, delta)
        description = await self.expect_version(delta.version)
        return description | {"apply_ms": (time.perf_counter() - start) * 1e3}

    def _apply(self, delta: Delta) -> None:
        if delta.parent != self.recommender.version:  # known already, or one before it was missed
            return
        self._apply_or_load(delta)
        self.counts["deltas"] += 1

    def _apply_or_load(self, delta: Delta) -> None:
        """Move to a delta's version; where it comes out wrong, nothing may be answered before all is loaded anew."""
        try:
            self.recommender.apply(delta)
        except DeltaMismatch as error:
            logger.warning("loading the newest version whole: %s", error)
            self.counts["mismatches"] += 1
            self.recommender = self._load(self.item_changes)

    async def expect_version(self, version: int) -> dict[str, Any]:
        """Catch up from the registry if this replica missed a push, or if the version is a new base."""
        if self.recommender.version < version:
            async with self.loading:
                if self.recommender.version < version and not await self.on_thread(self._catch_up, version):
                    await self._replace()
        return await self.describe()

    def _catch_up(self, version: int) -> bool:
        """Apply the deltas that are missing; False where one is not to be had."""
        self.counts["catch_ups"] += 1
        while self.recommender.version < version:
            try:
                delta = self.registry.read_delta(self.recommender.version + 1)
            except (FileNotFoundError, DeltaMismatch) as error:
                logger.warning("loading the newest version beside this one: %s", error)
                return False
            self._apply_or_load(delta)
        return True

    async def _replace(self) -> None:
        """Load the newest version beside the one that answers; it takes over between two batches."""
        revision, changes = self.item_revision, dict(self.item_changes)
        recommender = await asyncio.get_running_loop().run_in_executor(self.loader, self._load, changes)
        await self.on_thread(self._take_over, recommender, revision)

    def _take_over(self, recommender: Recommender, revision: int) -> None:
        if recommender.version <= self.recommender.version:
            return
        if revision != self.item_revision:  # items changed while it was loaded
            recommender.change_items(self.item_changes)
        self.recommender = recommender


async def _or_none(handle: Callable[[], ActorHandle], method: str, *arguments: Any) -> dict[str, Any] | None:
    """An actor's answer for the status, or None while it is away: that is what the status then says."""
    try:
        return await asyncio.wait_for(getattr(handle(), method).remote(*arguments), 2.0)
    except (ValueError, TimeoutError, RayActorError):
        return None
