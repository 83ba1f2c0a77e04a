"""Processes are killed while events flow: nothing that was acknowledged is lost, and nothing is learned twice."""

import os
import signal
from collections import Counter
from typing import Any

import pytest

from lib.feedback_log import FeedbackLogReader
from tests.conftest import LiveService
from tests.traffic import UNANSWERED, Traffic

VICTIMS = [("aggregator",), ("learner",), ("replica",), ("aggregator", "learner", "replica")]

THREADS = 4


def processes(status: dict[str, Any]) -> dict[str, list[int]]:
    """Process ids of each part that answers now."""
    return {
        "aggregator": [status["aggregator"][name] for name in ("process",) if name in status["aggregator"]],
        "learner": [status["learner"][name] for name in ("process",) if name in status["learner"]],
        "replica": [replica["process"] for replica in status["replicas"]],
    }


def all_live_without(service: LiveService, killed: list[int]) -> Any:
    """A condition: every part is live again, in another process."""

    def condition(status: dict[str, Any]) -> bool:
        now = processes(status)
        whole = {part: len(found) for part, found in now.items()}
        gone = not set(killed) & {process for found in now.values() for process in found}
        return gone and whole == {"aggregator": 1, "learner": 1, "replica": service.arguments.replicas}

    return condition


def assert_each_event_once(service: LiveService, acknowledged: list[tuple[str, str]]) -> None:
    """Each acknowledged event is in the log once, in its user's history, and in the weights of every replica once."""
    status = service.wait_until_learned()
    learner = status["learner"]
    assert acknowledged
    assert len(set(acknowledged)) == len(acknowledged)
    with FeedbackLogReader(service.log) as log:
        logged = Counter((entry.event.user_id, entry.event.event_id) for entry in log.replay())
        assert [event for event in acknowledged if logged[event] != 1] == []
        assert learner["log_offset"] == log.last_offset()
        assert learner["events_trained"] + learner["events_rejected"] == log.count()
        for user in {user_id for user_id, _ in acknowledged}:
            history = [(event["item_id"], event["timestamp"]) for event in service.export(user)]
            assert history == [(entry.event.item_id, entry.event.timestamp) for entry in log.user_events(user)]


@pytest.mark.parametrize("victims", VICTIMS, ids=" and ".join)
def test_a_killed_process_loses_nothing_and_comes_back_by_itself(
    service: LiveService, victims: tuple[str, ...]
) -> None:
    name = f"killed {'+'.join(victims)}"
    before = service.wait_until_learned()
    with Traffic(service, name, senders=THREADS // 2, askers=THREADS // 2) as traffic:
        traffic.wait_for(events=50, answers=50)
        killed = [processes(service.status())[victim][0] for victim in victims]
        for process in killed:
            os.kill(process, signal.SIGKILL)
        service.wait_until(f"{victims} restarted", all_live_without(service, killed))
        traffic.wait_for(events=50, answers=50)
    assert_each_event_once(service, traffic.acknowledged)
    assert service.status()["model_version"] > before["model_version"]
    unexpected = [failure for failure in traffic.failures if not excused(failure, victims)]
    assert unexpected == []
    # a thread has one request under way when its replica dies
    assert sum(UNANSWERED in failure for failure in traffic.failures) <= THREADS


def excused(failure: str, victims: tuple[str, ...]) -> bool:
    """Whether a request may fail like this while these processes come back.

    While the aggregator restarts, who needs it waits for it, and hears after ReplicaConfig.actor_timeout to try again.
    HAProxy asks another replica what a killed one left unanswered, unless the kernel resets a connection that was used
    before: then it hangs up on the client too, which HTTP expects to ask again.
    """
    if "aggregator" in victims and " 503 " in failure and "try again" in failure:
        return True
    return "replica" in victims and UNANSWERED in failure


def test_a_stopped_service_continues_where_it_was(service: LiveService) -> None:
    before = service.wait_until_learned()
    items = [{"item_id": item, "category": "kept"} for item in ("kept", "gone")]
    service.client.put("/v1/items", json={"items": items}).raise_for_status()
    service.client.delete("/v1/items/gone").raise_for_status()
    with Traffic(service, "stopped", askers=0) as traffic:
        traffic.wait_for(events=100)
    # the newest of them are not learned yet
    service.stop()
    service.start()
    after = service.wait_until_learned()
    assert_each_event_once(service, traffic.acknowledged)
    assert after["model_version"] > before["model_version"]
    assert after["aggregator"]["log_offset"] >= before["aggregator"]["log_offset"] + len(traffic.acknowledged)
    assert len(service.export("visitor-00001")) > 0, "the histories of the dataset are there"
    asked = {"user_id": "visitor-00001", "filter": {"category": "kept"}}
    answer = service.client.post("/v1/recommendations", json=asked).raise_for_status().json()
    assert [item["item_id"] for item in answer["items"]] == ["kept"]


def test_a_killed_service_continues_where_it_was(service: LiveService) -> None:
    """What a power loss leaves: every process ends at once, while events wait to be learned."""
    service.wait_until_learned()
    with Traffic(service, "powerless", askers=0) as traffic:
        traffic.wait_for(events=60)
        everything = [process for found in processes(service.status()).values() for process in found]
        for process in everything:
            os.kill(process, signal.SIGKILL)
    service.wait_until("everything restarted", all_live_without(service, everything))
    assert_each_event_once(service, traffic.acknowledged)
