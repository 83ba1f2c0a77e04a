"""Events at which learning fails: how the learner's process counts its tries, and when it sets them aside."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.versions.attempts import ATTEMPT_FILE, ITEM_ATTEMPT_FILE, MOST_KILLED, MOST_TRIES, NO_TRACEBACK, Attempts
from lib.versions.registry import Registry
from serving.learner import OFFER_SECONDS, Learner
from serving.learner_workers import LearnerWorkers, WorkerKilled
from serving.rollout import PushCost
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
        self.item_attempts = Attempts(registry.store, ITEM_ATTEMPT_FILE)
        self.learning, self.live = None, None
        self.pushed: list[int] = []
        if error is not None:
            self.workers.learn = self._fail
        self.looked_for_offers = -OFFER_SECONDS
        self.error = error

    def _push(self, delta: Delta) -> tuple[PushCost, bool]:
        self.pushed.append(delta.version)
        return PushCost(0, 0, 0, 0), True

    def _announce_base(self) -> None:
        self.pushed.append(self.learner.version)

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
    process.learning = process.attempts, 0, 2
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


CHANGES = [ItemChange(number, f"item-{number}", {"title": f"item {number}"}) for number in range(1, 41)]


def change_until_done(registry: Registry, monkeypatch: pytest.MonkeyPatch, bad: set[str], error: BaseException) -> int:
    """Start processes until one has taken over all changes; returns how many there were."""
    whole = NearlineLearner.change_items

    def change_items(learner: NearlineLearner, changes: Sequence[ItemChange]) -> Delta | None:
        if bad & {change.item_id for change in changes}:
            raise error
        return whole(learner, changes)

    monkeypatch.setattr(NearlineLearner, "change_items", change_items)
    for number in range(1, 1000):
        process = Process(registry)
        try:
            process._change_items(CHANGES)
        except (KeyError, SystemExit):
            continue
        assert process.learner.item_revision == 40
        return number
    raise AssertionError("no process came to an end")


@pytest.mark.parametrize("bad", [{"item-1"}, {"item-23"}, {"item-40"}, {"item-3", "item-4", "item-30"}])
def test_a_changed_item_at_which_learning_raises_is_found_and_set_aside(registry, monkeypatch, bad):
    needed = change_until_done(registry, monkeypatch, bad, KeyError("poison"))
    assert needed < 40
    learner = NearlineLearner(registry, CONFIG)
    assert {each.reason.split("'")[1] for each in learner.rejections.set_aside} == bad
    for each in learner.rejections.set_aside:
        assert each.traceback is not None
        assert "in change_items" in each.traceback
        assert (each.events, each.last_offset, each.harmful) == (0, 0, False)
    known = learner.model.catalog.row_of
    assert {change.item_id for change in CHANGES} - known.keys() == bad
    assert not Path(registry.store.path(ITEM_ATTEMPT_FILE)).exists()
    assert change_until_done(registry, monkeypatch, bad, KeyError("poison")) == 1, "a restart reads all changes again"
    assert isinstance(Process(registry)._learn(BATCH), Delta)


def test_a_change_that_kills_the_process_is_found_too(registry, monkeypatch):
    change_until_done(registry, monkeypatch, {"item-7"}, SystemExit())
    [aside] = NearlineLearner(registry, CONFIG).rejections.set_aside
    assert (aside.item_revision, aside.traceback) == (7, NO_TRACEBACK)


def test_an_item_that_was_set_aside_is_tried_when_it_is_changed_again(registry, monkeypatch):
    change_until_done(registry, monkeypatch, {"item-7"}, KeyError("poison"))
    monkeypatch.undo()
    process = Process(registry)
    process._change_items([*CHANGES, ItemChange(41, "item-7", {"title": "mended"})])
    assert "item-7" in process.learner.model.catalog.row_of


def test_an_offered_model_at_which_learning_raises_is_set_aside(registry, monkeypatch):
    registry.offers.add("poison", Path(registry.store.path("snapshots/0000000001")))

    def take_over(learner: NearlineLearner, name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(NearlineLearner, "take_over", take_over)
    for _ in range(MOST_TRIES):
        with pytest.raises(KeyError):
            Process(registry)._take_over()
    process = Process(registry)
    process._take_over()
    assert registry.offers.names() == []
    [aside] = NearlineLearner(registry, CONFIG).rejections.set_aside
    assert aside.reason == "learning raised each time that the offered model poison was tried: KeyError: 'poison'"
    assert isinstance(process._learn(BATCH), Delta)


def test_an_offered_model_is_taken_over_after_a_failed_try(registry, monkeypatch):
    registry.offers.add("good", Path(registry.store.path("snapshots/0000000001")))
    with monkeypatch.context() as once:
        once.setattr(LearnerWorkers, "take_over", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Process(registry)._take_over()
    process = Process(registry)
    process._take_over()
    assert (process.learner.version, process.pushed) == (2, [2])
    assert registry.offers.names() == []


@pytest.mark.parametrize("proven", [False, True])
def test_a_killed_worker_counts_as_a_kill(registry, proven):
    for tries in range(1, MOST_KILLED + 1):
        process = Process(registry, WorkerKilled("a worker of the learner was killed"))
        process.attempts.proven = proven and tries == 1
        with pytest.raises(WorkerKilled):
            process._learn(BATCH)
        attempt = Attempts(registry.store).beyond(0)
        assert attempt is not None
        assert (attempt.tries, attempt.traceback) == (tries, NO_TRACEBACK)
    assert isinstance(Process(registry)._learn(BATCH), Rejection)
