"""Feedback that no person gives is told as it arrives, and what people do passes."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.data.events import EVENT_SCHEMA, Event
from lib.data.guard import CHANGED_OPINION, CROWD, CleaningRules, FeedbackGuard
from lib.data.tables import clean

NOW = 1_700_000_000_000
RULES = CleaningRules()


def click(user: str, item: str, timestamp: int = NOW) -> Event:
    return Event(user, item, "click", None, timestamp)


def reasons(guard: FeedbackGuard, events: list[tuple[Event, int]]) -> Counter[str]:
    """How many events of (event, time of arrival) were refused, by reason; "" for those that passed."""
    found = (guard.objection(event, now) for event, now in events)
    return Counter("" if objection is None else objection.reason for objection in found)


def test_the_flood_guard_agrees_with_clean():
    rules = CleaningRules(flood_events=5, flood_window_ms=50, rate_events=0, repeat_events=0)
    generator = np.random.default_rng(1)
    times = np.cumsum(generator.integers(0, 8, 2000)) + NOW - 1_000_000
    users = generator.integers(0, 3, 2000)
    events = [click(str(u), str(place), int(t)) for place, (u, t) in enumerate(zip(users, times, strict=True))]
    guard = FeedbackGuard(rules)
    admitted = [event.item_id for event in events if guard.objection(event, event.timestamp) is None]
    kept, counts = clean(pa.Table.from_pylist([event._asdict() for event in events], EVENT_SCHEMA), NOW, rules)
    assert 100 < counts["flood"] < 1900
    assert sorted(kept["item_id"].to_pylist()) == sorted(admitted)


def past_reasons(guard: FeedbackGuard, events: list[Event], now: int = NOW) -> Counter[str]:
    """How many events that arrive at once were refused, by reason."""
    found = (guard.objection(event, now, now - event.timestamp) for event in events)
    return Counter("" if objection is None else objection.reason for objection in found)


@pytest.mark.parametrize("order", [1, -1])
def test_events_of_years_that_arrive_at_once_are_no_flood(order):
    years = [click("u", f"i{place % 7}", NOW - 12 * 60 * 60 * 1000 * place) for place in range(1, 1001)]
    guard = FeedbackGuard(RULES)
    assert past_reasons(guard, years[::order]) == {"": 1000}
    assert past_reasons(guard, [click("u", f"j{place}") for place in range(30)]) == {"": 30}  # and now goes on


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_a_flood_of_the_past_is_told_by_its_own_times(order):
    times = NOW - 3_600_000 + 100 * np.arange(2000)
    times = {"rising": times, "falling": times[::-1], "mixed": np.random.default_rng(0).permutation(times)}[order]
    passed = past_reasons(FeedbackGuard(RULES), [click("bot", f"i{t}", int(t)) for t in times])[""]
    assert RULES.flood_events <= passed <= 0.6 * len(times)  # what is refused counts, too
    at_once = [click("bot", f"i{place}", NOW - 3_600_000 + 500 * (place // 50)) for place in range(200)]
    assert past_reasons(FeedbackGuard(RULES), at_once)["rate"] > 100
    again = [click("bot", "i", NOW - 3_600_000 + 2000 * place) for place in range(60)]
    assert past_reasons(FeedbackGuard(RULES), again) == {"": RULES.repeat_events, "repeat": 60 - RULES.repeat_events}


def test_so_many_events_of_invented_times_are_taken_in_an_hour():
    guard = FeedbackGuard(RULES)
    invented = [click("bot", "i", NOW - 10_000_000 * place) for place in range(1, 10_001)]
    assert past_reasons(guard, invented) == {"": RULES.past_events, "flood": 10_000 - RULES.past_events}
    assert past_reasons(guard, [click("person", "i", NOW - 100_000)]) == {"": 1}
    assert past_reasons(guard, invented[:1], NOW + 3_599_999) == {"flood": 1}
    assert past_reasons(guard, invented[:1], NOW + 3_600_000) == {"": 1}
    assert past_reasons(FeedbackGuard(CleaningRules(past_events=0)), invented) == {"": 10_000}


def test_the_past_of_few_users_is_remembered():
    guard = FeedbackGuard(RULES, max_users=10)
    for place in range(100):
        assert past_reasons(guard, [click(str(place), f"i{event}", NOW - 100_000 * event) for event in (1, 2)]) == {
            "": 2
        }
    assert (len(guard._pasts), guard._past_events) == (10, 20)
    assert past_reasons(guard, [click("late", "i", NOW - 100_000)], NOW + 3_600_000) == {"": 1}
    assert (len(guard._pasts), guard._past_events) == (1, 1)


def test_what_was_not_taken_is_forgotten():
    guard = FeedbackGuard(CleaningRules(past_events=2, flood_events=2))
    for events in ([click("u", f"i{place}", NOW - 100_000 * place) for place in (1, 2)], [click("u", i) for i in "ab"]):
        for _ in range(3):
            assert past_reasons(guard, events) == {"": 2}
            for event in events:
                guard.take_back(event)
        assert past_reasons(guard, [*events, events[0]]) == {"": 2, "flood": 1}


def test_a_bot_is_stopped_and_let_back_when_it_has_been_quiet():
    guard = FeedbackGuard(RULES)
    clicks = [(click("bot", f"i{place}", NOW + 100 * place), NOW + place) for place in range(5000)]
    assert reasons(guard, clicks) == {"": RULES.flood_events, "flood": 5000 - RULES.flood_events}
    assert guard.objection(click("person", "i1"), NOW + 5000) is None
    assert guard.objection(click("bot", "i1"), NOW + 5000 + RULES.flood_window_ms) is None


def test_it_forgets_who_is_quiet():
    guard = FeedbackGuard(CleaningRules(flood_events=2, flood_window_ms=1000), max_users=10)
    for place in range(100):
        guard.objection(click(str(place), "i"), NOW)
    assert len(guard) == 10
    guard.objection(click("late", "i"), NOW + 1000)
    assert len(guard) == 1


def test_an_impossible_rate_is_that_of_the_users_own_times():
    at_once = [(click("bot", f"i{place}"), NOW + 500 * place) for place in range(50)]
    assert reasons(FeedbackGuard(RULES), at_once) == {"": RULES.rate_events, "rate": 50 - RULES.rate_events}
    sent_late = [(click("phone", f"i{place}", NOW - 2000 * place), NOW) for place in range(50)]
    assert reasons(FeedbackGuard(RULES), sent_late) == {"": 50}
    assert reasons(FeedbackGuard(CleaningRules(rate_events=0)), at_once) == {"": 50}


def test_the_same_again_and_again_is_refused():
    clicks = [(click("u", "i", NOW + 2000 * place), NOW + 100 * place) for place in range(60)]
    assert reasons(FeedbackGuard(RULES), clicks) == {"": RULES.repeat_events, "repeat": 60 - RULES.repeat_events}
    slowly = [(event, NOW + RULES.flood_window_ms * place) for place, (event, _) in enumerate(clicks)]
    assert reasons(FeedbackGuard(RULES), slowly) == {"": 60}


def test_an_opinion_may_change_a_few_times():
    guard = FeedbackGuard(RULES)
    kinds = ["like", "dislike"] * 5
    opinions = [(Event("u", "i", kind, None, NOW + 2000 * place), NOW + place) for place, kind in enumerate(kinds)]
    assert reasons(guard, opinions) == {"": RULES.opinion_changes + 1, "contradiction": 9 - RULES.opinion_changes}
    assert guard.noticed[CHANGED_OPINION] == RULES.opinion_changes
    ratings = [(Event("v", "i", "rating", 4.0, NOW + 2000 * place), NOW + place) for place in range(10)]
    assert reasons(guard, ratings) == {"": 10}  # the same again is no contradiction


def test_a_crowd_of_newcomers_is_counted_once_each():
    guard = FeedbackGuard(CleaningRules(crowd_users=20))
    crowded = []
    for place in range(30):
        for _ in range(2):
            event = click(f"new{place}", "pushed", NOW + 2000 * place)
            assert guard.objection(event, NOW + place) is None
            crowded.append(guard.crowded(event, NOW + place))
    assert crowded == [False] * 40 + [True] * 20
    late = Event("old times", "pushed", "click", None, NOW - 10_000_000)
    assert guard.objection(late, NOW + 40, 10_000_000) is None
    assert guard.crowded(late, NOW + 40), "a crowd is told by arrival"
    assert not guard.crowded(late, NOW + 40 + RULES.flood_window_ms)
    assert guard.noticed[CROWD] == 21
    assert guard.objection(click("other", "calm"), NOW) is None
    assert not guard.crowded(click("other", "calm"), NOW)


@pytest.mark.parametrize("name", ["past_events", "rate_events", "repeat_events", "opinion_changes", "crowd_users"])
def test_a_rule_below_zero_is_refused(name):
    values: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=name):
        CleaningRules(**values)
