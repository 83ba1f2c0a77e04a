"""The aggregators of all shards as one: a call goes, at the same time, to all shards that it concerns.

A user's events and history are at the user's shard, the changes of items at the first. The methods are those of an
aggregator (serving/aggregator.py).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util import list_named_actors

from lib.data.events import Event
from lib.data.history import History
from lib.errors import InputError, origin_of
from lib.log.board import ChangeBoard, News
from lib.log.errors import LogUnavailable, LogWriteError, PartlyWritten
from lib.log.items import ItemChange
from lib.log.layout import LogLayout
from lib.log.shard import shard_of
from serving.aggregator import AGGREGATOR, NAMESPACE, AggregatorConfig, start_aggregator
from serving.batches import Batches
from serving.status import AggregatorsStatus, AggregatorStatus, AggregatorsUnavailable, Unavailable

logger = logging.getLogger("ray.serve")
RESTART_SECONDS = 0.1  # between two tries to reach an aggregator that died
STATUS_SECONDS = 2.0  # to wait for an aggregator's status
MOST_EVENTS = 1000  # of several requests that go to an aggregator in one call: others wait for it
Given = TypeVar("Given")
Append = Callable[[list[Event], set[str], Counter[str]], Awaitable[Sequence[str | None]]]


@dataclass(frozen=True)
class Feedback:
    """The events of one request."""

    events: list[Event]
    named: set[str]  # ids that were given to events without any identity
    rejected: Counter[str]  # events that were refused already, by reason

    def weight(self) -> int:
        """Return how much of a call it takes: its events, or 1 where there are none."""
        return max(1, len(self.events))


class Aggregators:
    """All aggregators, for a replica to call; a call waits, and is repeated, while an aggregator restarts."""

    def __init__(self, state: str, data: str | None, config: AggregatorConfig, layout: LogLayout, timeout: float):
        """Start the aggregators that do not run; a call raises TimeoutError after `timeout` seconds."""
        self.start = partial(start_aggregator, state, data, config, layout=layout)
        self.shards = layout.shards()
        self.handles = [self.start(shard=shard) for shard in self.shards]
        self.timeout = timeout
        self.feedback: list[Batches[Feedback, list[str | None]]] = [
            Batches(partial(append_together, partial(self._call, shard, "append")), MOST_EVENTS, Feedback.weight)
            for shard in range(len(self.handles))
        ]
        self.boards: list[ChangeBoard] = []  # known once the aggregators have answered for the first time

    async def open_boards(self) -> None:
        """Read from now on, on one machine, from shared memory whose history has changed."""
        places = await asyncio.gather(*[self._call(shard, "board") for shard in range(len(self.handles))])
        self.boards = [ChangeBoard.open(Path(place)) for place in places if place is not None]

    def news(self) -> Iterator[News]:
        """Return the events that were added to histories since the last call, as far as the boards have them."""
        return (news for board in self.boards for news in board.news())

    def counters(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return each user's counter of changes; nothing where there are no boards."""
        if not self.boards:
            return {}
        counters: dict[str, int] = {}
        for shard, mine in self._split(user_ids, lambda user_id: user_id).items():
            counters |= self.boards[shard].users(user_id for _, user_id in mine)
        return counters

    def items_counter(self) -> int | None:
        """Return the catalog's counter of changes; None where there are no boards."""
        return self.boards[0].items() if self.boards else None

    async def append(self, feedback: Feedback) -> list[str | None]:
        """Make events durable and part of the histories; return for each None, or why it was not taken.

        Raises:
            LogWriteError: none of them could be written; PartlyWritten where some of them were.
        """
        shards = self._split(feedback.events, lambda event: event.user_id) or {0: []}
        calls = []
        for shard, mine in shards.items():
            events, rejected = [event for _, event in mine], Counter() if calls else feedback.rejected
            calls.append(self.feedback[shard].submit(Feedback(events, feedback.named, rejected)))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures and len(failures) < len(calls) and isinstance(failures[0], LogWriteError):
            raise PartlyWritten(str(failures[0])) from failures[0]
        if failures:
            raise failures[0]
        return _in_order(shards.values(), cast("list[list[str | None]]", outcomes), len(feedback.events))

    async def newer(
        self, users: Sequence[tuple[str, int | None]], item_revision: int, ask_for_items: bool = True
    ) -> tuple[list[History | None], list[ItemChange]]:
        """Return what a replica lacks of users' histories and of the items, see Aggregator.newer."""
        shards = self._split(users, lambda user: user[0])
        if ask_for_items:
            shards.setdefault(0, [])
        calls = [
            self._call(shard, "newer", [user for _, user in mine], item_revision) for shard, mine in shards.items()
        ]
        answers = await asyncio.gather(*calls)
        changes = [change for _, changed in answers for change in changed]
        return _in_order(shards.values(), [histories for histories, _ in answers], len(users)), changes

    async def get_histories(self, user_ids: Sequence[str]) -> list[History]:
        """Return users' histories."""
        shards = self._split(user_ids, lambda user_id: user_id)
        calls = [self._call(shard, "get_histories", [user for _, user in mine]) for shard, mine in shards.items()]
        return _in_order(shards.values(), await asyncio.gather(*calls), len(user_ids))

    async def change_items(
        self, items: Sequence[tuple[str, dict[str, Any] | None]], served: Mapping[str, str] | None = None
    ) -> int:
        """Make changed and deleted (None) items durable, and return their revision.

        Raises:
            InputError: an attribute is not of the kind that it has for other items; nothing of the call is recorded.
        """
        outcome = await self._call(0, "change_items", items, served)
        if isinstance(outcome, str):
            raise InputError(outcome)
        return outcome

    async def users(self, limit: int) -> list[tuple[str, int]]:
        """Return the `limit` users who acted last, the latest of each shard first, with the number of events."""
        found = await asyncio.gather(*[self._call(shard, "users", limit) for shard in range(len(self.handles))])
        return [user for users in zip_longest(*found) for user in users if user is not None][:limit]

    async def latest_users(self) -> list[str]:
        """Return who acted last, the latest of each shard first."""
        found = await asyncio.gather(*[self._call(shard, "latest_users") for shard in range(len(self.handles))])
        return [user for users in found for user in users]

    async def status(self) -> AggregatorStatus | AggregatorsStatus | AggregatorsUnavailable | Unavailable:
        """Return the only status, or the sum of all shards' and each beside it; `restarting` while one is away."""
        answers = await asyncio.gather(*[self._status(shard) for shard in range(len(self.handles))])
        known = [answer for answer in answers if isinstance(answer, AggregatorStatus)]
        several = len(self.handles) > 1
        for answer in answers:
            if isinstance(answer, Unavailable):
                return AggregatorsUnavailable(state=answer.state, shards=known) if several else answer
        return _sum_of(known) if several else known[0]

    async def _status(self, shard: int) -> AggregatorStatus | Unavailable:
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                return await self._call(shard, "status")
        except TimeoutError:
            return Unavailable(state="restarting")
        except LogUnavailable as error:
            return Unavailable(state=f"cannot open its log, and tries again: {origin_of(error)}")

    def _split(self, values: Iterable[Given], user_of: Callable[[Given], str]) -> dict[int, list[tuple[int, Given]]]:
        """Divide values by shard, each with its place."""
        shards: dict[int, list[tuple[int, Given]]] = {}
        for place, value in enumerate(values):
            shards.setdefault(shard_of(user_of(value), len(self.handles)), []).append((place, value))
        return shards

    async def _call(self, shard: int, method: str, *arguments: Any) -> Any:
        """Call an aggregator; Ray repeats the call while it restarts, and one that died for good is started anew."""
        async with asyncio.timeout(self.timeout):
            while True:
                handle = self.handles[shard]
                try:
                    return await getattr(handle, method).remote(*arguments)
                except RayActorError as error:
                    logger.warning("aggregator %d is started anew: %s", shard, error)
                await asyncio.sleep(RESTART_SECONDS)
                if self.handles[shard] is handle:
                    self.handles[shard] = await asyncio.to_thread(self.start, shard=self.shards[shard])


def _in_order(shards: Iterable[list[tuple[int, Any]]], answers: Iterable[list], count: int) -> list:
    """Put the shards' answers into the order that the values had before they were divided."""
    ordered: list = [None] * count
    for mine, given in zip(shards, answers, strict=True):
        for (place, _), answer in zip(mine, given, strict=True):
            ordered[place] = answer
    return ordered


def statuses_of(aggregators: Sequence[ActorHandle]) -> list[AggregatorStatus]:
    """Return what each says of itself."""
    return cast("list[AggregatorStatus]", ray.get([aggregator.status.remote() for aggregator in aggregators]))


def _sum_of(shards: list[AggregatorStatus]) -> AggregatorsStatus:
    counts = ("log_offset", "learned_offset", "pending", "events", "duplicates", "users", "commits", "item_revision")
    return AggregatorsStatus(
        state=shards[0].state,
        **{name: sum(getattr(shard, name) for shard in shards) for name in counts},
        rejected=sum((Counter(shard.rejected) for shard in shards), Counter()),
        noticed=sum((Counter(shard.noticed) for shard in shards), Counter()),
        damage=[damage for shard in shards for damage in shard.damage],
        shards=shards,
    )


def running_aggregators() -> list[ActorHandle]:
    """Return all aggregators that run on this cluster."""
    actors = cast("list[dict[str, str]]", list_named_actors(all_namespaces=True))
    names = sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
    names = [name for name in names if name.startswith(AGGREGATOR)]
    return [ray.get_actor(name, namespace=NAMESPACE) for name in names]


async def append_together(append: Append, requests: Sequence[Feedback]) -> list[list[str | None]]:
    """Append the events of many requests in one call; return for each event None, or why it was not taken.

    A call costs some milliseconds of CPU time at both ends, however little it carries.
    """
    events = [event for request in requests for event in request.events]
    named = set().union(*(request.named for request in requests))
    outcomes = iter(await append(events, named, sum((request.rejected for request in requests), Counter())))
    return [[next(outcomes) for _ in request.events] for request in requests]
