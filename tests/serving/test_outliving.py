"""The loop outlives its parts: storage that is away at a restart, dead and hanging actors, poisoned events."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from lib.live.micro_batch import MicroBatch
from lib.log.items import ItemChange
from lib.log.layout import RECORD
from lib.log.reader import FeedbackLogReader
from lib.model.delta import Delta
from lib.versions.accounts import Accounts
from lib.versions.attempts import ATTEMPT_FILE
from lib.versions.ledger import check
from lib.versions.registry import Registry
from serving.aggregator import NAMESPACE, aggregator_handle
from serving.learner import GROUPS, Learner, start_learner
from serving.rollout import LEARNER, learner_handle
from serving.supervision import supervised
from tests.helpers.service import PATIENCE, LiveService, assert_refused, click, learner_config, metrics

POISON, SPELL = "poison", "spell"  # also the names of a changed item, and of an offered model


class PoisonedLearner(Learner):
    """A learner that cannot learn from one item, and stalls at another."""

    def _open(self) -> None:
        super()._open()
        learn, change_items, take_over = self.workers.learn, self.workers.change_items, self.workers.take_over

        def poisoned(batch: MicroBatch) -> Any:
            if POISON in batch.new_item_ids():
                raise KeyError(POISON)
            if SPELL in batch.new_item_ids():
                time.sleep(3600)
            return learn(batch)

        def poisoned_items(changes: Sequence[ItemChange]) -> Delta | None:
            if POISON in {change.item_id for change in changes}:
                raise KeyError(POISON)
            return change_items(changes)

        def poisoned_offer(name: str) -> None:
            if name == POISON:
                raise KeyError(POISON)
            take_over(name)

        self.workers.learn, self.workers.change_items, self.workers.take_over = poisoned, poisoned_items, poisoned_offer


@pytest.fixture
def poisoned_learner(mortal_service: LiveService) -> Iterator[None]:
    """Have a learner that cannot learn from two items, in place of the service's own."""
    mortal_service.wait_until_learned()
    ray.kill(learner_handle())
    mortal_service.wait_until("the learner is gone", lambda status: "version" not in status["learner"])
    actor: Any = cast("Any", ray.remote)(concurrency_groups=GROUPS)(PoisonedLearner).options(
        name=LEARNER,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=8,
        num_cpus=0.5,
    )
    config = learner_config().model_copy(update={"stalled_seconds": 5.0})
    actor.remote(mortal_service.arguments.state_location, config)
    yield
    with suppress(ValueError):
        ray.kill(learner_handle())
    start_learner(mortal_service.arguments.state_location, learner_config())
    mortal_service.wait_until_learned()


def test_events_at_which_learning_raises_are_set_aside_and_the_next_are_learned(
    mortal_service: LiveService, poisoned_learner: None
) -> None:
    before = mortal_service.wait_until_learned()["learner"]
    mortal_service.send(click("ann", "item-0001"))
    mortal_service.wait_until_learned()
    mortal_service.send(click("ann", POISON), click("ben", "item-0002"))
    mortal_service.wait_until("learning has failed", lambda _: (mortal_service.state / ATTEMPT_FILE).exists())
    mortal_service.send(click("ann", "item-0003"))  # waits behind them, and is no part of what is set aside
    after = mortal_service.wait_until(
        "learning goes on", lambda s: s["learner"].get("set_aside_updates") and mortal_service.wait_until_learned()
    )["learner"]
    assert after["set_aside_updates"] == 1
    [aside] = after["set_aside"]
    assert aside["reason"] == f"learning raised each time that it was tried: KeyError: '{POISON}'"
    assert "in poisoned" in aside["traceback"]
    assert aside["events"] == 2
    assert after["events_trained"] == before["events_trained"] + 2
    assert metrics(mortal_service)["afterclick_set_aside_updates_total"] == [({}, 1.0)]
    assert [event["item_id"] for event in mortal_service.export("ann")] == ["item-0001", POISON, "item-0003"]
    with FeedbackLogReader(mortal_service.log) as log:
        assert check(Accounts(Registry(mortal_service.state)).newest_lineage(), log).faults == []


def test_events_at_which_learning_stalls_are_set_aside_and_the_next_are_learned(
    mortal_service: LiveService, poisoned_learner: None
) -> None:
    before = mortal_service.wait_until_learned()["learner"]
    mortal_service.send(click("ann", SPELL))
    mortal_service.wait_until("learning has stalled", lambda _: (mortal_service.state / ATTEMPT_FILE).exists())
    mortal_service.send(click("ann", "item-0004"))
    after = (
        mortal_service.wait_until(
            "learning goes on",
            lambda status: status["learner"].get("set_aside_updates", 0) > before["set_aside_updates"],
        )
        and mortal_service.wait_until_learned()
    )
    aside = after["learner"]["set_aside"][-1]
    assert "in poisoned" in aside["traceback"]
    assert aside["reason"] == "learning raised each time that it was tried: no progress for 5 s"
    assert after["learner"]["events_trained"] == before["events_trained"] + 1


def test_a_changed_item_and_a_model_at_which_learning_raises_are_set_aside_and_all_else_goes_on(
    mortal_service: LiveService, poisoned_learner: None
) -> None:
    before = mortal_service.wait_until_learned()["learner"]
    items = [{"item_id": item, "category": "fresh"} for item in ("fresh-1", POISON, "fresh-2")]
    mortal_service.client.put("/v1/items", json={"items": items}).raise_for_status()
    registry = Registry(mortal_service.state)
    registry.offers.add(POISON, mortal_service.state / "snapshots" / f"{registry.snapshots()[-1]:010d}")
    aside = mortal_service.wait_until(
        "both are set aside",
        lambda status: status["learner"].get("set_aside_updates", 0) == before["set_aside_updates"] + 2 and status,
        patience=5 * PATIENCE,  # each halving of the items is a start of the learner
    )["learner"]["set_aside"][-2:]
    of_item, of_offer = sorted(aside, key=lambda each: each["item_revision"] or 1 << 60)
    said = f"learning raised each time that the changed item '{POISON}' was tried: KeyError: '{POISON}'"
    assert of_item["reason"] == said
    assert "in poisoned_items" in of_item["traceback"]
    assert of_offer["reason"].startswith(f"learning raised each time that the offered model {POISON} was tried")
    assert registry.offers.names() == []
    mortal_service.send(click("ann", "item-0005"))
    after = mortal_service.wait_until_learned()["learner"]
    assert after["events_trained"] == before["events_trained"] + 1
    known = registry.load().catalog.row_of
    assert {item["item_id"] for item in items} - known.keys() == {POISON}


def test_a_learner_answers_however_many_rollbacks_wait(ray_session: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD)  # a storage that hangs: whoever reads it waits
    actor: Any = cast("Any", ray.remote)(concurrency_groups=GROUPS)(Learner).options(max_concurrency=8, num_cpus=0)
    learner = actor.remote(str(tmp_path), learner_config())
    waiting = [learner.rollback.remote(1) for _ in range(9)]
    status: Any = ray.get(learner.status.remote(), timeout=PATIENCE)
    assert status.state == "starting"
    ray.get(learner.ping.remote(), timeout=PATIENCE)
    assert ray.wait(waiting, timeout=0)[0] == []
    ray.kill(learner)


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Have a folder away in the block, as a disk that is not mounted; a file is in its place, so nobody makes one."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.write_text("")
    try:
        yield
    finally:
        folder.unlink()
        elsewhere.rename(folder)


def test_a_learner_that_is_restarted_while_its_storage_is_away_goes_on_once_it_is_back(
    mortal_service: LiveService,
) -> None:
    before = mortal_service.wait_until_learned()["learner"]
    with away(mortal_service.state):
        os.kill(before["process"], signal.SIGKILL)
        mortal_service.wait_until(
            "the learner says so", lambda status: status["learner"]["state"].startswith("cannot start (")
        )
    mortal_service.send(click("away", "item-0001"))
    after = mortal_service.wait_until_learned()["learner"]
    assert after["process"] != before["process"]
    assert after["events_trained"] == before["events_trained"] + 1


def test_an_aggregator_that_is_restarted_while_its_storage_is_away_goes_on_once_it_is_back(
    mortal_service: LiveService,
) -> None:
    mortal_service.send(click("patient", "item-0001"))
    before = mortal_service.wait_until_learned()["aggregator"]
    event = click("patient", "item-0002", event_id="second")
    with away(mortal_service.state):
        os.kill(before["process"], signal.SIGKILL)
        mortal_service.wait_until(
            "the aggregator says so", lambda s: "cannot open its log, and tries again" in s["aggregator"]["state"]
        )
        refused = mortal_service.client.post("/v1/events", json={"events": [event]})
        assert_refused(refused, 503, "the log cannot be opened now, and it is tried again")
        assert refused.headers["Retry-After"] == "1"
        waiting = mortal_service.wait_until("the learner waits", lambda s: s["learner"].get("storage_error") and s)
        assert waiting["learner"]["state"] == "waiting for events"
    mortal_service.wait_until("the aggregator is back", lambda s: "process" in s["aggregator"])
    assert mortal_service.send(event)["accepted"] == 1
    after = mortal_service.wait_until_learned()
    assert [event["item_id"] for event in mortal_service.export("patient")] == ["item-0001", "item-0002"]
    assert after["aggregator"]["log_offset"] == before["log_offset"] + 1
    assert after["learner"]["state"] == "running"


def test_a_replica_starts_an_aggregator_that_died_for_good(mortal_service: LiveService) -> None:
    mortal_service.send(click("lasting", "item-0001"))
    before = mortal_service.wait_until_learned()["aggregator"]
    ray.kill(aggregator_handle())
    assert mortal_service.send(click("lasting", "item-0002"))["accepted"] == 1
    after = mortal_service.wait_until_learned()["aggregator"]
    assert after["process"] != before["process"]
    assert [event["item_id"] for event in mortal_service.export("lasting")] == ["item-0001", "item-0002"]


def test_a_learner_that_died_for_good_is_started_again(mortal_service: LiveService) -> None:
    before = mortal_service.wait_until_learned()["learner"]
    with supervised(mortal_service.arguments.state_location, learner_config(), workers=1):
        ray.kill(learner_handle())
        mortal_service.send(click("lasting", "item-0003"))
        after = mortal_service.wait_until_learned()["learner"]
    assert after["process"] != before["process"]
    assert after["events_trained"] == before["events_trained"] + 1


@pytest.mark.parametrize("part", ["learner", "aggregator"])
def test_what_hangs_is_started_again(mortal_service: LiveService, part: str) -> None:
    before = mortal_service.wait_until_learned()[part]["process"]
    config = learner_config().model_copy(update={"stalled_seconds": 3.0})
    with supervised(mortal_service.arguments.state_location, config, workers=1):
        os.kill(before, signal.SIGSTOP)
        after = mortal_service.wait_until(
            f"another {part} answers", lambda s: s[part].get("process", before) != before and s[part]["process"]
        )
        mortal_service.send(click("hanging", "item-0001"))
        mortal_service.wait_until_learned()
    assert after != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
