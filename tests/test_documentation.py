"""What the READMEs say is true: shell blocks run as they stand, and paths, names, options and links exist.

A block of a README is taken from it verbatim. The READMEs of one of READ_TOGETHER are read in one folder that looks
like a fresh clone (links to the repository's own files), block after block, as a person would; a block that ends in
`afterclick serve` is left running for the blocks behind it, and ended by Ctrl-C. What cannot run here is in NOT_RUN
with its reason, so that a new block is either run or listed.
"""

import importlib
import os
import pkgutil
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.local import HOST
from jobs.command_line import VERBS
from serving import routes
from tests.helpers.settings_table import options_of

ROOT = Path(__file__).resolve().parents[1]
PORT = 8000  # that the READMEs name
PATIENCE = 300.0  # seconds for one block
LARGEST_README = 8000  # bytes of the first one
READMES = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "*/README.md", "*/*/README.md")
    for path in sorted(ROOT.glob(pattern))
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
# READMEs whose examples go on from one another; `clicks.csv` is what their reader brings
READ_TOGETHER = (("README.md", "lib/README.md", "jobs/README.md"), ("serving/README.md",))
# blocks by their beginning -> why they are not run
NOT_RUN = {
    "python3 -m venv": "installs packages from the network; .ci/run does it",
    "kafka-topics.sh": "needs Kafka's own tools; tests/log/test_kafka.py has brokers of its own",
    "ray job submit": "needs a cluster; tests/jobs/test_ray_job.py submits a job to one",
    "RAY_SERVE_ENABLE_HA_PROXY=1 ray start": "starts a cluster",
    "serve deploy": "needs a cluster; tests/cluster checks the configuration",
    "afterclick finetune": "needs feedback of some days; tests/jobs/test_finetune.py has it",
    "afterclick replay --data data/shop --out shop-replay": "a second service and minutes; tests/jobs/test_replay.py",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PATH = re.compile(r"`((?:jobs|serving|lib|cluster|tests)/[\w./-]+?\.(?:py|html|yaml|md))(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a README."""

    readme: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Return why it is not run, None where it is."""
        return next((reason for beginning, reason in NOT_RUN.items() if self.text.startswith(beginning)), None)

    @property
    def serves(self) -> bool:
        """Whether its last command stays up."""
        return self.text.replace("\\\n", " ").splitlines()[-1].startswith("afterclick serve")


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text()


def blocks_of(readme: str) -> list[Block]:
    """Return the blocks that are commands: shell and Python."""
    found = (Block(readme, *match.groups()) for match in FENCE.finditer(text_of(readme)))
    return [block for block in found if block.language in ("sh", "python")]


def prose_of(readme: str) -> str:
    return FENCE.sub("", text_of(readme))


# ------------------------------------------------------------------------------------------------ what needs no running


def test_the_first_readme_is_short():
    assert len(text_of("README.md").encode()) <= LARGEST_README


def test_every_shell_block_is_run_or_listed_with_its_reason():
    together = {readme for readmes in READ_TOGETHER for readme in readmes}
    blocks = [block for readme in READMES for block in blocks_of(readme)]
    forgotten = [block.text for block in blocks if block.readme not in together and block.reason is None]
    assert not forgotten
    for beginning in NOT_RUN:
        assert any(block.text.startswith(beginning) for block in blocks), f"no README has {beginning!r} any more"
    for readme in READMES:
        languages = {match[1] for match in FENCE.finditer(text_of(readme))}
        assert languages <= {"sh", "python", "text"}, f"{readme}: a block of another language is not checked"
        assert not re.search("^    ", prose_of(readme), re.MULTILINE), f"{readme}: an indented block is not checked"


def test_a_serve_command_is_the_last_one_of_its_block():
    for block in [block for readme in READMES for block in blocks_of(readme) if block.reason is None]:
        commands = block.text.replace("\\\n", " ").splitlines()
        assert not any(command.startswith("afterclick serve") for command in commands[:-1]), block.text


@pytest.mark.parametrize("readme", READMES)
def test_files_and_what_is_named_in_them_exist(readme):
    for path, name in PATH.findall(text_of(readme)):
        assert (ROOT / path).is_file(), f"{readme}: there is no {path}"
        source = (ROOT / path).read_text()
        for part in name.split(".") if name else ():
            assert re.search(rf"^\s*(async def|def|class) {part}\b|^{part}\b.*=", source, re.MULTILINE), (
                f"{readme}: {path} has no {part}"
            )


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    for link in LINK.findall(prose_of(readme)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), f"{readme}: {link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{readme}: {link} leads to no heading"


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def names_of_options(verb: str) -> set[str]:
    """Return what options a verb has."""
    return {"--help"}.union(*((*option.opts, *option.secondary_opts) for option in options_of(verb)))


def commands_in(readme: str) -> Iterator[tuple[str, str]]:
    """Yield (verb, the rest) of each command of ours in blocks and in code within the text."""
    text = text_of(readme).replace("\\\n", " ")
    for code in (*re.findall(r"`([^`\n]+)`", FENCE.sub("", text)), *text.splitlines()):
        words = code.strip().removeprefix(".venv/bin/").split(" ", 2)
        if words[0] == "afterclick" and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
            yield words[1], " ".join(words[2:])
        elif words[0] in VERBS and len(words) > 1 and words[1].startswith("--"):
            yield words[0], " ".join(words[1:])


@pytest.mark.parametrize("readme", READMES)
def test_verbs_and_their_options_exist(readme):
    for verb, rest in commands_in(readme):
        assert verb in VERBS, f"{readme}: afterclick {verb}"
        unknown = set(OPTION.findall(rest.partition("#")[0].partition("|")[0])) - names_of_options(verb)
        assert not unknown, f"{readme}: afterclick {verb} has no {unknown}"


def test_modules_that_are_run_exist():
    for readme in READMES:
        for module in re.findall(r"python -m ((?:jobs|tests)\.[\w.]+)", text_of(readme)):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{readme}: {module}"


def test_every_verb_has_a_section_with_its_options():
    text = text_of("jobs/README.md")
    for verb in VERBS:
        section = re.split(rf"^### {verb}$", text, flags=re.MULTILINE)[1].partition("\n### ")[0]
        assert f"<!-- options of {verb} -->\n\n|" in section  # tests/test_settings.py compares them


def test_every_request_is_in_the_readme_of_the_service():
    text = text_of("serving/README.md")
    for module in pkgutil.iter_modules(routes.__path__):
        router = getattr(importlib.import_module(f"serving.routes.{module.name}"), "router", None)
        for route in router.routes if router is not None else ():
            path = re.sub(r"\{\w+(:\w+)?\}", "{id}", route.path)
            for method in route.methods:
                assert re.search(rf"`{method} {re.escape(path)}[`?]", text), f"{method} {path}"


def test_every_benchmark_is_in_their_readme():
    text = text_of("tests/benchmarks/README.md")
    for path in sorted((ROOT / "tests/benchmarks").glob("*.py")):
        if path.name != "__init__.py":
            assert f"tests.benchmarks.{path.stem}" in text or f"`{path.name}`" in text, path.name
    for path in (ROOT / "tests/benchmarks/results").glob("*.md"):
        assert path.name in text, path.name


# ------------------------------------------------------------------------------------------------------ what is run


class Clone:
    """A folder that looks like a fresh clone with its environment, and what runs in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path in ROOT.iterdir():
            if path.name in ("jobs", "serving", "lib", "cluster", "tests", "pyproject.toml", "README.md"):
                (folder / path.name).symlink_to(path)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / ".curlrc").write_text("fail-with-body\nshow-error\n")  # an error status is an error
        # what this process has set for Ray is of its own Ray
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AFTERCLICK_"))}
        path = f"{folder}/.venv/bin:{os.environ['PATH']}"
        self.environment = ours | {"PATH": path, "CURL_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        self.outputs = 0

    def start(self, block: Block) -> tuple[subprocess.Popen, Path]:
        """Start a block; returns its process, and the file that it writes to."""
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "python":
            command = [f"{self.folder}/.venv/bin/python", "-c", block.text]
        self.outputs += 1
        output = self.folder / f".output-{self.outputs}"
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        return process, output

    def run(self, block: Block) -> str:
        """Run a block to its end; returns what it printed."""
        process, output = self.start(block)
        try:
            status = process.wait(PATIENCE)
        finally:
            end(process, signal.SIGKILL)
        printed = output.read_text()
        assert status == 0, f"{block.readme}:\n{block.text}\nended with {status} and printed\n{printed}"
        return printed

    @contextmanager
    def running(self, block: Block) -> Iterator[None]:
        """Serve for the length of a block."""
        process, output = self.start(block)
        try:
            deadline = time.monotonic() + PATIENCE
            while "serving at" not in output.read_text():
                failed = process.poll() is not None or time.monotonic() > deadline
                assert not failed, f"{block.readme}:\n{block.text}\nprinted\n{output.read_text()}"
                time.sleep(0.2)
            yield
            end(process, signal.SIGINT)  # Ctrl-C
            process.wait(PATIENCE)
            assert output.read_text().splitlines()[-1] == "stopped", output.read_text()
        finally:
            end(process, signal.SIGKILL)


def end(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a block's processes, as a terminal does."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def write_clicks(path: Path) -> None:
    """Write what the reader of the first README brings: 60 products, 40 people over ten days."""
    chance = random.Random(1)
    people = ["ann", *(f"visitor-{number}" for number in range(1, 40))]
    lines = ["customer_id,product_id,event,time"]
    for person in people:
        for number in range(12):
            product = 201 + (len(person) * 7 + chance.randrange(20)) % 60
            kind = chance.choice(["view", "view", "click", "addtocart"])
            lines.append(f"{person},{product},{kind},2026-03-{number % 10 + 1:02} {chance.randrange(10, 22)}:00:00")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("readmes", READ_TOGETHER, ids=" ".join)
def test_the_blocks_of_a_readme_run_as_they_stand(readmes, tmp_path):
    blocks = [block for readme in readmes for block in blocks_of(readme) if block.reason is None]
    if any(block.serves for block in blocks):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, PORT)) == 0:
                pytest.skip(f"something answers at port {PORT}, which the READMEs name: stop it")
    clone = Clone(tmp_path)
    write_clicks(tmp_path / "clicks.csv")
    with ExitStack() as service:
        for block in blocks:
            if block.serves:
                service.close()  # the one before
                service.enter_context(clone.running(block))
                continue
            printed = clone.run(block)
            if "/recommendations" in block.text or "/similar" in block.text:
                assert '"item_id"' in printed or '"accepted"' in printed, f"{block.text}\nprinted\n{printed}"
