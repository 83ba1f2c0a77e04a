"""`afterclick serve` and `afterclick demo` as processes: what they print, from their start to Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster.local import HOST, free_port
from lib.data.catalog import Catalog
from lib.model.folder import Manifest, save_model
from tests.helpers.logs import ROOT
from tests.helpers.service import click
from tests.helpers.tiny import item_ids, tiny_encoder

PATIENCE = 300.0  # seconds until a wait is given up; nothing is judged by how long it took

pytestmark = pytest.mark.slow


class Command:
    """A verb of `afterclick` that runs as from a terminal; what it prints goes to two files."""

    def __init__(self, folder: Path, *arguments: object):
        self.out, self.err = folder / "out", folder / "err"
        # what this process has set for Ray is of its own Ray
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AFTERCLICK_"))}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.command_line", *map(str, arguments)],
                cwd=ROOT,
                env=ours | {"PYTHONUNBUFFERED": "1"},
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
        status = self.process.wait(PATIENCE)
        return status, self.out.read_text().splitlines(), self.err.read_text().splitlines()


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
            os.killpg(command.process.pid, signal.SIGTERM)
            command.process.wait(PATIENCE)


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
    assert (ended, err) == (0, [])


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
    assert [line for line in err if not re.fullmatch(r"epoch \d/8  loss \d\.\d{3}  \d+ s", line)] == []
    assert out[-1].startswith("failed requests")
    assert status == 0
