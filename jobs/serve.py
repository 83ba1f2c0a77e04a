"""Serve a model on this machine: Ray, Serve behind HAProxy, the aggregators and the near-line learner.

    python -m jobs.serve --model MODEL [--data DATA] [--replicas 2] [--port 8000]

Log and versions live in MODEL/live, so the same command continues where it was stopped or killed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.errors import InputError, SettingsError, refuse_uri
from lib.log.backend import SQLITE

if TYPE_CHECKING:
    from lib.experiments.results import ChallengerConfig

SCALE, SETTINGS, CHALLENGER = "Scale", "Settings", "A second model beside the live one"  # headings of --help


def serve_command(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    data: Annotated[Path | None, typer.Option(help="Ingested dataset whose users' histories to start with.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port on 127.0.0.1.")] = 8000,
    state: Annotated[Path | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    versions: Annotated[
        str | None, typer.Option(help="Folder or URI (s3://, gs://) of the versions; the state folder if absent.")
    ] = None,
    log: Annotated[str, typer.Option(help="Of feedback: sqlite, or kafka://host:port/topic.")] = SQLITE,
    replicas: Annotated[int, typer.Option(min=1, help="Inference replicas.", rich_help_panel=SCALE)] = 2,
    most_replicas: Annotated[
        int | None, typer.Option(min=1, help="Up to so many as the load grows.", rich_help_panel=SCALE)
    ] = None,
    aggregators: Annotated[
        int, typer.Option(min=1, help="Share the users out among so many, for good.", rich_help_panel=SCALE)
    ] = 1,
    learner_workers: Annotated[
        int, typer.Option(min=1, help="Processes that learn together.", rich_help_panel=SCALE)
    ] = 1,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings of learner and trigger.", rich_help_panel=SETTINGS)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One of them, such as trigger.events=32; repeatable.", rich_help_panel=SETTINGS),
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="YAML file of ranking rules.", rich_help_panel=SETTINGS)] = None,
    cleaning: Annotated[
        Path | None, typer.Option(help="YAML file of what feedback is refused.", rich_help_panel=SETTINGS)
    ] = None,
    challenger: Annotated[
        str | None,
        typer.Option(help="Model folder, or number of a stored version.", rich_help_panel=CHALLENGER),
    ] = None,
    challenger_share: Annotated[
        float | None, typer.Option(help="Share of the users that it answers; 0.1.", rich_help_panel=CHALLENGER)
    ] = None,
    shadow: Annotated[
        bool, typer.Option(help="Ask the challenger, and show nothing of it.", rich_help_panel=CHALLENGER)
    ] = False,
    challenger_set: Annotated[
        list[str] | None, typer.Option(help="Test setting key=value; repeatable.", rich_help_panel=CHALLENGER)
    ] = None,
) -> None:
    """Serve a model, learn from feedback, push the weights; Ctrl-C and SIGTERM stop it cleanly."""
    from jobs.configuration import settings_from, values_of, yaml_of
    from jobs.service import LiveSettings, check_service, counted, running_service, sole_service, stop_on_signal
    from lib.data.guard import CleaningRules
    from lib.ranking.rules import RankingRules
    from serving.app import ServeArguments

    live = settings_from(LiveSettings, config, set_ or [])
    arguments = ServeArguments(
        model=str(model.absolute()),
        data=str(data.absolute()) if data is not None else None,
        replicas=replicas,
        most_replicas=most_replicas,
        aggregators=aggregators,
        log=log,
        state=str(state.absolute()) if state is not None else None,
        versions=versions if versions is None or "://" in versions else str(Path(versions).absolute()),
        trigger=live.trigger,
        stalled_seconds=live.stalled_seconds,
        cleaning=settings_from(CleaningRules, cleaning, []),
        ranking=RankingRules(**yaml_of(ranking, "ranking")) if ranking is not None else RankingRules(),
        challenger=_challenger(challenger, challenger_share, shadow, values_of(challenger_set or [])),
    )
    check_service(arguments, port)
    parts = f"{counted(replicas, 'replica')}, {counted(aggregators, 'aggregator')} and the learner"
    with sole_service(arguments):
        print(f"starting Ray, {parts}", flush=True)
        with running_service(arguments, port, live.learner, learner_workers) as url:
            stop = stop_on_signal()
            print(f"serving at {url}  (page: {url}/, API: {url}/docs)  Ctrl-C stops it", flush=True)
            stop.wait()
            print("stopping", flush=True)
    print("stopped", flush=True)
    raise typer.Exit(stop.status)


def _challenger(
    model: str | None, share: float | None, shadow: bool, settings: dict[str, Any]
) -> "ChallengerConfig | None":
    """Return the second model and its test, None where none is named.

    Raises:
        InputError: a setting is wrong, or there are settings without a model.
    """
    from lib.experiments.results import ChallengerConfig

    given: dict[str, Any] = {} if share is None else {"share": share}
    if model is None:
        if given or shadow or settings:
            raise InputError("challenger: name the second model with --challenger, or leave out what is said of it")
        return None
    refuse_uri("challenger", model)
    named = model if model.isdecimal() else str(Path(model).absolute())
    try:
        return ChallengerConfig(**{"model": named, "shadow": shadow} | given | settings)
    except SettingsError as error:
        raise InputError(f"challenger.{error}") from error


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(serve_command)
