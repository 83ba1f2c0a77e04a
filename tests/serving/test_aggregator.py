"""The aggregator without Ray: when it releases events to the learner."""

import asyncio

import pytest

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
