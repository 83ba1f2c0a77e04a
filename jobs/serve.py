"""Serve a model on this machine: Ray, Serve behind HAProxy, the aggregator and the near-line learner.

    python -m jobs.serve --model MODEL [--data DATA] [--replicas 2] [--port 8000]

Log and versions live in MODEL/live, so the same command continues where it was stopped or killed.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import ray
import typer
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.local import HOST, connect, require_free_port
from jobs.nearline import start_learner
from lib.datasets import read_events
from lib.events import InputError
from lib.learner import LearnerConfig
from lib.model_folder import load_model
from serving.aggregator import NAMESPACE, start_aggregator
from serving.app import ServeArguments, build
from serving.recommendations import APPLICATION


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    arguments: ServeArguments


def start_service(arguments: ServeArguments, port: int, learner: LearnerConfig | None = None) -> Service:
    """Start everything on the running Ray; returns when the first answer has been given.

    Raises:
        InputError: the model folder or the dataset cannot be used, or the port is taken.
    """
    require_free_port(port)
    load_model(arguments.model)
    if arguments.data is not None:
        read_events(arguments.data)
    application = build(arguments)
    aggregator = start_aggregator(arguments.state_location, arguments.data)
    ray.get(aggregator.status.remote())
    serve.start(http_options=HTTPOptions(host=HOST, port=port))
    serve.run(application, name=APPLICATION, route_prefix="/")
    start_learner(arguments.state_location, learner)
    url = f"http://{HOST}:{port}"
    _wait_until_answering(url)
    return Service(url, arguments)


def _wait_until_answering(url: str) -> None:
    """The ingress may need a moment more than the replicas to open its socket."""
    transport = httpx.HTTPTransport(retries=20)
    with httpx.Client(transport=transport, timeout=30) as client:
        client.get(f"{url}/healthz").raise_for_status()


def stop_service() -> None:
    """Stop learner, replicas and aggregator, in this order, so that nothing that was acknowledged waits unwritten."""
    for name, method in (("learner", "stop"), ("aggregator", "close")):
        if name == "aggregator":
            serve.shutdown()
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            continue
        ray.get(getattr(actor, method).remote(), timeout=30)
        ray.kill(actor)


@contextmanager
def running_service(arguments: ServeArguments, port: int, learner: LearnerConfig | None = None) -> Iterator[Service]:
    """A service for the length of a block, with a Ray of its own if none runs."""
    started = connect()
    try:
        yield start_service(arguments, port, learner)
    finally:
        stop_service()
        if started:
            ray.shutdown()


def serve_command(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    data: Annotated[Path | None, typer.Option(help="Ingested dataset whose users' histories to start with.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Inference replicas.")] = 2,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port on 127.0.0.1.")] = 8000,
    state: Annotated[Path | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of learner settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Learner setting key=value; repeatable.")] = None,
) -> None:
    """Serve a model, learn from feedback, push the weights; Ctrl-C stops it cleanly."""
    from jobs.configuration import settings_from

    learner = settings_from(LearnerConfig, config, set_ or [])
    arguments = ServeArguments(
        model=str(model.absolute()),
        data=str(data.absolute()) if data is not None else None,
        replicas=replicas,
        state=str(state.absolute()) if state is not None else None,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"starting Ray, {replicas} replicas, the aggregator and the learner", flush=True)
    with running_service(arguments, port, learner) as service:
        print(f"serving at {service.url}  (page: {service.url}/, API: {service.url}/docs)  Ctrl-C stops it", flush=True)
        stop.wait()
        print("stopping", flush=True)
    print("stopped", flush=True)


def get_json(url: str, path: str, **parameters: Any) -> Any:
    """GET from a running service.

    Raises:
        InputError: nothing answers at this address.
    """
    return _request("GET", url, path, params=parameters)


def post_json(url: str, path: str, body: Any) -> Any:
    """POST to a running service; its objections become InputError."""
    return _request("POST", url, path, json=body)


def _request(method: str, url: str, path: str, **arguments: Any) -> Any:
    try:
        response = httpx.request(method, f"{url.rstrip('/')}{path}", timeout=30, **arguments)
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise InputError(f"url: no service answers at {url} ({error}); start one with `afterclick serve`") from error
    if response.is_client_error:
        raise InputError(f"the service refused: {response.json().get('detail', response.text)}")
    response.raise_for_status()
    return response.json()


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(serve_command)
