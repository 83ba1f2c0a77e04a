"""Ray on this one machine: its environment, its start and its stop.

HTTP goes through HAProxy straight to the replicas, which costs a fifth of what Serve's Python proxy costs. Ray and HTTP
listen on 127.0.0.1. Serve binds three more kinds of port to every address and has no setting for it: HAProxy's metrics
and statistics, and each replica's port for calls between deployments; on an open network they need a firewall.
`prepare_environment` must run before ray is imported, since ray reads its settings then.
"""

import atexit
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from random import SystemRandom

from lib.errors import InputError
from lib.log.one_machine import ONE_MACHINE

HOST = "127.0.0.1"
# both below the range that systems give to outgoing connections
OTHER_PORTS = range(10_000, 12_000)
PORTS_IN_TURN = cycle(SystemRandom().sample(OTHER_PORTS, len(OTHER_PORTS)))  # one caller may need several
PORTS_PER_CLUSTER = 200
REPLICA_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
SINGLE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
BLOCKS = range(12_000, 32_000, PORTS_PER_CLUSTER)  # the first port of each
HELD: list[socket.socket] = []  # the first port of this process's block: as long as it is bound the block is taken
END_SECONDS = 8.0  # after SIGTERM; containers are killed after 10, and ending takes a moment itself
RAY_ENDS = threading.Event()  # set while this process ends its Ray itself
LONGEST_FOLDER = 97 - 57 - len("/admin.sock")  # characters


def prepare_environment() -> None:
    """Set what Ray and Serve read at import, unless the user has set it already."""
    folder = _haproxy_folder()
    if "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC" not in os.environ:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = {} if "RAY_ADDRESS" in os.environ else _settings_of_one_machine()
    settings |= {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # a request that a killed replica did not answer goes to another one
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # A dead replica is known by refused connections. A live one on a busy machine may be late with some checks and
        # must not be given up: with the other one dead, HAProxy would answer 500 by itself.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "10",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # a dead HAProxy is replaced after three checks; at Ray's 10 s nobody would be answered for half a minute
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # Ray's 5 s give up a start on a busy machine
        # What takes long has a thread of its own already. With user code in another one, each request would cross
        # between two event loops twice.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy notices within a second
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_worker_niceness": "0",  # only the learner yields; Ray would lower the replicas too
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # every epoch of a training waits for it; Ray's own is 2 s
        # Ray's own metrics took a tenth of a core under load; the service's are at /metrics
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # Ray itself does not listen beyond 127.0.0.1
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _haproxy_folder() -> Path:
    """Return this process's folder for HAProxy; Serve adds 57 characters, and a socket's path may have 97."""
    name = f"afterclick-{os.getpid()}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(str(folder)) <= LONGEST_FOLDER else Path("/tmp") / name


def _settings_of_one_machine() -> dict[str, str]:
    """Return the settings that a cluster of several machines must not have.

    Raises:
        InputError: no ports are left.
    """
    # by the first name, on any system: Ray stays on 127.0.0.1 instead of taking the machine's outward address
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", ONE_MACHINE: "1"} | _own_ports()


def _own_ports() -> dict[str, str]:
    """Return settings of the ports that no other service of this machine may have, unless the user has set them all.

    HAProxy knows a dead replica by nothing but its port, and while all are dead it asks Serve's own proxy, whose port
    several processes may share: requests of the one service, events that it acknowledges among them, would go to the
    other.

    Raises:
        InputError: no ports are left.
    """
    range_is_set = any(name in os.environ for name in REPLICA_PORTS)  # one end of it goes with no other that is not set
    if range_is_set and all(name in os.environ for name in SINGLE_PORTS):
        return {}
    first = _own_block()
    last = first + PORTS_PER_CLUSTER - 1
    settings = {name: str(last - place) for place, name in enumerate(SINGLE_PORTS)}
    if not range_is_set:
        settings |= zip(REPLICA_PORTS, (str(first + 1), str(last - len(SINGLE_PORTS))), strict=True)
    return settings


def _own_block() -> int:
    """Return the first port of a block that no other process here has; it is this process's for its life.

    Raises:
        InputError: all are taken, or none can be had.
    """
    reason = None
    for first in SystemRandom().sample(BLOCKS, len(BLOCKS)):
        held = socket.socket()
        try:
            held.bind((HOST, first))
        except OSError as error:
            held.close()
            reason = error.strerror
            continue
        HELD.append(held)
        return first
    raise InputError(
        f"ports: none of the {len(BLOCKS)} blocks between {BLOCKS.start} and {BLOCKS.stop} can be had ({reason}); "
        "end some Rays"
    )


def free_port() -> int:
    """Return a port that nothing listens on now, that no outgoing connection is given, and no call got before."""
    while True:
        port = next(PORTS_IN_TURN)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def require_free_port(port: int) -> None:
    """Refuse a port that is taken; a HAProxy that outlived its Ray, as after kill -9, is ended first.

    Raises:
        InputError: something listens there already.
    """
    _end_haproxies(lambda command, parent: b"/afterclick-" in command and not parent.startswith(b"ray::"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port: {port} cannot be used ({error.strerror}); choose another with --port") from error


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS names (as a submitted job does) or start Ray here; return whether it started.

    Raises:
        InputError: no cluster answers at RAY_ADDRESS.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise InputError(f"RAY_ADDRESS: no Ray cluster answers at {address}; correct or unset it") from error
        return False
    ray.init(
        address="local",
        num_cpus=max(8, os.cpu_count() or 1),  # actors share the cores; this is a count of places, not of cores
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address=HOST,
    )
    return True


@contextmanager
def running_ray() -> Iterator[None]:
    """Have Ray for the length of a job; stop it if it was started here."""
    prepare_environment()
    import ray

    own = not ray.is_initialized() and "RAY_ADDRESS" not in os.environ
    try:
        with _own_sigterm():
            connect()
        yield
    finally:
        if own:
            RAY_ENDS.set()
            with undisturbed():
                ray.shutdown()
                _end_own_haproxy()
            RAY_ENDS.clear()


def end_in_time(status: int) -> None:
    """Have this process and its Ray end soon after SIGTERM, whatever becomes of what stops them in good order.

    They end after END_SECONDS; or at once where Ray has ended by itself, as systemd, for one, sends SIGTERM to every
    process: nothing could be stopped then, and each call to Ray would wait for a minute.
    """
    threading.Thread(target=_end, args=(time.monotonic() + END_SECONDS, status), name="end", daemon=True).start()


def _end(deadline: float, status: int) -> None:
    import ray._private.worker as worker

    while time.monotonic() < deadline:
        node = worker._global_node
        if node is not None and node.dead_processes() and not RAY_ENDS.is_set():
            break
        time.sleep(0.1)
    if worker._global_node is not None:
        worker._global_node.kill_all_processes(check_alive=False)
    _end_own_haproxy()
    shutil.rmtree(_haproxy_folder(), ignore_errors=True)
    os._exit(status)


def _end_own_haproxy() -> None:
    """End what is left of HAProxy where Serve was not given the time to: it would hold the port for good."""
    folder = f"{_haproxy_folder()}/".encode()
    _end_haproxies(lambda command, _: folder in command)


def _end_haproxies(chosen: Callable[[bytes, bytes], bool]) -> None:
    """End those of Serve's HAProxy processes of which this is true, given their command line and their parent's."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            command = (process / "cmdline").read_bytes()
            if b"haproxy\0-db\0" not in command:
                continue
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if chosen(command, Path(f"/proc/{parent}/cmdline").read_bytes()):
                _kill(int(process.name))


def _kill(number: int) -> None:
    """End a process, and wait until its ports are free: its command line is gone a moment before they are.

    Raises:
        OSError: it has ended meanwhile.
    """
    process = os.pidfd_open(number)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [])
    finally:
        os.close(process)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: `ray.init` sets one of its own, which exits with another status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # what Ray's handler raises
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM during a block that stops what runs, which takes seconds and must not be cut off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
