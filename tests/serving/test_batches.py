"""Adaptive batches: nobody waits for nothing, results go to their callers, and what would wait too long is refused."""

import asyncio
import socket
import time

import pytest

from serving.batches import Batches, Overloaded


class Doubling:
    """Doubles numbers when the gate opens, and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        await self.gate.wait()
        if -1 in numbers:
            raise ValueError("minus one")
        return [2 * number for number in numbers]


def test_an_idle_queue_runs_at_once_and_a_busy_one_gathers():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=3)
        assert await batches.submit(1) == 2
        double.gate.clear()
        asked = [asyncio.create_task(batches.submit(number)) for number in range(10, 18)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        double.gate.set()
        assert await asyncio.gather(*asked) == [2 * number for number in range(10, 18)]
        assert double.batches[0] == [1]
        assert [number for batch in double.batches[1:] for number in batch] == list(range(10, 18))
        assert max(map(len, double.batches)) == 3
        assert batches.count == len(double.batches) < 9

    asyncio.run(scenario())


def test_requests_that_have_arrived_are_read_before_a_batch_begins():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=10)
        own, others = socket.socketpair()
        own.setblocking(False)
        answers: list[asyncio.Task[int]] = []

        def read() -> None:  # as a server does: bytes become a task, and the task joins
            for byte in own.recv(1):
                answers.append(asyncio.create_task(batches.submit(byte)))

        with own, others:
            asyncio.get_running_loop().add_reader(own, read)
            first = asyncio.create_task(batches.submit(1))
            others.sendall(bytes([2, 3, 4]))  # nothing of it is read before the first has joined
            assert await first == 2
            asyncio.get_running_loop().remove_reader(own)
        assert await asyncio.gather(*answers) == [4, 6, 8]
        assert double.batches == [[1, 2, 3, 4]]

    asyncio.run(scenario())


def test_an_error_reaches_each_caller_of_its_batch_and_no_other():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=2)
        outcomes = await asyncio.gather(*(batches.submit(n) for n in (-1, 5, 6, 7)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError, int, int]
        assert await batches.submit(1) == 2

    asyncio.run(scenario())


def test_who_has_gone_is_not_computed():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=10)
        double.gate.clear()
        first = asyncio.create_task(batches.submit(1))
        await asyncio.sleep(0.01)
        gone, stays = (asyncio.create_task(batches.submit(number)) for number in (2, 3))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        double.gate.set()
        assert [await first, await stays] == [2, 6]
        assert double.batches == [[1], [3]]

    asyncio.run(scenario())


def test_more_is_refused_once_the_wait_would_be_too_long():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=2)
        batches.admit(0.0)
        await batches.submit(1)
        batches.duration = 0.1
        batches.admit(0.0)  # idle: there is nothing to wait for
        double.gate.clear()
        running = [asyncio.create_task(batches.submit(number)) for number in range(2)]
        await asyncio.sleep(0.01)
        assert batches.expected_wait() == pytest.approx(0.2)  # the batch that runs, then the own one
        waiting = [asyncio.create_task(batches.submit(number)) for number in range(4)]
        await asyncio.sleep(0.01)
        assert batches.expected_wait() == pytest.approx(0.4)
        batches.admit(0.5)
        with pytest.raises(Overloaded) as refused:
            batches.admit(0.3)
        assert refused.value.wait == pytest.approx(0.4)
        batches.lag = 0.2
        with pytest.raises(Overloaded):
            batches.admit(0.5)  # it waited to be read as well
        double.gate.set()
        await asyncio.gather(*running, *waiting)
        batches.admit(0.0)

    asyncio.run(scenario())


def test_a_late_event_loop_shows():
    async def scenario() -> None:
        batches = Batches(Doubling(), largest=2)
        watching = asyncio.create_task(batches.watch())
        await asyncio.sleep(0.05)
        calm = batches.lag
        for _ in range(20):
            time.sleep(0.05)
            await asyncio.sleep(0.001)
        assert batches.lag > calm + 0.005
        watching.cancel()

    asyncio.run(scenario())


def test_a_batch_is_bounded_by_what_its_items_weigh():
    async def scenario() -> None:
        double = Doubling()
        batches = Batches(double, largest=1000, weight=lambda number: number)
        numbers = [600, 600, 300, 100, 1500, 1, 999, 1]
        assert await asyncio.gather(*map(batches.submit, numbers)) == [2 * number for number in numbers]
        assert double.batches == [[600], [600, 300, 100], [1500], [1, 999], [1]]

    asyncio.run(scenario())
