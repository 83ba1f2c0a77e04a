"""Simulated visitors of a running service, over real HTTP: they show what learning live gains.

- Test first: before a visitor's next choice is sent, the live answer and the frozen model's answer for the same
  history are both asked whether they contain it.
- One visitor, one event at a time: a history never runs ahead of what the service has acknowledged.
- Nothing is retried: every request that does not end in a 200 counts as failed.
- Whatever makes the two answers incomparable takes the trial out: see `_Visits.is_trial`.
"""

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import httpx

from jobs.demo.frozen import Frozen, FrozenBatches
from jobs.demo.tally import Tally
from jobs.demo.worlds import Source
from lib.data.events import Event
from lib.data.history import History
from lib.data.ratings import STARS, RatingScale, is_dislike
from lib.data.user_histories import UserHistories
from lib.errors import InputError

REQUEST_TIMEOUT_SECONDS = 10.0


async def run_visitors(
    base_url: str,
    source: Source,
    frozen: Frozen,
    tally: Tally,
    stop: asyncio.Event,
    concurrency: int = 8,
    events_per_second: float = 50,
    k: int = 10,
    past: Iterable[Event] = (),
    ratings: RatingScale = STARS,
) -> None:
    """Let visitors ask, choose and react until `stop` is set or the source ends.

    Args:
        base_url: where the service listens, such as http://127.0.0.1:8000.
        source: whose events are sent, in order.
        frozen: the model that live answers are compared with; called in a thread, for all that wait at once.
        tally: counts; read it at any time from the same event loop.
        stop: events that are under way are finished after it is set.
        concurrency: events under way at the same time, of different users.
        events_per_second: at most so many events are sent, reactions included.
        k: how many items both models recommend.
        past: the events that the service knows at the start.
        ratings: their scale.

    Raises:
        InputError: a number out of its range.
        ExceptionGroup: the frozen model or the source failed, or an answer broke the service's contract.
    """
    for name, number in (("concurrency", concurrency), ("events_per_second", events_per_second), ("k", k)):
        if number <= 0:
            raise InputError(f"{name}: must be above 0, got {number}")
    tally.k = k
    histories = histories_of(past)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_SECONDS, limits=limits) as client:
        visits = _Visits(
            client, source, FrozenBatches(frozen, k), tally, _Pace(events_per_second), k, histories, ratings
        )
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(visits.work(stop))


def histories_of(events: Iterable[Event]) -> UserHistories:
    """Return the history of every user, oldest event first; events of the same time keep their order."""
    histories = UserHistories()
    for event in sorted(events, key=lambda event: event.timestamp):
        histories.append(event)
    return histories


class _Pace:
    """Spaces events so that no more than so many a second are sent; time that was lost is not caught up."""

    def __init__(self, events_per_second: float):
        self.spacing = 1.0 / events_per_second
        self.due = time.monotonic()

    def take(self, events: int = 1) -> float:
        """Reserve a place for so many events; return the seconds until it."""
        now = time.monotonic()
        wait = max(0.0, self.due - now)
        self.due = max(self.due, now) + events * self.spacing
        return wait


class _Visits:
    """The state that the workers share: histories as the service has acknowledged them, and who is busy."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        source: Source,
        frozen: FrozenBatches,
        tally: Tally,
        pace: _Pace,
        k: int,
        histories: UserHistories,
        ratings: RatingScale,
    ):
        self.client, self.source, self.frozen, self.tally, self.pace, self.k = client, source, frozen, tally, pace, k
        self.histories = histories
        self.ratings = ratings
        self.turns: dict[str, asyncio.Lock] = {}  # a lock serves in the order of asking: a user's events stay in order
        self.busy: dict[str, int] = defaultdict(int)
        self.unsure: set[str] = set()

    async def work(self, stop: asyncio.Event) -> None:
        """Take one event after another until `stop` is set or the source ends."""
        while not await _is_set_within(stop, self.pace.take()):
            event = self.source.next_event([user_id for user_id, events in self.busy.items() if events])
            if event is None:
                return
            self.busy[event.user_id] += 1
            async with self.turns.setdefault(event.user_id, asyncio.Lock()):
                await self.take(event)
            self.busy[event.user_id] -= 1
            if not self.busy[event.user_id]:
                del self.busy[event.user_id], self.turns[event.user_id]

    async def take(self, event: Event) -> None:
        """Ask both models, compare, send the choice, then the reaction to what was shown."""
        history = self.histories.get(event.user_id)
        if not self.is_trial(event, history):
            answer, live_hit = await self.recommend(event.user_id), None
        else:
            answer, frozen_top = await asyncio.gather(self.recommend(event.user_id), self.frozen.top(history))
            live_hit = answer is not None and event.item_id in _item_ids(answer)
            if answer is not None:
                self.tally.count_trial(live_hit, event.item_id in frozen_top)
        await self.send(event, live_hit)
        if answer is None:
            return
        reaction = self.source.react(event.user_id, _item_ids(answer))
        self.tally.reactions += bool(reaction)
        self.pace.take(len(reaction))
        for reacted in reaction:
            await self.send(reacted, None, answer.get("request_id"))

    def is_trial(self, event: Event, history: History) -> bool:
        """Return whether both models could hit this event, and are asked under the same history.

        Both leave out what the user already had; a dislike is nothing to recommend; and where a failed request
        leaves open what the service knows of a user, the two histories may differ.
        """
        disliked = is_dislike(event, self.ratings)
        return not disliked and event.user_id not in self.unsure and event.item_id not in history.item_ids

    async def recommend(self, user_id: str) -> dict[str, Any] | None:
        """Return the live answer, or None if the request failed."""
        begin = time.perf_counter()
        answer = await self.call("GET", f"/v1/users/{quote(user_id, safe='')}/recommendations", params={"k": self.k})
        if answer is None:
            return None
        self.tally.latencies_ms.append(1000 * (time.perf_counter() - begin))
        self.tally.answers += 1
        self.tally.count_version(answer["model_version"])
        return answer

    async def send(self, event: Event, live_hit: bool | None, request_id: str | None = None) -> None:
        """Send one event; the history grows only by what was acknowledged."""
        named = event._replace(event_id=uuid.uuid4().hex, request_id=request_id)
        self.tally.events_sent += 1
        answer = await self.call("POST", "/v1/events", json={"events": [named._asdict()]})
        if answer is None:
            self.unsure.add(event.user_id)
            self.tally.users_unsure = len(self.unsure)
        elif answer["accepted"]:
            self.tally.events_acknowledged += 1
            self.tally.latest.append((event, live_hit))
            self.histories.append(event)
        else:
            self.tally.events_refused += 1
            reasons = [rejected["reason"] for rejected in answer["rejected"]]
            self.tally.last_refusal = reasons[0] if reasons else "duplicate"

    async def call(self, method: str, path: str, **request: Any) -> dict[str, Any] | None:
        """Make one request, never repeated; count anything but a 200 with JSON as failed and return None."""
        self.tally.requests += 1
        try:
            response = await self.client.request(method, path, **request)
        except httpx.RequestError as error:
            self.tally.count_failure(f"{method} {path}: {type(error).__name__}: {error}")
            return None
        if response.status_code != 200:
            self.tally.count_failure(f"{method} {path}: {response.status_code} {response.text[:200]}")
            return None
        try:
            return response.json()
        except ValueError as error:
            self.tally.count_failure(f"{method} {path}: 200, but the body is not JSON: {error}")
            return None


def _item_ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


async def _is_set_within(stop: asyncio.Event, seconds: float) -> bool:
    """Wait so many seconds, or less if `stop` is set; return whether it is set."""
    if seconds > 0 and not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            return False
    return stop.is_set()
