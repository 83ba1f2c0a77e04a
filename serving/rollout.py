"""Rollout: a delta to every live replica, with their acknowledgements.

The payload is put into the object store once and each replica reads it from there. A replica that was not reached, or
came up after the call, learns from the next announcement that it is behind, and catches up from the registry.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.exceptions import DeploymentUnavailableError

from lib.model.delta import Delta
from serving.aggregator import NAMESPACE

APPLICATION = "afterclick"
DEPLOYMENT = "Recommendations"
LEARNER = "learner"


class Acknowledgement(NamedTuple):
    """What a replica answers to a push or an announcement."""

    version: int  # that it answers with now
    apply_ms: float = 0.0  # that a pushed delta took


@dataclass(frozen=True)
class Acknowledgements:
    """What came back from a push or an announcement."""

    replicas: list[Acknowledgement]
    unreached: int  # that did not answer in time, or failed
    seconds: float

    @property
    def nobody(self) -> bool:
        """Whether no replica is alive, so that those to come start with the newest version."""
        return not self.replicas and self.unreached == 0

    def all_at(self, version: int) -> bool:
        """Return whether every live replica answers with this version or a later one; no replica is none."""
        return bool(self.replicas) and self.lacking(version) == 0

    def lacking(self, version: int) -> int:
        """Return how many replicas did not say that they have it."""
        return self.unreached + sum(replica.version < version for replica in self.replicas)

    def behind(self, version: int) -> bool:
        """Return whether a replica answered with an older version: it could not read what is stored."""
        return any(replica.version < version for replica in self.replicas)


@dataclass(frozen=True)
class PushCost:
    """What a push took."""

    push_bytes: int
    build_ms: float  # to make the bytes
    transfer_ms: float  # until the last replica that answered had them, and back
    apply_ms: float  # the longest that a replica took to go over to the new version


class Rollout:
    """Reaches the replicas of one deployment."""

    def __init__(self, timeout: float = 10.0):
        self.timeout = timeout
        self._handle: Any = None

    def push(self, delta: Delta) -> tuple[Acknowledgements, PushCost]:
        """Send a delta; returns the acknowledgements and what it took."""
        start = time.perf_counter()
        data = delta.to_bytes()
        built = time.perf_counter()
        reference = ray.put(data)
        acknowledgements = self._broadcast("apply_delta", [reference])
        apply_ms = max((replica.apply_ms for replica in acknowledgements.replicas), default=0.0)
        sent_ms = (time.perf_counter() - built) * 1e3
        return acknowledgements, PushCost(len(data), (built - start) * 1e3, max(sent_ms - apply_ms, 0.0), apply_ms)

    def announce(self, version: int) -> Acknowledgements:
        """Tell every replica the newest version; those that are behind catch up before they acknowledge."""
        return self._broadcast("expect_version", version)

    def _broadcast(self, method: str, *arguments: Any) -> Acknowledgements:
        start = time.perf_counter()
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        try:
            answers = self._handle.broadcast(method, *arguments).results(timeout_s=self.timeout, return_exceptions=True)
        except DeploymentUnavailableError:  # no replica is alive
            return Acknowledgements([], 0, time.perf_counter() - start)
        except TimeoutError:  # who is alive is not known yet
            return Acknowledgements([], 1, time.perf_counter() - start)
        replicas = [answer for answer in answers if isinstance(answer, Acknowledgement)]
        return Acknowledgements(replicas, len(answers) - len(replicas), time.perf_counter() - start)


def learner_handle() -> ActorHandle:
    """Return the running learner.

    Raises:
        ValueError: none is running.
    """
    return ray.get_actor(LEARNER, namespace=NAMESPACE)
