"""What the trigger releases to the learner, made of new events and of everybody's histories."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    The newest `new_counts[i]` events of `histories[i]` are new; what stands before them is context.
    """

    last_offset: int  # of the newest event in the batch
    histories: list[History]
    new_counts: list[int]
    received_at: list[int]  # milliseconds, of each new event
    replay: list[History]  # windows to learn from again
    held_out: list[History]  # of other users who act now, for the gate
    quarantined: frozenset[int] = frozenset()  # offsets of new events that are not to be learned now

    @property
    def events(self) -> int:
        """How many events are new."""
        return sum(self.new_counts)

    def new_item_ids(self) -> Iterator[str]:
        """Yield the item of each new event."""
        for history, count in zip(self.histories, self.new_counts, strict=True):
            yield from history.item_ids[len(history) - count :]


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
    return MicroBatch(
        last_offset=events[-1].offset,
        histories=[_with_context(histories.get(user), own, after, sample.history_length) for user, own in new.items()],
        new_counts=[len(own) for own in new.values()],
        received_at=[logged.received_at for logged in events],
        replay=histories.windows(sample.replay, sample.history_length + 1, after, generator),
        held_out=histories.held_out(sample.held_out_users, sample.held_out_length + 1, new, generator),
    )


def _with_context(history: History, new: Sequence[LoggedEvent], after: int, length: int) -> History:
    """Return a user's new events behind the newest `length` of those that came before.

    The new ones are the log's, so that each is learned once also where more wait than are kept in memory.
    """
    context = history.up_to(after).newest(length)
    for logged in new:
        context.append(logged.event, logged.offset)
    return context
