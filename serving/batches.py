"""Adaptive batches: what arrives while one runs forms the next, and an idle queue runs at once.

No batch waits for a time or a size: under light load a batch is one request, and it grows with the load, as all
requests that have arrived by then are read before it begins. A request that would wait too long is refused at once, so
that those that are taken are answered in time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate, takewhile
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
SMOOTHING = 0.1  # weight of the newest batch in the mean of the durations, and of the newest lag
PASSES = 2  # of the event loop from bytes that have arrived to the request that joins: one reads, one parses
TICK = 0.02  # seconds between two looks at the event loop


class Overloaded(RuntimeError):
    """More is asked than can be answered in time."""

    def __init__(self, wait: float):
        super().__init__(f"an answer would take {wait:.3f} s")
        self.wait = wait  # seconds


class Batches(Generic[Item, Result]):
    """Calls `run` with batches of items, one batch at a time, and gives each caller its own result.

    A batch weighs at most `largest`, unless it is of one item.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        largest: int,
        weight: Callable[[Item], int] = lambda item: 1,
    ):
        self.run = run
        self.largest = largest
        self.weight = weight
        self.count = 0  # batches that have run
        self.duration = 0.0  # seconds of a batch, a running mean
        self.lag = 0.0  # seconds by which the event loop is late, a running mean: so long requests wait to be read
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running: asyncio.Task | None = None

    async def submit(self, item: Item) -> Result:
        """Join the next batch, and return the item's result."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run_batches())
        return await answer

    async def watch(self) -> None:
        """Measure the lag of the event loop for as long as this runs."""
        while True:
            start = time.perf_counter()
            await asyncio.sleep(TICK)
            self.lag += (time.perf_counter() - start - TICK - self.lag) * SMOOTHING

    def expected_wait(self) -> float:
        """Return the seconds until one more item would have its result, if batches take as long as they did of late."""
        if self._running is None or self._running.done():
            return 0.0
        ahead = 1 + len(self._waiting) // self.largest  # with the one that runs now
        return self.lag + (ahead + 1) * self.duration

    def admit(self, longest: float) -> None:
        """Refuse one more item if it would wait longer than `longest` seconds.

        Raises:
            Overloaded: it would.
        """
        wait = self.expected_wait()
        if wait > longest:
            raise Overloaded(wait)

    async def _run_batches(self) -> None:
        while self._waiting:
            await self._read_arrived()
            weights = accumulate(self.weight(item) for item, _ in self._waiting)
            count = max(1, sum(1 for _ in takewhile(lambda weight: weight <= self.largest, weights)))
            batch = [pair for pair in self._waiting[:count] if not pair[1].done()]  # its caller may be gone
            del self._waiting[:count]
            if batch:
                await self._run_batch(batch)

    async def _read_arrived(self) -> None:
        """Let those join whose requests have arrived: a batch of many costs each of them less."""
        known = 0
        while known < len(self._waiting) < self.largest:
            known = len(self._waiting)
            for _ in range(PASSES):
                await asyncio.sleep(0)

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        start = time.perf_counter()
        try:
            results = await self.run([item for item, _ in batch])
        except Exception as error:  # every caller of the batch learns of it
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        elapsed = time.perf_counter() - start
        self.duration += (elapsed - self.duration) * (SMOOTHING if self.count else 1.0)
        self.count += 1
        for (_, answer), result in zip(batch, results, strict=True):
            if not answer.done():
                answer.set_result(result)
