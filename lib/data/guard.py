"""The limits of what a person can do, and the guard that holds feedback to them as it arrives.

The guard knows floods, impossible rates, repetition, flip-flopping and crowds. Its window is of times of arrival, which
nobody can forge. An event whose own time is before the window, as what a phone kept while it was offline and sends all
at once, is judged among its user's events of that time, by the same limits. Times can be invented, so only so many
events of the past are taken from one user in an hour of arrival; crowds are told by arrival alone.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import Field

from lib.data.events import Event
from lib.errors import EventRejected
from lib.settings import Settings

RATE_MS = 1000
PAST_PERIOD_MS = 60 * 60 * 1000  # of arrival, for which events of the past are remembered
MOST_PAST_EVENTS = 1_000_000  # of all users together that are remembered
LATENESS_MS = 24 * 60 * 60 * 1000
CHANGED_OPINION, CROWD = "changed_opinion", "crowd"


class CleaningRules(Settings):
    """What is impossible or abusive: an event beyond these limits is rejected and counted.

    A user's event is a flood when `flood_events` earlier ones came less than `flood_window_ms` before it. Measured, the
    most that one user did within a minute: 30 ratings in MovieLens 100K (people rate a page of films at once; 90 within
    5 minutes), 18 clicks in Yoochoose (43 within 5 minutes). Ten times that leaves both untouched, and also data whose
    times are whole days, where a day's events share one time, while of a bot's thousands a minute 300 pass.

    Floods and times are judged in tables, too; the rest only in feedback as it arrives. Its limits are measured
    likewise: 10 events of one user within a second (MovieLens, whose times are whole seconds), 13 clicks of one user on
    one item within a minute (Yoochoose), and 13 events of one item within a minute.
    """

    future_tolerance_ms: int = Field(
        default=5 * 60 * 1000, ge=0, description="how far a time may be ahead: clocks of phones and browsers run fast"
    )
    lateness_ms: int = Field(
        default=LATENESS_MS,
        ge=1,
        description="how late an event may come and be read by its time; a later one is read as if it were this late",
    )
    flood_events: int = Field(default=300, ge=1, description="of one user within the window")
    flood_window_ms: int = Field(default=60 * 1000, ge=1, description="the window of floods, repeats and crowds")
    past_events: int = Field(
        default=2000, ge=0, description="of one user within an hour, whose own times are before the window; 0: off"
    )
    rate_events: int = Field(default=30, ge=0, description="of one user whose own times lie within a second; 0: off")
    repeat_events: int = Field(
        default=20, ge=0, description="of one user, one item and one kind within the window; 0: off"
    )
    opinion_changes: int = Field(
        default=3, ge=0, description="of one user on one item within the window, the last one counts; 0: any number"
    )
    crowd_users: int = Field(
        default=50,
        ge=0,
        description="newcomers who act on one item within the window, counted but not rejected; 0: off",
    )
    quarantine: bool = Field(default=False, description="learn nothing of a crowd's events; histories still get them")


class Arrival(NamedTuple):
    """An event within the window."""

    time: int  # of arrival, milliseconds
    event: Event


class Past(NamedTuple):
    """A user's events whose own times were before the window when they came."""

    since: int  # arrival of the first of them, milliseconds
    events: list[Event]  # ordered by their own times

    def between(self, start: int, stop: int) -> list[Event]:
        """Return the events whose times are later than `start` and earlier than `stop`."""
        first = bisect_right(self.events, start, key=_own_time)
        return self.events[first : bisect_left(self.events, stop, key=_own_time)]


class FeedbackGuard:
    """Admits events or says why not; for one thread.

    It remembers the events of the window, at most `flood_events` of each user, and at most `max_users` users: beyond
    that, who was quiet longest is forgotten; likewise the events of the past, for an hour. Rejected events count, so a
    bot that does not slow down stays out.
    """

    def __init__(self, rules: CleaningRules, max_users: int = 100_000) -> None:
        self.rules = rules
        self.max_users = max_users
        self.noticed: Counter[str] = Counter()  # suspicious events that were taken all the same, by reason
        self._arrivals: OrderedDict[str, deque[Arrival]] = OrderedDict()  # the user of the latest event last
        self._pasts: OrderedDict[str, Past] = OrderedDict()  # the user of the latest event last
        self._past_events = 0  # in them
        # item: when each of its newcomers first came to it; the latest last
        self._crowds: OrderedDict[str, dict[str, int]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many users are remembered."""
        return len(self._arrivals)

    def objection(self, event: Event, now: int, age: int = 0) -> EventRejected | None:
        """Return why an event may not pass (flood, rate, repeat, contradiction), None where it may.

        Args:
            event: the event.
            now: milliseconds of a clock that is never set.
            age: milliseconds from the event's own time to its arrival.
        """
        if age >= self.rules.flood_window_ms:
            return self._objection_to_past(event, now)
        earliest = now - self.rules.flood_window_ms
        arrivals = self._arrivals.pop(event.user_id, None)
        if arrivals is None:
            arrivals = deque(maxlen=self.rules.flood_events)
        while arrivals and arrivals[0].time <= earliest:
            arrivals.popleft()
        found = self._judged(event, [own.event for own in arrivals], ()) if arrivals else None
        arrivals.append(Arrival(now, event))
        self._arrivals[event.user_id] = arrivals
        self._forget(earliest)
        return found

    def take_back(self, event: Event) -> None:
        """Forget an event that was not taken after all."""
        arrivals, past = self._arrivals.get(event.user_id, ()), self._pasts.get(event.user_id)
        for arrival in [own for own in arrivals if own.event is event]:
            self._arrivals[event.user_id].remove(arrival)
        if past:
            kept = [own for own in past.events if own is not event]
            self._past_events -= len(past.events) - len(kept)
            past.events[:] = kept

    def crowded(self, event: Event, now: int) -> bool:
        """Count an admitted event of a newcomer; return whether it is one of a crowd that its item draws."""
        if self.rules.crowd_users == 0:
            return False
        earliest = now - self.rules.flood_window_ms
        newcomers = self._crowds.pop(event.item_id, {})
        while newcomers and newcomers[next(iter(newcomers))] <= earliest:
            del newcomers[next(iter(newcomers))]
        newcomers.setdefault(event.user_id, now)  # each counts once
        if len(newcomers) > self.rules.crowd_users + 1:
            del newcomers[next(iter(newcomers))]
        self._crowds[event.item_id] = newcomers
        while len(self._crowds) > self.max_users:
            self._crowds.popitem(last=False)
        if len(newcomers) <= self.rules.crowd_users:
            return False
        self.noticed[CROWD] += 1
        return True

    def _objection_to_past(self, event: Event, now: int) -> EventRejected | None:
        """Judge an event whose own time is before the window, among its user's events around that time."""
        past = self._pasts.pop(event.user_id, None)
        if past is None or past.since <= now - PAST_PERIOD_MS:
            self._past_events -= len(past.events) if past else 0
            past = Past(now, [])
        self._pasts[event.user_id] = past
        self._forget_past(now - PAST_PERIOD_MS)
        if 0 < self.rules.past_events <= len(past.events):
            message = f"flood: more than {self.rules.past_events} events of the past in an hour; send the others later"
            return EventRejected("flood", "user_id", message)
        window = self.rules.flood_window_ms
        earlier = past.between(event.timestamp - window, event.timestamp + 1)
        later = past.between(event.timestamp, event.timestamp + window)
        found = self._judged(event, earlier, later)
        past.events.insert(bisect_right(past.events, event.timestamp, key=_own_time), event)
        self._past_events += 1
        return found

    def _judged(self, event: Event, earlier: Sequence[Event], later: Sequence[Event]) -> EventRejected | None:
        """Judge an event among its user's events in the window before it, and in the one after it."""
        rules, near = self.rules, [*earlier, *later]
        if max(len(earlier), len(later)) >= rules.flood_events:
            seconds = rules.flood_window_ms / 1000
            return EventRejected("flood", "user_id", f"flood: more than {rules.flood_events} events in {seconds:g} s")
        same_second = sum(abs(own.timestamp - event.timestamp) < RATE_MS for own in near)
        if 0 < rules.rate_events <= same_second:
            message = f"rate: more than {rules.rate_events} events within a second; send the times at which they were"
            return EventRejected("rate", "timestamp", message)
        same = sum(own.item_id == event.item_id and own.event == event.event for own in near)
        if 0 < rules.repeat_events <= same:
            message = f"repeat: more than {rules.repeat_events} times {event.event} of one item in a short time"
            return EventRejected("repeat", "item_id", message)
        return self._contradiction(event, [own for own in earlier if own.item_id == event.item_id])

    def _contradiction(self, event: Event, of_item: list[Event]) -> EventRejected | None:
        opinions = [opinion for own in (*of_item, event) if (opinion := opinion_of(own)) is not None]
        if opinion_of(event) is None or len(opinions) < 2 or opinions[-1] == opinions[-2]:
            return None
        changes = sum(one != other for one, other in pairwise(opinions))
        if 0 < self.rules.opinion_changes < changes:
            message = f"contradiction: opinion on one item changed more than {self.rules.opinion_changes} times"
            return EventRejected("contradiction", "event", message)
        self.noticed[CHANGED_OPINION] += 1
        return None

    def _forget(self, earliest: int) -> None:
        while len(self._arrivals) > 1:
            user_id, arrivals = next(iter(self._arrivals.items()))
            if arrivals and arrivals[-1].time > earliest and len(self._arrivals) <= self.max_users:
                return
            del self._arrivals[user_id]

    def _forget_past(self, earliest: int) -> None:
        while len(self._pasts) > 1:
            user_id, past = next(iter(self._pasts.items()))
            if past.since > earliest and self._past_events <= MOST_PAST_EVENTS and len(self._pasts) <= self.max_users:
                return
            del self._pasts[user_id]
            self._past_events -= len(past.events)


def _own_time(event: Event) -> int:
    return event.timestamp


def opinion_of(event: Event) -> float | str | None:
    """Return what an event says of its item: the rating, or like or dislike; None for no opinion."""
    if event.event == "rating":
        return event.value
    return event.event if event.event in ("like", "dislike") else None
