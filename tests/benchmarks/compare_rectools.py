"""Compare Afterclick with RecTools' SASRec: same data, same protocol, same machine, one run.

    python -m tests.benchmarks.compare_rectools --data DIR [--json FILE] [--peer-python PYTHON]

Notable features:
- Afterclick pretrains with its defaults; `jobs.evaluate` refuses a model that was trained on the targets
- the peer trains for as long as Afterclick did (or for `--seconds`), at the same width, depth and length, on all cores,
  with the best settings found for it and with a setting of the memory allocator that makes it faster
- the peer has a virtual environment of its own in the user's cache; nothing is installed beside Afterclick

Protocol: leave-one-out. The last event of each user with two events or more is the target; the events before it are
both training data and input. All items are ranked but those that the user has seen, and metrics are means over all
users. "Sequences" are what each trains on: Afterclick cuts a long history into windows of at most the length and trains
on all of them, RecTools takes each user's newest events once an epoch. Run it on a machine that does nothing else.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.dataset import EVENTS_FILE
from lib.errors import InputError
from tests.benchmarks.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parents[2]
PEER_PROGRAM = Path(__file__).with_name("rectools_peer.py")
RECTOOLS = "0.19.0"
PEER_REQUIREMENTS = (f"rectools[torch]=={RECTOOLS}", "pyarrow==21.0.0")  # newer ones need a newer NumPy than RecTools'
# without these glibc returns each large tensor to the system and faults it in again: a third of the peer's step
PEER_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
BUSY_LOAD = 0.5  # above it something else is running, and the timings of both sides suffer, not equally
METRICS = ("recall@10", "ndcg@10")
PEER_SHAPE = {"factors": "hidden_size", "blocks": "num_hidden_layers", "length": "max_length"}
TRAINING_KEYS = ("seconds", "sequences_per_second", *PEER_SHAPE.values())


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command in the repository and pass its output through.

    Raises:
        RuntimeError: it failed.
    """
    finished = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **(environment or {})}, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{name} failed with exit status {finished.returncode}: {' '.join(command)}")


def read_object(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that must have `keys`."""
    if not path.is_file():
        raise RuntimeError(f"{path} was not written")
    content = json.loads(path.read_text())
    missing = [key for key in keys if key not in content]
    if missing:
        raise RuntimeError(f"{path} lacks {', '.join(missing)}; it has {', '.join(content)}")
    return content


def run_afterclick(data: Path, folder: Path) -> dict[str, Any]:
    """Pretrain with the defaults and evaluate; return metrics, and as `training` what the manifest says of it."""
    model, evaluation = folder / "model", folder / "afterclick.json"
    module = [sys.executable, "-m"]
    run("pretraining", [*module, "jobs.pretrain", "--data", str(data), "--out", str(model)])
    training = read_object(model / "manifest.json", ("training",))["training"]
    missing = [key for key in TRAINING_KEYS if key not in training]
    if missing:
        raise RuntimeError(f"{model / 'manifest.json'}: training lacks {', '.join(missing)}")
    arguments = ["--data", str(data), "--model", str(model), "--protocol", "leave-one-out", "--json", str(evaluation)]
    run("evaluation", [*module, "jobs.evaluate", *arguments])
    return {**read_object(evaluation, (*METRICS, "cases")), "training": training}


def has_peer(python: Path) -> bool:
    """Say whether this interpreter can run the peer: RecTools of the right version, with torch and pyarrow."""
    check = f"import rectools, rectools.models, pyarrow, torch; assert rectools.__version__ == '{RECTOOLS}'"
    if not python.is_file():
        return False
    return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0


def peer_environment() -> Path:
    """Return the interpreter of the peer's own environment in the user's cache; make it where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "afterclick" / f"rectools-{RECTOOLS}"
    python = folder / "bin" / "python"
    if has_peer(python):
        return python
    print(f"Making the peer's environment in {folder}", flush=True)
    # the same torch for both, so that neither is faster by its version
    requirements = [*PEER_REQUIREMENTS, f"torch=={version('torch').partition('+')[0]}"]
    run("making the peer's environment", [sys.executable, "-m", "venv", "--clear", str(folder)])
    run("installing the peer", [str(python), "-m", "pip", "install", "--quiet", *requirements])
    if not has_peer(python):
        raise RuntimeError(f"{python} cannot import RecTools {RECTOOLS}; remove {folder} and try again")
    return python


def peer_settings(assignments: list[str]) -> list[str]:
    """Turn settings, name=value, into options of the peer's program."""
    options: list[str] = []
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not (name and separator and value):
            raise InputError(f"peer-set: {assignment!r} is not name=value; give it like --peer-set batch_size=64")
        options += [f"--{name.replace('_', '-')}", value]
    return options


def run_peer(python: Path, data: Path, folder: Path, training: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """Train and evaluate the peer at Afterclick's width, depth and length; `options` are its budget and settings."""
    result = folder / "rectools.json"
    shape = {option: training[key] for option, key in PEER_SHAPE.items()}
    command = [str(python), str(PEER_PROGRAM), "--data", str(data / EVENTS_FILE), "--json", str(result)]
    for name, value in {**shape, "threads": available_cores()}.items():
        command += [f"--{name}", str(value)]
    run("the peer", [*command, *options], PEER_ALLOCATOR)
    return read_object(result, (*METRICS, "seconds", "epochs", "sequences_per_second", "users"))


def compare(afterclick: dict[str, Any], peer: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return both values and their ratio (Afterclick / RecTools) by quantity, without ratios by zero."""
    if afterclick["cases"] != peer["users"]:
        raise RuntimeError(f"Afterclick was evaluated on {afterclick['cases']} users, RecTools on {peer['users']}")
    ours = {name: afterclick[name] for name in METRICS} | afterclick["training"]
    names = (*METRICS, "seconds", "epochs", "sequences_per_second", "targets_per_second")
    rows = {name: {"afterclick": ours[name], "rectools": peer[name]} for name in names if name in ours and name in peer}
    for row in rows.values():
        if row["rectools"]:
            row["ratio"] = row["afterclick"] / row["rectools"]
    return rows


def print_comparison(rows: dict[str, dict[str, float]], machine: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    table = Table(title=f"Leave-one-out, all items ranked; {machine['cores']} cores, {machine['processor']}")
    for heading, side in (("", "left"), ("Afterclick", "right"), (f"RecTools {RECTOOLS}", "right"), ("ratio", "right")):
        table.add_column(heading, justify=side)  # pyright: ignore[reportArgumentType]
    for name, row in rows.items():
        digits = 4 if name in METRICS else 1
        values = [f"{row[side]:,.{digits}f}" for side in ("afterclick", "rectools")]
        table.add_row(name.replace("_per_second", "/s"), *values, f"{row['ratio']:.2f}" if "ratio" in row else "-")
    Console().print(table)


def benchmark(
    data: Annotated[Path, typer.Option(help="An ingested dataset: a folder with events.parquet.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="An interpreter that has RecTools; none is made then.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="The peer's budget; as long as Afterclick took.")] = None,
    peer_epochs: Annotated[int | None, typer.Option(help="Give the peer these epochs, not a budget.")] = None,
    peer_set: Annotated[list[str] | None, typer.Option(help="A setting of the peer, name=value; repeatable.")] = None,
) -> None:
    """Compare Afterclick with RecTools' SASRec on one dataset."""
    if peer_epochs is not None and seconds is not None:
        raise InputError("seconds: it excludes --peer-epochs; give one of the two")
    data = data.resolve()
    if not (data / EVENTS_FILE).is_file():
        raise InputError(
            f"data: no {EVENTS_FILE} in {data}; make it with `afterclick ingest --source PATH --out {data}`"
        )
    extra = peer_settings(peer_set or [])
    if peer_python is not None and not has_peer(peer_python):
        raise InputError(
            f"peer-python: {peer_python} cannot import RecTools {RECTOOLS}, torch and pyarrow; leave it out"
        )
    machine = describe_machine()
    if machine["load_before"] > BUSY_LOAD:
        Console(stderr=True).print(
            f"The machine is busy (load {machine['load_before']:.1f}): do not trust the timings."
        )
    with tempfile.TemporaryDirectory(prefix="compare-rectools-") as name:
        folder = Path(name)
        # not resolved: only by its link is an interpreter that of its virtual environment
        python = peer_python.absolute() if peer_python else peer_environment()
        afterclick = run_afterclick(data, folder)
        training = afterclick["training"]
        budget = ["--seconds", str(seconds or training["seconds"])]
        if peer_epochs is not None:
            budget = ["--epochs", str(peer_epochs)]
        peer = run_peer(python, data, folder, training, [*budget, *extra])
    rows = compare(afterclick, peer)
    print_comparison(rows, machine)
    result = {"machine": machine, "data": data.name, "comparison": rows, "afterclick": afterclick, "rectools": peer}
    if json_file is not None:
        write_json(json_file, result)


if __name__ == "__main__":
    run_command(benchmark)
