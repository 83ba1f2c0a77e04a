"""The offline protocols and rankings on a table small enough to check by hand, and the metrics."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, EVENT_SCHEMA
from lib.data.histories import Histories, histories_of
from lib.data.holdout import LEAVE_ONE_OUT, NONE, TEMPORAL, cutoff_time, training_part
from lib.data.ratings import RatingScale
from lib.evaluation.metrics import (
    bootstrap_means,
    coverage_at,
    interval,
    ndcg_at,
    recall_at,
    reciprocal_rank,
    self_information,
)
from lib.evaluation.protocols import Cases, Ranking, baseline_contender, case_inputs, cases_of, model_contender, rank
from lib.model.encoder import BehaviourEncoder
from tests.helpers.tiny import NOW, SECOND, item_ids, random_histories, tiny_encoder

# (user, item, seconds): the span is 100 s, so the test of the temporal protocol begins at second 80
ROWS = [
    ("a", 1, 0),
    ("a", 2, 50),
    ("a", 3, 80),
    ("a", 4, 100),
    ("b", 5, 90),
    ("b", 6, 95),
    ("c", 7, 10),
    ("d", 8, 20),
    ("d", 8, 79),
]


def table_of(rows: list[tuple[str, int, int]], kind: str = "click") -> pa.Table:
    columns = {
        "user_id": [user for user, _, _ in rows],
        "item_id": [f"i{item}" for _, item, _ in rows],
        "event": [kind] * len(rows),
        "value": [None] * len(rows),
        "timestamp": [NOW + second * SECOND for _, _, second in rows],
        "event_id": [None] * len(rows),
        "request_id": [None] * len(rows),
    }
    return pa.table(columns, schema=EVENT_SCHEMA)


def histories_from(rows: list[tuple[str, int, int]], items: int = 24) -> Histories:
    return histories_of(table_of(rows), Catalog(item_ids(items)).row_of, EVENT_KINDS)


@pytest.fixture
def histories() -> Histories:
    return histories_from(ROWS)


def readable(cases: Cases) -> set[tuple[str, tuple[int, ...], int]]:
    """(user, input items, target item) of each case."""
    inputs = case_inputs(cases, slice(None))
    spans = zip(inputs.user_ids, inputs.offsets[:-1], inputs.offsets[1:], cases.targets, strict=True)
    return {(user, tuple(inputs.rows[start:stop].tolist()), int(target)) for user, start, stop, target in spans}


def items_of(histories: Histories) -> dict[str, list[int]]:
    spans = zip(histories.user_ids, histories.offsets[:-1], histories.offsets[1:], strict=True)
    return {user: histories.rows[start:stop].tolist() for user, start, stop in spans}


def test_leave_one_out_cases(histories):
    assert readable(cases_of(histories, LEAVE_ONE_OUT)) == {("a", (1, 2, 3), 4), ("b", (5,), 6), ("d", (8,), 8)}


def test_leave_one_out_trains_on_the_rest(histories):
    # c has a single event, which is no target, so it may be learned from
    assert items_of(training_part(histories, LEAVE_ONE_OUT)) == {"a": [1, 2, 3], "b": [5], "c": [7], "d": [8]}


def test_temporal_cases(histories):
    assert cutoff_time(histories.timestamps) == NOW + 80 * SECOND
    # b's first event lies in the test, but nothing comes before it that it could be predicted from
    assert readable(cases_of(histories, TEMPORAL)) == {("a", (1, 2), 3), ("a", (1, 2, 3), 4), ("b", (5,), 6)}


@pytest.mark.parametrize(
    ("kind", "value", "ratings"),
    [("dislike", np.nan, None), ("skip", np.nan, None), ("rating", 2.0, None), ("rating", 4.0, RatingScale(1, 10))],
)
def test_what_was_disliked_is_an_input_and_no_target(histories, kind, value, ratings):
    own = [ratings] if ratings else []
    for place in (2, 5):  # a's third event of four, b's newest
        histories.kinds[place] = EVENT_KINDS.index(kind) + 1
        histories.values[place] = value
    assert readable(cases_of(histories, LEAVE_ONE_OUT, *own)) == {("a", (1, 2, 3), 4), ("d", (8,), 8)}
    assert readable(cases_of(histories, TEMPORAL, *own)) == {("a", (1, 2, 3), 4)}
    histories.kinds[:] = EVENT_KINDS.index(kind) + 1
    histories.values[:] = value
    assert readable(cases_of(histories, LEAVE_ONE_OUT, *own)) == set()


def test_temporal_trains_on_what_came_before(histories):
    assert items_of(training_part(histories, TEMPORAL)) == {"a": [1, 2], "b": [], "c": [7], "d": [8, 8]}


@pytest.mark.parametrize("protocol", [LEAVE_ONE_OUT, TEMPORAL])
def test_no_target_is_trained_on(protocol):
    random = random_histories(40, 5000, np.random.default_rng(0))
    random.rows[:] = np.arange(1, len(random.rows) + 1)  # every event can be told from every other
    targets = {target for _, _, target in readable(cases_of(random, protocol))}
    assert targets
    assert not targets & set(training_part(random, protocol).rows.tolist())


def test_without_holdout_all_is_trained_on(histories):
    assert training_part(histories, NONE) is histories


def test_cases_in_parts_are_the_cases(histories):
    cases = cases_of(histories, TEMPORAL)
    parts = [case_inputs(cases, slice(start, start + 2)) for start in (0, 2)]
    assert [len(inputs) for inputs in parts] == [2, 1]
    assert parts[1].rows.tolist() == [5]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_by_hand():
    ranks = np.array([0, 1, 2, 9, 10, 500])
    assert recall_at(ranks, 10).tolist() == [1, 1, 1, 1, 0, 0]
    assert recall_at(ranks, 1).tolist() == [1, 0, 0, 0, 0, 0]
    expected = [1.0, 1 / math.log2(3), 0.5, 1 / math.log2(11), 0.0, 0.0]
    assert ndcg_at(ranks, 10) == pytest.approx(expected)
    assert reciprocal_rank(ranks) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11, 1 / 501])
    assert coverage_at(np.array([[1, 2, 0], [2, 3, 0]]), 12) == 3 / 12
    assert coverage_at(np.zeros((2, 3), dtype=np.int64), 12) == 0


def test_surprise_by_hand():
    # an item that makes half of the events surprises by one bit; one that never occurred as much as one that did once
    assert self_information(np.array([0, 8, 4, 3, 1, 0])) == pytest.approx([4, 1, 2, math.log2(16 / 3), 4, 4])
    assert self_information(np.zeros(3)).tolist() == [0, 0, 0]


def test_the_interval_is_that_of_the_normal_distribution():
    # means of 400 draws of variance 1/4: the standard error is 1/40
    values = np.repeat([0.0, 1.0], 200)[:, None]
    means = bootstrap_means(values, np.ones_like(values))
    low, high = interval(means[:, 0])
    assert low == pytest.approx(0.5 - 1.96 / 40, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 / 40, abs=0.01)
    assert np.array_equal(means, bootstrap_means(values, np.ones_like(values)))
    assert not np.array_equal(means, bootstrap_means(values, np.ones_like(values), seed=1))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        values = generator.random((60, 1)) ** 2  # skewed, of mean 1/3
        low, high = interval(bootstrap_means(values, np.ones_like(values), 300, seed)[:, 0])
        held += low <= 1 / 3 <= high
    assert 0.90 <= held / 200 <= 0.98


def test_users_are_drawn_with_all_of_their_cases():
    # two users of 50 equal cases each: what is uncertain is which user was drawn, whatever the number of cases
    means = bootstrap_means(np.array([[0.0], [50.0]]), np.full((2, 1), 50.0))
    assert set(means[:, 0].tolist()) == {0.0, 0.5, 1.0}
    assert (means == 0.5).mean() == pytest.approx(0.5, abs=0.06)
    # a user of three cases weighs three times as much as a user of one
    means = bootstrap_means(np.array([[3.0], [0.0]]), np.array([[3.0], [1.0]]))
    assert set(means[:, 0].tolist()) == {0.0, 0.75, 1.0}


def test_draws_in_parts_are_whole(monkeypatch):
    sums = np.random.default_rng(0).random((7, 2))
    for at_once in (1, 20, 10_000):
        monkeypatch.setattr("lib.evaluation.metrics.DRAWS_AT_ONCE", at_once)
        means = bootstrap_means(sums, np.ones_like(sums), 50)
        assert means.shape == (50, 2)
        assert sums.min() < means.min() < means.max() < sums.max()


def test_a_resample_without_a_case_has_no_mean():
    means = bootstrap_means(np.array([[1.0], [0.0], [0.0]]), np.array([[1.0], [0.0], [0.0]]))
    assert np.isnan(means).any()
    assert interval(means[:, 0]) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in interval(np.full(3, np.nan)))


# ---------------------------------------------------------------------------------------------------------------------
# A model whose ranking is known: it finds items in the order 1, 2, 3, ... for everybody


def ordered_model(items: int) -> BehaviourEncoder:
    encoder = tiny_encoder(items)
    angles = torch.linspace(0, 1.5, items)
    with torch.no_grad():
        encoder.item_embeddings.weight.zero_()
        encoder.item_embeddings.weight[1:, 0], encoder.item_embeddings.weight[1:, 1] = angles.cos(), angles.sin()
        encoder.interest_to_item.zero_()
        encoder.final_norm.weight.zero_()
        encoder.final_norm.weight[2] = 1.0  # u is (0, 0, +-1, 0, ...)
        encoder.interest_to_item[2, 0] = 1.0
    return encoder


def certain_model(items: int) -> BehaviourEncoder:
    """Its every u points the same way: whether item 1 comes first must not depend on chance."""
    encoder = ordered_model(items)
    with torch.no_grad():
        encoder.position_embeddings.weight[:, 2] = 100.0
    return encoder


def run(rows: list[tuple[str, int, int]], items: int = 24, k: int = 3, batch: int = 256) -> Ranking:
    catalog = Catalog(item_ids(items))
    cases = cases_of(histories_from(rows, items), LEAVE_ONE_OUT)
    return rank(model_contender("m", certain_model(items), catalog, catalog), cases, k, batch)


HAND = [
    ("a", 9, 0), ("a", 1, 1),  # found first: rank 0
    ("b", 1, 0), ("b", 3, 1),  # 1 is seen, so the order is 2, 3: rank 1
    ("c", 20, 0), ("c", 10, 1),  # rank 9
    ("d", 7, 0),  # a single event is no case
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_ranking_by_hand(batch):
    found = run(HAND, batch=batch)
    assert found.ranks.tolist() == [0, 1, 9]
    assert found.recommended.tolist() == [[1, 2, 3], [2, 3, 4], [1, 2, 3]]
    assert (found.unknown_targets, found.unknown_inputs) == (0, 0)


def test_few_scores_at_once_change_nothing(monkeypatch):
    whole = run(HAND)
    monkeypatch.setattr("lib.evaluation.protocols.MOST_SCORES", 30)  # one case at a time
    assert np.array_equal(run(HAND).ranks, whole.ranks)
    assert np.array_equal(run(HAND).recommended, whole.recommended)


def test_a_seen_target_is_a_miss_however_small_the_catalog():
    for items in (4, 24):
        found = run([("a", 1, 0), ("a", 2, 1), ("a", 1, 2)], items=items, k=10)
        assert found.ranks.tolist() == [max(items, 10)]


def test_seen_items_are_never_recommended():
    # three of five items are seen: two are left to recommend, however many are asked for
    found = run([("a", 1, 0), ("a", 2, 1), ("a", 3, 2), ("a", 4, 3)], items=5, k=10)
    assert found.recommended.tolist() == [[4, 5, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert found.ranks.tolist() == [0]


def test_a_model_to_which_all_items_are_alike_finds_nothing(histories):
    catalog = Catalog(item_ids(24))
    cases = cases_of(histories, TEMPORAL)
    encoder = ordered_model(24)
    with torch.no_grad():
        encoder.item_embeddings.weight[1:] = encoder.item_embeddings.weight[1].clone()
    assert (rank(model_contender("m", encoder, catalog, catalog), cases, k=3).ranks >= 3).all()
    with torch.no_grad():
        encoder.interest_to_item[:] = float("nan")
    assert (rank(model_contender("m", encoder, catalog, catalog), cases, k=3).ranks >= 3).all()


def test_temporal_histories_advance_while_weights_stay():
    catalog = Catalog(item_ids(24))
    cases = cases_of(histories_from([("a", 9, 0), ("a", 1, 80), ("a", 2, 90), ("a", 3, 100)]), TEMPORAL)
    encoder = certain_model(24)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    # each target is the first of those that are not seen by then
    assert rank(model_contender("m", encoder, catalog, catalog), cases, k=1).ranks.tolist() == [0, 0, 0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# A contender that does not know all items


def unknowing(known: list[int]) -> tuple[BehaviourEncoder, Catalog]:
    """A model of these items, which it finds in this order."""
    return certain_model(len(known)), Catalog([f"i{item}" for item in known])


def test_an_unknown_target_is_a_miss_and_unknown_items_are_no_input():
    rows = [
        ("a", 5, 0), ("a", 1, 1), ("a", 9, 2),  # 5 is unknown; 9 is found first, before 1 and 2
        ("b", 1, 0), ("b", 5, 1),  # unknown: a miss
        ("c", 5, 0), ("c", 6, 1), ("c", 2, 2),  # nothing that it knows: what is popular, and that is 1, then 2
    ]  # fmt: skip
    items = Catalog(item_ids(24))
    encoder, catalog = unknowing([9, 1, 2])
    encoder.item_popularity[:] = torch.tensor([0.0, 0.0, 7.0, 3.0])  # in the model's own rows
    contender = model_contender("m", encoder, catalog, items)
    found = rank(contender, cases_of(histories_from(rows), LEAVE_ONE_OUT), k=3)
    assert found.ranks.tolist() == [0, 24, 1]
    assert found.recommended.tolist() == [[9, 2, 0], [9, 2, 0], [1, 2, 0]]
    assert (found.unknown_targets, found.unknown_inputs) == (1, 1)


def test_an_item_that_only_the_model_knows_is_ranked():
    items = Catalog([*item_ids(3), "other"])
    encoder, catalog = certain_model(4), Catalog(["other", *item_ids(3)])
    cases = cases_of(histories_from([("a", 1, 0), ("a", 2, 1)], 3), LEAVE_ONE_OUT)
    found = rank(model_contender("m", encoder, catalog, items), cases, k=3)
    assert found.ranks.tolist() == [1]
    assert found.recommended.tolist() == [[4, 2, 3]]


def test_what_a_baseline_never_recommends_is_a_miss():
    scores = np.full(25, -np.inf, dtype=np.float32)
    scores[[1, 3]] = [1.0, 2.0]
    contender = baseline_contender("b", lambda inputs: np.tile(scores, (len(inputs), 1)), Catalog(item_ids(24)))
    cases = cases_of(histories_from([("a", 9, 0), ("a", 1, 1), ("b", 3, 0), ("b", 4, 1)]), LEAVE_ONE_OUT)
    found = rank(contender, cases, k=2)
    assert found.ranks.tolist() == [1, 24]
    assert found.recommended.tolist() == [[3, 1], [1, 0]]
