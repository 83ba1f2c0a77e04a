"""The aggregator without Ray: when it releases events to the learner."""

import asyncio
import threading
import time
from typing import Any

import pytest

from lib.data.events import Event
from lib.data.guard import CleaningRules
from lib.data.history import History
from lib.errors import InputError
from serving.aggregator import DUPLICATE, Aggregator, AggregatorConfig, Trigger
from tests.helpers.logs import make_event

HOUR = 60 * 60 * 1000


@pytest.mark.parametrize(
    ("trigger", "due"),
    [
        (Trigger(events=3, milliseconds=HOUR), [False, False, True, True]),
        (Trigger(events=1, milliseconds=HOUR), [True, True, True, True]),
        (Trigger(events=3, milliseconds=0), [True, True, True, True]),
    ],
)
def test_events_are_released_when_so_many_or_so_old_are_pending(tmp_path, trigger, due):
    async def released() -> list[bool]:
        aggregator = Aggregator(str(tmp_path), config=AggregatorConfig(trigger=trigger))
        assert not await aggregator.wait_until_due(0, 0, wait_ms=0)
        found = []
        for number in range(4):
            assert await aggregator.append([make_event(number)]) == [None]
            found.append(await aggregator.wait_until_due(0, 0, wait_ms=0))
        assert not await aggregator.wait_until_due(4, 0, wait_ms=0)
        await aggregator.close()
        return found

    assert asyncio.run(released()) == due


def test_a_repeated_request_changes_nothing_however_large_it_is(tmp_path):
    rules = CleaningRules(flood_events=10, rate_events=0)

    async def run() -> None:
        aggregator = Aggregator(str(tmp_path), config=AggregatorConfig(cleaning=rules))
        now = time.time_ns() // 1_000_000
        events = [make_event(number, timestamp=now - number) for number in range(9)]
        assert await aggregator.append(events) == [None] * 9
        for _ in range(3):
            assert await aggregator.append(events) == [DUPLICATE] * 9
        more = [make_event(number, timestamp=now) for number in (100, 101)]
        answers = await aggregator.append([*events, more[0], more[1], more[0], more[1]])
        assert answers[:10] == [*[DUPLICATE] * 9, None], "repeated events are not counted"
        assert [answer and answer[:5] for answer in answers[10:]] == ["flood", DUPLICATE[:5], "flood"]
        assert (aggregator.duplicates, aggregator.rejected) == (3 * 9 + 9 + 1, {"flood": 2})
        other = [make_event(number, "other", timestamp=now) for number in range(9)]
        both = await asyncio.gather(aggregator.append(other), aggregator.append(other))  # at once
        assert sorted(map(str, both[0] + both[1])) == ["None"] * 9 + [DUPLICATE] * 9
        assert not aggregator.writing
        await aggregator.close()

    asyncio.run(run())


def test_events_of_the_past_are_no_flood_of_today(tmp_path):
    async def run() -> None:
        aggregator = Aggregator(str(tmp_path))
        now = time.time_ns() // 1_000_000
        years = [make_event(number, timestamp=now - HOUR * 10 * number) for number in range(1, 1001)]
        assert await aggregator.append(years) == [None] * 1000
        assert await aggregator.append(years) == [DUPLICATE] * 1000
        assert await aggregator.append([make_event(number, timestamp=now) for number in range(30)]) == [None] * 30
        await aggregator.close()

    asyncio.run(run())


def test_histories_are_in_order_of_time_also_after_a_restart(tmp_path):
    times = [50, 10, 30, 20, 60, 40, 5]
    config = AggregatorConfig(cleaning=CleaningRules(lateness_ms=40))

    async def history(*events: Event) -> History:
        aggregator = Aggregator(str(tmp_path), config=config)
        for event in events:
            assert await aggregator.append([event]) == [None]
        [found] = await aggregator.get_histories(["user"])
        await aggregator.close()
        return found

    found = asyncio.run(history(*(make_event(time) for time in times)))
    assert found.offsets == [2, 4, 7, 3, 6, 1, 5]  # the last one is as late as it may be: at 20, where there is one
    assert asyncio.run(history()) == found


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("trigger.events", {"trigger": {"events": 0}}),
        ("trigger.milliseconds", {"trigger": {"milliseconds": -1}}),
        ("keep_events", {"keep_events": 0}),
        ("cleaning.flood_events", {"cleaning": {"flood_events": 0}}),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_name(setting, values):
    with pytest.raises(InputError, match=f"^{setting}: "):
        AggregatorConfig(**values)


def test_others_are_answered_while_changed_items_are_written(tmp_path, monkeypatch):
    async def run() -> None:
        aggregator, released = Aggregator(str(tmp_path)), threading.Event()
        await aggregator.open()
        assert aggregator.items is not None
        append = aggregator.items.append

        def waiting(*arguments: Any) -> int:
            assert released.wait(60), "nothing else is done meanwhile"
            return append(*arguments)

        monkeypatch.setattr(aggregator.items, "append", waiting)
        changing = asyncio.create_task(aggregator.change_items([("i1", {"title": "One"})]))
        while not aggregator.appending:
            await asyncio.sleep(0)
        assert await aggregator.append([make_event(1)]) == [None]
        assert not changing.done()
        released.set()
        assert await changing == 1
        assert not aggregator.appending
        await aggregator.close()

    asyncio.run(run())


def test_items_that_change_together_get_revisions_of_their_own(tmp_path):
    async def run() -> None:
        aggregator = Aggregator(str(tmp_path))
        changes = [aggregator.change_items([(f"i{number}", {"size": number})]) for number in range(50)]
        assert sorted(map(int, await asyncio.gather(*changes))) == list(range(1, 51))
        _, changed = await aggregator.newer([], 0)
        assert len(changed) == 50
        await aggregator.close()

    asyncio.run(run())
