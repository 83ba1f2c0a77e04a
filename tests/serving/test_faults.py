"""A disk that has no room, and the proof that no event is lost or doubled."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lib.log.reader import FeedbackLogReader
from lib.versions.accounts import Accounts
from lib.versions.ledger import check
from lib.versions.registry import Registry
from tests.helpers.service import LiveService, assert_refused, click


@contextmanager
def files_up_to(size: int, process: int) -> Iterator[None]:
    """No file of a process may grow beyond so many bytes in the block: what a full disk looks like to it."""
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_events_are_refused_and_learning_waits_and_both_go_on_with_room(
    mortal_service: LiveService,
) -> None:
    before = mortal_service.wait_until_learned()
    with files_up_to(1000, before["learner"]["process"]):
        mortal_service.send(click("crowded", "item-0001", event_id="taken"))
        status = mortal_service.wait_until("the learner says so", lambda s: s["learner"].get("storage_error") and s)
        assert status["learner"]["state"] == "waiting for storage"
        assert "make room in" in status["learner"]["storage_error"]
        assert status["learner"]["version"] == before["learner"]["version"], "nothing is pushed that is not stored"
        with files_up_to(1000, before["aggregator"]["process"]):
            refused = mortal_service.client.post(
                "/v1/events", json={"events": [click("crowded", "item-0002", event_id="not")]}
            )
            assert_refused(refused, 503, "nothing of the request was taken")
        assert [event["item_id"] for event in mortal_service.export("crowded")] == ["item-0001"]
        assert mortal_service.send(click("crowded", "item-0002", event_id="not"))["accepted"] == 1
    after = mortal_service.wait_until_learned()
    assert (after["learner"]["state"], after["learner"]["storage_error"]) == ("running", None)
    assert after["learner"]["process"] == before["learner"]["process"]
    assert after["aggregator"]["process"] == before["aggregator"]["process"]
    assert after["learner"]["events_trained"] == before["learner"]["events_trained"] + 2
    with FeedbackLogReader(mortal_service.log) as log:
        assert check(Accounts(Registry(mortal_service.state)).newest_lineage(), log).faults == []


def test_a_delta_that_is_torn_while_live_is_made_up_for(mortal_service: LiveService) -> None:
    """A replica that cannot catch up by it gets a version that is stored whole."""
    before = mortal_service.wait_until_learned()
    mortal_service.send(click("torn", "item-0001"))
    mortal_service.wait_until_learned()
    torn = Registry(mortal_service.state).head()
    path = mortal_service.state / "deltas" / f"{torn:010d}"
    path.write_bytes(path.read_bytes()[:-100])
    victim = mortal_service.status()["replicas"][0]
    os.kill(victim["process"], signal.SIGKILL)
    mortal_service.wait_until(
        "a new replica is there", lambda s: len({r["process"] for r in s["replicas"]} - {victim["process"]}) == 2
    )
    after = mortal_service.wait_until_learned()
    assert after["model_version"] == before["model_version"] + 2
    assert Registry(mortal_service.state).load().damage == []
    with FeedbackLogReader(mortal_service.log) as log:
        assert check(Accounts(Registry(mortal_service.state)).newest_lineage(), log).faults == []
