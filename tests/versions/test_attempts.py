"""What is remembered of events at which learning fails, from one process to the next."""

from pathlib import Path

import numpy as np
import pytest

from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig
from lib.log.feedback import FeedbackLog
from lib.versions.accounts import Accounts
from lib.versions.attempts import ATTEMPT_FILE, LONGEST_TRACEBACK, MOST_KILLED, MOST_TRIES, NO_TRACEBACK, Attempts
from lib.versions.ledger import check
from lib.versions.store import Store
from tests.helpers.logs import make_event
from tests.helpers.tiny import history, micro_batch, started_registry

CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0))
TRACEBACK = "Traceback (most recent call last):\n  somewhere\nKeyError: 'poison'\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_an_error_is_counted_by_the_process_that_has_it(store):
    for number in range(1, MOST_TRIES + 1):
        attempts = Attempts(store)
        before = attempts.beyond(7)
        assert (before.tries if before else 0) == number - 1
        if number > 1:  # the first micro-batch of a process
            attempts.begin(7, 9)
        attempts.fail(7, 9, TRACEBACK)
    last = Attempts(store).beyond(7)
    assert last is not None
    assert last.is_last
    assert (last.after_offset, last.last_offset, last.tries, last.traceback) == (7, 9, MOST_TRIES, TRACEBACK)


def test_a_process_that_ends_without_a_word_is_counted(store):
    for tries in range(1, MOST_KILLED + 1):
        Attempts(store).begin(7, 9)
        last = Attempts(store).beyond(7)
        assert last is not None
        assert (last.is_last, last.traceback) == (tries == MOST_KILLED, NO_TRACEBACK)


def test_what_was_learned_and_other_events_are_not_counted(store):
    attempts = Attempts(store)
    attempts.begin(7, 9)
    assert attempts.beyond(9) is None
    attempts.succeed()
    attempts.succeed()
    assert Attempts(store).newest is None
    attempts.fail(7, 9, "x" * 10_000 + "end")
    attempts.fail(20, 21, "another")
    assert Attempts(store).beyond(7) is None
    again = Attempts(store).beyond(20)
    assert again is not None
    assert (again.tries, again.traceback) == (1, "another")


def test_a_long_traceback_is_kept_from_its_end(store):
    attempts = Attempts(store)
    attempts.fail(7, 9, "x" * 10_000 + "end")
    assert attempts.newest is not None
    assert len(attempts.newest.traceback) == LONGEST_TRACEBACK
    assert attempts.newest.traceback.endswith("end")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"after_offset": 7}'])
def test_a_damaged_record_stops_nobody(store, content):
    store.write(ATTEMPT_FILE, content)
    assert Attempts(store).newest is None


def test_learning_goes_on_after_what_was_set_aside(tmp_path):
    registry = started_registry(tmp_path / "store")
    learner = NearlineLearner(registry, CONFIG)
    with FeedbackLog.open(tmp_path / "log") as log:
        log.append([make_event(number) for number in range(6)]).result()
        learner.learn(micro_batch(2, [history([1, 2])], [2]))
        aside = learner.set_aside(micro_batch(4, [history([3, 4])], [2]), TRACEBACK)
        assert (aside.after_offset, aside.last_offset, aside.traceback) == (2, 4, TRACEBACK)
        assert aside.reason == "learning raised each time that it was tried: KeyError: 'poison'"

        again = NearlineLearner(registry, CONFIG)  # also after a restart
        assert again.log_offset == learner.log_offset == 4
        assert again.rejections.set_aside == learner.rejections.set_aside == [aside]
        assert again.rejections.cover(np.array([2, 3, 4, 5])).tolist() == [False, True, True, False]
        again.learn(micro_batch(6, [history([5, 6])], [2]))
        ledger = check(Accounts(registry).newest_lineage(), log)
    assert (ledger.faults, ledger.events_trained, ledger.events_rejected, ledger.waiting) == ([], 4, 2, 0)
