"""The status of the whole service, asked of every part at once; a part that is away is said to be."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from serving.aggregators import Aggregators
from serving.experiment import experiments_handle
from serving.rollout import APPLICATION, DEPLOYMENT, learner_handle
from serving.status import ExperimentStatus, LearnerStatus, ReplicaStatus, ShadowStatus, Status, Unavailable

PATIENCE_SECONDS = 2.0


async def gather_status(
    describe: Callable[[], Awaitable[ReplicaStatus]], aggregators: Aggregators, experiment: str | None
) -> Status:
    """Return versions, freshness, log offsets, pushes and rejected updates.

    Args:
        describe: what the replica that is asked says of itself.
        aggregators: those of the service.
        experiment: the name of the running experiment, if there is or was a challenger.
    """
    replicas, aggregator, learner, compared = await asyncio.gather(
        _replicas(describe), aggregators.status(), _learner(), _experiment(experiment)
    )
    versions = [replica.version for replica in replicas]
    freshness = None
    if isinstance(learner, LearnerStatus):
        versions.append(learner.version)
        freshness = learner.freshness
    return Status(
        model_version=max(versions, default=0),
        replicas=replicas,
        learner=learner,
        aggregator=aggregator,
        freshness=freshness,
        experiment=compared,
    )


async def _replicas(describe: Callable[[], Awaitable[ReplicaStatus]]) -> list[ReplicaStatus]:
    """Ask every live replica; one that is dying says nothing."""
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    try:
        answers = await handle.broadcast("describe").results_async(timeout_s=PATIENCE_SECONDS, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):  # the latter until Serve has told this replica of itself
        answers = [await describe()]
    replicas = [answer for answer in answers if isinstance(answer, ReplicaStatus)]
    return sorted(replicas, key=lambda replica: replica.replica_id)


async def _learner() -> LearnerStatus | Unavailable:
    return await _ask(learner_handle) or Unavailable(state="restarting or not started")


async def _experiment(name: str | None) -> ExperimentStatus | ShadowStatus | Unavailable | None:
    if name is None:
        return None
    return await _ask(experiments_handle, name) or Unavailable(state="restarting")


async def _ask(handle: Callable[[], ActorHandle], *arguments: str) -> Any:
    """Return an actor's status, or None while the actor is away."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            actor: Any = await asyncio.to_thread(handle)  # it asks the cluster, which takes a while
            return await actor.status.remote(*arguments)
    except (ValueError, TimeoutError, RayActorError):
        return None
