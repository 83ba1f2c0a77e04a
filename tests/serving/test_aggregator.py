"""The aggregator without Ray: when it releases events to the learner."""

import asyncio

import pytest

from lib.data.events import Event
from lib.data.guard import CleaningRules
from lib.data.history import History
from lib.errors import InputError
from serving.aggregator import Aggregator, AggregatorConfig, Trigger
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
