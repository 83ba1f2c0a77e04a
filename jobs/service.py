"""The service on this machine: Ray, Serve behind HAProxy, the aggregators and the near-line learner.

It is started in the order in which its parts need one another, and stopped in the opposite order.
"""

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import cast

import httpx
import ray
from pydantic import Field
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions

from cluster.local import HOST, end_in_time, require_free_port, running_ray, undisturbed
from lib.data.dataset import check_rating_scale, read_events
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
from serving.supervision import supervised

LOCK_FILE = "serving.lock"  # in the state folder
START_SECONDS = 60.0  # for HAProxy to know the replicas
STOP_SECONDS = 60.0  # for all parts together


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
        InputError: the port is taken; model, dataset or challenger cannot be used; the dataset's ratings have another
            scale; or a ranking rule does not suit the catalog.
    """
    require_free_port(port)
    arguments.check()
    encoder, catalog, _ = load_model(arguments.model)
    BoundRules.of(arguments.ranking, catalog).check()
    if arguments.challenger is not None:
        check_challenger(arguments.challenger, arguments.state_location)
    if arguments.data is not None:
        read_events(arguments.data)
        check_rating_scale(arguments.data, encoder.config.ratings)
    Registry(arguments.versions_location).check_format()


@contextmanager
def sole_service(arguments: ServeArguments) -> Iterator[None]:
    """Hold a state folder for one `serve`; the lock goes with the process, however that ends.

    Raises:
        InputError: another process serves it, or its feedback log cannot be used.
    """
    state = arguments.state_location
    folder = Path(state)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"state: {state} is served already, by process {file.read().strip()}; stop that first, or name another "
                "--state"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        check_state(state, arguments.versions, pages=True)
        yield


@contextmanager
def running_service(
    arguments: ServeArguments, port: int, learner: LearnerConfig | None = None, learner_workers: int = 1
) -> Iterator[str]:
    """Run a service for the length of a block, on a Ray of its own where none runs; yield its URL."""
    with running_ray():
        url = start_service(arguments, port, learner, learner_workers)
        try:
            with supervised(arguments.state_location, learner or LearnerConfig(), learner_workers):
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
        started = start_learner(arguments.state_location, learner, learner_workers)
        _warn_of(cast("LearnerStatus", ray.get(started.wait_until_started.remote())).damage)
        _wait_until_answering(url)
        _warn_of(_idle_rules(url))
    except BaseException:
        stop_service()
        raise
    return url


def stop_service() -> None:
    """Stop learner, replicas and aggregators, in this order, so that nothing that was acknowledged stays unwritten.

    What takes longer than STOP_SECONDS is ended as it is: all that was acknowledged is on disk then, too.
    """
    deadline = time.monotonic() + STOP_SECONDS
    with undisturbed(), ExitStack() as stops:  # the last one first, each of them whatever becomes of the others
        stops.callback(lambda: _stop_actors("aggregator", running_aggregators(), "close", deadline))
        stops.callback(lambda: _stop_actors("experiment", _actors_named(EXPERIMENTS), "close", deadline))
        stops.callback(lambda: _stop_serve(deadline))
        stops.callback(lambda: _stop_actors("learner", _actors_named(LEARNER), "stop", deadline))


class StopSignal:
    """Ctrl-C or SIGTERM as something to wait for, with the exit status that tells which of them came."""

    def __init__(self) -> None:
        self.status = 0
        self._received: SimpleQueue[None] = SimpleQueue()  # a handler may put into it in the midst of a `get`

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; the first one decides."""
        if not self.status:
            self.status = 128 + number
            if number == signal.SIGTERM:
                end_in_time(self.status)
        self._received.put(None)

    def is_set(self) -> bool:
        """Return whether a signal has come."""
        return self.status != 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a signal, so many seconds at most; return whether one has come."""
        if not self.is_set():
            with suppress(Empty):
                self._received.get(timeout=timeout)
        return self.is_set()


def stop_on_signal() -> StopSignal:
    """Return an event that Ctrl-C and SIGTERM set from now on, instead of raising an exception."""
    stop = StopSignal()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.receive)
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


def _warn_of(damage: list[str]) -> None:
    """Print what a part goes on without."""
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


def _idle_rules(url: str) -> list[str]:
    """Return the ranking rules that have no effect on the live catalog, and why."""
    status = httpx.get(f"{url}/v1/status", timeout=START_SECONDS).raise_for_status().json()
    return [f"ranking.{rule}" for rule in sorted({rule for each in status["replicas"] for rule in each["idle_rules"]})]


def _stop_serve(deadline: float) -> None:
    """Shut Serve down without the error message that Ray prints where `serve.shutdown` does all of it.

    The controller answers the call to shut down by ending itself, so that the call always fails. Serve makes it with
    retries, of which Ray tells the driver; without retries the failure is only raised.
    """
    for controller in _actors_named(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE):
        try:
            stopped = controller.graceful_shutdown.options(max_task_retries=0).remote()
            ray.get(stopped, timeout=_seconds_until(deadline))
        except GetTimeoutError:
            _warn_of(["the replicas are ended in the midst of requests, as they did not stop in time"])
            return  # serve.shutdown would wait half a minute more
        except RayError:  # it has ended
            pass
    serve.shutdown()


def _seconds_until(deadline: float) -> float:
    """Return what is left of the time, a moment at least."""
    return max(deadline - time.monotonic(), 0.5)


def _actors_named(name: str, namespace: str = NAMESPACE) -> list[ActorHandle]:
    """Return the actor of that name, if there is one."""
    try:
        return [ray.get_actor(name, namespace=namespace)]
    except ValueError:
        return []


def _stop_actors(part: str, actors: list[ActorHandle], method: str, deadline: float) -> None:
    """Have actors finish what they do, then end them; one that does not answer in time is ended all the same."""
    try:
        ray.get([getattr(actor, method).remote() for actor in actors], timeout=_seconds_until(deadline))
    except GetTimeoutError:
        _warn_of([f"the {part} is ended in the midst of its work, which a restart repeats"])
    except RayError:  # it has ended already
        pass
    finally:
        for actor in actors:
            ray.kill(actor)
