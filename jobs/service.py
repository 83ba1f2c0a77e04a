"""The service on this machine: Ray, Serve behind HAProxy, the aggregators and the near-line learner.

It is started in the order in which its parts need one another, and stopped in the opposite order.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import httpx
import ray
from pydantic import Field
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions

from cluster.local import HOST, require_free_port, running_ray
from lib.data.dataset import read_events
from lib.errors import InputError
from lib.live.settings import LearnerConfig
from lib.model.folder import load_model
from lib.ranking.rules import BoundRules
from lib.versions.registry import Registry
from serving.aggregator import NAMESPACE, Trigger, start_aggregator
from serving.aggregators import running_aggregators, statuses_of
from serving.app import ServeArguments, build, check_state
from serving.experiment import EXPERIMENTS, check_challenger
from serving.learner import check_logs, start_learner
from serving.rollout import APPLICATION, LEARNER
from serving.status import LearnerStatus

START_SECONDS = 60.0  # for HAProxy to know the replicas
STOP_SECONDS = 30.0


class LiveSettings(LearnerConfig):
    """How the service learns: the settings of the learner, and when pending events are released to it."""

    trigger: Trigger = Field(default=Trigger(), description="when pending events are released to the learner")

    @property
    def learner(self) -> LearnerConfig:
        """The settings of the learner alone."""
        return LearnerConfig(**{name: getattr(self, name) for name in LearnerConfig.model_fields})


def check_service(arguments: ServeArguments, port: int) -> None:
    """Refuse, before Ray is started, what cannot be served.

    Raises:
        InputError: the port is taken; model, dataset, state or challenger cannot be used; or the catalog lacks what
            a ranking rule names.
    """
    require_free_port(port)
    arguments.check()
    _, catalog, _ = load_model(arguments.model)
    BoundRules.of(arguments.ranking, catalog)
    if arguments.challenger is not None:
        check_challenger(arguments.challenger, arguments.state_location)
    if arguments.data is not None:
        read_events(arguments.data)
    Registry(arguments.state_location).check_format()
    check_state(arguments.state_location, pages=True)


@contextmanager
def running_service(
    arguments: ServeArguments, port: int, learner: LearnerConfig | None = None, learner_workers: int = 1
) -> Iterator[str]:
    """Run a service for the length of a block, on a Ray of its own where none runs; yield its URL."""
    with running_ray():
        url = start_service(arguments, port, learner, learner_workers)
        try:
            yield url
        finally:
            stop_service()


def start_service(
    arguments: ServeArguments, port: int, learner: LearnerConfig | None = None, learner_workers: int = 1
) -> str:
    """Start everything on the running Ray; return the URL once it answers.

    Raises:
        InputError: the port is taken, the model folder or the state cannot be used, or this cluster serves another one.
    """
    require_free_port(port)
    _refuse_second_service(arguments.state_location)
    url = f"http://{HOST}:{port}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the commands say in a line of their own what starts
    try:
        application = build(arguments)
        _start_aggregators(arguments)
        serve.start(http_options=HTTPOptions(host=HOST, port=port))
        serve.run(application, name=APPLICATION, route_prefix="/")
        _warn_of(_status_of(start_learner(arguments.state_location, learner, learner_workers)).damage)
        _wait_until_answering(url)
    except BaseException:
        stop_service()
        raise
    return url


def stop_service() -> None:
    """Stop learner, replicas and aggregators, in this order, so that nothing that was acknowledged stays unwritten."""
    with ExitStack() as stops:  # the last one first, each of them whatever becomes of the others
        stops.callback(lambda: _stop_actors(running_aggregators(), "close"))
        stops.callback(lambda: _stop_actors(_actors_named(EXPERIMENTS), "close"))
        stops.callback(_stop_serve)
        stops.callback(lambda: _stop_actors(_actors_named(LEARNER), "stop"))


def stop_on_signal() -> threading.Event:
    """Return an event that Ctrl-C and SIGTERM set from now on, instead of ending the process."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: 1 replica, 2 replicas."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _refuse_second_service(state: str) -> None:
    for status in statuses_of(running_aggregators()):
        if status.state != state:
            raise InputError(
                f"state: this cluster serves {status.state} already; stop that first, or use another cluster"
            )


def _start_aggregators(arguments: ServeArguments) -> None:
    state, layout = arguments.state_location, arguments.layout
    aggregators = [
        start_aggregator(state, arguments.data, arguments.aggregator, shard, layout) for shard in layout.shards()
    ]
    statuses = statuses_of(aggregators)
    for status in statuses:
        _warn_of(status.damage)
    check_logs(state, statuses)


def _status_of(learner: ActorHandle) -> LearnerStatus:
    return cast("LearnerStatus", ray.get(learner.status.remote()))


def _warn_of(damage: list[str]) -> None:
    """Print what a part found damaged in its files and goes on without."""
    for found in damage:
        print(f"warning: {found}", file=sys.stderr, flush=True)


def _wait_until_answering(url: str) -> None:
    """Wait for HAProxy, which may need a moment more than the replicas.

    Raises:
        httpx.HTTPError: it still does not answer after START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"{url}/healthz", timeout=START_SECONDS).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _stop_serve() -> None:
    """Shut Serve down without the error message that Ray prints where `serve.shutdown` does all of it.

    The controller answers the call to shut down by ending itself, so that the call always fails. Serve makes it with
    retries, of which Ray tells the driver; without retries the failure is only raised.
    """
    for controller in _actors_named(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE):
        with suppress(RayError):  # it has ended; or it takes too long, and serve.shutdown says so
            ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_SECONDS)
    serve.shutdown()


def _actors_named(name: str, namespace: str = NAMESPACE) -> list[ActorHandle]:
    """Return the actor of that name, if there is one."""
    try:
        return [ray.get_actor(name, namespace=namespace)]
    except ValueError:
        return []


def _stop_actors(actors: list[ActorHandle], method: str) -> None:
    """Have actors finish what they do, then end them; one that does not answer is ended all the same."""
    try:
        ray.get([getattr(actor, method).remote() for actor in actors], timeout=STOP_SECONDS)
    finally:
        for actor in actors:
            ray.kill(actor)
