"""Feedback that no person gives, told as it arrives: floods, impossible rates, repetition, flip-flopping, and crowds.

The window is of the times of arrival, which nobody can forge. A user's own times say only whether things were done at
an impossible rate, so that what a phone kept while it was offline and sends at once is taken.
"""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lib.data.events import Event
from lib.errors import EventRejected, InputError

RATE_MS = 1000
CHANGED_OPINION, CROWD = "changed_opinion", "crowd"


@dataclass(frozen=True)
class CleaningRules:
    """What is impossible or abusive; an event beyond these is rejected and counted. 0 turns one of the last four off.

    A user's event is a flood when `flood_events` earlier ones came less than `flood_window_ms` before it. Measured, the
    most that one user did within a minute: 30 ratings in MovieLens 100K (people rate a page of films at once; 90 within
    5 minutes), 18 clicks in Yoochoose (43 within 5 minutes). Ten times that leaves both untouched, and also data whose
    times are whole days, where a day's events share one time, while of a bot's thousands a minute 300 pass.

    The others judge feedback as it arrives, not tables. Measured likewise: 10 events of one user
    within a second (MovieLens, whose times are whole seconds), 13 clicks of one user on one item within a minute
    (Yoochoose), and 13 events of one item within a minute.
    """

    future_tolerance_ms: int = 5 * 60 * 1000  # clocks of phones and browsers run ahead by a little
    flood_events: int = 300
    flood_window_ms: int = 60 * 1000
    rate_events: int = 30  # of one user whose own times lie within one second
    repeat_events: int = 20  # of one user, one item and one kind within the window
    opinion_changes: int = 3  # of one user on one item within the window; until then the last opinion counts
    crowd_users: int = 50  # newcomers who act on one item within the window: counted, and rejected nowhere
    quarantine: bool = False  # what a crowd does is in the histories, but not learned as it comes

    def __post_init__(self) -> None:
        if self.flood_events < 1:
            raise InputError(f"flood_events is {self.flood_events}; it must be at least 1")
        if self.flood_window_ms < 1:
            raise InputError(f"flood_window_ms is {self.flood_window_ms}; it must be at least 1 millisecond")
        if self.future_tolerance_ms < 0:
            raise InputError(f"future_tolerance_ms is {self.future_tolerance_ms}; it must be 0 or more milliseconds")
        for name in ("rate_events", "repeat_events", "opinion_changes", "crowd_users"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")


class Arrival(NamedTuple):
    """What is remembered of an event for as long as the window."""

    time: int  # of arrival, milliseconds
    event: Event


class FeedbackGuard:
    """Admits events or says why not. For one thread.

    It remembers the window's events, `flood_events` at most of each user, and `max_users` users: beyond that the one
    who was quiet longest is forgotten. Rejected events count, so a bot that does not slow down stays out.
    """

    def __init__(self, rules: CleaningRules, max_users: int = 100_000) -> None:
        self.rules = rules
        self.max_users = max_users
        self.noticed: Counter[str] = Counter()  # what was taken all the same, by reason
        self._arrivals: OrderedDict[str, deque[Arrival]] = OrderedDict()  # the user of the latest event last
        self._crowds: OrderedDict[str, deque[int]] = OrderedDict()  # item: when newcomers first came to it, latest last

    def __len__(self) -> int:
        """How many users are remembered."""
        return len(self._arrivals)

    def objection(self, event: Event, now: int) -> EventRejected | None:
        """Why this event may not pass: flood, rate, repeat or contradiction; `now` is in milliseconds."""
        earliest = now - self.rules.flood_window_ms
        arrivals = self._arrivals.pop(event.user_id, None)
        if arrivals is None:
            arrivals = deque(maxlen=self.rules.flood_events)
        while arrivals and arrivals[0].time <= earliest:
            arrivals.popleft()
        found = self._judged(event, arrivals) if arrivals else None
        arrivals.append(Arrival(now, event))
        self._arrivals[event.user_id] = arrivals
        self._forget(earliest)
        return found

    def take_back(self, user_id: str) -> None:
        """Forget the newest event of a user: it was not taken after all."""
        if arrivals := self._arrivals.get(user_id):
            arrivals.pop()

    def crowded(self, event: Event, now: int) -> bool:
        """Count an admitted event of a newcomer; whether it is one of a crowd that its item draws."""
        if self.rules.crowd_users == 0:
            return False
        earliest = now - self.rules.flood_window_ms
        times = self._crowds.pop(event.item_id, None)
        if times is None:
            times = deque(maxlen=self.rules.crowd_users + 1)
        while times and times[0] <= earliest:
            times.popleft()
        if sum(own.event.item_id == event.item_id for own in self._arrivals[event.user_id]) == 1:
            times.append(now)  # a newcomer counts once
        self._crowds[event.item_id] = times
        while len(self._crowds) > self.max_users:
            self._crowds.popitem(last=False)
        if len(times) <= self.rules.crowd_users:
            return False
        self.noticed[CROWD] += 1
        return True

    def _judged(self, event: Event, arrivals: deque[Arrival]) -> EventRejected | None:
        rules = self.rules
        if len(arrivals) >= rules.flood_events:
            seconds = rules.flood_window_ms / 1000
            return EventRejected("flood", "user_id", f"flood: more than {rules.flood_events} events in {seconds:g} s")
        same_second = sum(abs(own.event.timestamp - event.timestamp) < RATE_MS for own in arrivals)
        if 0 < rules.rate_events <= same_second:
            message = f"rate: more than {rules.rate_events} events within a second; send the times at which they were"
            return EventRejected("rate", "timestamp", message)
        of_item = [own.event for own in arrivals if own.event.item_id == event.item_id]
        same = sum(own.event == event.event for own in of_item)
        if 0 < rules.repeat_events <= same:
            message = f"repeat: more than {rules.repeat_events} times {event.event} of one item in a short time"
            return EventRejected("repeat", "item_id", message)
        return self._contradiction(event, of_item)

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


def opinion_of(event: Event) -> float | str | None:
    """What an event says of its item: the rating, or like or dislike; None where it says nothing."""
    if event.event == "rating":
        return event.value
    return event.event if event.event in ("like", "dislike") else None
