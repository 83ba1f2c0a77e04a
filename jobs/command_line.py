"""The `afterclick` command line: its verbs, and one way to report what went wrong.

Exit status: 0, 1 (failed) or 2 (bad input, with one line that names the field and the remedy).
"""

import importlib
import sys
from collections.abc import Callable, Sequence

import typer

from lib.events import InputError

# verb -> (module of jobs, function); imported when it is called, so that `--help` answers at once
COMMANDS = {
    "demo": ("demo", "demo_command"),
    "ingest": ("ingest", "ingest_command"),
    "pretrain": ("pretrain", "pretrain_command"),
    "evaluate": ("evaluate", "evaluate_command"),
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
    "evaluate": "recall, ndcg, mrr and coverage of a model, offline",
    "serve": "HTTP answers, feedback, near-line learning and pushes, on this machine",
    "nearline": "keep a near-line learner on a cluster that serves",
    "status": "what a running service says of itself",
    "versions": "the stored versions of a served model",
    "rollback": "bring the weights of a stored version back, live",
}


def run_command(function: Callable[..., None], arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run one command and end the process with its exit status."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(function)
    try:
        application(args=list(arguments) if arguments is not None else None, prog_name=name)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    verb = arguments[0]
    if verb not in COMMANDS:
        print(f"error: {verb!r} is not a verb of afterclick; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, function = COMMANDS[verb]
    run_command(getattr(importlib.import_module(f"jobs.{module}"), function), arguments[1:], f"afterclick {verb}")


def usage() -> str:
    """What `afterclick --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {verb:<{width}}  {SUMMARY[verb]}" for verb in COMMANDS]
    return "\n".join(
        ["usage: afterclick VERB [options]", "", *lines, "", "afterclick VERB --help lists a verb's options"]
    )


if __name__ == "__main__":
    main()
