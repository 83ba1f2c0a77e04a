import io
import re

import pytest
from rich.console import Console

from jobs.demo.live_view import LiveView, sparkline, summary
from jobs.demo.tally import Tally
from lib.data.events import Event

STATUS = {
    "model_version": 42,
    "freshness": {"last_ms": 310.0, "p50_ms": 290.4, "p99_ms": 1250.0, "count": 41},
    "replicas": [
        {"replica_id": "replica-a1b2c3", "version": 42, "checksum": "0123456789abcdef"},
        {"replica_id": "replica-d4e5f6", "version": 41, "checksum": "fedcba9876543210"},
    ],
    "learner": {"state": "running", "version": 42, "pushes": 41, "rejected_updates": 2, "events_trained": 2624},
    "aggregator": {"log_offset": 2700, "events": 2700, "pending": 12},
}


@pytest.fixture
def tally():
    tally = Tally(requests=2000, events_sent=900, events_acknowledged=899, answers=1100, version=42)
    for trial in range(500):
        tally.count_trial(trial % 2 == 0, trial % 4 == 0)
    tally.latencies_ms.extend([4.0, 5.0, 6.0])
    tally.latest.append((Event("visitor-00007", "item-0001", "click", None, 5), True))
    tally.latest.append((Event("visitor-[b]", "item-9999", "view", None, 6), None))
    return tally


def text_of(renderable, width=120, height=60):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(renderable)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def view_on(terminal, height=60):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, height=height)
    return LiveView({"item-0001": "Nordic Desk Lamp"}, console), out


def row_of(text, name):
    return next(re.sub(r"\s+", " ", line) for line in text.splitlines() if name in line)


def test_the_view_shows_every_number(tally):
    view, _ = view_on(terminal=True)
    text = text_of(view.render(tally, STATUS))
    assert "model version 42" in text
    assert "pushes 41" in row_of(text, "pushes")
    assert "rejected updates 2" in row_of(text, "rejected updates")
    assert "310 ms (p50 290 ms, p99 1.2 s)" in text
    assert "a1b2c3 42 01234567" in row_of(text, "a1b2c3")
    assert "d4e5f6 41 fedcba98" in row_of(text, "d4e5f6")
    assert "0 of 2,000" in row_of(text, "failed requests")
    assert "0.500 0.250 +0.250" in row_of(text, "all ")
    assert "0.500 0.250 +0.250 500 █" in row_of(text, "last 1,000")
    assert "click Nordic Desk Lamp was recommended" in row_of(text, "visitor-00007")
    assert "visitor-[b] view item-9999" in row_of(text, "visitor-[b]")  # text of others is not markup


@pytest.mark.parametrize("missing", [None, *STATUS])
def test_a_part_that_is_missing_or_null_shows_as_unknown(tally, missing):
    view, _ = view_on(terminal=True)
    statuses = [{**STATUS, missing: None}, {k: v for k, v in STATUS.items() if k != missing}] if missing else [None, {}]
    for status in statuses:
        text = text_of(view.render(tally, status))
        assert "model version 42" in text  # from the answers, where the status has none
        assert ("–" in text) == (missing != "model_version")
        assert view.line(tally, status).startswith("version 42 |")
        assert "hit rate@10, live" in text_of(summary(tally, status))


@pytest.mark.parametrize("part", ["freshness", "learner", "aggregator"])
def test_the_numbers_of_a_part_may_be_null(tally, part):
    status = {**STATUS, part: dict.fromkeys(STATUS[part])}
    view, _ = view_on(terminal=True)
    assert "–" in text_of(view.render(tally, status))
    assert text_of(summary(tally, status))


def test_before_the_first_answer_there_are_no_rates():
    view, _ = view_on(terminal=True)
    text = text_of(view.render(Tally(), None))
    assert "nan" not in text
    assert "nan" not in view.line(Tally(), None)
    assert "nan" not in text_of(summary(Tally(), None))
    assert "–" in row_of(text, "all ")


def test_failures_are_shown_with_the_last_error(tally):
    tally.count_failure("GET /v1/users/[a]/recommendations: 503 down")
    view, _ = view_on(terminal=True)
    text = text_of(view.render(tally, STATUS), width=160)
    assert "1 of 2,000" in row_of(text, "failed requests")
    assert "[a]/recommendations" in text
    assert "1 of 2,000; the last: GET /v1/users/[a]/recommendations: 503 down" in text_of(summary(tally, STATUS))


def test_elsewhere_than_on_a_terminal_a_plain_line_comes_every_five_seconds(tally, monkeypatch):
    now = 100.0
    monkeypatch.setattr("jobs.demo.live_view.time.monotonic", lambda: now)
    view, out = view_on(terminal=False)
    with view:
        for _ in range(24):  # six seconds
            view.update(tally, STATUS)
            now += 0.25
            tally.events_acknowledged += 10
            tally.answers += 5
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "\x1b" not in out.getvalue()
    assert lines[1] == (
        "version 42 | pushes 41 | event to weights p50 290 ms p99 1.2 s | 2 replicas (42, 41)"
        " | 40 events/s, 20 answers/s | failed 0 | hit rate@10 of the last 500: live 0.500, frozen 0.250"
    )


def test_on_a_terminal_the_view_is_redrawn_in_place(tally):
    view, out = view_on(terminal=True)
    with view:
        view.update(tally, STATUS)
        view.update(tally, {**STATUS, "model_version": 43})
    assert "model version 42" in out.getvalue()
    assert "model version 43" in out.getvalue()
    assert "\x1b[1A" in out.getvalue()  # the cursor goes up to draw over what was there


def test_the_latest_events_give_way_on_a_low_terminal(tally):
    for number in range(12):
        tally.latest.append((Event(f"visitor-{number:05d}", "item-0001", "view", None, number), None))
    heights = {}
    for height in (24, 60):
        view, _ = view_on(terminal=True, height=height)
        heights[height] = text_of(view.render(tally, STATUS)).count("visitor-0")
    assert heights == {24: 3, 60: 12}


def test_the_summary_names_trials_and_the_interval(tally):
    text = text_of(summary(tally, STATUS))
    assert "0.500 (250 of 500 trials)" in row_of(text, "hit rate@10, live")
    assert "0.250 (125 of 500 trials)" in row_of(text, "hit rate@10, frozen")
    # 125 of 500 trials differ, all in favour of live: 0.25, standard error sqrt(0.25 * 0.75 / 500) = 0.0194
    assert "+0.250 (+0.212 to +0.288), 95% interval, paired" in text
    assert "42 (41 pushes, 2 updates rejected)" in text
    assert "899 of 900 acknowledged" in text


def test_a_sparkline_spans_its_numbers_and_zero():
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([0.0, 0.07, 0.035, 0.07]) == "▁█▅█"
    assert sparkline([-1.0, 0.0, 1.0]) == "▁▅█"


def test_a_terminal_of_80_columns_holds_every_number_on_its_line(tally):
    for _ in range(2000):
        tally.count_trial(True, False)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    text = text_of(LiveView(console=console).render(tally, STATUS), width=80)
    assert "(+0." in row_of(text, "all ")
    assert "2,500" in row_of(text, "all ")
    assert row_of(text, "last 1,000").rstrip(" │").endswith(sparkline(list(tally.differences)[-9:]))
