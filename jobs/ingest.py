"""Make a dataset folder of event files.

python -m jobs.ingest --source PATH --out DIR
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jobs.configuration import write_json
from jobs.tables import print_facts
from lib.data.events import EVENT_KINDS, EVENT_SCHEMA
from lib.data.formats.files import FORMATS
from lib.data.ingest import IngestReport, ingest
from lib.data.ingest import Progress as ProgressFunction
from lib.data.ratings import RatingScale
from lib.errors import InputError

_KINDS = ", ".join(EVENT_KINDS)
_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}


def ingest_command(
    source: Annotated[Path, typer.Option("--source", help="File or folder with events.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the dataset.")],
    format: Annotated[str, typer.Option("--format", help=f"auto, or {', '.join(FORMATS)}.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="FIELD=NAME",
            help=f"The column that holds a field ({', '.join(EVENT_SCHEMA.names)}); its number, from 0, in a CSV file "
            "without a header. Repeat for more.",
        ),
    ] = None,
    event_kind: Annotated[
        list[str] | None,
        typer.Option("--event-kind", metavar="THEIRS=OURS", help=f"Their word for one of {_KINDS}. Repeat for more."),
    ] = None,
    default_kind: Annotated[
        str | None,
        typer.Option(
            "--default-kind", help="The kind of events that have none: rating if they have a value, or click."
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="Between columns, or 'tab'; otherwise told from the file.")
    ] = None,
    items: Annotated[
        Path | None, typer.Option("--items", help="Descriptions of the items: a CSV, JSON lines or Parquet file.")
    ] = None,
    rating_scale: Annotated[
        str | None,
        typer.Option(
            "--rating-scale",
            metavar="WORST-BEST",
            help="The scale of the ratings, such as 1-10, or implicit where they are no opinions; otherwise told from "
            "the data.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset that --out holds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file, too.")] = None,
) -> None:
    """Read event files of any common format, clean them and write a dataset folder."""
    columns = _pairs("--column", column or [])
    kinds = _pairs("--event-kind", event_kind or [])
    scale = None if rating_scale is None else RatingScale.parse(rating_scale)
    console = Console()
    with _progress(Console(stderr=True)) as progress:
        report = ingest(
            source,
            out,
            format=format,
            columns=columns,
            kinds=kinds,
            default_kind=default_kind,
            delimiter=_delimiter(delimiter),
            items=items,
            rating_scale=scale,
            overwrite=overwrite,
            progress=progress,
        )
    if json_file is not None:
        write_json(json_file, asdict(report))
    _print_report(console, report, out)


def _pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Return left -> right of a repeated option such as `--column user_id=visitor`.

    Raises:
        InputError: one is no pair, or a left side is given twice.
    """
    split = {}
    for pair in pairs:
        # Their word for a kind may hold an equals sign; ours, and the fields, never do.
        left, equals, right = pair.partition("=") if option == "--column" else pair.rpartition("=")
        if not (equals and left and right):
            raise InputError(
                f"{option} {pair!r}: write it as {'FIELD=NAME' if option == '--column' else 'THEIRS=OURS'}"
            )
        if left in split:
            raise InputError(f"{option} {pair!r}: {left!r} is given more than once; leave one of them out")
        split[left] = right
    return split


def _delimiter(text: str | None) -> str | None:
    """Return the characters that a delimiter's name stands for.

    Raises:
        InputError: it is neither a name nor a delimiter.
    """
    if text is None:
        return None
    text = _DELIMITERS.get(text, text)
    if text != "::" and (len(text) != 1 or text in '"\n\r'):
        raise InputError(f"--delimiter {text!r}: it must be one character, '::' or one of {', '.join(_DELIMITERS)}")
    return text


@contextmanager
def _progress(console: Console) -> Iterator[ProgressFunction]:
    """Yield what shows the progress: a bar on a terminal, a line for each tenth elsewhere."""
    if not console.is_terminal:
        tenths: dict[str, int] = {}

        def line(stage: str, done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > tenths.get(stage, 0):
                tenths[stage] = tenth
                print(f"{stage}: {tenth * 10}%", file=sys.stderr, flush=True)

        yield line
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        tasks = {stage: bar.add_task(stage, start=False) for stage in ("reading", "cleaning")}

        def advance(stage: str, done: int, total: int) -> None:
            bar.start_task(tasks[stage])
            bar.update(tasks[stage], completed=done, total=total)

        yield advance


def _print_report(console: Console, report: IngestReport, out: Path) -> None:
    rows = [
        ("source", f"{report.source} ({report.format})"),
        ("dataset", str(out)),
        ("events read", f"{report.read:,}"),
        ("events kept", f"{report.kept:,}"),
        *((f"rejected: {reason}", f"{count:,}") for reason, count in report.rejected.items()),
        ("users", f"{report.users:,}"),
        ("items", f"{report.items:,}"),
        ("items described", f"{report.described_items:,}"),
        *((f"descriptions rejected: {reason}", f"{count:,}") for reason, count in report.rejected_items.items()),
        ("period", report.period),
        *_rating_rows(report),
        *(
            (f"unknown kind {kind!r}", f"{count:,} (map it with --event-kind)")
            for kind, count in report.unknown_kinds.items()
        ),
    ]
    if console.is_terminal:
        print_facts(rows, "Ingested")
        return
    for name, value in rows:
        print(f"{name}: {value}")


def _rating_rows(report: IngestReport) -> list[tuple[str, str]]:
    """Say what was taken for dislikes, and what looks wrong about it."""
    if report.rating_scale is None:
        return []
    scale = RatingScale.parse(report.rating_scale)
    rows = [("ratings", f"{report.ratings:,}, scale {scale}")]
    if report.ratings_off_scale:
        rows.append(("ratings beyond the scale", f"{report.ratings_off_scale:,} (kept without their value)"))
    if scale.worst == scale.best:
        return [*rows, ("ratings taken for dislikes", "none: the values are no opinions (else give --rating-scale)")]
    rows.append(("ratings taken for dislikes", f"{report.dislikes:,}, those below {scale.dislikes_below:g}"))
    if report.dislikes == 0 or report.dislikes > report.ratings / 2:
        found = "no rating is a dislike" if report.dislikes == 0 else "most ratings are dislikes"
        rows.append(("warning", f"{found}; if that is wrong give --rating-scale"))
    return rows


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(ingest_command)
