"""The `afterclick` command line: its verbs, and one way to report what went wrong.

Exit status: 0; 1, a job failed; 2, bad input, with one line that names the field and the remedy; 130, Ctrl-C. The
traceback of a failed job goes to a log file that its one line names, or to stderr where AFTERCLICK_TRACEBACK=1.
"""

import importlib
import importlib.metadata
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import typer

from lib.errors import InputError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
TRACEBACK = "AFTERCLICK_TRACEBACK"

# verb -> (module of jobs, function); imported when it is called, so that `--help` answers at once
COMMANDS = {
    "demo": ("demo.demo", "demo_command"),
    "ingest": ("ingest", "ingest_command"),
    "pretrain": ("pretrain", "pretrain_command"),
    "finetune": ("finetune", "finetune_command"),
    "evaluate": ("evaluate", "evaluate_command"),
    "replay": ("replay", "replay_command"),
    "serve": ("serve", "serve_command"),
    "nearline": ("nearline", "nearline_command"),
    "status": ("status", "status_command"),
    "versions": ("versions", "versions_command"),
    "rollback": ("rollback", "rollback_command"),
}
SUMMARY = {
    "demo": "a synthetic shop that learns from its visitors, on this machine",
    "ingest": "event files of any common format -> a dataset folder",
    "pretrain": "a dataset folder -> a model folder, on Ray Train",
    "finetune": "the feedback of a served model -> its next base, on Ray Train",
    "evaluate": "recall, ndcg, mrr and coverage of models, offline",
    "replay": "what learning live is worth, event by event, on a dataset",
    "serve": "HTTP answers, feedback, near-line learning and pushes, on this machine",
    "nearline": "keep a near-line learner on a cluster that serves",
    "status": "what a running service says of itself",
    "versions": "the stored versions of a served model",
    "rollback": "bring the weights of a stored version back, live",
}


def main() -> None:
    """Entry point of the console script; ends the process with its exit status."""
    sys.exit(_guarded(lambda: _dispatch(sys.argv[1:])))


def run_command(function: Callable[..., None], arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run one command with the process's arguments or the given ones; ends the process with its exit status."""
    sys.exit(_guarded(lambda: _run(function, arguments, name)))


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"afterclick {importlib.metadata.version('afterclick')}")
        return 0
    verb = arguments[0]
    if verb not in COMMANDS:
        close = get_close_matches(verb, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? There" if close else "there"
        raise InputError(f"{verb!r} is not a verb of afterclick; {meant} are {', '.join(COMMANDS)}")
    module, function = COMMANDS[verb]
    command = getattr(importlib.import_module(f"jobs.{module}"), function)
    return _run(command, arguments[1:], f"afterclick {verb}")


def _run(function: Callable[..., None], arguments: Sequence[str] | None, name: str | None) -> int:
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(epilog=f"Exit status: 0, 1 (failed) or 2 (bad input). {TRACEBACK}=1 prints tracebacks.")(
        function
    )
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # outside its standalone mode typer returns the status of --help and of Ctrl-C, and raises all else
        return application(args=arguments, prog_name=name, standalone_mode=False) or 0
    except typer.TyperException as error:
        raise InputError(f"{error.format_message().rstrip('.')}; --help lists the options") from error


def _guarded(run: Callable[[], int]) -> int:
    """The exit status of a run, after the one line that says what went wrong with it."""
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        origin = getattr(error, "cause", None) or error  # Ray wraps what an actor raises, with its traceback as text
        if isinstance(origin, InputError):
            print(f"error: {_one_line(str(origin))}", file=sys.stderr)
            return BAD_INPUT
        print(f"failed: {_one_line(_description(origin))} (log: {_write_log(error)})", file=sys.stderr)
        return FAILED


def _description(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _write_log(error: BaseException) -> str:
    """Keep the traceback in a file; returns its path."""
    with tempfile.NamedTemporaryFile("w", prefix="afterclick-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def usage() -> str:
    """What `afterclick --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: afterclick VERB [options]",
            "",
            *(f"  {verb:<{width}}  {SUMMARY[verb]}" for verb in COMMANDS),
            "",
            "afterclick VERB --help lists a verb's options; afterclick --version names the version.",
            "Exit status: 0; 1, the job failed (its one line names the log with the traceback, which",
            f"{TRACEBACK}=1 prints instead of a line alone); 2, bad input; 130, Ctrl-C.",
        ]
    )


if __name__ == "__main__":
    main()
