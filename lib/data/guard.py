"""The limits of what a person can do, and the guard that holds feedback to them as it arrives.

The guard knows floods, impossible rates, repetition, flip-flopping and crowds. Its window is of times of arrival, which
nobody can forge. An event's own time only says whether it was one of too many in a second, so that what a phone kept
while it was offline, and sends all at once, is taken.
"""

from collections import Counter, OrderedDict, deque
from itertools import pairwise
from typing import NamedTuple

from pydantic import Field

from lib.data.events import Event
from lib.errors import EventRejected
from lib.settings import Settings

RATE_MS = 1000
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


class FeedbackGuard:
    """Admits events or says why not; for one thread.

    It remembers the events of the window, at most `flood_events` of each user, and at most `max_users` users: beyond
    that, who was quiet longest is forgotten. Rejected events count, so a bot that does not slow down stays out.
    """

    def __init__(self, rules: CleaningRules, max_users: int = 100_000) -> None:
        self.rules = rules
        self.max_users = max_users
        self.noticed: Counter[str] = Counter()  # suspicious events that were taken all the same, by reason
        self._arrivals: OrderedDict[str, deque[Arrival]] = OrderedDict()  # the user of the latest event last
        self._crowds: OrderedDict[str, deque[int]] = OrderedDict()  # item: when newcomers first came to it, latest last

    def __len__(self) -> int:
        """Return how many users are remembered."""
        return len(self._arrivals)

    def objection(self, event: Event, now: int) -> EventRejected | None:
        """Return why an event may not pass (flood, rate, repeat, contradiction), None where it may.

        Args:
            event: the event.
            now: milliseconds of a clock that is never set.
        """
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
        """Forget the newest event of a user, which was not taken after all."""
        if arrivals := self._arrivals.get(user_id):
            arrivals.pop()

    def crowded(self, event: Event, now: int) -> bool:
        """Count an admitted event of a newcomer; return whether it is one of a crowd that its item draws."""
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
    """Return what an event says of its item: the rating, or like or dislike; None for no opinion."""
    if event.event == "rating":
        return event.value
    return event.event if event.event in ("like", "dislike") else None
