"""Tables at 80 columns: no cell is broken, and what does not fit beside the first column goes on below."""

import numpy as np
import pytest

from jobs.reports import print_comparison, print_replay
from jobs.status import _print_part, _print_replicas
from jobs.tables import print_facts, print_table
from lib.evaluation.comparison import Breakdown, Comparison, Estimate, Result
from lib.live.prequential_comparison import METRICS, ArmResult, ReplayComparison, SourceResult
from serving.status import ReplicaStatus, Unavailable

LONG_PATH = "/srv/models/of-a-shop-with-a-long-name/trained-2026-11-30-with-other-settings/model"


def test_a_table_that_fits_is_one(capsys):
    print_table(["name", "count", "share\nof all"], [["a", "12", "0.5"], ["bc", "3", "0.25\n0.2-0.3"]], "Title")
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name  count    share",
        "              of all",
        "----  -----  -------",
        "a        12      0.5",
        "bc        3     0.25",
        "             0.2-0.3",
        "",
    ]


def test_a_table_that_is_wider_goes_on_below_beside_the_names(capsys):
    columns = ["name", *(f"column-{number}" for number in range(12))]
    rows = [[name, *(f"{name}{number}" for number in range(12))] for name in ("first", "second")]
    print_table(columns, rows, "Title", width=80)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.count("Title") == 2
    assert [line.split()[0] for line in lines if line.startswith(("first", "second"))] == ["first", "second"] * 2
    assert all(cell in out.split() for row in (columns, *rows) for cell in row)


@pytest.mark.parametrize("columns", ["80", None])
def test_values_that_are_to_be_copied_are_never_broken(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    print_facts([("state", LONG_PATH), ("n", 3)], "learner")
    assert capsys.readouterr().out.splitlines() == ["learner", f"  state  {LONG_PATH}", "  n      3", ""]
    print_table(["path", "bytes"], [[LONG_PATH, "12"]])
    assert f"{LONG_PATH}  " in capsys.readouterr().out


def test_the_status_of_many_replicas_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = set(ReplicaStatus.model_fields) - {"replica_id", "checksum", "latency_buckets", "idle_rules"}
    fields = dict.fromkeys(names, 123_456_789) | {"checksum": "0123456789abcdef", "latency_buckets": []}
    idle = ["pin.1: there is no item 'x'"]
    replicas = [
        ReplicaStatus.model_validate(fields | {"replica_id": f"replica{number}", "idle_rules": idle})
        for number in range(3)
    ]
    _print_replicas(replicas)
    _print_part("learner", Unavailable(state="restarting"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("replica0") == 1
    assert out.count("ranking.pin.1: there is no item 'x'") == 1


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.01)


def numbers_of(out: str) -> list[str]:
    return [word for word in out.split() if word[:2] in ("0.", "+0", "1.")]


def test_comparisons_of_models_with_long_names_are_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {f"{name}@{k}": estimate(0.1 + k / 1000) for name in ("recall", "ndcg") for k in (5, 10, 20)}
    metrics |= {"mrr": estimate(0.3), "coverage": Estimate(0.5, float("nan"), float("nan"))}
    labels = ["1", "2-4", "5-9", "10-99", "100 and more"]
    activity = Breakdown("activity", labels, np.repeat(np.arange(5), 123_456))
    buckets = [[{"ndcg@10": estimate(0.2)} | metrics for _ in range(5)]]
    results = [
        Result(name, metrics, buckets, {} if name == "popular" else metrics)
        for name in ("popular", "models/of-a-shop-with-a-long-name")
    ]
    print_comparison(Comparison(1000, 1000, [activity], results), "films, leave-one-out")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in metrics)
    whole = numbers_of(out)
    assert len(whole) == 8 * 2 + 8 + 5 * 2
    assert all(len(number) >= 5 for number in whole)


def test_a_replay_is_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    groups = {"all": 83_846_000, "new users": 12_345_678, "known users": 71_500_322, "new items": 1, "known items": 2}
    arms = [
        ArmResult(
            name=name,
            metrics={group: {metric: estimate(0.1234) for metric in METRICS} for group in groups},
            lift={} if name == "history" else {metric: estimate(0.1) for metric in METRICS},
            over_time={},
            facts={"learn_seconds": 12_345.0, "events_read": 123_456_789},
            sources={
                source: SourceResult(*({metric: estimate(value) for metric in METRICS} for value in (0.2345, -0.0123)))
                for source in ("nearest", "trend_10000")
            },
        )
        for name in ("history", "live, with a long name")
    ]
    print_replay(ReplayComparison(83_846_000, 10, groups, [], arms), "a replay")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("0.1234") == 2 * (len(METRICS) + len(groups) + 1)
    assert out.count("123,456,789") == 2
    assert (out.count("0.2345"), out.count("-0.0123")) == (2 * 2, 2 * 2)
