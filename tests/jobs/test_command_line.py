"""The command line as a person meets it: help, one line for whatever goes wrong, and the exit status."""

import importlib
import importlib.metadata
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple, get_args, get_type_hints

import pytest

from cluster.local import free_port
from jobs import command_line
from jobs.command_line import VERBS, option_of
from lib.errors import InputError
from serving.status import ReplicaStatus, Status, Unavailable

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def afterclick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`afterclick ...` in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["afterclick", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command_line.main()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | type[BaseException]], None]:
    """Make `afterclick status` a command that raises."""

    def install(error: Exception | type[BaseException]) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("jobs.status.status_command", fail)

    return install


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, untrained; not to be changed."""
    from lib.data.catalog import Catalog
    from lib.model.folder import Manifest, save_model
    from tests.helpers.tiny import item_ids, tiny_encoder

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder, tiny_encoder(), Catalog(item_ids(24)), Manifest())
    return folder


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """`serve` takes SIGINT and SIGTERM for the rest of its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_one_line(outcome: Outcome, beginning: str, remedy: str, status: int = 2) -> None:
    """One plain line on stderr, nothing else."""
    assert outcome.err.startswith(beginning), outcome
    assert remedy in outcome.err
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert outcome.status == status


# -------------------------------------------------------------------------------------------------------- help, version


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_verbs_are_listed(afterclick, arguments):
    outcome = afterclick(*arguments)
    assert (outcome.status, outcome.err) == (0, "")
    for verb in VERBS:
        assert f"  {verb} " in outcome.out
        assert VERBS[verb].summary in outcome.out
    assert "AFTERCLICK_TRACEBACK=1" in outcome.out


def test_version(afterclick):
    assert afterclick("--version") == (0, f"afterclick {importlib.metadata.version('afterclick')}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(afterclick, verb):
    outcome = afterclick(verb, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"afterclick {verb}" in outcome.out
    assert "--help" in outcome.out


def test_help_does_not_wait_for_what_only_the_job_needs():
    verbs = [verb for verb in VERBS if verb != "replay"]  # of which a setting is the learner
    program = (
        "import importlib, sys\n"
        "from jobs.command_line import VERBS\n"
        f"for verb in {verbs}:\n"
        "    importlib.import_module(f'jobs.{VERBS[verb].module}')\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["--help"], {"command_line"}),
        (["status", "--help"], {"command_line", "configuration", "client", "status", "tables"}),
        (["serve", "--help"], {"command_line", "serve"}),
    ],
)
def test_help_imports_the_verb_that_is_asked_for_and_no_other(arguments, jobs):
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['afterclick', *{arguments}]\n"
        "from jobs.command_line import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert {name.removeprefix("jobs.") for name in modules if name.startswith("jobs.")} == jobs
    if arguments == ["--help"]:
        assert not modules & {"numpy", "pyarrow", "pydantic", "rich", "ray", "torch"}


# ----------------------------------------------------------------------------------------------------------- completion


def complete(*words: str) -> list[str]:
    """What bash would be told to complete the last word with."""
    environment = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.command_line"],
        cwd=ROOT,
        env=os.environ | environment | {"_AFTERCLICK_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_verbs_are_completed():
    assert complete("afterclick", "") == list(VERBS)
    assert complete("afterclick", "s") == ["serve", "status"]
    assert complete("afterclick", "x") == []


def test_the_options_of_a_verb_are_completed():
    assert complete("afterclick", "rollback", "--") == ["--version", "--url", "--help"]
    assert complete("afterclick", "serve", "--learner") == ["--learner-workers"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_shown(shell):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.command_line", "--show-completion", shell],
        cwd=ROOT,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_AFTERCLICK_COMPLETE=complete_{shell}" in done.stdout
    assert "afterclick" in done.stdout


def test_completion_is_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.command_line", "--install-completion", "bash"],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bash completion installed" in done.stdout
    assert "complete_bash" in (tmp_path / ".bash_completions" / "afterclick.sh").read_text()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "beginning", "remedy"),
    [
        (
            ["pretrian"],
            "error: 'pretrian' is not a verb of afterclick; did you mean pretrain? There are demo, ",
            "serve",
        ),
        (["xyz"], "error: 'xyz' is not a verb of afterclick; there are demo, ", "rollback"),
        (["status", "--urk", "x"], "error: No such option: --urk", "--url"),
        (["status", "extra"], "error: Got unexpected extra argument", "--help lists the options"),
        (["rollback"], "error: Missing option '--version'", "--help lists the options"),
        (["rollback", "--version", "x"], "error: Invalid value for '--version': ", "valid integer"),
        (["rollback", "--version", "0"], "error: Invalid value for '--version': ", "1"),
        (["status", "--url"], "error: Option '--url' requires an argument", "--help lists the options"),
        (["pretrain", "--data", "d", "--out", "o", "--set", "epochs=x"], "error: epochs: ", "valid integer"),
        (
            ["pretrain", "--data", "d", "--out", "o", "--config", "no.yaml"],
            "error: config: no.yaml ",
            "name a YAML file",
        ),
        (["evaluate", "--data", "d", "--model", "m", "--protocol", "luck"], "error: protocol: 'luck'", "leave-one-out"),
        (
            ["evaluate", "--data", "d", "--model", "m", "--plot", "p.pdf"],
            "error: plot: p.pdf is no PNG",
            "ends in .png",
        ),
        (["evaluate", "--data", "d"], "error: Missing option '--model'", "--help lists the options"),
    ],
)
def test_bad_input_is_one_line_and_status_2(afterclick, arguments, beginning, remedy):
    assert_one_line(afterclick(*arguments), beginning, remedy)


def path_options() -> Iterator[tuple[str, str]]:
    """Every verb with each of its options that is a path."""
    for verb, (module, function, _) in VERBS.items():
        command = getattr(importlib.import_module(f"jobs.{module}"), function)
        for parameter, hint in get_type_hints(command).items():
            if Path in (hint, *get_args(hint)):
                yield verb, option_of(command, parameter)


@pytest.mark.parametrize(("verb", "option"), list(path_options()))
def test_a_uri_is_refused_by_every_option_that_is_a_path(afterclick, verb, option):
    required = {"--data": "d", "--model": "m", "--out": "o", "--source": "s"}
    known = {f"--{name}" for known_verb, name in path_options() if known_verb == verb}
    given = {name: value for name, value in required.items() if name in known} | {f"--{option}": "s3://bucket/x"}
    outcome = afterclick(verb, *(word for pair in given.items() for word in pair))
    assert_one_line(outcome, f"error: {option}: s3:/bucket/x is a URI", "only a path on this machine")


def test_a_path_with_a_colon_is_a_path(afterclick, tmp_path):
    outcome = afterclick("versions", "--model", tmp_path / "odd:/name")
    assert_one_line(outcome, f"error: model: no folder at {tmp_path}/odd:/name", "pretrain")


def test_versions_take_a_uri_and_the_log_does_not(afterclick, tiny_model):
    outcome = afterclick("serve", "--model", tiny_model, "--versions", "gopher://a/b")
    assert_one_line(outcome, "error: versions: gopher://a/b is no storage that can be used", "")
    outcome = afterclick("versions", "--model", tiny_model, "--state", "s3://bucket/x", "--check")
    assert_one_line(outcome, "error: state: s3://bucket/x is a URI", "only a path on this machine")
    outcome = afterclick("serve", "--model", tiny_model, "--challenger", "s3://bucket/x")
    assert_one_line(outcome, "error: challenger: s3://bucket/x is a URI", "only a path on this machine")


def test_a_message_of_many_lines_becomes_one(afterclick, command):
    command(InputError("data: wrong\n  in two ways"))
    assert_one_line(afterclick("status"), "error: data: wrong in two ways\n", "")


def test_input_that_an_actor_refused_is_bad_input(afterclick, command):
    class FromActor(RuntimeError):
        cause = InputError("data: wrong there, too")

    command(FromActor("a long traceback of another process"))
    assert_one_line(afterclick("status"), "error: data: wrong there, too\n", "")


@pytest.mark.parametrize("verb", ["pretrain", "evaluate", "demo"])
def test_a_missing_dataset(afterclick, tmp_path, tiny_model, verb):
    data = tmp_path / "absent"
    options = {"pretrain": ["--out", tmp_path / "out"], "evaluate": ["--model", tiny_model, "--allow-leak"], "demo": []}
    outcome = afterclick(verb, "--data", data, *options[verb])
    if verb == "demo":  # says first what it does
        outcome = outcome._replace(out="")
    assert_one_line(outcome, f"error: data '{data}' does not exist", "make it with 'afterclick ingest")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["evaluate", "versions", "serve"])
def test_a_missing_model(afterclick, tmp_path, shop_dataset, keep_signals, verb):
    options = {"evaluate": ["--data", shop_dataset]}.get(verb, [])
    outcome = afterclick(verb, "--model", tmp_path / "absent", *options)
    assert_one_line(outcome, f"error: model: no folder at {tmp_path / 'absent'}", "afterclick pretrain")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "catalog.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["removed", "truncated"])
@pytest.mark.parametrize("verb", ["evaluate", "serve"])
def test_a_damaged_model(afterclick, tmp_path, tiny_model, shop_dataset, keep_signals, verb, damage, name):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    options = {"evaluate": ["--data", shop_dataset]}.get(verb, [])
    outcome = afterclick(verb, "--model", model, *options)
    assert_one_line(outcome, f"error: model: {model}", "pretrain")
    assert name in outcome.err


def test_a_port_that_is_taken(afterclick, tiny_model, keep_signals):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = afterclick("serve", "--model", tiny_model, "--port", port)
        assert_one_line(outcome, f"error: port: {port} cannot be used", "--port")
        outcome = afterclick("demo", "--port", port)
        assert_one_line(outcome, f"error: port: {port} cannot be used", "--port")


def test_versions_that_are_nowhere(afterclick, tmp_path, tiny_model):
    outcome = afterclick("versions", "--model", tiny_model, "--state", tmp_path)
    assert_one_line(outcome, f"error: state: no versions are stored at {tmp_path}", "--state")


@pytest.mark.parametrize("verb", ["serve", "versions"])
def test_versions_of_a_newer_release_are_refused_in_one_line(afterclick, tmp_path, tiny_model, monkeypatch, verb):
    from lib.model.version_format import FORMAT
    from lib.versions.registry import Registry

    with monkeypatch.context() as patch:
        patch.setattr("lib.model.folder.FORMAT", FORMAT + 1)
        Registry(tmp_path).start_from(tiny_model)
    more = ["--check"] if verb == "versions" else ["--port", free_port()]
    outcome = afterclick(verb, "--model", tiny_model, "--state", tmp_path, *more)
    file = tmp_path / "snapshots" / "0000000001" / "manifest.json"
    assert_one_line(outcome, f"error: version: {file} has format {FORMAT + 1}, ", "--state")


# -------------------------------------------------------------------------------------------- a service that is not one


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("boots: []", ["boots", "there are pin, boost"]),
        ("boost: [{filter: {price: {low: 1}}, weight: 0.1}]", ["boost.0.filter.price", "range"]),
        ("at_most: {genres: 0}", ["at_most.genres", "1"]),
        ("- pin", ["ranking", "mapping"]),
        ("pin: [", ["ranking", "YAML"]),
    ],
)
def test_bad_ranking_rules_are_refused_before_anything_starts(afterclick, tiny_model, tmp_path, rules, words):
    file = tmp_path / "rules.yaml"
    file.write_text(rules)
    outcome = afterclick("serve", "--model", tiny_model, "--ranking", file)
    assert_one_line(outcome, f"error: {words[0]}", *words[1:])
    missing = afterclick("serve", "--model", tiny_model, "--ranking", tmp_path / "none.yaml")
    assert_one_line(missing, "error: ranking:", "none.yaml")


def test_fewer_replicas_at_most_than_at_least_are_refused(afterclick, tiny_model):
    outcome = afterclick("serve", "--model", tiny_model, "--replicas", 3, "--most-replicas", 2)
    assert_one_line(outcome, "error: most_replicas: 2 are fewer", "the 3 of replicas")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("quality_tolerance=0.02", "quality_tolerance: no such setting; it is gate.quality_tolerance"),
        ("replay_events=0", "replay_events: no such setting; it is replay.events"),
        ("influence.user_limit=0", "influence.user_limit: input should be greater than 0, got 0"),
        ("gate.tolerance=0.02", "gate.tolerance: no such setting"),
    ],
)
def test_a_bad_setting_of_the_learner_is_refused_before_anything_starts(afterclick, tiny_model, assignment, message):
    assert_one_line(afterclick("serve", "--model", tiny_model, "--set", assignment), f"error: {message}", "")


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--challenger", "/nowhere"], "error: challenger: model: no folder at /nowhere"),
        (["--challenger", "3"], "error: challenger: version: 3 is not stored"),
        (["--challenger", "3", "--challenger-share", "1.5"], "error: challenger.share: input should be less than 1"),
        (["--challenger", "3", "--challenger-set", "rewards=likes"], "error: challenger.rewards: no such setting"),
        (["--shadow"], "error: challenger: name the second model with --challenger"),
        (["--challenger", "3", "--challenger-set", "reward"], "error: --set reward: write key=value"),
    ],
)
def test_a_bad_challenger_is_refused_before_anything_starts(afterclick, tiny_model, arguments, beginning):
    assert_one_line(afterclick("serve", "--model", tiny_model, *arguments), beginning, "")


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """An HTTP server that gives one answer to everything; returns its URL."""
    servers: list[HTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST = answer

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("arguments", [["status"], ["rollback", "--version", "1"]])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "http://[", "ftp://127.0.0.1"])
def test_no_service_at_the_url(afterclick, arguments, url):
    outcome = afterclick(*arguments, "--url", url)
    assert_one_line(outcome, f"error: url: no service answers at {url} (", "start one with `afterclick serve`")


def test_what_a_service_refuses_is_bad_input(afterclick, answering):
    url = answering(404, '{"detail": "version: 7 is not stored"}')
    outcome = afterclick("rollback", "--version", 7, "--url", url)
    assert_one_line(outcome, f"error: the service at {url} refused: version: 7 is not stored", "")


def test_another_service_at_the_url(afterclick, answering):
    url = answering(404, "<html>no such page</html>")
    assert_one_line(
        afterclick("status", "--url", url), f"error: url: what answers at {url} is no afterclick", "/v1/status"
    )


def test_a_service_that_fails_is_a_failure(afterclick, answering, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = answering(503, '{"detail": "no learner is running"}')
    outcome = afterclick("rollback", "--version", 1, "--url", url)
    assert_one_line(
        outcome, f"failed: RuntimeError: the service at {url} answered 503: no learner is running", "(log: ", status=1
    )


def test_a_status_is_shown_and_kept(afterclick, answering, tmp_path):
    named = {"replica_id": "r1", "checksum": "c1", "latency_buckets": [], "idle_rules": []}
    counts = dict.fromkeys(ReplicaStatus.model_fields.keys() - named.keys(), 7)
    replica = ReplicaStatus.model_validate(counts | named)
    away = Unavailable(state="restarting")
    shown = Status(model_version=3, replicas=[replica], learner=away, aggregator=away, freshness=None)
    status = shown.model_dump(mode="json")
    outcome = afterclick(
        "status", "--url", answering(200, json.dumps(status)), "--json", tmp_path / "reports" / "status.json"
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert "model version 3" in outcome.out
    assert "restarting" in outcome.out
    assert json.loads((tmp_path / "reports" / "status.json").read_text()) == status


def test_a_status_of_another_version_is_named(afterclick, answering):
    url = answering(200, '{"model_version": 3, "replicas": [{"replica_id": "r1"}]}')
    outcome = afterclick("status", "--url", url)
    assert_one_line(outcome, f"error: url: the service at {url} is of another version", "replicas.0.process")


# -------------------------------------------------------------------------------------------------- failures and Ctrl-C


def test_a_failure_is_one_line_that_names_its_log(afterclick, command, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command(OSError("the disk\nis full"))
    outcome = afterclick("status")
    (log,) = tmp_path.iterdir()
    assert outcome == (1, "", f"failed: OSError: the disk is full (log: {log})\n")
    assert "Traceback (most recent call last)" in log.read_text()
    assert "in fail" in log.read_text()


def test_the_traceback_is_printed_on_request(afterclick, command, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("AFTERCLICK_TRACEBACK", "1")
    command(OSError("no"))
    outcome = afterclick("status")
    assert outcome.status == 1
    assert outcome.err.startswith("Traceback (most recent call last)")
    assert outcome.err.splitlines()[-1].startswith("failed: OSError: no (log: ")


def test_ctrl_c_is_130_without_a_word(afterclick, command):
    command(KeyboardInterrupt)
    assert afterclick("status") == (130, "", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_without_a_word(tmp_path, number, status):
    # a service that takes the connection and never answers
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.command_line", "status", "--url", url],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        connection, _ = silent.accept()
        with connection:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, b"", b"")


def test_a_job_is_a_module_too(tmp_path):
    arguments = ["--model", str(tmp_path / "absent")]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.versions", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model: no folder at ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_module(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [verb, "--help"])
    monkeypatch.delitem(sys.modules, f"jobs.{verb}", raising=False)  # it is run, not imported
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"jobs.{verb}", run_name="__main__")
    assert ended.value.code == 0
    assert "Exit status: 0" in capsys.readouterr().out


def test_loading_a_model_draws_no_bar(capfd, tiny_model):
    from lib.model.folder import load_model

    load_model(tiny_model)
    assert capfd.readouterr() == ("", "")
