"""What the learner gets: each new event once, with what was before it in time."""

import numpy as np
import pytest

from lib.data.events import Event
from lib.data.history import History
from lib.data.replay import ReplaySample
from lib.data.user_histories import UserHistories
from lib.live.gate import first_new_events
from lib.live.micro_batch import MicroBatch, SampleSizes, micro_batch
from lib.log.log_file import LoggedEvent
from tests.helpers.tiny import NOW

SAMPLE = SampleSizes(history_length=3, replay=ReplaySample(0), held_out_users=0, held_out_length=1)


def logged(offset: int, time: int, user: str = "u") -> LoggedEvent:
    return LoggedEvent(offset, Event(user, f"i{offset}", "click", None, NOW + time), NOW)


def batch_of(histories: UserHistories, events: list[LoggedEvent], after: int) -> MicroBatch:
    return micro_batch(events, after, histories, SAMPLE, np.random.default_rng(0))


def test_an_event_that_came_late_has_what_was_before_it_as_context():
    histories = UserHistories()
    known = [logged(offset, 10 * offset) for offset in range(1, 9)]
    new = [logged(9, 45), logged(10, 100), logged(11, 200, "other"), logged(12, 15)]
    for entry in [*known, *new, logged(13, 1)]:  # the last is of the next batch
        histories.append(entry.event, entry.offset)
    batch = batch_of(histories, new, after=8)
    assert batch.histories[0].offsets == [1, 12, 2, 3, 4, 9, 5, 6, 7, 8, 10]
    assert batch.new == [[1, 5, 10], [0]]
    assert list(batch.new_item_ids()) == ["i12", "i9", "i10", "i11"]
    assert batch.events == 4
    assert [history.offsets for history in first_new_events(batch, 24)] == [[1, 12]]


def test_context_ends_with_the_last_new_event_and_begins_so_many_before_the_first():
    histories = UserHistories()
    new = [logged(21, 105), logged(22, 115)]
    for entry in [*(logged(offset, 10 * offset) for offset in range(1, 21)), *new]:
        histories.append(entry.event, entry.offset)
    [history], [places] = (batch_of(histories, new, after=20).histories, batch_of(histories, new, after=20).new)
    assert history.offsets == [8, 9, 10, 21, 11, 22]
    assert places == [3, 5]


def test_all_of_a_history_is_copied_once(monkeypatch):
    histories, copied = UserHistories(), []
    for entry in [logged(offset, 10 * offset) for offset in range(1, 101)]:
        histories.append(entry.event, entry.offset)
    new = [logged(101, 1100)]
    slice_of = History.slice

    def counted(history: History, start: int, stop: int) -> History:
        copied.append(stop - start)
        return slice_of(history, start, stop)

    monkeypatch.setattr(History, "slice", counted)
    assert batch_of(histories, new, after=100).histories[0].offsets == [98, 99, 100, 101]
    assert copied == [100, 4]


@pytest.mark.parametrize("seed", range(5))
def test_each_event_of_a_stream_is_new_once_and_in_order_of_time(seed):
    generator = np.random.default_rng(seed)
    histories, seen = UserHistories(keep=30), []
    waiting: list[LoggedEvent] = []
    for offset in range(1, 400):
        late = int(generator.integers(0, 60)) * int(generator.integers(0, 2))
        entry = logged(offset, 10 * offset - late, user=f"u{generator.integers(0, 4)}")
        histories.append(entry.event, offset)
        waiting.append(entry)
        if len(waiting) == 7:
            batch = batch_of(histories, waiting, after=waiting[0].offset - 1)
            for history, places in zip(batch.histories, batch.new, strict=True):
                assert history.timestamps == sorted(history.timestamps)
                seen += [history.offsets[place] for place in places]
                assert max(history.offsets) <= batch.last_offset
            waiting = []
    assert sorted(seen) == list(range(1, len(seen) + 1))
