"""What the trigger releases to the learner, made of new events and of everybody's histories."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.data.history import History
from lib.data.replay import ReplaySample
from lib.data.user_histories import UserHistories
from lib.log.log_file import LoggedEvent


@dataclass(frozen=True)
class SampleSizes:
    """What a learner wants with the new events."""

    history_length: int  # events of context before a user's new ones, and of a replayed window
    replay: ReplaySample
    held_out_users: int
    held_out_length: int  # events before the held-out one


@dataclass
class MicroBatch:
    """What the trigger releases to the learner: new events in their users' histories, and what goes with them.

    `new[i]` are the places, ascending, of the new events in `histories[i]`. What stands before one of them is its
    context; an event that came late may have learned ones behind it, too.
    """

    last_offset: int  # of the newest event in the batch
    histories: list[History]
    new: list[list[int]]
    received_at: list[int]  # milliseconds, of each new event
    replay: list[History]  # windows to learn from again
    held_out: list[History]  # of other users who act now, for the gate
    quarantined: frozenset[int] = frozenset()  # offsets of new events that are not to be learned now
    user_ids: list[str] = field(default_factory=list)  # whose histories they are

    @property
    def events(self) -> int:
        """How many events are new."""
        return sum(map(len, self.new))

    def new_item_ids(self) -> Iterator[str]:
        """Yield the item of each new event."""
        for history, places in zip(self.histories, self.new, strict=True):
            yield from (history.item_ids[place] for place in places)


def micro_batch(
    events: Sequence[LoggedEvent],
    after: int,
    histories: UserHistories,
    sample: SampleSizes,
    generator: np.random.Generator,
) -> MicroBatch:
    """Put new events (all beyond log offset `after`, oldest first) in their users' histories, with samples of others.

    The histories may be further on than the events.
    """
    new: dict[str, list[LoggedEvent]] = {}
    for logged in events:
        new.setdefault(logged.event.user_id, []).append(logged)
    around = [_with_context(histories, own, after, sample.history_length) for own in new.values()]
    return MicroBatch(
        last_offset=events[-1].offset,
        histories=[history for history, _ in around],
        new=[places for _, places in around],
        received_at=[logged.received_at for logged in events],
        replay=histories.windows(sample.replay, sample.history_length + 1, after, generator),
        held_out=histories.held_out(sample.held_out_users, sample.held_out_length + 1, new, generator),
        user_ids=list(new),
    )


def _with_context(
    histories: UserHistories, new: Sequence[LoggedEvent], after: int, length: int
) -> tuple[History, list[int]]:
    """Return a user's new events in their history, which begins `length` events before them, and their places in it.

    The new ones are the log's, so that each is learned once also where more wait than are kept in memory.
    """
    history = histories.up_to(new[0].event.user_id, after)
    first = min(history.add(logged.event, logged.offset, histories.lateness_ms) for logged in new)
    places = [place for place in range(first, len(history)) if history.offsets[place] > after]
    start = max(first - length, 0)
    return history.slice(start, places[-1] + 1), [place - start for place in places]
