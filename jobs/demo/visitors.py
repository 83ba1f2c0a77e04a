"""Simulated visitors of a running service, over real HTTP: they show what learning live is worth.

- Test first: before a visitor's next choice is sent, the live answer and the frozen model's answer for the same
  history are both asked whether they contain it.
- One visitor, one step at a time: a history never runs ahead of what the service has acknowledged.
- Nothing is retried: every request that does not end in a 200 counts as failed.
- Whatever makes the two answers incomparable takes the trial out: see `_Drive.is_trial`.
"""

import asyncio
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa

from jobs.demo.shop import Shop
from lib.data.events import EVENT_WEIGHTS, NEGATIVE_RATING
from lib.errors import InputError

REACTION_SECONDS = 2.0  # simulated time between seeing a recommendation and clicking it
REQUEST_TIMEOUT_SECONDS = 10.0
WINDOW = 1000  # trials in the sliding hit rate
DIFFERENCE_EVERY = 25  # trials between two points of the sparkline


class PastEvent(NamedTuple):
    """One event of a history; the timestamp is in milliseconds since 1970, UTC."""

    item_id: str
    kind: str
    value: float | None
    timestamp: int


class Step(NamedTuple):
    """A user's own next event, in the order of the source."""

    user_id: str
    item_id: str
    kind: str
    value: float | None
    timestamp: int


Histories = dict[str, list[PastEvent]]
Frozen = Callable[[list[list[PastEvent]], int], list[list[str]]]
"""The frozen model: (histories, oldest event first, k) -> k item ids a history, best first, seen items left out."""


class Source(Protocol):
    """Where the visitors' events come from."""

    def next_step(self, busy: Collection[str]) -> Step | None:
        """The next step in order, None at the end; `busy` are the users whose step before is not over yet."""
        ...

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Step]:
        """What the user does with the recommendations that were shown, often nothing."""
        ...


class ShopSource:
    """The visitors of the synthetic shop; it never ends. Takes the shop's time forward."""

    def __init__(self, shop: Shop):
        self.shop = shop

    def next_step(self, busy: Collection[str]) -> Step | None:
        """The own next choice of a visitor who is not busy."""
        self.shop.advance(self.shop.seconds_per_event)
        visitor = self.shop.next_visitor(busy)
        return Step(visitor, *self.shop.next_choice(visitor), None, self.shop.now)

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Step]:
        """A click on one of the recommendations, perhaps a cart after it, or nothing."""
        steps = []
        for item_id, kind in self.shop.react(user_id, recommended_item_ids):
            self.shop.advance(REACTION_SECONDS)
            steps.append(Step(user_id, item_id, kind, None, self.shop.now))
        return steps


class ReplaySource:
    """The events of a table (`lib.data.events.EVENT_SCHEMA`) once, oldest first; nobody reacts to recommendations."""

    def __init__(self, table: pa.Table):
        ordered = _oldest_first(table)
        self._columns = [ordered[name] for name in ("user_id", "item_id", "event", "value", "timestamp")]
        self._next, self._end = 0, ordered.num_rows

    def next_step(self, busy: Collection[str]) -> Step | None:
        """The next event of the table; the order stands even where its user is busy."""
        if self._next == self._end:
            return None
        step = Step(*(column[self._next].as_py() for column in self._columns))
        self._next += 1
        return step

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Step]:
        """Nothing: what was recommended then is not known."""
        return []


@dataclass
class Tally:
    """What has been sent, answered and compared so far; its size does not grow with the run.

    A trial is one own choice of one user that both models were asked for under the same history.
    """

    k: int = 10  # how many items both models recommend
    requests: int = 0
    failed_requests: int = 0
    last_error: str | None = None
    answers: int = 0  # recommendation requests answered with 200
    events_sent: int = 0
    events_acknowledged: int = 0
    events_refused: int = 0  # answered with 200, but as a duplicate or rejected
    last_refusal: str | None = None
    reactions: int = 0  # answers that were followed by a click
    trials: int = 0
    hits_live: int = 0
    hits_frozen: int = 0
    only_live: int = 0  # trials that only the live answer hit
    only_frozen: int = 0
    users_unsure: int = 0  # left out of the trials: a failed request leaves open whether their event was kept
    version: int | None = None  # the newest that an answer has named
    version_changes: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=200)
    )  # (unix seconds, version)
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=5000))  # of recommendation requests
    window: deque[tuple[bool, bool]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # (live hit, frozen hit)
    differences: deque[float] = field(default_factory=lambda: deque(maxlen=60))  # of the window's rates, over time
    latest: deque[tuple[Step, bool | None]] = field(default_factory=lambda: deque(maxlen=12))  # acknowledged; live hit

    def count_failure(self, error: str) -> None:
        """Count a request that did not end in a 200."""
        self.failed_requests += 1
        self.last_error = error

    def count_version(self, version: int) -> None:
        """Note a version that an answer names; answers of replicas that are a push behind change nothing."""
        if self.version is None or version > self.version:
            self.version = version
            self.version_changes.append((time.time(), version))

    def count_trial(self, live: bool, frozen: bool) -> None:
        """Count one comparison: whether each of the two answers contained the user's next choice."""
        self.trials += 1
        self.hits_live += live
        self.hits_frozen += frozen
        self.only_live += live and not frozen
        self.only_frozen += frozen and not live
        self.window.append((live, frozen))
        if self.trials % DIFFERENCE_EVERY == 0:
            window_live, window_frozen, _ = self.window_rates()
            self.differences.append(window_live - window_frozen)

    def rates(self) -> tuple[float, float]:
        """Hit rate of the live and of the frozen model over all trials; nan before the first."""
        if not self.trials:
            return math.nan, math.nan
        return self.hits_live / self.trials, self.hits_frozen / self.trials

    def window_rates(self) -> tuple[float, float, int]:
        """The same over the newest trials, and how many these are."""
        count = len(self.window)
        if not count:
            return math.nan, math.nan, 0
        return sum(live for live, _ in self.window) / count, sum(frozen for _, frozen in self.window) / count, count

    def difference(self) -> tuple[float, float, float]:
        """Live minus frozen hit rate over all trials, and its 95% interval (paired, normal approximation)."""
        if not self.trials:
            return math.nan, math.nan, math.nan
        mean = (self.only_live - self.only_frozen) / self.trials
        variance = (self.only_live + self.only_frozen) / self.trials - mean**2
        half = 1.96 * math.sqrt(variance / self.trials)
        return mean, mean - half, mean + half

    def latency_ms(self, percentile: float) -> float:
        """A percentile (0 to 100) of the newest recommendation latencies in milliseconds; nan before the first."""
        return float(np.percentile(self.latencies_ms, percentile)) if self.latencies_ms else math.nan


def histories_of(table: pa.Table) -> Histories:
    """The history of every user of an event table, oldest event first."""
    ordered = _oldest_first(table)
    histories: Histories = defaultdict(list)
    names = ("user_id", "item_id", "event", "value", "timestamp")
    for user_id, *event in zip(*(ordered[name].to_pylist() for name in names), strict=True):
        histories[user_id].append(PastEvent(*event))
    return dict(histories)


async def run_visitors(
    base_url: str,
    source: Source,
    frozen: Frozen,
    tally: Tally,
    stop: asyncio.Event,
    concurrency: int = 8,
    events_per_second: float = 50,
    k: int = 10,
    histories: Mapping[str, list[PastEvent]] | None = None,
) -> None:
    """Let visitors ask, choose and react until `stop` is set or the source ends.

    Args:
        base_url: where the service listens, such as http://127.0.0.1:8000.
        source: whose steps are taken, in order.
        frozen: the model that live answers are compared with; called in a thread, for all that wait at once.
        tally: counts; read it at any time from the same event loop.
        stop: steps that have begun are finished after it is set.
        concurrency: steps under way at the same time, of different users.
        events_per_second: at most so many events are sent, reactions included.
        k: how many items both models recommend.
        histories: what the service knows of each user at the start, oldest event first; copied.

    Raises:
        InputError: a number out of its range.
        ExceptionGroup: the frozen model or the source failed, or an answer broke the service's contract.
    """
    for name, number in (("concurrency", concurrency), ("events_per_second", events_per_second), ("k", k)):
        if number <= 0:
            raise InputError(f"{name}: must be above 0, got {number}")
    tally.k = k
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_SECONDS, limits=limits) as client:
        drive = _Drive(client, source, _FrozenBatches(frozen, k), tally, _Pace(events_per_second), k, histories or {})
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(drive.work(stop))


class _Pace:
    """Spaces events so that no more than so many a second are sent; time that was lost is not caught up."""

    def __init__(self, events_per_second: float):
        self.spacing = 1.0 / events_per_second
        self.due = time.monotonic()

    def take(self, events: int = 1) -> float:
        """Reserve a place for so many events; returns the seconds until it."""
        now = time.monotonic()
        wait = max(0.0, self.due - now)
        self.due = max(self.due, now) + events * self.spacing
        return wait


class _FrozenBatches:
    """Asks the frozen model for all histories that wait at once, in a thread."""

    def __init__(self, frozen: Frozen, k: int):
        self.frozen, self.k = frozen, k
        self.waiting: list[tuple[list[PastEvent], asyncio.Future[list[str]]]] = []
        self.running = asyncio.Lock()

    async def top(self, history: list[PastEvent]) -> list[str]:
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self.waiting.append((history, answer))
        async with self.running:
            # whoever gets here first answers for all that wait; the others find their answer done
            if not answer.done():
                batch, self.waiting = self.waiting, []
                tops = await asyncio.to_thread(self.frozen, [history for history, _ in batch], self.k)
                for (_, waiting), top in zip(batch, tops, strict=True):
                    waiting.set_result(top)
        return answer.result()


class _Drive:
    """The state that the steps share: histories as the service has acknowledged them, and who is busy."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        source: Source,
        frozen: _FrozenBatches,
        tally: Tally,
        pace: _Pace,
        k: int,
        histories: Mapping[str, list[PastEvent]],
    ):
        self.client, self.source, self.frozen, self.tally, self.pace, self.k = client, source, frozen, tally, pace, k
        self.histories: Histories = {user_id: list(events) for user_id, events in histories.items()}
        self.turns: dict[str, asyncio.Lock] = {}  # a lock serves in the order of asking: a user's steps stay in order
        self.busy: dict[str, int] = defaultdict(int)
        self.unsure: set[str] = set()

    async def work(self, stop: asyncio.Event) -> None:
        while not await _is_set_within(stop, self.pace.take()):
            step = self.source.next_step([user_id for user_id, steps in self.busy.items() if steps])
            if step is None:
                return
            self.busy[step.user_id] += 1
            async with self.turns.setdefault(step.user_id, asyncio.Lock()):
                await self.take(step)
            self.busy[step.user_id] -= 1
            if not self.busy[step.user_id]:
                del self.busy[step.user_id], self.turns[step.user_id]

    async def take(self, step: Step) -> None:
        """One step: ask both models, compare, send the choice, then the reaction to what was shown."""
        history = self.histories.setdefault(step.user_id, [])
        if not self.is_trial(step, history):
            answer, live_hit = await self.recommend(step.user_id), None
        else:
            answer, frozen_top = await asyncio.gather(self.recommend(step.user_id), self.frozen.top(history))
            live_hit = answer is not None and step.item_id in _item_ids(answer)
            if answer is not None:
                self.tally.count_trial(live_hit, step.item_id in frozen_top)
        await self.send(step, live_hit)
        if answer is None:
            return
        reaction = self.source.react(step.user_id, _item_ids(answer))
        self.tally.reactions += bool(reaction)
        self.pace.take(len(reaction))
        for event in reaction:
            await self.send(event, None, answer.get("request_id"))

    def is_trial(self, step: Step, history: list[PastEvent]) -> bool:
        """Whether both models could hit this step, and are asked under the same history.

        Both leave out what the user already had; a dislike is nothing to recommend; and where a failed request
        leaves open what the service knows of a user, the two histories may differ.
        """
        disliked = EVENT_WEIGHTS[step.kind] < 0 or (
            step.kind == "rating" and step.value is not None and step.value <= NEGATIVE_RATING
        )
        if disliked or step.user_id in self.unsure:
            return False
        return all(event.item_id != step.item_id for event in history)

    async def recommend(self, user_id: str) -> dict[str, Any] | None:
        """The live answer, or None if the request failed."""
        begin = time.perf_counter()
        answer = await self.call("GET", f"/v1/users/{quote(user_id, safe='')}/recommendations", params={"k": self.k})
        if answer is None:
            return None
        self.tally.latencies_ms.append(1000 * (time.perf_counter() - begin))
        self.tally.answers += 1
        self.tally.count_version(answer["model_version"])
        return answer

    async def send(self, step: Step, live_hit: bool | None, request_id: str | None = None) -> None:
        """Send one event; the history grows only by what was acknowledged."""
        event = {
            "user_id": step.user_id,
            "item_id": step.item_id,
            "event": step.kind,
            "value": step.value,
            "timestamp": step.timestamp,
            "event_id": uuid.uuid4().hex,
            "request_id": request_id,
        }
        self.tally.events_sent += 1
        answer = await self.call("POST", "/v1/events", json={"events": [event]})
        if answer is None:
            self.unsure.add(step.user_id)
            self.tally.users_unsure = len(self.unsure)
        elif answer["accepted"]:
            self.tally.events_acknowledged += 1
            self.tally.latest.append((step, live_hit))
            self.histories[step.user_id].append(PastEvent(*step[1:]))
        else:
            self.tally.events_refused += 1
            reasons = [rejected["reason"] for rejected in answer["rejected"]]
            self.tally.last_refusal = reasons[0] if reasons else "duplicate"

    async def call(self, method: str, path: str, **request: Any) -> dict[str, Any] | None:
        """One request, never repeated; anything but a 200 with JSON is counted as failed and gives None."""
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


def _oldest_first(table: pa.Table) -> pa.Table:
    """The events in time order; events of the same time keep their order."""
    return table.take(pa.array(np.argsort(table["timestamp"].to_numpy(), kind="stable")))


def _item_ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


async def _is_set_within(stop: asyncio.Event, seconds: float) -> bool:
    """Wait so many seconds, or less if `stop` is set; returns whether it is set."""
    if seconds > 0 and not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            return False
    return stop.is_set()
