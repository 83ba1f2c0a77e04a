"""The configuration for a cluster, and how Ray is found or started."""

import ast
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import yaml
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from cluster.local import (
    HOST,
    PORTS_PER_CLUSTER,
    _own_block,
    connect,
    free_port,
    prepare_environment,
    require_free_port,
)
from lib.data.catalog import Catalog
from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError
from lib.model.folder import Manifest, save_model
from lib.versions.registry import Registry
from serving.app import ServeArguments, build
from serving.rollout import APPLICATION, DEPLOYMENT
from tests.helpers.tiny import NOW, item_ids, tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())


def test_serve_deploy_accepts_the_configuration():
    schema = ServeDeploySchema.model_validate(CONFIGURATION)
    (application,) = schema.applications
    assert application.name == APPLICATION
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    arguments = ServeArguments.model_validate(application.args)
    (deployment,) = application.deployments
    assert deployment.name == DEPLOYMENT
    assert deployment.num_replicas == arguments.replicas


def test_the_application_is_built_from_its_arguments(tmp_path):
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    given = CONFIGURATION["applications"][0]["args"] | {"model": str(tmp_path / "model"), "data": None}
    application = call_user_app_builder_with_args_if_necessary(build, given)
    assert isinstance(application, serve.Application)
    assert Registry(tmp_path / "model" / "live").head() == 1


def test_a_dataset_of_another_rating_scale_is_not_served(tmp_path):
    save_model(tmp_path / "model", tiny_encoder(rating_scale="1-10"), Catalog(item_ids(24)), Manifest())
    event = {"user_id": "ann", "item_id": "i1", "event": "rating", "value": 4.0, "timestamp": NOW}
    write_dataset(tmp_path / "stars", pa.Table.from_pylist([event], EVENT_SCHEMA), None)
    arguments = ServeArguments(model=str(tmp_path / "model"), data=str(tmp_path / "stars"))
    with pytest.raises(InputError, match=r"^data: the ratings of .*stars are on the scale 1-5, .* on 1-10;"):
        build(arguments)


def test_replicas_scale_where_a_most_is_given(tmp_path):
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    given = {"model": str(tmp_path / "model"), "replicas": 2}
    fixed = build(ServeArguments(**given))._bound_deployment._deployment_config
    assert (fixed.num_replicas, fixed.autoscaling_config) == (2, None)
    scaled = build(ServeArguments(**given, most_replicas=8))._bound_deployment._deployment_config.autoscaling_config
    assert scaled is not None
    assert (scaled.min_replicas, scaled.max_replicas) == (2, 8)
    assert scaled.target_ongoing_requests == ServeArguments(**given).autoscaling.target_ongoing_requests
    with pytest.raises(InputError, match=r"^most_replicas: 1 are fewer than the 2"):
        build(ServeArguments(**given, most_replicas=1))


def test_an_argument_that_there_is_not_is_refused():
    given = CONFIGURATION["applications"][0]["args"] | {"port": 1}
    with pytest.raises(ValueError, match="port: no such setting; there are model, state"):
        call_user_app_builder_with_args_if_necessary(build, given)


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    monkeypatch.delenv("RAY_TRAIN_V2_ENABLED")
    prepare_environment()
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"


@pytest.mark.parametrize("temporary", ["/tmp", "/tmp/a-folder-of-a-user-whose-name-is-long"])
@pytest.mark.parametrize("process", [7, 4_194_304])
def test_the_path_of_haproxys_socket_is_short_enough(monkeypatch, temporary, process):
    monkeypatch.setattr("tempfile.tempdir", temporary)
    monkeypatch.setattr(os, "getpid", lambda: process)
    monkeypatch.delenv("RAY_SERVE_HAPROXY_SOCKET_PATH")
    monkeypatch.setattr("atexit.register", lambda *_, **__: None)
    prepare_environment()
    configured = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    assert len(str(configured.parent / ("c" * 56) / configured.name)) <= 97, "Serve adds the cluster's id"


PRINT_PORTS = """
import os
from cluster.local import prepare_environment
prepare_environment()
from ray.serve._private import constants
ports = [name for name in dir(constants) if name.startswith("RAY_SERVE_") and name.endswith("_PORT")]
print({name: getattr(constants, name) for name in ports}, flush=True)
input()
"""


def test_two_services_of_one_machine_share_no_port(start_process, monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        monkeypatch.delenv(name)
    taken: list[range] = []
    for process in [start_process(PRINT_PORTS) for _ in range(2)]:
        ports = ast.literal_eval(process.stdout.readline())
        # no service here speaks gRPC, and no machine is a worker of another
        known = {name: port for name, port in ports.items() if "INGRESS_M" not in name or "GRPC" not in name}
        assert None in known.values(), "of the proxies of other machines"
        every = [port for port in known.values() if port is not None]
        assert "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in known
        assert len(set(every)) == len(every) >= 6
        block = range(min(every), max(every) + 1)
        assert len(block) < PORTS_PER_CLUSTER
        assert not any(set(block) & set(other) for other in taken)
        taken.append(block)


@pytest.mark.parametrize(
    "chosen", [{"RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "9000"}, {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "9000"}]
)
def test_a_user_s_ports_stay_and_all_others_are_of_this_machine_and_its_own(monkeypatch, chosen):
    monkeypatch.setattr("cluster.local.HELD", held := [])
    for name in [name for name in os.environ if name.startswith(("RAY_", "AFTERCLICK_"))]:
        monkeypatch.delenv(name)
    for name, port in chosen.items():
        monkeypatch.setenv(name, port)
    with monkeypatch.context() as changed:
        changed.setattr("os.environ", environment := dict(os.environ))
        prepare_environment()
        prepare_environment()
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "Ray does not listen beyond 127.0.0.1"
    assert environment["AFTERCLICK_ONE_MACHINE"] == "1"
    (own,) = held
    block = range(own.getsockname()[1], own.getsockname()[1] + PORTS_PER_CLUSTER)
    own.close()
    ports = {name: port for name, port in environment.items() if name.endswith("_PORT")}
    assert {name: ports.pop(name) for name in chosen} == chosen
    assert {"RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"} <= ports.keys()
    assert all(int(port) in block for port in ports.values())


def test_a_block_of_ports_is_one_process_s(monkeypatch):
    monkeypatch.setattr("cluster.local.HELD", held := [])
    monkeypatch.setattr("cluster.local.BLOCKS", blocks := range(10_900, 10_904, 2))  # nothing else takes them
    assert {_own_block(), _own_block()} == set(blocks)
    with pytest.raises(
        InputError, match=r"^ports: none of the 2 blocks between 10900 and 10904 can be had \(Address.*\); end"
    ):
        _own_block()
    for own in held:
        own.close()


def test_a_free_port_is_free_until_it_is_taken():
    port = free_port()
    require_free_port(port)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(InputError, match=rf"^port: {port} cannot be used \(.*\); choose another with --port$"):
            require_free_port(port)


HAPROXY = """
defaults
  mode http
  timeout connect 1s
  timeout client 1s
  timeout server 1s
frontend one
  bind 127.0.0.1:{port}
"""


def test_a_haproxy_that_outlived_its_ray_gives_its_port_back(tmp_path):
    from ray.serve._private.haproxy import get_haproxy_binary

    port, folder = free_port(), tmp_path / "afterclick-4194304"
    folder.mkdir()
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port))
    command = [get_haproxy_binary(), "-db", "-f", str(folder / "haproxy.cfg")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as haproxy:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex((HOST, port)) != 0:
            assert haproxy.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        require_free_port(port)
        assert haproxy.wait(60) == -signal.SIGKILL


def test_the_ray_that_runs_is_joined(ray_session):
    assert connect() is False


def test_a_cluster_that_is_not_there_is_bad_input(monkeypatch):
    def init(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease start one.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: no Ray cluster answers at auto; correct or unset it$"):
        connect()
