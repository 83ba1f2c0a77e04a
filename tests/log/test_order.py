"""The logs of several shards read as one: each event has one offset, for good."""

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.data.history import History
from lib.errors import InputError
from lib.log.feedback import FeedbackLog
from lib.log.integrity import check_log
from lib.log.layout import LogLayout, read_log
from lib.log.order import LogOrder, Run
from lib.log.reader import FeedbackLogReader
from serving.batch_source import in_order
from tests.helpers.logs import make_event
from tests.helpers.tiny import history, micro_batch

LAYOUT = LogLayout(aggregators=3)


@pytest.fixture
def order(tmp_path: Path) -> Iterator[LogOrder]:
    LogOrder.create(tmp_path / "order.sqlite")
    with LogOrder(tmp_path / "order.sqlite") as order:
        yield order


def test_runs_follow_each_other_without_gaps_and_those_of_one_shard_are_one(order):
    assert (order.end(), order.place(0), order.after(0)) == (0, 0, None)
    assert order.extend(1, 0, 5) == Run(0, 1, 0, 5)
    assert order.extend(1, 5, 7) == Run(5, 1, 5, 2)
    assert order.extend(0, 0, 3) == Run(7, 0, 0, 3)
    assert order.extend(1, 7, 8) == Run(10, 1, 7, 1)
    with LogOrder(order.path) as again:
        assert again.end() == 11
        assert [again.place(shard) for shard in range(3)] == [3, 8, 0]
        assert [again.after(offset) for offset in (0, 6, 7, 10, 11)] == [
            Run(0, 1, 0, 7), Run(6, 1, 6, 1), Run(7, 0, 0, 3), Run(10, 1, 7, 1), None
        ]  # fmt: skip
        assert [again.offset_of(1, place) for place in range(1, 9)] == [1, 2, 3, 4, 5, 6, 7, 11]
        with pytest.raises(AssertionError, match="place 9 of shard 1 has no offset yet"):
            again.offset_of(1, 9)


def test_two_learners_do_not_give_offsets_to_the_same_events(order):
    order.extend(0, 0, 3)
    with LogOrder(order.path) as other:
        other.extend(0, 3, 5)
        with pytest.raises(InputError, match=r"order\.sqlite: another learner extends it"):
            order.extend(0, 3, 4)
        assert order.extend(1, 0, 1) == Run(5, 1, 0, 1)


def test_an_order_that_is_missing_or_damaged_is_refused(order, tmp_path):
    with pytest.raises(InputError, match=r"absent is missing; restore it"):
        LogOrder(tmp_path / "absent")
    (tmp_path / "other").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match=r"other is damaged"):
        LogOrder(tmp_path / "other")
    outside = sqlite3.connect(order.path, isolation_level=None)
    outside.execute("BEGIN IMMEDIATE")
    order._database.connection.execute("PRAGMA busy_timeout = 0")
    with pytest.raises(OSError, match=r"order\.sqlite cannot be used \(database is locked\)"):
        order.extend(0, 0, 1)
    outside.close()
    assert order.extend(0, 0, 1) == Run(0, 0, 0, 1)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[list[FeedbackLog]]:
    LAYOUT.begin(tmp_path)
    logs = [LAYOUT.open(tmp_path, shard) for shard in LAYOUT.shards()]
    yield logs
    for log in logs:
        log.close()


def test_several_logs_are_read_as_one(logs, tmp_path):
    choice, expected, number = random.Random(3), [], 0
    with LogOrder(tmp_path / "order.sqlite") as order:
        for _ in range(60):
            shard, count = choice.randrange(3), choice.randrange(1, 6)
            events = [make_event(number + n, user=f"user-{shard}") for n in range(count)]
            number += count
            offsets = logs[shard].append(events).result().offsets
            order.extend(shard, offsets[0] - 1, offsets[-1])
            expected += events
    logs[2].append([make_event(5000), make_event(5001)]).result()  # have no place in the order yet
    with read_log(tmp_path) as log:
        assert [(logged.offset, logged.event) for logged in log.replay()] == list(enumerate(expected, 1))
        for after, limit in ((0, 1), (17, 40), (len(expected) - 3, 100), (len(expected), 5)):
            assert [e.offset for e in log.read(after, limit)] == [*range(after + 1, len(expected) + 1)][:limit]
        assert (log.last_offset(), log.count()) == (len(expected) + 2, len(expected) + 2)
        assert (log.count(20, 33), log.count(len(expected)), log.count(0, len(expected))) == (13, 2, len(expected))
        gone = sum(event.user_id == "user-1" for event in expected)
        assert logs[1].erase("user-1") == gone
        assert [logged.event for logged in log.replay()] == [e for e in expected if e.user_id != "user-1"]
        assert log.count(0, len(expected)) == len(expected) - gone
        assert log.last_offset() == len(expected) + 2


def test_logs_that_end_before_their_order_or_before_what_was_learned_are_refused(logs, tmp_path):
    logs[1].append([make_event(1), make_event(2)]).result()
    with LogOrder(tmp_path / "order.sqlite") as order:
        order.extend(1, 0, 2)
        check_log(tmp_path, 2, pages=True)
        with pytest.raises(InputError, match=r"order\.sqlite ends at offset 2, but versions in .* learned up to 3"):
            check_log(tmp_path, 3)
        order.extend(1, 2, 4)
    with pytest.raises(InputError, match=r"feedback-1\.sqlite ends at offset 2, but .* put 4 of its events in order"):
        check_log(tmp_path, 2)
    (tmp_path / "order.sqlite").unlink()
    with pytest.raises(InputError, match=r"order\.sqlite is missing"):
        check_log(tmp_path, 2)


def test_the_only_log_needs_no_order(tmp_path):
    with LogLayout().open(tmp_path, LogLayout().shards()[0]) as log:
        log.append([make_event(1)]).result()
    assert {path.name for path in tmp_path.iterdir()} == {"feedback.sqlite", "feedback.sqlite.lock"}
    with read_log(tmp_path) as log:
        assert isinstance(log, FeedbackLogReader)


def test_a_micro_batch_of_a_shard_is_given_the_offsets_of_the_order(order):
    order.extend(1, 0, 4)
    order.extend(0, 0, 10)
    run = order.extend(1, 4, 7)
    new, old = history([1, 2, 3]), history([4, 5])
    new.offsets, new.first_offset = [2, 5, 7], 2
    old.offsets, old.first_offset = [0, 4], 0  # of a user that the dataset has
    batch = micro_batch(7, [new], [2], replay=[old], held_out=[history([6])])
    batch.quarantined = frozenset({7, 9})
    placed = in_order(batch, run, order)
    assert (placed.last_offset, placed.quarantined) == (17, {17})
    assert (placed.histories[0].offsets, placed.histories[0].first_offset) == ([0, 15, 17], 2)
    assert (placed.replay[0].item_ids, placed.replay[0].first_offset) == (["i4", "i5"], 0)
    assert placed.replay[0].offsets == [0, 4]
    assert (batch.last_offset, new.offsets) == (7, [2, 5, 7]), "what was given is as it was"
    assert isinstance(placed.held_out[0], History)
    batch.new = [[0, 2]]  # the middle one was learned before: the first came late
    assert in_order(batch, run, order).histories[0].offsets == [12, 0, 17]
    assert np.isin(placed.histories[0].offsets[1:], range(15, 18)).all()
