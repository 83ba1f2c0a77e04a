"""Serve a model on this machine: Ray, Serve behind HAProxy, the aggregator and the near-line learner.

    python -m jobs.serve --model MODEL [--data DATA] [--replicas 2] [--port 8000]

Log and versions live in MODEL/live, so the same command continues where it was stopped or killed.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import ray
import typer
from ray import serve
from ray.actor import ActorHandle
from ray.serve.config import HTTPOptions

from cluster.local import HOST, require_free_port, running_ray
from lib.data.dataset import read_events
from lib.data.guard import CleaningRules
from lib.errors import InputError, SettingsError
from lib.experiments.results import ChallengerConfig
from lib.live.settings import LearnerConfig
from lib.log.backend import SQLITE
from lib.model.folder import load_model
from lib.ranking.rules import BoundRules, RankingRules
from serving.aggregator import NAMESPACE, start_aggregator
from serving.aggregators import running_aggregators, statuses_of
from serving.app import ServeArguments, build, check_state
from serving.experiment import EXPERIMENTS, check_challenger
from serving.learner import check_logs, start_learner
from serving.rollout import APPLICATION, LEARNER
from serving.status import LearnerStatus

START_SECONDS = 60.0  # for HAProxy to know the replicas
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    arguments: ServeArguments


def start_service(
    arguments: ServeArguments, port: int, learner: LearnerConfig | None = None, learner_workers: int = 1
) -> Service:
    """Start everything on the running Ray; returns when the first answer has been given.

    Raises:
        InputError: the model folder or the dataset cannot be used, or the port is taken.
    """
    _check(arguments, port)
    url = f"http://{HOST}:{port}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it starts is said in two lines of our own
    try:
        application = build(arguments)
        layout = arguments.layout
        given = (arguments.state_location, arguments.data, arguments.aggregator)
        aggregators = [start_aggregator(*given, shard, layout) for shard in layout.shards()]
        statuses = statuses_of(aggregators)
        for status in statuses:
            _say_damage(status.damage)
        check_logs(arguments.state_location, statuses)
        serve.start(http_options=HTTPOptions(host=HOST, port=port))
        serve.run(application, name=APPLICATION, route_prefix="/")
        _say_damage(_status_of(start_learner(arguments.state_location, learner, learner_workers)).damage)
        _wait_until_answering(url)
    except BaseException:
        stop_service()
        raise
    return Service(url, arguments)


def _status_of(learner: ActorHandle) -> LearnerStatus:
    return cast("LearnerStatus", ray.get(learner.status.remote()))


def _say_damage(found: list[str]) -> None:
    """Say what a part found damaged in its files, and goes on without."""
    for damage in found:
        print(f"warning: {damage}", file=sys.stderr, flush=True)


def _check(arguments: ServeArguments, port: int) -> None:
    """Find bad input before anything is started."""
    require_free_port(port)
    check_model(arguments)
    if arguments.data is not None:
        read_events(arguments.data)
    for status in statuses_of(running_aggregators()):
        running = status.state
        if running != arguments.state_location:
            raise InputError(f"state: this cluster serves {running} already; stop that first, or use another cluster")


def check_model(arguments: ServeArguments) -> None:
    """Refuse a model that cannot be loaded, and ranking rules that its catalog does not understand.

    Raises:
        InputError: it names the file, or the rule.
    """
    arguments.check()
    _, catalog, _ = load_model(arguments.model)
    BoundRules.of(arguments.ranking, catalog)
    if arguments.challenger is not None:
        check_challenger(arguments.challenger, arguments.state_location)


def _wait_until_answering(url: str) -> None:
    """The ingress may need a moment more than the replicas.

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


def stop_service() -> None:
    """Stop learner, replicas and aggregators, in this order, so that nothing that was acknowledged waits unwritten."""
    with ExitStack() as stops:  # the last one first, each of them whatever becomes of the others
        stops.callback(lambda: _stop_actors(running_aggregators(), "close"))
        stops.callback(lambda: _stop_actors(_running(EXPERIMENTS), "close"))
        stops.callback(serve.shutdown)
        stops.callback(lambda: _stop_actors(_running(LEARNER), "stop"))


def _running(name: str) -> list[ActorHandle]:
    """The actor of that name, if there is one."""
    try:
        return [ray.get_actor(name, namespace=NAMESPACE)]
    except ValueError:
        return []


def _stop_actors(actors: list[ActorHandle], method: str) -> None:
    """Have actors finish what they do, then end them; one that does not answer is ended all the same."""
    try:
        ray.get([getattr(actor, method).remote() for actor in actors], timeout=STOP_SECONDS)
    finally:
        for actor in actors:
            ray.kill(actor)


def _aggregators(count: int) -> str:
    return "the aggregator" if count == 1 else f"{count} aggregators"


@contextmanager
def running_service(
    arguments: ServeArguments, port: int, learner: LearnerConfig | None = None, learner_workers: int = 1
) -> Iterator[Service]:
    """A service for the length of a block, with a Ray of its own if none runs."""
    with running_ray():
        service = start_service(arguments, port, learner, learner_workers)
        try:
            yield service
        finally:
            stop_service()


def serve_command(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    data: Annotated[Path | None, typer.Option(help="Ingested dataset whose users' histories to start with.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Inference replicas.")] = 2,
    most_replicas: Annotated[int | None, typer.Option(min=1, help="Up to so many as the load grows.")] = None,
    aggregators: Annotated[int, typer.Option(min=1, help="Share the users out among so many, for good.")] = 1,
    log: Annotated[str, typer.Option(help="Of feedback: sqlite, or kafka://host:port/topic.")] = SQLITE,
    learner_workers: Annotated[int, typer.Option(min=1, help="Processes that learn together.")] = 1,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port on 127.0.0.1.")] = 8000,
    state: Annotated[Path | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of learner settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Learner setting key=value; repeatable.")] = None,
    ranking: Annotated[Path | None, typer.Option(help="YAML file of ranking rules.")] = None,
    cleaning: Annotated[Path | None, typer.Option(help="YAML file of what feedback is refused.")] = None,
    challenger: Annotated[str | None, typer.Option(help="Second model, or stored version, to compare with.")] = None,
    challenger_share: Annotated[float | None, typer.Option(help="Share of the users that it answers; 0.1.")] = None,
    shadow: Annotated[bool, typer.Option(help="Ask the challenger, and show nothing of it.")] = False,
    challenger_set: Annotated[list[str] | None, typer.Option(help="Test setting key=value; repeatable.")] = None,
) -> None:
    """Serve a model, learn from feedback, push the weights; Ctrl-C stops it cleanly."""
    from jobs.configuration import settings_from, values_of, yaml_of

    learner = settings_from(LearnerConfig, config, set_ or [])
    arguments = ServeArguments(
        model=str(model.absolute()),
        data=str(data.absolute()) if data is not None else None,
        replicas=replicas,
        most_replicas=most_replicas,
        aggregators=aggregators,
        log=log,
        state=str(state.absolute()) if state is not None else None,
        cleaning=settings_from(CleaningRules, cleaning, []),
        ranking=RankingRules(**yaml_of(ranking, "ranking")) if ranking is not None else RankingRules(),
        challenger=_challenger(challenger, challenger_share, shadow, values_of(challenger_set or [])),
    )
    require_free_port(port)  # here and of the model, too: what can be known before Ray is started
    check_model(arguments)
    check_state(arguments.state_location, pages=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"starting Ray, {replicas} replicas, {_aggregators(aggregators)} and the learner", flush=True)
    with running_service(arguments, port, learner, learner_workers) as service:
        print(f"serving at {service.url}  (page: {service.url}/, API: {service.url}/docs)  Ctrl-C stops it", flush=True)
        stop.wait()
        print("stopping", flush=True)
    print("stopped", flush=True)


def _challenger(
    model: str | None, share: float | None, shadow: bool, settings: dict[str, Any]
) -> ChallengerConfig | None:
    given: dict[str, Any] = {} if share is None else {"share": share}
    if model is None:
        if given or shadow or settings:
            raise InputError("challenger: name the second model with --challenger, or leave out what is said of it")
        return None
    named = model if model.isdecimal() else str(Path(model).absolute())
    try:
        return ChallengerConfig(**{"model": named, "shadow": shadow} | given | settings)
    except SettingsError as error:
        raise InputError(f"challenger.{error}") from error


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(serve_command)
