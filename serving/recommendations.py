"""The deployment that answers: histories, encoder and index in one process, a batch at a time.

Requests that arrive while a batch runs form the next one; an idle replica answers at once.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence

import ray
from pydantic import Field
from ray import serve

from lib.log.layout import LogLayout
from lib.model.delta import DeltaMismatch
from lib.model.version_format import OtherFormat
from lib.ranking.recommender import Question
from lib.ranking.rules import RankingRules
from lib.retrieval.index import use_threads
from lib.settings import Settings
from lib.versions.registry import Registry
from serving.aggregator import AggregatorConfig
from serving.aggregators import Aggregators, Feedback
from serving.batches import Batches, Overloaded
from serving.challenger import Answer, load_challenger
from serving.decision_log import DecisionLog
from serving.errors import DeadlineMissed
from serving.experiment import PreparedChallenger
from serving.gather import gather_status
from serving.history_cache import HistoryCache
from serving.latency import LatencyHistogram
from serving.live_histories import LiveHistories
from serving.live_models import LiveModels
from serving.request_id import new_request_id
from serving.rollout import Acknowledgement
from serving.status import ReplicaStatus, Status

logger = logging.getLogger("ray.serve")
Asked = tuple[Question, str | None]  # the user id for whose history it is, if it does not come with the question


class ReplicaConfig(Settings):
    """How one replica works."""

    largest_batch: int = Field(default=32, ge=1, description="answers that are computed together")
    longest_wait: float = Field(
        default=1.0, gt=0, description="seconds; who would wait longer for an answer is told at once to try again"
    )
    threads: int = Field(default=1, ge=1, description="of torch and FAISS")
    cached_users: int = Field(default=20_000, ge=1, description="whose histories are kept here")
    cached_events: int = Field(default=AggregatorConfig().keep_events, ge=1, description="of each of them")
    decision_bytes: int = Field(
        default=200_000_000,
        ge=1,
        description="bytes of explored answers that all replicas keep; older ones go",
    )
    actor_timeout: float = Field(
        default=20.0, gt=0, description="seconds to wait for an aggregator to come back before answering 503"
    )


class Recommendations:
    """One replica (serving/app.py makes it a deployment)."""

    def __init__(
        self,
        state: str,
        data: str | None,
        config: ReplicaConfig,
        rules: RankingRules,
        aggregator: AggregatorConfig,
        layout: LogLayout,
        challenger: PreparedChallenger | None = None,
    ):
        self.config = config
        self.cleaning = aggregator.cleaning
        use_threads(config.threads)
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.decisions = None
        if rules.exploration_temperature > 0:
            self.decisions = DecisionLog(state, self.replica_id, config.decision_bytes)
        self.aggregators = Aggregators(state, data, aggregator, layout, config.actor_timeout)
        self.models = LiveModels(Registry.of(state), rules)
        self.models.challenger = None if challenger is None else load_challenger(state, challenger, rules)
        self.experiment = None if challenger is None else challenger.name
        cache = HistoryCache(config.cached_users, config.cached_events)
        self.histories = LiveHistories(self.aggregators, cache, self.models)
        self.batches: Batches[Asked, Answer] = Batches(self._answer, config.largest_batch)
        self.counts: Counter[str] = Counter()  # answers, refused, events
        self.latency = LatencyHistogram()
        self.checked = False
        self.tasks: list[asyncio.Task] = []

    async def check_health(self) -> None:
        """Catch up before the first request: Serve asks for the health once before it, and then again and again."""
        if self.checked:
            return
        await self.models.catch_up(self.models.registry.head() or 0)
        await self.aggregators.open_boards()
        await self.histories.read(set())  # what changed of the items
        self.tasks = [asyncio.create_task(self.batches.watch()), asyncio.create_task(self.histories.warm_up())]
        challenger = self.models.challenger
        if challenger is not None and await challenger.tell():
            self.tasks.append(asyncio.create_task(self.models.run_challenger(challenger)))
        else:  # there is none, or it was decided on before
            self.models.challenger = None
        self.checked = True

    # ---------------------------------------------------------------------------------------------------- the answers

    async def recommend(
        self, question: Question, user_id: str | None = None, deadline: float | None = None
    ) -> tuple[str, Answer]:
        """Return the id of the request and its answer, within `deadline` seconds if there is a deadline.

        Args:
            question: what is asked; its history is read here if there is a user id.
            user_id: whose history it is; None for a history that came with the request.
            deadline: seconds that the client will wait.

        Raises:
            Overloaded: the answer would take longer than ReplicaConfig.longest_wait.
            DeadlineMissed: it would take longer than the deadline, or did.
        """
        start = time.perf_counter()
        answer = await self._ask((question, user_id), deadline)
        self.counts["answers"] += 1
        self.latency.observe(time.perf_counter() - start)
        request_id = new_request_id()
        if answer.arm is not None and user_id is not None and self.models.challenger is not None:
            request_id = self.models.challenger.note(request_id, user_id, answer)
        if self.decisions is not None:
            self.decisions.append(request_id, user_id, answer.version, answer.items, answer.arm)
        return request_id, answer

    async def _ask(self, asked: Asked, deadline: float | None) -> Answer:
        """Join the next batch, unless that would take too long."""
        longest = self.config.longest_wait if deadline is None else min(deadline, self.config.longest_wait)
        try:
            self.batches.admit(longest)
            async with asyncio.timeout(deadline):
                return await self.batches.submit(asked)
        except (Overloaded, TimeoutError) as error:
            self.counts["refused"] += 1
            if deadline is not None and (isinstance(error, TimeoutError) or error.wait > deadline):
                raise DeadlineMissed(deadline) from error
            raise

    async def _answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer one batch: read histories, then encode, retrieve and rank."""
        histories = await self.histories.read({user_id for _, user_id in asked if user_id is not None})
        questions = [
            question if user_id is None else question._replace(history=histories[user_id])
            for question, user_id in asked
        ]
        return await self.models.answer(questions, [user_id for _, user_id in asked])

    async def current_models(self) -> LiveModels:
        """Return the models with the catalog as it is now."""
        await self.histories.read(set())
        return self.models

    async def take(self, feedback: Feedback) -> list[str | None]:
        """Make events durable and part of the histories; per event None, or why it was not taken.

        Raises:
            LogWriteError: nothing of it could be written; PartlyWritten where some of it was.
        """
        outcomes = await self.aggregators.append(feedback)
        if self.models.challenger is not None:
            pairs = zip(feedback.events, outcomes, strict=True)
            self.models.challenger.react([event for event, outcome in pairs if outcome is None])
        self.counts["events"] += len(feedback.events) + feedback.rejected.total()
        return outcomes

    # --------------------------------------------------------------------------------------------- called by broadcast

    async def apply_delta(self, payload: list[ray.ObjectRef]) -> Acknowledgement:
        """Take a pushed delta between two batches."""
        data = await payload[0]
        start = time.perf_counter()
        try:
            delta = await self.models.read_delta(bytes(data))
        except (DeltaMismatch, OtherFormat) as error:  # the registry may have a version that can be read
            logger.error("a pushed delta cannot be read: %s", error)
            return await self.expect_version(self.models.live.version)
        await self.models.apply(delta)
        acknowledgement = await self.expect_version(delta.version)
        return acknowledgement._replace(apply_ms=(time.perf_counter() - start) * 1e3)

    async def expect_version(self, version: int) -> Acknowledgement:
        """Catch up to an announced version if need be, and acknowledge the one that answers."""
        await self.models.catch_up(version)
        async with self.models.unchanging:
            return Acknowledgement(self.models.live.version)

    async def describe(self) -> ReplicaStatus:
        """Return what the status says of this replica."""
        async with self.models.unchanging:
            live = self.models.live
            return ReplicaStatus(
                replica_id=self.replica_id,
                process=os.getpid(),
                version=live.version,
                checksum=live.checksum,
                log_offset=live.log_offset,
                batches=self.batches.count,
                users_cached=len(self.histories.cache),
                answers=self.counts["answers"],
                refused=self.counts["refused"],
                unrecorded=0 if self.decisions is None else self.decisions.unrecorded,
                events=self.counts["events"],
                deltas=self.models.counts["deltas"],
                catch_ups=self.models.counts["catch_ups"],
                attributes_left_out=live.catalog.table.skipped,
                mismatches=self.models.counts["mismatches"],
                latency_buckets=self.latency.buckets(),
                latency_sum=self.latency.sum,
                idle_rules=live.idle_rules(),
            )

    async def status(self) -> Status:
        """Ask every part of the service what the status says of it."""
        return await gather_status(self.describe, self.aggregators, self.experiment)
