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
    assert guard.noticed[CROWD] == 20
    assert guard.objection(click("other", "calm"), NOW) is None
    assert not guard.crowded(click("other", "calm"), NOW)


@pytest.mark.parametrize("name", ["rate_events", "repeat_events", "opinion_changes", "crowd_users"])
def test_a_rule_below_zero_is_refused(name):
    values: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=name):
        CleaningRules(**values)
