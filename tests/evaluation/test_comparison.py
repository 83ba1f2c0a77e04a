"""Contenders side by side: buckets, intervals and differences by hand, and what `evaluate` prints, writes and draws."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.configuration import write_json
from jobs.evaluate import _names, evaluate_command, evaluate_models
from jobs.reports import plot_comparison, print_comparison
from lib.data.catalog import Catalog
from lib.data.events import EVENT_SCHEMA
from lib.data.holdout import LEAVE_ONE_OUT, TEMPORAL
from lib.errors import InputError
from lib.evaluation.comparison import Comparison, activity, compare, item_popularity
from lib.evaluation.protocols import Cases, Ranking
from lib.model.facts import TrainingFacts
from lib.model.folder import Manifest, save_model
from lib.ranking.features import FEATURES
from lib.ranking.fit import Whole, count_all
from tests.helpers.tiny import NOW, SECOND, item_ids, random_histories, tiny_encoder


def cases_with(users: list[int], inputs: list[int]) -> Cases:
    """Cases of which only users and lengths of input matter."""
    return Cases(random_histories(2, 2, np.random.default_rng(0)), np.array(users), np.array(inputs))


def ranking(ranks: list[int], recommended: list[list[int]]) -> Ranking:
    return Ranking(np.array(ranks), np.array(recommended, dtype=np.int32), 0, 0)


# -------------------------------------------------------------------------------------------------------------- buckets


def test_activity_in_quarters():
    found = activity(cases_with([0] * 8, [8, 7, 6, 5, 4, 3, 2, 1]))
    assert found.labels == ["1-2 events", "3-4 events", "5-6 events", "7-8 events"]
    assert found.buckets.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert found.cases == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ([1], ["1 event"]),
        ([5, 5, 5], ["5 events"]),
        ([1, 1, 1, 1, 2, 1500], ["1 event", "2 events", "3-1,500 events"]),
        ([2, 3], ["2 events", "3 events"]),
    ],
)
def test_activity_where_many_are_alike(inputs, labels):
    found = activity(cases_with([0] * len(inputs), inputs))
    assert found.labels == labels
    assert sum(found.cases) == len(inputs)


def test_item_popularity_by_hand():
    # of 100 events item 1 has 30, 2 has 25: the two that make half; 3 to 5 make the next 30%, 6 to 8 the rest
    counts = np.array([0, 30, 25, 20, 5, 5, 5, 5, 5, 0, 0])
    found = item_popularity(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1]), counts)
    assert found.labels == ["head", "mid", "tail", "new"]
    assert found.buckets.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 0]
    assert found.items == [2, 2, 4, 2]  # 55% + 25% = 80%: item 5 begins the tail
    assert found.cases == [3, 2, 4, 1]


def test_nothing_was_trained_on():
    found = item_popularity(np.array([1, 2]), np.zeros(3, dtype=np.int64))
    assert found.cases == [0, 0, 0, 2]
    assert found.items == [0, 0, 0, 2]


# ----------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def comparison() -> Comparison:
    """Three users, one of them with two cases; k is 2 and items 1 and 2 make half and a quarter of the events."""
    cases = cases_with([0, 0, 4, 7], [1, 1, 5, 9])
    counts = np.array([0, 8, 4, 3, 1])
    one = ranking([0, 2, 1, 0], [[1, 2], [1, 0], [2, 3], [0, 0]])
    other = ranking([0, 0, 0, 9], [[1, 2], [3, 4], [1, 2], [1, 2]])
    broken = [activity(cases), item_popularity(np.array([1, 2, 4, 1]), counts)]
    return compare([("one", one), ("other", other), ("again", one)], cases, broken, counts)


def test_metrics_by_hand(comparison):
    one = {name: estimate.value for name, estimate in comparison.results[0].metrics.items()}
    half = 1 / math.log2(3)
    bits = [0.0, 1.0, 2.0, math.log2(16 / 3), 4.0]
    assert (comparison.cases, comparison.users) == (4, 3)
    assert one == pytest.approx(
        {
            "recall@2": 3 / 4,
            "ndcg@2": (1 + 0 + half + 1) / 4,
            "mrr": (1 + 1 / 3 + 1 / 2 + 1) / 4,
            # the mean of each list, over the three that recommend something
            "novelty@2": ((bits[1] + bits[2]) / 2 + bits[1] + (bits[2] + bits[3]) / 2) / 3,
            "coverage@2": 3 / 4,
        }
    )


def test_intervals_hold_the_value(comparison):
    for result in comparison.results:
        for name, estimate in result.metrics.items():
            if name == "coverage@2":  # a resample has fewer different users, so its coverage says nothing
                assert math.isnan(estimate.low)
                continue
            assert estimate.low <= estimate.value <= estimate.high
    recall = comparison.results[0].metrics["recall@2"]
    # users 4 and 7 hit always, user 0 one time in two
    assert (recall.low, recall.high) == (0.5, 1.0)


def test_the_difference_of_a_model_with_itself_is_nothing(comparison):
    first, other, again = comparison.results
    assert first.differences == {}
    for estimate in again.differences.values():
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    recall = other.differences["recall@2"]
    assert recall.value == pytest.approx(3 / 4 - 3 / 4)
    # paired: against `one`, user 0 wins one case of two and user 7 loses one of one, user 4 is as good
    assert (recall.low, recall.high) == (-1.0, 0.5)


def test_buckets_by_hand(comparison):
    by_activity, by_popularity = comparison.breakdowns
    assert by_activity.labels == ["1 event", "2-5 events", "6-9 events"]
    assert by_activity.cases == [2, 1, 1]
    assert by_popularity.cases == [2, 1, 1, 0]
    recalls = [[bucket["recall@2"].value for bucket in buckets] for buckets in comparison.results[0].breakdowns]
    assert recalls[0] == [0.5, 1.0, 1.0]
    assert recalls[1][:3] == [1.0, 0.0, 1.0]
    assert math.isnan(recalls[1][3])
    only_user_4 = comparison.results[0].breakdowns[0][1]["ndcg@2"]
    assert (only_user_4.low, only_user_4.high) == pytest.approx((1 / math.log2(3),) * 2)


def test_buckets_add_up_to_the_whole(comparison):
    for result in comparison.results:
        for breakdown, buckets in zip(comparison.breakdowns, result.breakdowns, strict=True):
            assert sum(breakdown.cases) == comparison.cases
            for metric in ("recall@2", "ndcg@2"):
                total = sum(n * b[metric].value for n, b in zip(breakdown.cases, buckets, strict=True) if n)
                assert total / comparison.cases == pytest.approx(result.metrics[metric].value)


def test_tables_are_plain_and_fit_into_80_columns(comparison, capsys):
    print_comparison(comparison, "data, leave-one-out")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for text in ("data, leave-one-out", "0.7500", ".500-1.00", "difference from one", "2-5 events", "0 cases", "-1.00"):
        assert text in out


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users and 24 items, and two items that no model knows, one of which is nothing but a target."""
    folder = tmp_path_factory.mktemp("evaluated") / "films"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item}") for user in range(40) for item in generator.integers(1, 25, 2 + user % 9)]
    rows = [("new", "i1"), ("new", "unknown"), ("old", "unknown"), ("old", "i2"), *rows]
    rows += [("late", "i1"), ("late", "only a target")]
    times = [NOW + place * SECOND for place in range(len(rows))]
    columns = {
        "user_id": [user for user, _ in rows],
        "item_id": [item for _, item in rows],
        "event": ["click"] * len(rows),
        "value": [None] * len(rows),
        "timestamp": times,
        "event_id": [None] * len(rows),
        "request_id": [None] * len(rows),
    }
    pq.write_table(pa.table(columns, schema=EVENT_SCHEMA), folder / "events.parquet")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, of 24 and of 12 items, that say of themselves that they held out the newest event."""
    folder = tmp_path_factory.mktemp("models")
    for name, items in (("large", 24), ("small", 12)):
        manifest = Manifest(version=3, training=TrainingFacts(holdout=LEAVE_ONE_OUT))
        save_model(folder / name, tiny_encoder(items), Catalog(item_ids(items)), manifest)
    return [folder / "large", folder / "small"]


def test_one_models_figures_stand_at_the_top(data, models):
    written = evaluate_models(data, models[:1], LEAVE_ONE_OUT).as_json()
    own = written["contenders"][0]
    for name in ("recall@10", "ndcg@10", "mrr", "coverage@10", "novelty@10", "items", "model_version"):
        assert written[name] == own[name]
    assert (written["cases"], written["users"], written["all_items"]) == (43, 43, 26)
    assert (written["protocol"], written["model_version"], written["items"]) == (LEAVE_ONE_OUT, 3, 24)
    assert [contender["name"] for contender in written["contenders"]] == ["large", "popularity", "item-to-item"]
    json.dumps(written, allow_nan=False)


def test_sources_of_a_model_with_a_ranker_stand_beside_its_whole_answer(data, tmp_path, capsys):
    encoder, catalog = tiny_encoder(24), Catalog(item_ids(24))
    encoder.add_ranker(8, len(FEATURES))
    count_all(encoder, Whole(random_histories(40, 24, np.random.default_rng(0))))
    save_model(tmp_path / "m", encoder, catalog, Manifest(training=TrainingFacts(holdout=LEAVE_ONE_OUT)))
    evaluate_command(data, [tmp_path / "m"], json_=tmp_path / "f.json")
    shown = capsys.readouterr().out
    assert "m: each source of candidates alone, and the whole answer without it" in shown
    assert "difference from whole, paired" in shown
    (model, *baselines) = json.loads((tmp_path / "f.json").read_text())["contenders"]
    told = {source["name"]: source for source in model["sources"]}
    assert {"nearest", "following", "together", "trend_1000", "without nearest", "without together"} <= told.keys()
    for source in told.values():
        assert source["difference"]["ndcg@10"] == pytest.approx(source["ndcg@10"] - model["ndcg@10"])
        low, high = source["difference"]["intervals"]["ndcg@10"]
        assert low <= source["difference"]["ndcg@10"] <= high
    assert not any("sources" in each for each in baselines)
    evaluate_command(data, [tmp_path / "m"], sources=False, without_sources=["nearest"], json_=tmp_path / "g.json")
    (left, *_) = json.loads((tmp_path / "g.json").read_text())["contenders"]
    assert "sources" not in left
    assert left["ndcg@10"] == told["without nearest"]["ndcg@10"]
    with pytest.raises(InputError, match="without_sources: there is no source 'nearby'"):
        evaluate_models(data, [tmp_path / "m"], LEAVE_ONE_OUT, without_sources=["nearby"])


def test_what_a_model_does_not_know_is_counted(data, models):
    large, small = evaluate_models(data, models, LEAVE_ONE_OUT, baselines=False).facts
    assert (large["events_of_unknown_items"], large["cases_of_unknown_target"]) == (3, 2)
    assert large["cases_without_known_input"] == 1
    assert small["events_of_unknown_items"] > 50
    assert small["cases_of_unknown_target"] > 10
    assert small["items"] == 12


def test_all_contenders_have_the_same_cases_whatever_they_know(data, models):
    both = evaluate_models(data, models, LEAVE_ONE_OUT)
    written = both.as_json()
    assert "recall@10" not in written  # whose?
    assert written["cases"] == 43
    for contender in written["contenders"]:
        for breakdown in ("by_activity", "by_item_popularity"):
            assert sum(bucket["cases"] for bucket in contender[breakdown]) == 43
    alone = evaluate_models(data, models[1:], LEAVE_ONE_OUT, baselines=False)
    # another model beside it changes nothing but the universe of items that coverage is a share of
    assert both.comparison.results[1].metrics["ndcg@10"] == alone.comparison.results[0].metrics["ndcg@10"]
    first, second = written["contenders"][:2]
    assert "difference" not in first
    assert second["difference"]["from"] == "large"
    assert second["difference"]["ndcg@10"] == pytest.approx(second["ndcg@10"] - first["ndcg@10"])
    low, high = second["difference"]["intervals"]["ndcg@10"]
    assert low <= second["difference"]["ndcg@10"] <= high


def test_the_temporal_protocol_has_more_cases_than_users(data, models):
    evaluation = evaluate_models(data, models[:1], TEMPORAL, allow_leak=True)
    assert evaluation.comparison.cases > evaluation.comparison.users > 1


def test_contenders_have_different_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _names([Path("a/m"), Path("b/n")]) == ["m", "n"]
    assert _names([Path("a/m"), Path("b/m"), Path("a/m")]) == ["a/m", "b/m", "a/m (2)"]
    assert _names([Path()]) == [tmp_path.name]
    assert _names([Path("popularity")]) == [f"{tmp_path.name}/popularity"]


# -------------------------------------------------------------------------------------------------------------- command


def test_json_and_plot_are_written(data, models, tmp_path, capsys):
    evaluate_command(data, models, json_=tmp_path / "new" / "f.json", plot=tmp_path / "new" / "f.PNG")
    out = capsys.readouterr().out
    for text in ("films, leave-one-out, 43 cases of 43 users", "large", "small", "popularity", "item-to-item"):
        assert text in out
    written = json.loads((tmp_path / "new" / "f.json").read_text())
    assert len(written["contenders"]) == 4
    header = (tmp_path / "new" / "f.PNG").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert (width, height) == (1920, 660)


def refused(beginning: str, remedy: str, *arguments, **options) -> None:
    with pytest.raises(InputError) as refusal:
        evaluate_command(*arguments, **options)
    assert str(refusal.value).startswith(beginning)
    assert remedy in str(refusal.value)


def test_bad_input_is_refused(data, models, tmp_path):
    refused("plot: f.pdf is no PNG", "ends in .png", data, models, plot=Path("f.pdf"))
    refused("model: none is given", "name one or more", data, [])
    refused("protocol: 'luck'", TEMPORAL, data, models, protocol="luck")
    refused(f"protocol: {models[0]} was trained", "--allow-leak", data, models, protocol=TEMPORAL)
    refused("model: no folder at", "afterclick pretrain", data, [models[0], tmp_path / "absent"])
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused(f"json: {blocked / 'f.json'} cannot", "another file", data, models[:1], json_=blocked / "f.json")


def test_a_plot_that_cannot_be_written(comparison, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"plot: .*f\.png cannot be written .*; name another file"):
        plot_comparison(comparison, "title", blocked / "f.png")


def test_data_of_other_items(data, models, tmp_path):
    save_model(tmp_path / "other", tiny_encoder(3), Catalog(["x", "y", "z"]), Manifest())
    refused(
        "data: none of its items is in the catalog of", "it was trained on", data, [tmp_path / "other"], allow_leak=True
    )


def test_data_without_cases(data, models, tmp_path):
    shutil.copytree(data, tmp_path / "few")
    table = pq.read_table(data / "events.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "few" / "events.parquet")
    refused("data: ", "ingest more events", tmp_path / "few", models)


def test_targets_are_not_counted_as_training(data, models):
    evaluation = evaluate_models(data, models[:1], LEAVE_ONE_OUT)
    # the one item that is nothing but a target is new, and no baseline can find it
    assert evaluation.comparison.breakdowns[1].cases[3] == 1
    for result in evaluation.comparison.results[1:]:
        assert result.breakdowns[1][3]["recall@10"].value == 0


def test_no_number_that_json_does_not_know(data, models, tmp_path):
    table = pq.read_table(data / "events.parquet")
    pq.write_table(table.slice(0, len(table) - 2), tmp_path / "events.parquet")
    written = evaluate_models(tmp_path, models[:1], LEAVE_ONE_OUT, baselines=False).as_json()
    empty = written["contenders"][0]["by_item_popularity"][3]  # no target is new now
    assert empty == {"bucket": "new", "cases": 0, "items": 0, "recall@10": None, "ndcg@10": None, "intervals": {}}
    write_json(tmp_path / "f.json", written)
    assert "NaN" not in (tmp_path / "f.json").read_text()
