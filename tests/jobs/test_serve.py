"""`afterclick serve` and `afterclick demo` as processes: what they print from their start to a signal, and leave."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster.local import HOST, free_port
from lib.data.catalog import Catalog
from lib.log.reader import FeedbackLogReader
from lib.model.folder import Manifest, save_model
from tests.helpers.logs import ROOT
from tests.helpers.service import click
from tests.helpers.tiny import item_ids, tiny_encoder

PATIENCE = 300.0  # seconds until a wait is given up; nothing is judged by how long it took

pytestmark = pytest.mark.slow


class Command:
    """A verb of `afterclick` that runs as from a terminal; what it prints goes to two files.

    Its temporary files are in a folder of their own, and its processes have a mark in their environment.
    """

    def __init__(self, folder: Path, *arguments: object):
        self.mark = f"AFTERCLICK_TEST={uuid.uuid4().hex}"
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        self.temporary = Path(tempfile.mkdtemp(prefix="a", dir="/tmp"))  # the path of a socket must be short
        # what this process has set for Ray is of its own Ray
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AFTERCLICK_"))}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.command_line", *map(str, arguments)],
                cwd=ROOT,
                env=ours
                | dict([self.mark.split("=")])
                | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(self.temporary), "RAY_TMPDIR": str(self.temporary / "r")},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_until_it_prints(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.out.read_text():
            failed = self.process.poll() is not None or time.monotonic() > deadline
            assert not failed, self.out.read_text() + self.err.read_text()
            time.sleep(0.1)

    def press_ctrl_c(self) -> tuple[int, list[str], list[str]]:
        """Interrupt all processes of the command, as a terminal does; returns its status, and the lines it printed."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.ended()

    def terminate(self) -> tuple[int, list[str], list[str]]:
        """Send SIGTERM to the command alone, as containers do; returns its status, and the lines it printed."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, list[str], list[str]]:
        """Wait for the end; returns the status, and the lines that were printed."""
        status = self.process.wait(PATIENCE)
        return status, self.out.read_text().splitlines(), self.err.read_text().splitlines()

    def processes(self) -> list[str]:
        """What runs of the command, by its mark."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environment.read_bytes().split(b"\0"):
                    found.append((environment.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended meanwhile, or is another user's
                continue
        return found

    def leaves_no_process(self) -> bool:
        """Whether every process of the command has ended, or soon has."""
        deadline = time.monotonic() + PATIENCE
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def leaves_nothing(self) -> bool:
        """Whether no process and no temporary file of the command is there; Ray's logs are to be read later."""
        ended, logs = self.leaves_no_process(), self.temporary / "r" / "ray"
        rest = [path for path in self.temporary.rglob("*") if path.is_file() and logs not in path.parents]
        return ended and not rest and not Path(f"/tmp/afterclick-{self.process.pid}").exists()

    def waits_until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.out.read_text() + self.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Run a verb; it does not outlive the test."""
    commands: list[Command] = []

    def start(*arguments: object) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.wait(PATIENCE)
        shutil.rmtree(command.temporary, ignore_errors=True)


def test_serve_follows_its_settings_and_prints_nothing_of_rays_own(run, tmp_path):
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    port = free_port()
    url = f"http://{HOST}:{port}"
    settings = ["trigger.events=3", "trigger.milliseconds=3600000", "gate.held_out_users=0"]
    given = [word for setting in settings for word in ("--set", setting)]
    serve = run("serve", "--model", tmp_path / "model", "--port", port, "--replicas", 1, *given)
    serve.wait_until_it_prints("serving at")
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:

        def send(count: int) -> None:
            events = [click(f"user-{number}", item_ids(24)[number]) for number in range(count)]
            assert client.post("/v1/events", json={"events": events}).raise_for_status().json()["accepted"] == count

        def status() -> dict:
            return client.get("/v1/status").raise_for_status().json()

        send(2)
        time.sleep(1)  # the default trigger would have released them five times over
        assert (status()["aggregator"]["pending"], status()["learner"]["log_offset"]) == (2, 0)
        send(1)
        deadline = time.monotonic() + PATIENCE
        while status()["learner"]["log_offset"] < 3:
            assert time.monotonic() < deadline, status()
            time.sleep(0.1)
    ended, out, err = serve.press_ctrl_c()
    assert out == [
        "starting Ray, 1 replica, 1 aggregator and the learner",
        f"serving at {url}  (page: {url}/, API: {url}/docs)  Ctrl-C stops it",
        "stopping",
        "stopped",
    ]
    assert (ended, err) == (130, [])
    assert serve.leaves_nothing(), serve.processes()


def test_sigterm_stops_serve_as_ctrl_c_does_and_a_second_serve_is_refused_in_one_line(run, tmp_path):
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    (tmp_path / "ranking.yaml").write_text("{pin: {2: i7, 3: nobody}, bury: [{filter: {in_stock: false}}]}")
    port, options = free_port(), ("--replicas", 1, "--ranking", tmp_path / "ranking.yaml")
    serve = run("serve", "--model", tmp_path / "model", "--port", port, *options)
    serve.wait_until_it_prints("serving at")

    status, out, err = run("serve", "--model", tmp_path / "model", "--port", free_port()).ended()
    assert (status, out) == (2, [])
    assert err == [
        f"error: state: {tmp_path}/model/live is served already, by process {serve.process.pid}; stop that first, or "
        "name another --state"
    ]
    elsewhere = run("serve", "--model", tmp_path / "model", "--port", port, "--state", tmp_path / "elsewhere")
    status, out, err = elsewhere.ended()
    assert (status, out) == (2, [])
    assert err == [f"error: port: {port} cannot be used (Address already in use); choose another with --port"]

    events = [click(f"user-{number}", item_ids(24)[number]) for number in range(5)]
    answer = httpx.post(f"http://{HOST}:{port}/v1/events", json={"events": events}, timeout=PATIENCE)
    assert answer.raise_for_status().json()["accepted"] == 5
    status, out, err = serve.terminate()
    assert (status, out[2]) == (143, "stopping")
    assert err[:2] == [
        "warning: ranking.bury.0.filter.in_stock: no item has this attribute, so none matches; there are no "
        "attributes yet",
        "warning: ranking.pin.3: there is no item 'nobody'; until it is put, another one has its place",
    ]
    assert serve.leaves_nothing(), serve.processes()
    with FeedbackLogReader(tmp_path / "model" / "live" / "feedback.sqlite") as log:
        assert log.count() == 5


def test_sigterm_to_every_process_leaves_nothing_either(run, tmp_path):
    """As systemd sends it by default: Ray has ended before anything could be stopped."""
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    serve = run("serve", "--model", tmp_path / "model", "--port", free_port(), "--replicas", 1)
    serve.wait_until_it_prints("serving at")
    os.killpg(serve.process.pid, signal.SIGTERM)
    status, _, err = serve.ended()
    assert (status, err) == (143, [])
    assert serve.leaves_nothing(), serve.processes()


@pytest.mark.parametrize("begun", ["gcs_server", "raylet", "ServeController", "haproxy"])
def test_sigterm_while_serve_starts_leaves_nothing(run, tmp_path, begun):
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest())
    serve = run("serve", "--model", tmp_path / "model", "--port", free_port(), "--replicas", 1)
    serve.waits_until(lambda: any(begun in process for process in serve.processes()))
    status, out, err = serve.terminate()
    assert (status, out, err) == (143, ["starting Ray, 1 replica, 1 aggregator and the learner"], [])
    assert serve.leaves_nothing(), serve.processes()


OURS = (
    r"making the world",
    r"pretraining on 60,000 events",
    r"pretrained in \d+ s",
    r"starting 1 replica",
    r"serving at http://127\.0\.0\.1:\d+ \(open it to click along\)  Ctrl-C stops",
    r"version \d+ \| pushes .*",
    r"",
    r" *Summary *",
    r"(hit rate@10, live|hit rate@10, frozen|difference|last [\d,]+ trials|left out|model version|event to weights) .*",
    r"(answers|events|failed requests) .*",
)


def test_the_demo_prints_nothing_of_rays_own(run):
    demo = run("demo", "--replicas", 1)
    demo.wait_until_it_prints(" | pushes ")
    status, out, err = demo.press_ctrl_c()
    assert [line for line in out if not any(re.fullmatch(pattern, line) for pattern in OURS)] == []
    assert [line for line in err if not re.fullmatch(r"epoch \d+/10  loss \d\.\d{3}  \d+ s", line)] == []
    assert out[-1].startswith("failed requests")
    assert status == 130
    assert demo.leaves_nothing(), demo.processes()


def test_sigterm_stops_the_demo_while_it_trains(run):
    demo = run("demo", "--replicas", 1)
    deadline = time.monotonic() + PATIENCE
    while "epoch 1/10" not in demo.err.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, out, err = demo.terminate()
    assert (status, out) == (143, ["making the world", "pretraining on 60,000 events"])
    assert [line for line in err if not re.fullmatch(r"epoch \d+/10  loss \d\.\d{3}  \d+ s", line)] == []
    assert demo.leaves_no_process(), demo.processes()
