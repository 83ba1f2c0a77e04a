"""`afterclick finetune`: a new base takes the place of the live weights under traffic, or leaves them as they are."""

from pathlib import Path

import pytest

from jobs.finetune import FinetuneSettings, finetune
from lib.feedback_log import FeedbackLogReader
from lib.registry import Registry
from tests.conftest import LiveService
from tests.test_faults import assert_each_event_once
from tests.test_rollout import versions_and_checksums
from tests.traffic import Traffic

SETTINGS = FinetuneSettings(epochs=1, tolerance=2.0, negatives=64)  # NDCG cannot be so much worse


def test_a_new_base_goes_live_without_a_failed_request_and_learning_goes_on(
    service: LiveService, shop_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Traffic(service, "finetuned") as traffic:
        traffic.wait_for(events=200)
        before = service.status()
        outcome = finetune(service.state, shop_dataset, settings=SETTINGS, gpu=False)
        live = service.status()
        traffic.wait_for(events=50, answers=50)
    assert traffic.failures == []
    assert traffic.versions[0] < outcome.version <= traffic.versions[-1]  # pyright: ignore[reportOptionalOperand]
    assert (outcome.accepted, outcome.since) == (True, before["learner"]["base"])
    assert all(replica["version"] >= outcome.version for replica in live["replicas"])
    assert live["learner"]["base"] == outcome.version
    # what was held out, and what came while it was trained, is learned after it, each event once
    assert_each_event_once(service, traffic.acknowledged)
    after = service.wait_until_learned()
    assert versions_and_checksums(after) == [(after["model_version"], after["learner"]["checksum"])] * 2
    registry = Registry(service.state)
    base = registry.load(outcome.version)
    assert (base.log_offset, base.facts["kind"]) == (outcome.log_offset, "finetune")
    with FeedbackLogReader(service.log) as log:
        assert base.facts["events_trained"] + base.facts["events_rejected"] == len(
            [logged for logged in log.replay() if logged.offset <= outcome.log_offset]
        )
    assert registry.offers() == []
    assert not (service.state / "finetuning").exists()
    said = capsys.readouterr()
    assert "epoch 1/1  loss" in said.err

    # a rollback behind the base: a version of other weights, whole
    response = service.client.post("/v1/rollback", json={"version": before["model_version"]})
    restored = response.raise_for_status().json()["model_version"]
    status = service.status()
    assert [replica["version"] for replica in status["replicas"]] == [restored] * 2
    assert status["learner"]["log_offset"] == after["learner"]["log_offset"]
    service.wait_until_learned()
