"""Events at which learning fails: how the learner's process counts its tries, and when it sets them aside."""

import time
from pathlib import Path

import pytest

from lib.live.gate import GateConfig
from lib.live.learner import Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.model.delta import Delta
from lib.versions.attempts import ATTEMPT_FILE, MOST_KILLED, MOST_TRIES, NO_TRACEBACK, Attempts
from lib.versions.registry import Registry
from serving.learner import Learner
from serving.learner_workers import LearnerWorkers
from serving.watchdog import Watchdog
from tests.helpers.tiny import history, micro_batch, started_registry

CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0))


class Process(Learner):
    """A process of the learner, without its thread."""

    def __init__(self, registry: Registry, error: Exception | None = None):
        self.config = CONFIG
        self.workers = LearnerWorkers(registry.store.root, CONFIG)
        self.learner = self.workers.first
        self.attempts = Attempts(registry.store)
        self.proven, self.learning = False, None
        if error is not None:
            self.workers.learn = self._fail
        self.error = error

    def _fail(self, batch: MicroBatch) -> Delta | Rejection:
        assert self.error is not None
        raise self.error


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started_registry(tmp_path / "store")


BATCH = micro_batch(2, [history([1, 2])], [2])


def test_the_third_process_that_fails_is_the_last_to_try(registry):
    for _ in range(MOST_TRIES):
        process = Process(registry, KeyError("poison"))
        with pytest.raises(KeyError):
            process._learn(BATCH)
    process = Process(registry, KeyError("poison"))
    aside = process._learn(BATCH)
    assert isinstance(aside, Rejection)
    assert aside.traceback is not None
    assert "in _fail" in aside.traceback
    assert process.learner.log_offset == 2
    assert isinstance(Process(registry)._learn(micro_batch(3, [history([3])], [1])), Delta)
    assert not Path(registry.store.path(ATTEMPT_FILE)).exists()


def test_a_process_that_learned_something_counts_the_next_failure_as_the_first(registry):
    process = Process(registry)
    assert isinstance(process._learn(BATCH), Delta)
    process.workers.learn, process.error = process._fail, KeyError("poison")
    with pytest.raises(KeyError):
        process._learn(micro_batch(4, [history([3])], [1]))
    attempt = Attempts(registry.store).beyond(2)
    assert attempt is not None
    assert (attempt.last_offset, attempt.tries) == (4, 1)


def test_a_process_that_is_killed_while_it_learns_has_tried(registry):
    for tries in range(1, MOST_KILLED + 1):
        with pytest.raises(SystemExit):
            Process(registry, SystemExit())._learn(BATCH)  # pyright: ignore[reportArgumentType]
        attempt = Attempts(registry.store).beyond(0)
        assert attempt is not None
        assert (attempt.tries, attempt.traceback) == (tries, NO_TRACEBACK)
    assert isinstance(Process(registry)._learn(BATCH), Rejection)


def test_storage_that_is_away_is_no_fault_of_the_events(registry):
    for _ in range(MOST_TRIES + 1):
        process = Process(registry)
        assert isinstance(process._learn(micro_batch(process.learner.log_offset + 2, [history([1, 2])], [2])), Delta)
        process.workers.learn, process.error = process._fail, OSError("no room")
        with pytest.raises(OSError, match="no room"):
            process._learn(BATCH)
    assert Attempts(registry.store).newest is None


def test_a_first_try_that_fails_for_want_of_storage_is_none(registry):
    for _ in range(MOST_TRIES + 1):
        with pytest.raises(FileExistsError):
            Process(registry, FileExistsError("another learner publishes"))._learn(BATCH)
    assert Attempts(registry.store).newest is None
    with pytest.raises(KeyError):
        Process(registry, KeyError("poison"))._learn(BATCH)
    with pytest.raises(FileExistsError):
        Process(registry, FileExistsError("another learner publishes"))._learn(BATCH)
    attempt = Attempts(registry.store).beyond(0)
    assert attempt is not None
    assert attempt.tries == 1
    assert isinstance(Process(registry)._learn(BATCH), Delta)


def test_where_learning_stalls_is_recorded(registry):
    process = Process(registry)
    process.learning = 0, 2
    process._stalled("the stack\n")
    attempt = Attempts(registry.store).beyond(0)
    assert attempt is not None
    assert attempt.traceback == "the stack\nno progress for 60 s"
    process.learning = None
    process.attempts.succeed()
    process._stalled("elsewhere")
    assert Attempts(registry.store).newest is None


def test_a_snapshot_may_take_as_long_as_a_base(registry, monkeypatch):
    process = Process(registry)
    process.state, process.processes = registry.store.root, 1
    process.watchdog = Watchdog(CONFIG.stalled_seconds)
    process._open()
    process.watchdog.progress()
    left = []

    def publish(*arguments: object) -> None:
        left.append(process.watchdog.due - time.monotonic())

    monkeypatch.setattr(process.learner.registry, "publish_snapshot", publish)
    process.learner.store_whole()
    process.watchdog.rest()
    assert left[0] > CONFIG.stalled_seconds
