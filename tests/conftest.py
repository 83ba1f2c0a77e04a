"""Fixtures that tests share: one Ray and one small model for each process, and the running service.

`service` and `mortal_service` are real: Serve behind HAProxy, two replicas, the aggregator and the learner. Tests that
only use it share the first; a file whose tests kill parts of it has the second for itself.

Ray and torch are imported by the fixtures that need them, so that the other tests do not wait for them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from cluster.local import HOST, free_port, prepare_environment
from tests.helpers.logs import ROOT
from tests.helpers.service import PATIENCE, LiveService, RaySession, started_service

if "PYTEST_XDIST_WORKER" in os.environ:  # it has ports and folders of its own, not those of the process that started it
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        del os.environ[name]
prepare_environment()  # before any test module imports ray, which reads its settings then


def group_of(fixtures: Collection[str]) -> str | None:
    """Return the group of a test that needs Ray, by its fixtures; one process runs a whole group, with one Ray."""
    if "ray_session" not in fixtures:
        return None
    return "model" if "small_model" in fixtures else "ray"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Name the group in the id of a test: pytest-xdist distributes tests by nothing else."""
    if group := group_of(metafunc.fixturenames):
        metafunc.fixturenames.append("group")
        metafunc.parametrize("group", [group], ids=[f"@{group}"])


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Begin with the groups, which take longest, and in them use `service` before a `mortal_service` ends it."""

    def turn(item: pytest.Function) -> tuple[bool, ...]:
        group = group_of(item.fixturenames)
        return group != "model", group != "ray", "mortal_service" in item.fixturenames

    for item in items:
        if "mortal_service" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    items.sort(key=turn)


class GroupsAndFiles(LoadScopeScheduling):
    """Give each process of `pytest -n` whole groups, and of the other tests whole files."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        group = re.search(r"\[(@\w+)", test)
        return group[1] if group else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupsAndFiles:
    """Choose what `pytest -n` runs where."""
    return GroupsAndFiles(config, log)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """Start Ray with its job server, on 127.0.0.1."""
    import ray
    from ray._private import parameter
    from ray._private.utils import write_ray_address

    class Parameters(parameter.RayParams):
        """Give the job agent a port of its own, as ray.init cannot: two agents on one port take each other's jobs."""

        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **{"dashboard_agent_listen_port": free_port()} | settings)

    parameter.RayParams = Parameters
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the path of a socket must be short
    context = ray.init(
        _temp_dir=folder,
        address="local",
        num_cpus=max(8, os.cpu_count() or 1),
        include_dashboard=True,
        dashboard_host=HOST,
        dashboard_port=free_port(),
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address=HOST,
    )
    write_ray_address(ray.get_runtime_context().gcs_address, folder)  # jobs join any Ray of the machine else
    try:
        yield RaySession(f"http://{context.dashboard_url}")
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)  # what is still ending may write to its log


@pytest.fixture(scope="session")
def kafka_brokers() -> Iterator[str]:
    """Start Kafka brokers, librdkafka's own, which live as long as this client, and give their address."""
    from confluent_kafka import Producer

    producer = Producer({"test.mock.num.brokers": 2, "log_level": 0})
    brokers = producer.list_topics(timeout=PATIENCE).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
    producer.flush()


@pytest.fixture
def kafka_topic(kafka_brokers: str) -> str:
    """Make a topic for the test, with four partitions, and return its address."""
    from confluent_kafka import Producer

    name = f"feedback-{uuid.uuid4().hex}"
    Producer({"bootstrap.servers": kafka_brokers}).list_topics(name, timeout=PATIENCE)  # these brokers make it then
    return f"kafka://{kafka_brokers}/{name}"


@pytest.fixture(scope="session")
def shop_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small synthetic dataset: 300 visitors, 200 items; enough for a ranker (lib/ranking/fit.py)."""
    from jobs.demo.shop import Shop

    folder = tmp_path_factory.mktemp("shop")
    Shop(seed=1, visitors=300, items=200).write_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(ray_session: RaySession, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain a small model on `shop_dataset`; tests must not change its folder."""
    from jobs.pretrain import pretrain
    from jobs.pretrain_settings import PretrainSettings

    model = tmp_path_factory.mktemp("pretrained") / "model"
    pretrain(shop_dataset, model, PretrainSettings(epochs=2, max_length=20, hidden_size=32), gpu=False)
    return model


@pytest.fixture(scope="session")
def service(small_model: Path, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """Start the service that tests share: they send events and ask, and kill no part of it."""
    with started_service(small_model, shop_dataset, tmp_path_factory.mktemp("served")) as live:
        yield live


@pytest.fixture(scope="module")
def mortal_service(
    small_model: Path, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveService]:
    """Start a service for one file, whose tests may kill any part of it; they are marked slow.

    Each test leaves it live for the next one (`mortal_service.wait_until_learned()` says whether it is).
    """
    with started_service(small_model, shop_dataset, tmp_path_factory.mktemp("mortal")) as live:
        yield live


@pytest.fixture
def start_process():
    """Start Python programs in the repository, and kill those that still run at the end of the test."""
    processes = []

    def start(program: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
