"""Random kills under load for minutes, then the proofs that nothing was lost, doubled or stopped.

    python -m tests.benchmarks.chaos --minutes 10 --kills 60 [--json FILE] [--data DATA --model MODEL]

Starts `afterclick serve` on a copy of the model (without one, on a synthetic shop with a quickly pretrained model),
sends it 200 events and 100 questions a second, and kills at random (kill -9) its aggregator, its learner, replicas,
HAProxy and its manager, the Serve controller, and now and then all of its processes at once, which it then starts
again. An event is sent again until it is acknowledged. No limit of influence lowers what an event counts, so that the
counts of the ranking stage must be those of the log to the bit. Exit status 1, with the proofs that failed, where any
did.
"""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import HOST, free_port
from jobs.command_line import BAD_INPUT, run_command
from jobs.configuration import write_json
from tests.benchmarks.machine import describe_machine
from tests.helpers.chaos import (
    PROXY,
    Kill,
    Load,
    everything_of,
    haproxies_of,
    is_whole,
    kill,
    proofs,
    recovered,
    strike,
)
from tests.helpers.service import NO_LIMITS

EVERYTHING = "everything"
WEIGHTS = {"replica": 5, "aggregator": 4, "learner": 4, "controller": 2, "proxy manager": 2, PROXY: 2, EVERYTHING: 1}
START_SECONDS = 300.0


@dataclass
class Server:
    """An `afterclick serve` of this benchmark's own, which can be killed whole."""

    model: Path
    data: Path
    output: Path
    options: tuple[str, ...] = ()  # of `afterclick serve`
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None
    failed_starts: int = 0  # that ended by themselves, as Ray's do on a busy machine
    served: bool = False  # whether it ever did: then its options are good
    _said: int = 0  # bytes of its output before its newest start

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        command = [sys.executable, "-m", "jobs.serve", "--port", str(self.port)]
        command += ["--model", str(self.model), "--data", str(self.data), *self.options]
        self._said = self.output.stat().st_size if self.output.exists() else 0
        # a Ray of this process, which may have trained a model, has ports and files of its own in the environment
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    @property
    def root(self) -> int:
        """The process that started the others."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> list[int]:
        """Kill all its processes (kill -9), and return them."""
        if self.process is None:
            return []
        processes = everything_of(self.root)
        kill(processes)
        self.process.wait()
        kill(haproxies_of(self.root))  # one that was being started meanwhile
        shutil.rmtree(Path(tempfile.gettempdir()) / f"afterclick-{self.root}", ignore_errors=True)
        return processes

    async def whole(self, load: Load) -> None:
        """Wait until it serves, with all its parts; start it again where it ends, but not for bad options.

        Raises:
            RuntimeError: it does not come up; the message holds what it said last.
        """
        deadline = time.monotonic() + START_SECONDS
        said = ""
        while time.monotonic() < deadline:
            ended = None if self.process is None else self.process.poll()
            said = self.output.read_bytes()[self._said :].decode(errors="replace")
            if ended == BAD_INPUT and not self.served:
                break
            if ended is not None:
                self.failed_starts += 1
                self.kill()
                self.start()
            elif "serving at" in said and (status := await load.status()) and is_whole(status, load.replicas):
                self.served = True
                return
            await asyncio.sleep(0.5)
        raise RuntimeError(f"`afterclick serve` did not come up; it said: {said[-2000:]}")


@dataclass
class Chaos:
    """The kills of a run, and what waits for the service to recover from each."""

    server: Server
    load: Load
    choice: random.Random
    kills: list[Kill] = field(default_factory=list)
    waiting: list[asyncio.Task] = field(default_factory=list)

    async def run(self, seconds: float, count: int, say: Callable[[str], None]) -> None:
        """Kill at least `count` times, at random moments within so many seconds."""
        end = time.monotonic() + seconds
        while len(self.kills) < count or time.monotonic() < end:
            remaining = max(end - time.monotonic(), 0.0)
            mean = remaining / max(count - len(self.kills), 1)
            await asyncio.sleep(self.choice.uniform(0.2, 1.8) * max(mean, 0.5))
            part = self.choice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            struck = await self._strike_everything() if part == EVERYTHING else self._strike(part)
            if struck is not None:
                say(f"{len(self.kills):4} killed {struck.part}  acknowledged {len(self.load.acknowledged)}")
        await asyncio.gather(*self.waiting)

    def _strike(self, part: str) -> Kill | None:
        struck = strike(self.server.root, part, self.choice)
        if struck is not None:
            self.kills.append(struck)
            self.waiting.append(asyncio.create_task(self._recovered(struck)))
        return struck

    async def _recovered(self, struck: Kill) -> None:
        while True:
            kills = len(self.kills)
            try:
                return await recovered(self.load, self.server.root, struck)
            except TimeoutError as error:
                if kills == len(self.kills):  # nothing else was killed meanwhile that it may have waited for
                    return self.load.faults.append(str(error))

    async def _strike_everything(self) -> Kill:
        for task in self.waiting:  # the parts that they wait for are gone
            task.cancel()
        struck = Kill(EVERYTHING, self.server.kill())
        self.kills.append(struck)
        self.server.start()
        await self.server.whole(self.load)
        struck.whole_after = time.monotonic() - struck.at
        self.waiting.clear()
        return struck


def table_of(chaos: Chaos) -> list[dict[str, Any]]:
    """Return a line for each part: its kills, the seconds until it was back, and what failed until the next kill."""
    lines = []
    for part in WEIGHTS:
        kills = [struck for struck in chaos.kills if struck.part == part]
        answered = [seconds for struck in kills if (seconds := struck.answered_after(chaos.load)) is not None]
        whole = [struck.whole_after for struck in kills if struck.whole_after is not None]
        failed = Counter(failure.kind for failure in chaos.load.failures if _cause(chaos, failure.at) == part)
        lines.append(
            {
                "part": part,
                "kills": len(kills),
                "answered_p50_s": _quantile(answered, 0.5),
                "answered_max_s": _quantile(answered, 1.0),
                "whole_p50_s": _quantile(whole, 0.5),
                "whole_max_s": _quantile(whole, 1.0),
                "overtaken": len(kills) - len(whole),  # by a kill of everything
                "failed_requests": dict(failed),
            }
        )
    return lines


def _cause(chaos: Chaos, at: float) -> str | None:
    """Return what was killed last before a moment."""
    return next((struck.part for struck in reversed(chaos.kills) if struck.at <= at), None)


def _quantile(seconds: list[float], share: float) -> float | None:
    return round(float(np.quantile(seconds, share)), 2) if seconds else None


def synthetic(folder: Path) -> tuple[Path, Path]:
    """Make a synthetic shop, and a model pretrained on it for two epochs; return (model, data)."""
    from jobs.demo.shop import Shop

    data, model = folder / "shop", folder / "pretrained"
    Shop(seed=1, visitors=500, items=1000).write_dataset(data)
    command = [sys.executable, "-m", "jobs.pretrain", "--data", str(data), "--out", str(model), "--set", "epochs=2"]
    subprocess.run([*command, "--set", "max_length=50"], check=True, stdout=subprocess.DEVNULL)
    return model, data


async def measure(chaos: Chaos, seconds: float, kills: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Start the service, kill its parts, wait until it has settled, and check the proofs."""
    load = chaos.load
    chaos.server.start()
    async with load:
        await chaos.server.whole(load)
        load.begin()
        began = time.monotonic()
        await chaos.run(seconds, kills, say)
        elapsed = time.monotonic() - began
        faults, ledger = await proofs(load, chaos.server.model / "live")
    return {
        "seconds": round(elapsed, 1),
        "kills": len(chaos.kills),
        "failed_starts": chaos.server.failed_starts,
        "events_sent": len(load.sent),
        "events_acknowledged": len(load.acknowledged),
        "answers": len(load.good_answers),
        "failed_requests": dict(Counter(failure.kind for failure in load.failures)),
        "by_part": table_of(chaos),
        "ledger": ledger,
        "faults": faults,
    }


def show(results: dict[str, Any]) -> None:
    """Print the results."""
    console = Console()
    table = Table("killed", "times", "answered p50, max s", "whole p50, max s", "failed requests", title="kills")
    for line in results["by_part"]:
        failed = "\n".join(f"{count} {kind}" for kind, count in line["failed_requests"].items())
        answered = f"{line['answered_p50_s']}, {line['answered_max_s']}"
        table.add_row(
            line["part"], str(line["kills"]), answered, f"{line['whole_p50_s']}, {line['whole_max_s']}", failed
        )
    console.print(table)
    for name in ("seconds", "kills", "failed_starts", "events_sent", "events_acknowledged", "answers", "ledger"):
        console.print(f"{name}: {results[name]}")
    for fault in results["faults"]:
        console.print(f"NOT PROVEN: {fault}")
    if not results["faults"]:
        console.print("every proof holds")


def chaos_command(
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    kills: Annotated[int, typer.Option(min=1, help="At least so many.")] = 60,
    events: Annotated[float, typer.Option(help="Events per second.")] = 200.0,
    questions: Annotated[float, typer.Option(help="Recommendation requests per second.")] = 100.0,
    aggregators: Annotated[int, typer.Option(min=1)] = 1,
    learner_workers: Annotated[int, typer.Option(min=1)] = 1,
    model: Annotated[Path | None, typer.Option(help="Model folder; it is copied.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its dataset.")] = None,
    json_: Annotated[Path | None, typer.Option("--json")] = None,
    seed: int = 0,
) -> None:
    """Kill at random under load, and prove that nothing was lost."""
    machine, folder = describe_machine(), Path(tempfile.mkdtemp(prefix="afterclick-chaos-"))
    if model is None or data is None:
        model, data = synthetic(folder)
    shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("live"))
    items = sorted(set(pq.read_table(data / "events.parquet", columns=["item_id"])["item_id"].to_pylist()))
    options = ["--aggregators", str(aggregators), "--learner-workers", str(learner_workers)]
    for name, limit in NO_LIMITS.items():
        options += ["--set", f"influence.{name}={limit}"]
    server = Server(folder / "model", data, folder / "serve.out", tuple(options))
    load = Load(server.url, "chaos", items, events_per_second=events, questions_per_second=questions)
    chaos = Chaos(server, load, random.Random(seed))
    try:
        results = asyncio.run(measure(chaos, 60 * minutes, kills, lambda line: print(line, flush=True)))
    finally:
        server.kill()
    if json_ is not None:
        write_json(json_, {"machine": machine, "seed": seed, **results})
    show(results)
    if results["faults"]:
        print(f"log, versions and output are kept in {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(chaos_command)
