"""Feedback that no person gives is refused with its reason, and what people do is not."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.cleaning import FeedbackGuard
from lib.events import EVENT_SCHEMA, CleaningRules, Event, InputError, clean

NOW = 1_700_000_000_000
SECOND = 1000
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def event(user: str = "u", item: str = "i", kind: str = "click", value: float | None = None, time: int = NOW) -> Event:
    return Event(user, item, kind, value, time)


def reasons(guard: FeedbackGuard, *events: Event, gap: int = 2 * SECOND) -> list[str | None]:
    """Why each of some events is refused that arrive one after another, at their own times."""
    found = []
    for place, arriving in enumerate(events):
        now = NOW + place * gap
        objection = guard.objection(arriving._replace(timestamp=now), now)
        found.append(None if objection is None else objection.reason)
    return found


def test_floods_as_they_arrive_are_those_of_a_table():
    rules = CleaningRules(flood_events=30, flood_window_ms=50_000, rate_events=0, repeat_events=0)
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.integers(0, 1000, 2000)) + NOW - 5_000_000
    users = generator.integers(0, 3, 2000)
    events = [event(str(user), str(place), time=int(time)) for place, (user, time) in enumerate(zip(users, times))]
    guard = FeedbackGuard(rules)
    admitted = [own.item_id for own in events if guard.objection(own, own.timestamp) is None]
    kept, counts = clean(
        EVENT_SCHEMA.empty_table().from_pylist([own._asdict() for own in events], EVENT_SCHEMA), NOW, rules
    )
    assert 100 < counts["flood"] < 1900
    assert sorted(kept["item_id"].to_pylist()) == sorted(admitted)


def test_a_bot_is_stopped_and_let_back_and_others_are_not_touched():
    guard = FeedbackGuard(CleaningRules())
    found = Counter(reasons(guard, *(event("bot", str(place)) for place in range(5000)), gap=50))
    assert found == {None: 300 - 0, "flood": 4700} or found[None] < 400
    assert guard.objection(event("person"), NOW + 5000 * 50) is None
    assert guard.objection(event("bot", "other"), NOW + 5000 * 50 + 60 * SECOND) is None


def test_more_than_a_hand_can_do_in_a_second_is_refused():
    guard = FeedbackGuard(CleaningRules(rate_events=3))
    at_once = [guard.objection(event(item=str(place)), NOW) for place in range(5)]
    assert [objection and objection.reason for objection in at_once] == [None, None, None, "rate", "rate"]
    assert at_once[-1] is not None
    assert "send the times" in at_once[-1].message
    # what a phone kept while it was offline comes at once, too, but has its own times
    kept = [event("phone", str(place), time=NOW - place * 10 * SECOND) for place in range(100)]
    assert [guard.objection(own, NOW) for own in kept] == [None] * 100


def test_the_same_again_and_again_is_refused():
    guard = FeedbackGuard(CleaningRules(repeat_events=2))
    assert reasons(guard, *[event()] * 4) == [None, None, "repeat", "repeat"]
    assert guard.objection(event(kind="cart"), NOW) is None  # another kind of event
    assert guard.objection(event(item="another"), NOW) is None
    assert guard.objection(event(time=NOW + 90 * SECOND), NOW + 90 * SECOND) is None  # a minute later


def test_who_changes_their_mind_is_heard_and_who_flips_is_not():
    guard = FeedbackGuard(CleaningRules(opinion_changes=2))
    flips = [event(kind=kind) for kind in ("like", "dislike", "click", "like", "dislike", "dislike")]
    assert reasons(guard, *flips) == [None, None, None, None, "contradiction", None]
    assert guard.noticed == {"changed_opinion": 2}
    stars = [event("v", kind="rating", value=value) for value in (5.0, 5.0, 1.0, 5.0, 1.0)]
    assert reasons(guard, *stars) == [None, None, None, None, "contradiction"]


def test_a_crowd_of_newcomers_on_one_item_is_counted():
    guard = FeedbackGuard(CleaningRules(crowd_users=3))

    def come(user: str, item: str, now: int) -> bool:
        assert guard.objection(event(user, item, time=now), now) is None
        return guard.crowded(event(user, item, time=now), now)

    assert [come(f"n{place}", "pushed", NOW) for place in range(5)] == [False, False, False, True, True]
    assert not come("n0", "another", NOW)
    assert guard.noticed == {"crowd": 2}
    assert not come("late", "pushed", NOW + 60 * SECOND)
    assert [come("alone", "liked", NOW + 61 * SECOND) for _ in range(5)] == [False] * 5  # one is no crowd


def test_what_is_remembered_is_bounded():
    guard = FeedbackGuard(CleaningRules(flood_events=2, flood_window_ms=1000), max_users=10)
    for place in range(100):
        guard.objection(event(str(place)), NOW)
    assert len(guard) == 10
    guard.objection(event("late"), NOW + 1000)
    assert len(guard) == 1


def test_what_could_not_be_stored_is_no_flood():
    guard = FeedbackGuard(CleaningRules(flood_events=1))
    assert guard.objection(event(item="a"), NOW) is None
    guard.take_back("u")
    assert guard.objection(event(item="a"), NOW) is None
    assert guard.objection(event(item="b", time=NOW + 5000), NOW) is not None


@pytest.mark.parametrize("name", ["rate_events", "repeat_events", "opinion_changes", "crowd_users"])
def test_a_rule_is_turned_off_by_0_and_refused_below(name):
    with pytest.raises(InputError, match=f"{name} is -1"):
        CleaningRules(**{name: -1})
    off = FeedbackGuard(CleaningRules(rate_events=0, repeat_events=0, opinion_changes=0, crowd_users=0))
    same = [event(kind=kind) for kind in ("like", "dislike") * 50]
    assert [off.objection(own, NOW) for own in same] == [None] * 100
    assert not off.crowded(same[0], NOW)


@pytest.mark.parametrize("name", ["ml-100k", "yoochoose-100k"])
def test_the_default_rules_refuse_nothing_that_people_did(name):
    path = SHARED / name / "events.parquet"
    if not path.exists():
        pytest.skip("shared/data is absent")
    table = pq.read_table(path).sort_by("timestamp").slice(0, 20_000)
    guard = FeedbackGuard(CleaningRules())
    columns = (table[column].to_pylist() for column in Event._fields[:5])
    events = [Event(*values) for values in zip(*columns, strict=True)]
    assert [own for own in events if guard.objection(own, own.timestamp)] == []
