"""The service under test: how to start it, how to talk to it, and what must be true of it."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.local import HOST, free_port
from lib.log.reader import FeedbackLogReader

if TYPE_CHECKING:
    from lib.live.settings import LearnerConfig
    from serving.app import ServeArguments

NO_LIMITS = {"user_limit": 1e9, "newcomer_share": 1e9, "item_limit": 1e9}  # of influence: an event counts 1
PATIENCE = 60.0  # seconds until a wait is given up; nothing is judged by how long it took
Found = TypeVar("Found")


@dataclass(frozen=True)
class RaySession:
    """The one Ray of the session; `address` is what `ray job submit --address` takes."""

    address: str


def learner_config(**gate: Any) -> LearnerConfig:
    """Settings of a learner for the service under test, with these of its gate.

    What tests click is random: learned for long it is harm, and would be taken back as such. Each event counts in full,
    however new its user is, so that counts can be compared with the log.
    """
    from lib.live.gate import GateConfig
    from lib.live.influence import InfluenceLimits
    from lib.live.settings import LearnerConfig

    influence = InfluenceLimits.model_validate(NO_LIMITS)
    return LearnerConfig(gate=GateConfig(reference_users=0, **gate), influence=influence)


@dataclass
class LiveService:
    """The service under test, and how to talk to it."""

    arguments: ServeArguments
    port: int
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        # a connection each: HAProxy then spreads the requests over the replicas
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, limits=limits)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    @property
    def state(self) -> Path:
        """The folder of log and versions."""
        return Path(self.arguments.state_location)

    @property
    def log(self) -> Path:
        """The feedback log's file."""
        return self.state / "feedback.sqlite"

    def start(self, **arguments: Any) -> None:
        """Start everything, on whatever the state folder holds, with other arguments for this time."""
        from jobs.service import start_service

        start_service(self.arguments.model_copy(update=arguments), self.port, learner_config())

    def stop(self) -> None:
        """Stop everything, cleanly."""
        from jobs.service import stop_service

        stop_service()

    def status(self) -> dict[str, Any]:
        """GET /v1/status."""
        return self.client.get("/v1/status").raise_for_status().json()

    def send(self, *events: dict[str, Any]) -> dict[str, Any]:
        """POST events; the answer."""
        return self.client.post("/v1/events", json={"events": list(events)}).raise_for_status().json()

    def recommend(self, user_id: str, k: int = 10, **fields: Any) -> dict[str, Any]:
        """A user's recommendations; the answer."""
        body = {"user_id": user_id, "k": k, **fields}
        return self.client.post("/v1/recommendations", json=body).raise_for_status().json()

    def items(self) -> list[str]:
        """Ids of items that the catalog has, the most popular first."""
        return [item["item_id"] for item in self.recommend("somebody unknown", 200)["items"]]

    def export(self, user_id: str) -> list[dict[str, Any]]:
        """A user's events as the service has them."""
        return self.client.get(f"/v1/users/{user_id}/export").raise_for_status().json()["events"]

    def wait_until(
        self, what: str, condition: Callable[[dict[str, Any]], Found | None], patience: float = PATIENCE
    ) -> Found:
        """Ask for the status until the condition holds of it, and return what that gave; fails with the status."""
        deadline = time.monotonic() + patience
        status: Any = None
        while time.monotonic() < deadline:
            try:
                status = self.status()
            except httpx.HTTPError as error:
                status = repr(error)
            else:
                if found := condition(status):
                    return found
            time.sleep(0.1)
        pytest.fail(f"waited {patience:.0f} s in vain until {what}; the last status: {status}")

    def wait_until_learned(self) -> dict[str, Any]:
        """Wait until all parts are up and every logged event is in the weights of every replica; the status then."""
        return self.wait_until("everything is learned and live everywhere", self._learned)

    def _learned(self, status: dict[str, Any]) -> dict[str, Any] | None:
        replicas, learner, aggregator = status["replicas"], status["learner"], status["aggregator"]
        if len(replicas) != self.arguments.replicas or "version" not in learner or "log_offset" not in aggregator:
            return None
        if learner["log_offset"] != aggregator["log_offset"]:
            return None
        state = {(learner["version"], learner["checksum"])} | {(r["version"], r["checksum"]) for r in replicas}
        return status if len(state) == 1 else None


@contextmanager
def started_service(model: Path, data: Path, folder: Path) -> Iterator[LiveService]:
    """Start a service with two replicas on a fresh copy of the model, in place of the one that runs on this Ray."""
    from jobs.service import stop_service
    from serving.app import ServeArguments

    stop_service()
    shutil.copytree(model, folder / "model")
    live = LiveService(ServeArguments(model=str(folder / "model"), data=str(data), replicas=2), free_port())
    try:
        live.start()
        yield live
    finally:
        live.client.close()
        live.stop()


def click(user_id: str, item_id: str, **fields: Any) -> dict[str, Any]:
    return {"user_id": user_id, "item_id": item_id, "event": "click", **fields}


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def metrics(service: LiveService) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample of /metrics: name -> its labels and value."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(service.client.get("/metrics").raise_for_status().text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def assert_refused(response: httpx.Response, status: int, *words: str) -> None:
    """The error is one line under `detail`, names what it must, and shows nothing of the inside."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["detail"]
    assert isinstance(body["detail"], str)
    assert "\n" not in body["detail"]
    assert "Traceback" not in body["detail"]
    assert ".py" not in body["detail"]
    for word in words:
        assert word in body["detail"]


def assert_each_event_once(service: LiveService, acknowledged: list[tuple[str, str]]) -> None:
    """Each acknowledged event is in the log once, in its user's history, and in the weights of every replica once."""
    status = service.wait_until_learned()
    learner = status["learner"]
    assert acknowledged
    assert len(set(acknowledged)) == len(acknowledged)
    with FeedbackLogReader(service.log) as log:
        events = [logged.event for logged in log.replay()]
        logged = Counter((event.user_id, event.event_id) for event in events)
        assert [event for event in acknowledged if logged[event] != 1] == []
        assert learner["log_offset"] == log.last_offset()
        assert learner["events_trained"] + learner["events_rejected"] == log.count()
        for user in {user_id for user_id, _ in acknowledged}:
            history = [(event["item_id"], event["timestamp"]) for event in service.export(user)]
            expected = [(event.item_id, event.timestamp) for event in events if event.user_id == user]
            assert history == sorted(expected, key=lambda event: event[1])


def versions_and_checksums(status: dict[str, Any]) -> list[tuple[int, str]]:
    return [(replica["version"], replica["checksum"]) for replica in status["replicas"]]
