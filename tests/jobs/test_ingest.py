"""The ingest command as a person types it."""

import json
import re
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from jobs import ingest as ingest_job
from lib.data.dataset import read_events, read_items
from lib.errors import InputError

T = 1_600_000_000_000
application = typer.Typer()
application.command()(ingest_job.ingest_command)


def run(*arguments: object) -> str:
    """The command's standard output; raises what the command raises."""
    result = CliRunner().invoke(application, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    path.write_text(f"who;what;did;time\nu;i;heart;{T}\nu;j;buy;{T + 1}\nu;j;buy;{T + 1}\nu;k;zap;{T}\nbroken\n")
    return path


def test_every_option(tmp_path, source):
    (tmp_path / "goods.csv").write_text("id,title\ni,One [1]\ni,Again\n")
    options = ["--column", "user_id=who", "--column", "item_id=what", "--column", "event=did"]
    options += ["--event-kind", "heart=like", "--delimiter", ";", "--format", "csv", "--items", tmp_path / "goods.csv"]
    output = run("--source", source, "--out", tmp_path / "out", "--json", tmp_path / "reports" / "r.json", *options)
    for line in [
        "events read: 5",
        "events kept: 2",
        "rejected: duplicate: 1",
        "rejected: unknown_event: 1",
        "rejected: malformed_line: 1",
        "users: 1",
        "items: 2",
        "items described: 1",
        "descriptions rejected: duplicate: 1",
        "period: 2020-09-13 12:26 to 2020-09-13 12:26 UTC",
        "unknown kind 'zap': 1 (map it with --event-kind)",
    ]:
        assert line in output.splitlines()
    events = read_events(tmp_path / "out")
    assert events["event"].to_pylist() == ["like", "purchase"]
    items = read_items(tmp_path / "out")
    assert items is not None
    assert items["title"].to_pylist() == ["One [1]"]
    report = json.loads((tmp_path / "reports" / "r.json").read_text())
    assert report == json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert report["kept"] == 2
    with pytest.raises(InputError, match="--overwrite"):
        run("--source", source, "--out", tmp_path / "out", *options)
    run("--source", source, "--out", tmp_path / "out", "--overwrite", *options)


def test_default_kind_and_delimiter_by_name(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(f"user\titem\ttime\nu\ti\t{T}\n")
    run("--source", path, "--out", tmp_path / "out", "--default-kind", "play", "--delimiter", "tab")
    assert read_events(tmp_path / "out")["event"].to_pylist() == ["play"]


@pytest.mark.parametrize(
    ("values", "options", "printed"),
    [
        ("1 3 7 9", [], ["ratings: 4, scale 1-10", "ratings taken for dislikes: 2, those below 4.375"]),
        (
            "1 3 5",
            ["--rating-scale", "1-5"],
            ["ratings: 3, scale 1-5", "ratings taken for dislikes: 1, those below 2.5"],
        ),
        (
            "1 1 1",
            [],
            [
                "ratings: 3, scale implicit",
                "ratings taken for dislikes: none: the values are no opinions (else give --rating-scale)",
            ],
        ),
        (
            "4 5 5",
            [],
            [
                "ratings taken for dislikes: 0, those below 2.5",
                "warning: no rating is a dislike; if that is wrong give --rating-scale",
            ],
        ),
        (
            "0 0 1 2 8",
            ["--rating-scale", "1-10"],
            [
                "ratings beyond the scale: 2 (kept without their value)",
                "ratings taken for dislikes: 2, those below 4.375",
                "warning: most ratings are dislikes; if that is wrong give --rating-scale",
            ],
        ),
    ],
)
def test_what_was_taken_for_dislikes_is_printed(tmp_path, values, options, printed):
    path = tmp_path / "data.csv"
    lines = [f"u,i{place},{value},{T + place}" for place, value in enumerate(values.split())]
    path.write_text("user,item,rating,time\n" + "\n".join(lines))
    output = run("--source", path, "--out", tmp_path / "out", *options).splitlines()
    for line in printed:
        assert line in output
    assert sum(line.startswith("warning") for line in output) == sum(line.startswith("warning") for line in printed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--column", "user_id"], "--column 'user_id': write it as FIELD=NAME"),
        (["--column", "user_id=a", "--column", "user_id=b"], "'user_id' is given more than once"),
        (["--event-kind", "=view"], "--event-kind '=view': write it as THEIRS=OURS"),
        (["--event-kind", "a=zap"], "the kind must be one of view"),
        (["--default-kind", "zap"], "--default-kind zap"),
        (["--delimiter", "abc"], "--delimiter 'abc': it must be one character"),
        (["--format", "xml"], "--format xml"),
        (["--rating-scale", "ten"], "rating scale 'ten': write the worst and the best mark as 1-10"),
    ],
)
def test_bad_options_are_named(tmp_path, source, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run("--source", source, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_their_word_may_hold_an_equals_sign():
    assert ingest_job._pairs("--event-kind", ["a=b=view"]) == {"a=b": "view"}
    assert ingest_job._pairs("--column", ["user_id=a=b"]) == {"user_id": "a=b"}


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with ingest_job._progress(Console(stderr=True, force_terminal=False)) as progress:
        for done in range(0, 101):
            progress("reading", done, 100)
        progress("cleaning", 1, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"reading: {tenth}%" for tenth in range(10, 101, 10)), "cleaning: 100%"]


def test_a_terminal_gets_a_bar_and_a_table(tmp_path, capsys):
    console = Console(stderr=True, force_terminal=True, width=100)
    with ingest_job._progress(console) as progress:
        progress("reading", 50, 100)
    assert "50%" in capsys.readouterr().err
    report = ingest_job.IngestReport(source="[data]", format="csv", read=3, kept=2, rejected={"flood": 1})
    ingest_job._print_report(Console(force_terminal=True, width=100), report, tmp_path)
    output = capsys.readouterr().out
    assert "[data] (csv)" in output
    assert "rejected: flood" in output
