"""What a replica passes on to the aggregator: the feedback of all requests that came while the call before was running.

A call costs some milliseconds of processor time at both ends, however little it carries.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from lib.data.events import Event

Append = Callable[[list[Event], set[str], Counter[str]], Awaitable[Sequence[str | None]]]
MOST_REQUESTS = 64  # in one call


@dataclass(frozen=True)
class Feedback:
    """What one request brought."""

    events: list[Event]
    named: set[str]  # ids that were given to events without any identity
    rejected: Counter[str]  # events that were refused already, by reason


async def append_together(append: Append, requests: Sequence[Feedback]) -> list[list[str | None]]:
    """One call for many requests; for each, per event None, or why it was not taken."""
    events = [event for request in requests for event in request.events]
    named = set().union(*(request.named for request in requests))
    outcomes = iter(await append(events, named, sum((request.rejected for request in requests), Counter())))
    return [[next(outcomes) for _ in request.events] for request in requests]
