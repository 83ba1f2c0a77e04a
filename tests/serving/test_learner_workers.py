"""Two workers of the learner learn what one learns, judge as one, and end together."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as distributed

from lib.errors import InputError
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.log.items import ItemChange
from lib.model.delta import Delta, state_of
from lib.model.distributed import broadcast_from_rank_0, local_batch, require_equal
from lib.model.fingerprint import fingerprint
from lib.versions.registry import Registry
from serving.learner import aggregators_of
from serving.learner_workers import LearnerWorkers, WorkerKilled
from tests.helpers.learners import training_batch_of
from tests.helpers.tiny import history, micro_batch, started_registry

CONFIG = LearnerConfig(
    negatives=8,
    snapshot_every=4,
    gate=GateConfig(held_out_candidates=12, quality_tolerance=1.0, loss_tolerance=10.0),
)
HELD_OUT = [history([7, 8, 9]), history([3, 1, 2, 6]), history([12, 13, 14])]
REPLAY = [history([10, 11, 12, 13]), history([14, 15]), history([5, 18, 22])]
FIRST = micro_batch(2, [history([1, 2, 3]), history([4, 5])], replay=REPLAY, held_out=HELD_OUT)
STEPS: list[MicroBatch | list[ItemChange]] = [
    FIRST,
    micro_batch(3, [history([6, 7, 8])], held_out=HELD_OUT),  # one history, so that a worker has none
    [ItemChange(1, "put", {"title": "Put"})],
    micro_batch(5, [history([9, "new"]), history(["put", 2])], replay=REPLAY, held_out=HELD_OUT),
]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started_registry(tmp_path / "two")


@pytest.fixture
def alone(tmp_path: Path) -> tuple[NearlineLearner, list[Any]]:
    """A learner that no worker is beside, after all steps, and what came of each."""
    learner = NearlineLearner(started_registry(tmp_path / "one"), CONFIG)
    return learner, [take(learner, step) for step in STEPS]


@pytest.fixture
def two(ray_session: object, registry: Registry) -> Iterator[LearnerWorkers]:
    """This process and one other."""
    workers = LearnerWorkers(registry.store.root, CONFIG, workers=2)
    try:
        yield workers
    finally:
        for other in workers.others:
            ray.kill(other)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def other_worker(workers: LearnerWorkers) -> tuple[int, str]:
    """The process of the second worker, and the checksum of its weights."""
    [other] = workers.others
    known: Any = ray.get(other.__ray_call__.remote(lambda worker: (os.getpid(), worker.learner.model.checksum)))
    return known


def take(learner: LearnerWorkers | NearlineLearner, step: MicroBatch | list[ItemChange]) -> Any:
    return learner.learn(step) if isinstance(step, MicroBatch) else learner.change_items(step)


def test_two_workers_learn_what_one_learns(
    alone: tuple[NearlineLearner, list[Any]], two: LearnerWorkers, registry: Registry
) -> None:
    one, expected = alone
    for step, wanted in zip(STEPS, expected, strict=True):
        together = take(two, step)
        assert isinstance(together, Delta)
        assert (together.version, together.log_offset) == (wanted.version, wanted.log_offset)
        assert together.new_items == wanted.new_items
        assert together.facts.loss == pytest.approx(wanted.facts.loss)
    stored = registry.load()
    assert registry.snapshots() == [1, 4], "the first worker alone publishes"
    assert fingerprint(stored.encoder) == two.first.model.checksum == other_worker(two)[1]
    own, other = state_of(one.model.encoder), state_of(stored.encoder)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    # what fails its gate, is wished back, or is not to be had, all of them treat alike
    gate = two.first.gate
    gate.config = gate.config.model_copy(update={"loss_tolerance": -0.9})  # no update can be so much better
    rejection = two.learn(replace(FIRST, last_offset=7))
    assert isinstance(rejection, Rejection)
    assert rejection.last_offset == 7
    gate.config = CONFIG.gate
    with pytest.raises(InputError, match="version: 99 is not stored"):
        two.restore(99)
    restored = two.restore(2)
    assert restored is not None
    assert (restored.version, two.first.version, restored.log_offset) == (6, 6, 7)
    assert other_worker(two)[1] == restored.checksum == fingerprint(registry.load().encoder)
    assert two.learn(replace(FIRST, last_offset=9)).version == 7  # pyright: ignore[reportAttributeAccessIssue]
    gate.pairs.extend([(2.0, 1.0, 0.0, 1.0)] * 64)  # as if new events had shown harm
    harm = two.learn(replace(FIRST, last_offset=11))
    assert isinstance(harm, Rejection)
    assert harm.delta is not None
    assert (harm.delta.version, harm.delta.facts.restored, harm.after_offset) == (8, 6, 7)
    rest = two.learn(replace(FIRST, last_offset=13))
    assert isinstance(rest, Rejection)
    assert "learning rests" in rest.reason
    registry.offers.add("offer", Path(registry.store.root, "snapshots", f"{4:010d}"))
    two.take_over("offer")
    whole = two.store_whole()
    assert (two.first.lineage.base, whole.version, registry.snapshots()[-1]) == (9, 10, 10)
    process, checksum = other_worker(two)
    assert checksum == whole.checksum == fingerprint(registry.load().encoder)

    # one that dies leaves the other nothing to do but end, which has published nothing: who follows learns it once
    os.kill(process, signal.SIGKILL)
    with pytest.raises(WorkerKilled):
        two.learn(micro_batch(whole.log_offset + 2, [history([1, 2])]))
    assert registry.head() == 10
    distributed.destroy_process_group()
    again = NearlineLearner(registry, CONFIG)
    learned = again.learn(micro_batch(again.log_offset + 2, [history([1, 2])]))
    assert isinstance(learned, Delta)
    assert (learned.version, again.lineage.events_trained) == (11, whole.facts.events_trained + 1)


def test_an_error_of_another_worker_is_told_from_a_kill(two: LearnerWorkers) -> None:
    def poison(worker: Any) -> None:
        def learn(batch: MicroBatch) -> None:
            raise KeyError("poison")

        worker.learner.learn = learn

    [other] = two.others
    ray.get(other.__ray_call__.remote(poison))
    with pytest.raises(RuntimeError, match=r"(?s)a worker of the learner raised:.*KeyError: 'poison'"):
        two.learn(FIRST)


def test_one_worker_is_the_learner_itself(alone: tuple[NearlineLearner, list[Any]], registry: Registry) -> None:
    one, expected = alone
    workers = LearnerWorkers(registry.store.root, CONFIG)
    outcomes = [take(workers, step) for step in STEPS]
    assert [outcome.checksum for outcome in outcomes] == [outcome.checksum for outcome in expected]
    batch = training_batch_of(one, FIRST)
    assert batch is not None
    assert torch.equal(local_batch(batch).rows, batch.rows)
    assert broadcast_from_rank_0(lambda: "no") == "no"
    require_equal(one.model.checksum)


def test_a_learner_alone_says_what_to_begin_with(ray_session: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing serves it here yet; begin with `serve deploy"):
        aggregators_of(str(tmp_path))
