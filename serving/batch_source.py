"""Micro-batches for the learner: from the only aggregator, or from those of all shards in turn.

Each of several shards counts its own events; what the learner gets has the offsets of the one order of all events
(lib/log/order.py), which is made durable here, a micro-batch of one shard at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import ray

from lib.data.history import History
from lib.live.micro_batch import MicroBatch, SampleSizes
from lib.log.items import ItemChange
from lib.log.layout import ORDER_FILE, LogLayout
from lib.log.order import LogOrder, Run
from lib.log.shard import ONLY, Shard
from lib.log.write_ahead_log import last_commit_is_torn
from serving.aggregator import aggregator_handle

WAIT_SECONDS = 0.5  # for a micro-batch, before the learner does something else
Released = MicroBatch | list[ItemChange] | None


class BatchSource:
    """What there is to learn beyond a log offset. For one thread.

    Raises:
        InputError: the record of how the state folder's log is split, or the order of its events, is damaged.
        OSError: the order cannot be read, or written, now; `next` may raise the same, and can be called again.
    """

    def __init__(self, state: str):
        self.shards = LogLayout.of(state).shards()
        self.order: LogOrder | None = None
        self._waiting: dict[ray.ObjectRef, Shard] = {}  # until a shard has something, in the order of asking
        if len(self.shards) > 1:
            path = Path(state, ORDER_FILE)
            if path.exists():
                last_commit_is_torn(path)  # one that is torn is dropped: no version knows of it
            self.order = LogOrder(path)

    def next(self, offset: int, item_revision: int, sample: SampleSizes, up_to: int | None = None) -> Released:
        """Return the next micro-batch beyond a log offset; None after WAIT_SECONDS without one.

        Items that changed after a revision come first, alone and at once. With `up_to`, an offset that was given
        before, the micro-batch ends there.
        """
        if self.order is None:
            return _released(ONLY, offset, item_revision, sample, up_to=up_to)
        if (run := self.order.after(offset)) is not None:  # in the order, but not in these weights
            if up_to is not None:
                run = run._replace(length=min(run.length, up_to - offset))
            return self._again(run, item_revision, sample)
        shard = self._due(item_revision)
        if shard is None:
            return None
        place = self.order.place(shard.number)
        batch = _released(shard, place, item_revision, sample, 0.0)
        if not isinstance(batch, MicroBatch):
            return batch
        run = self.order.extend(shard.number, place, batch.last_offset)
        return in_order(batch, run, self.order)

    def _again(self, run: Run, item_revision: int, sample: SampleSizes) -> Released:
        """Return events of one shard that have their offsets already; changes of items come first."""
        assert self.order is not None
        if run.shard != 0:
            _, changes = cast(
                "tuple[list, list[ItemChange]]",
                ray.get(aggregator_handle(self.shards[0]).newer.remote([], item_revision)),
            )
            if changes:
                return changes
        batch = _released(self.shards[run.shard], run.place, item_revision, sample, up_to=run.last_place)
        return in_order(batch, run, self.order) if isinstance(batch, MicroBatch) else batch

    def _due(self, item_revision: int) -> Shard | None:
        """Return a shard that has something to learn, the one served longest ago; None after WAIT_SECONDS."""
        assert self.order is not None
        asked = self._waiting.values()
        for shard in [shard for shard in self.shards if shard not in asked]:
            place = self.order.place(shard.number)
            self._waiting[aggregator_handle(shard).wait_until_due.remote(place, item_revision)] = shard
        # a shard's events are fetched when its turn comes, so that the batch has all that came by then
        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=WAIT_SECONDS)
        if not done:
            return None
        shard = self._waiting.pop(done[0])
        return shard if ray.get(done[0]) else None


def _released(
    shard: Shard,
    place: int,
    item_revision: int,
    sample: SampleSizes,
    wait: float = WAIT_SECONDS,
    up_to: int | None = None,
) -> Released:
    call = aggregator_handle(shard).next_batch.remote(place, item_revision, sample, int(wait * 1000), up_to)
    return cast("Released", ray.get(call))


def in_order(batch: MicroBatch, run: Run, order: LogOrder) -> MicroBatch:
    """Return a shard's micro-batch, which is a part of this run, with the offsets of the order of all shards.

    Events of context get none, as nobody asks for them and each would have to be looked up. Those of replayed events
    are looked up, as the learner skips what it once rejected.
    """
    shift = run.after - run.place

    def placed(history: History, new: Sequence[int] = ()) -> History:
        first, offsets = history.first_offset, [0] * len(history)
        for place in new:
            offsets[place] = history.offsets[place] + shift
        return replace(
            history,
            offsets=offsets,
            first_offset=order.offset_of(run.shard, first) if first else 0,
        )

    def replayed(history: History) -> History:
        offsets = [order.offset_of(run.shard, offset) if offset else 0 for offset in history.offsets]
        return replace(placed(history), offsets=offsets)

    return replace(
        batch,
        last_offset=batch.last_offset + shift,
        histories=[placed(history, new) for history, new in zip(batch.histories, batch.new, strict=True)],
        replay=[replayed(history) for history in batch.replay],
        quarantined=frozenset(offset + shift for offset in batch.quarantined if offset <= batch.last_offset),
    )
