"""The `afterclick` command line: one Typer application whose verbs are imported when they are called.

Exit status: 0; 1, a job failed; 2, bad input, with one line that names the field and the remedy; 130, Ctrl-C; 143,
SIGTERM. The last two are 128 and the signal's number, as shells have it, also of a verb that stops cleanly. The
traceback of a failed job goes to a log file that its one line names, and to stderr where AFTERCLICK_TRACEBACK=1.
"""

import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from lib.errors import InputError, origin_of, refuse_uri

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
TRACEBACK = "AFTERCLICK_TRACEBACK"
EXIT_STATUS = (
    f"Exit status: 0, 1 (failed), 2 (bad input), {INTERRUPTED} (Ctrl-C) or {TERMINATED} (SIGTERM). "
    f"{TRACEBACK}=1 prints tracebacks."
)


class Verb(NamedTuple):
    """Where a verb's function is, and what `afterclick --help` says of it without importing it."""

    module: str  # of jobs
    function: str
    summary: str


VERBS = {
    "demo": Verb("demo.command", "demo_command", "a synthetic shop that learns from its visitors, on this machine"),
    "ingest": Verb("ingest", "ingest_command", "event files of any common format -> a dataset folder"),
    "pretrain": Verb("pretrain", "pretrain_command", "a dataset folder -> a model folder, on Ray Train"),
    "finetune": Verb("finetune", "finetune_command", "the feedback of a served model -> its next base, on Ray Train"),
    "evaluate": Verb("evaluate", "evaluate_command", "recall, ndcg, mrr and coverage of models, offline"),
    "replay": Verb("replay", "replay_command", "what learning live gains on a dataset, event by event"),
    "serve": Verb("serve", "serve_command", "answer over HTTP, take feedback, learn live, on this machine"),
    "nearline": Verb("nearline", "nearline_command", "keep a near-line learner on a cluster that serves"),
    "status": Verb("status", "status_command", "the versions, delays and counts of a running service"),
    "versions": Verb("versions", "versions_command", "the stored versions of a served model"),
    "rollback": Verb("rollback", "rollback_command", "bring the weights of a stored version back, live"),
}


class VerbGroup(TyperGroup):
    """The verbs: listed by their summaries, each imported when it is called or its options are completed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all verbs, in the order of `--help`."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """Return a verb without its options, which is enough to list it."""
        return TyperCommand(cmd_name, short_help=VERBS[cmd_name].summary) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the verb that is called or completed.

        Raises:
            InputError: there is no such verb.
        """
        name, *rest = args
        if name == "help":
            print(ctx.get_help())
            ctx.exit()
        if name in VERBS:
            module, function, _ = VERBS[name]
            return name, _command_of(getattr(importlib.import_module(f"jobs.{module}"), function)), rest
        if ctx.resilient_parsing:  # completion: nothing follows an unknown verb
            return None, None, rest
        close = get_close_matches(name, VERBS, n=1)
        meant = f"did you mean {close[0]}? There" if close else "there"
        raise InputError(f"{name!r} is not a verb of afterclick; {meant} are {', '.join(VERBS)}")


app = typer.Typer(
    cls=VerbGroup,
    help="A recommender that learns from the click you just made.",
    invoke_without_command=True,
    options_metavar="",
    subcommand_metavar="VERB [OPTIONS]",
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=f"afterclick VERB --help lists the options of a verb. {EXIT_STATUS}",
    rich_markup_mode=None,  # importing rich would take longer than all else that --help does
    pretty_exceptions_enable=False,
)


@app.callback()
def _start(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Print the version if it is asked for, and the help where no verb is called."""
    if version:
        from importlib.metadata import version as installed_version  # --help need not wait for it

        print(f"afterclick {installed_version('afterclick')}")
        ctx.exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """Run the console script; end the process with its exit status."""
    sys.exit(_guarded(lambda: _run(get_command(app), None, "afterclick")))


def run_command(function: Callable[..., None], arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run one command with the process's arguments or the given ones; end the process with its exit status."""
    sys.exit(_guarded(lambda: _run(_command_of(function), arguments, name)))


def _command_of(function: Callable[..., None]) -> Any:
    """Return a function as a Typer command of its own."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(epilog=EXIT_STATUS)(_refusing_uris(function))
    return get_command(single)


def _refusing_uris(function: Callable[..., None]) -> Callable[..., None]:
    """Have a command refuse URIs for its options that are paths; one that takes URIs is a string."""

    @wraps(function)
    def checked(**options: Any) -> None:
        for name, value in options.items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    refuse_uri(option_of(function, name), str(path))
        function(**options)

    return checked


def option_of(function: Callable[..., None], parameter: str) -> str:
    """Return the name of an option as it is typed, without dashes."""
    annotated = get_type_hints(function, include_extras=True)[parameter]
    said = [name for option in annotated.__metadata__ for name in (option.default, *(option.param_decls or ()))]
    names = [name for name in said if isinstance(name, str)]
    return (names or [parameter])[0].strip("-_")


def _run(command: Any, arguments: Sequence[str] | None, name: str | None) -> int:
    try:
        # outside its standalone mode Typer returns the status of --help and of Ctrl-C, and raises all else
        return command(args=arguments, prog_name=name, standalone_mode=False) or 0
    except typer.TyperException as error:
        raise InputError(f"{error.format_message().rstrip('.')}; --help lists the options") from error


def _guarded(run: Callable[[], int]) -> int:
    """Return the exit status of a run, after the one line that says what went wrong with it.

    SIGTERM interrupts it as Ctrl-C does, so that it stops its parts first. Of the exceptions that a handler may raise
    Ray lets KeyboardInterrupt alone through as it is.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and "ray" in sys.modules and not received:
            from cluster.local import end_in_time

            end_in_time(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = run()
        return TERMINATED if status == INTERRUPTED and received[:1] == [signal.SIGTERM] else status
    except KeyboardInterrupt:
        return TERMINATED if received[:1] == [signal.SIGTERM] else INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        origin = origin_of(error)
        if isinstance(origin, InputError):
            print(f"error: {_one_line(str(origin))}", file=sys.stderr)
            return BAD_INPUT
        print(f"failed: {_one_line(_description(origin))} (log: {_write_log(error)})", file=sys.stderr)
        return FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _description(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _write_log(error: BaseException) -> str:
    """Write the traceback to a file; return its path."""
    with tempfile.NamedTemporaryFile("w", prefix="afterclick-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


if __name__ == "__main__":
    main()
