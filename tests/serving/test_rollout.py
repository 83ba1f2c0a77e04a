"""Versions reach every replica: under load, after a missed push, after a restart, backwards on request."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import ray

from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.model.delta import Delta
from lib.model.fingerprint import fingerprint
from lib.versions.registry import Registry
from serving.aggregator import aggregator_handle
from serving.learner import start_learner
from serving.rollout import Rollout, learner_handle
from tests.helpers.service import (
    PATIENCE,
    LiveService,
    assert_refused,
    click,
    learner_config,
    metrics,
    versions_and_checksums,
)
from tests.helpers.traffic import Traffic


@contextmanager
def stopped_learner(service: LiveService, after: LearnerConfig | None = None) -> Iterator[None]:
    """No learner runs in the block; one starts again after it."""
    service.wait_until_learned()
    ray.kill(learner_handle())
    service.wait_until("the learner is gone", lambda status: "version" not in status["learner"])
    try:
        yield
    finally:
        start_learner(service.arguments.state_location, after or learner_config())


def next_batch(learner: NearlineLearner) -> Any:
    """What the aggregator releases next."""
    call = aggregator_handle().next_batch.remote(learner.log_offset, learner.item_revision, learner.sample_sizes, 5000)
    return ray.get(call)


def learn_waiting_events(learner: NearlineLearner) -> Delta:
    """Learn and publish what waits at the aggregator, without a push: all that a learner does before it crashes."""
    batch: Any = next_batch(learner)
    if not isinstance(batch, MicroBatch):  # items that other tests put come first
        assert learner.change_items(batch) is None, "they are in the weights already"
        batch = next_batch(learner)
    assert isinstance(batch, MicroBatch)
    delta = learner.learn(batch)
    assert not isinstance(delta, Rejection)
    return delta


def test_fifty_pushes_under_load_fail_no_request(mortal_service: LiveService) -> None:
    first = mortal_service.wait_until_learned()["model_version"]
    seen: dict[str, list[int]] = {}

    def enough(status: dict[str, Any]) -> bool:
        for replica in status["replicas"]:
            seen.setdefault(replica["replica_id"], []).append(replica["version"])
        return status["learner"].get("version", 0) >= first + 50

    with Traffic(mortal_service, "loaded", askers=3) as traffic:
        mortal_service.wait_until("50 versions are pushed", enough, patience=5 * PATIENCE)
        traffic.wait_for(events=0, answers=20)
    assert traffic.failures == []
    status = mortal_service.wait_until_learned()
    assert len(seen) == 2
    for versions in seen.values():
        assert versions == sorted(versions), "a replica's version went back"
        assert len(set(versions)) > 5
    assert first <= min(traffic.versions) < max(traffic.versions) <= status["model_version"]
    assert versions_and_checksums(status) == [(status["learner"]["version"], status["learner"]["checksum"])] * 2
    assert status["learner"]["unreached_replicas"] == 0
    assert status["freshness"]["count"] > 0


def test_an_answer_is_of_a_version_that_was_live_when_it_was_asked(service: LiveService) -> None:
    with Traffic(service, "timely", askers=0):
        for number in range(30):
            oldest = min(replica["version"] for replica in service.status()["replicas"])
            answered = service.recommend(f"timely-{number}")["model_version"]
            newest = service.status()["learner"]["version"]
            assert oldest <= answered <= newest
    service.wait_until_learned()


def test_a_missed_push_and_a_crash_before_the_push_heal(mortal_service: LiveService) -> None:
    with stopped_learner(mortal_service):
        before = mortal_service.status()
        catch_ups = {replica["replica_id"]: replica["catch_ups"] for replica in before["replicas"]}
        learner = NearlineLearner(Registry(mortal_service.state), LearnerConfig())
        mortal_service.send(click("missed", "item-0001"))
        missed = learn_waiting_events(learner)
        mortal_service.send(click("missed", "item-0002"))
        later = learn_waiting_events(learner)
        assert versions_and_checksums(mortal_service.status()) == versions_and_checksums(before), (
            "nothing was pushed yet"
        )

        acknowledgements, cost = Rollout().push(later)
        assert acknowledgements.all_at(later.version)
        assert cost.push_bytes > 0
        assert cost.apply_ms > 0
        status = mortal_service.status()
        assert versions_and_checksums(status) == [(later.version, later.checksum)] * 2
        assert later.version == missed.version + 1
        for replica in status["replicas"]:
            assert replica["catch_ups"] == catch_ups[replica["replica_id"]] + 1

        Rollout().push(missed)  # comes late, and changes nothing
        assert versions_and_checksums(mortal_service.status()) == [(later.version, later.checksum)] * 2

        mortal_service.send(click("missed", "item-0003"))
        unpushed = learn_waiting_events(learner)  # and here the learner crashes
    status = mortal_service.wait_until_learned()
    assert versions_and_checksums(status) == [(unpushed.version, unpushed.checksum)] * 2
    assert status["learner"]["version"] == unpushed.version, "nothing was learned a second time"


def test_a_pushed_delta_that_cannot_be_applied_leaves_one_version(mortal_service: LiveService) -> None:
    with stopped_learner(mortal_service):
        before = mortal_service.status()
        version = before["model_version"]
        none = np.zeros(0, dtype=np.int64)
        unfit = Delta(version + 1, version, "", 0, 1000, none, {"blocks.9.weight": np.zeros(3, np.float32)})
        wrong = Delta(version + 1, version, "another", 0, 1000, none, {})
        for delta in (unfit, wrong):
            acknowledgements, _ = Rollout().push(delta)
            assert [each.version for each in acknowledgements.replicas] == [version] * 2
            assert mortal_service.recommend("visitor-00001")["model_version"] == version
        after = mortal_service.status()
        assert versions_and_checksums(after) == versions_and_checksums(before)
        assert [replica["mismatches"] for replica in after["replicas"]] == [2, 2]


def test_a_replica_starts_at_the_newest_version_also_without_a_learner(mortal_service: LiveService) -> None:
    with stopped_learner(mortal_service):
        mortal_service.send(click("starter", "item-0001"))
        unpushed = learn_waiting_events(NearlineLearner(Registry(mortal_service.state), LearnerConfig()))
        victim, survivor = mortal_service.status()["replicas"]
        os.kill(victim["process"], signal.SIGKILL)

        def started(status: dict[str, Any]) -> dict[str, Any] | None:
            others = [
                r for r in status["replicas"] if r["replica_id"] not in (victim["replica_id"], survivor["replica_id"])
            ]
            return others[0] if others else None

        newcomer = mortal_service.wait_until("a new replica has started", started)
        assert (newcomer["version"], newcomer["checksum"]) == (unpushed.version, unpushed.checksum)

        def knows_users(status: dict[str, Any]) -> bool:
            known = {r["replica_id"]: r["users_cached"] for r in status["replicas"]}
            return known.get(newcomer["replica_id"], 0) >= 150

        mortal_service.wait_until("it has the histories of those who acted last", knows_users)
    mortal_service.wait_until_learned()


def test_a_stale_learner_cannot_publish(service: LiveService) -> None:
    """One that was cut off and comes back must not fork the versions."""
    service.wait_until_learned()
    stale = NearlineLearner(Registry(service.state), LearnerConfig())
    service.send(click("stale", "item-0001"))
    before = service.wait_until_learned()
    with pytest.raises(FileExistsError, match="another learner"):
        learn_waiting_events(stale)
    service.send(click("stale", "item-0002"))
    after = service.wait_until_learned()
    assert after["model_version"] == before["model_version"] + 1
    assert after["learner"]["process"] == before["learner"]["process"]


def test_a_rollback_brings_the_weights_back_on_every_replica_and_learning_goes_on(service: LiveService) -> None:
    old = service.wait_until_learned()
    service.send(click("regretted", "item-0001"))
    service.wait_until_learned()
    service.send(click("regretted", "item-0002"))
    newest = service.wait_until_learned()
    assert newest["learner"]["checksum"] != old["learner"]["checksum"]
    response = service.client.post("/v1/rollback", json={"version": old["model_version"]})
    new_version = newest["model_version"] + 1
    assert response.raise_for_status().json() == {"model_version": new_version, "restored": old["model_version"]}
    status = service.status()
    assert versions_and_checksums(status) == [(new_version, old["learner"]["checksum"])] * 2
    assert status["learner"]["log_offset"] == newest["learner"]["log_offset"], "what was learned is not learned again"
    assert service.recommend("visitor-00001")["model_version"] == new_version
    registry = Registry(service.state)
    stored = {fingerprint(registry.load(version).encoder) for version in (old["model_version"], new_version)}
    assert stored == {old["learner"]["checksum"]}

    service.send(click("after", "item-0001"))
    after = service.wait_until_learned()
    assert after["model_version"] == new_version + 1
    assert after["learner"]["events_trained"] == newest["learner"]["events_trained"] + 1


def test_a_rollback_to_an_unknown_version_says_which_there_are(service: LiveService) -> None:
    version = service.wait_until_learned()["model_version"]
    response = service.client.post("/v1/rollback", json={"version": 999_999})
    assert_refused(response, 404, "version", "999999", f"1 to {version}")
    assert service.wait_until_learned()["model_version"] == version


def test_a_rollback_to_a_pruned_version_says_which_are_stored(mortal_service: LiveService) -> None:
    small = learner_config().model_copy(update={"keep_bytes": 1, "snapshot_every": 2})
    with stopped_learner(mortal_service, after=small):
        first = mortal_service.status()["model_version"]
    for number in range(8):
        mortal_service.send(click("pruner", f"item-{number + 1:04}"))
        mortal_service.wait_until_learned()
    status = mortal_service.wait_until_learned()
    response = mortal_service.client.post("/v1/rollback", json={"version": first + 1})
    assert_refused(response, 404, "version", f"{first + 1} is not stored", "any more", "keep_bytes", "stored are 1")
    stored = status["learner"]["stored"]
    files = [file for name in ("snapshots", "deltas") for file in (mortal_service.state / name).rglob("*")]
    assert stored["bytes"] == sum(file.stat().st_size for file in files if file.is_file())
    assert stored["pruned"] >= 4
    assert stored["keep_bytes"] == 1
    oldest = min(int(file.name) for file in (mortal_service.state / "deltas").iterdir())
    assert mortal_service.client.post("/v1/rollback", json={"version": oldest}).raise_for_status().json()
    with stopped_learner(mortal_service):
        pass  # the one that starts again has the usual settings


def test_a_rollback_without_a_learner_says_so(mortal_service: LiveService) -> None:
    with stopped_learner(mortal_service):
        assert_refused(mortal_service.client.post("/v1/rollback", json={"version": 1}), 503, "learner")
    mortal_service.wait_until_learned()


def test_a_rejected_update_reaches_no_replica_and_shows(mortal_service: LiveService) -> None:
    before = mortal_service.wait_until_learned()
    with stopped_learner(mortal_service, after=learner_config(loss_tolerance=-1.0)):  # no loss is below 0
        pass
    mortal_service.wait_until("the strict learner is there", lambda status: "version" in status["learner"])
    mortal_service.send(click("poison", "item-0001"), click("poison", "item-0002"))
    status = mortal_service.wait_until_learned()
    learner = status["learner"]
    assert versions_and_checksums(status) == versions_and_checksums(before)
    assert learner["rejected_updates"] >= 1
    assert learner["events_rejected"] == before["learner"]["events_rejected"] + 2
    assert learner["events_trained"] == before["learner"]["events_trained"]
    assert "held-out loss" in learner["last_rejection"]["reason"]
    assert learner["last_rejection"]["last_offset"] == status["aggregator"]["log_offset"]
    assert metrics(mortal_service)["afterclick_rejected_updates_total"] == [({}, learner["rejected_updates"])]
    with stopped_learner(mortal_service):
        pass
    restarted = mortal_service.wait_until_learned()["learner"]
    for name in ("rejected_updates", "events_rejected", "events_trained", "last_rejection", "log_offset"):
        assert restarted[name] == learner[name], name
    mortal_service.send(click("antidote", "item-0001"))
    after = mortal_service.wait_until_learned()
    assert after["model_version"] > before["model_version"]
