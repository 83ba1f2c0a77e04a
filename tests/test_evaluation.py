"""The offline protocols on a table small enough to check by hand, and the metrics."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.catalog import Catalog
from lib.encoder import BehaviourEncoder
from lib.evaluation import (
    LEAVE_ONE_OUT,
    NONE,
    TEMPORAL,
    Cases,
    case_inputs,
    cases_of,
    cutoff_time,
    evaluate,
    known_histories,
    training_part,
)
from lib.events import EVENT_KINDS, EVENT_SCHEMA, InputError
from lib.histories import Histories
from lib.metrics import coverage_at, ndcg_at, recall_at, reciprocal_rank
from tests.tiny import NOW, SECOND, item_ids, random_histories, tiny_encoder

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


@pytest.fixture
def histories() -> Histories:
    return known_histories(table_of(ROWS), Catalog(item_ids(24)), list(EVENT_KINDS))[0]


def readable(cases: Cases) -> set[tuple[str, tuple[int, ...], int]]:
    """(user, input items, target item) of each case."""
    inputs, targets = case_inputs(cases, slice(None))
    spans = zip(inputs.user_ids, inputs.offsets[:-1], inputs.offsets[1:], targets, strict=True)
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
    assert [len(targets) for _, targets in parts] == [2, 1]
    assert parts[1][0].rows.tolist() == [5]


def test_events_of_unknown_items_are_counted():
    known, left_out = known_histories(table_of(ROWS), Catalog(item_ids(4)), list(EVENT_KINDS))
    assert left_out == 5
    assert items_of(known) == {"a": [1, 2, 3, 4]}
    with pytest.raises(InputError, match="none of its items is in the model's catalog"):
        known_histories(table_of(ROWS), Catalog(["other"]), list(EVENT_KINDS))


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


def signs(encoder: BehaviourEncoder, cases: Cases) -> None:
    """Make every u of these cases point the same way: whether item 1 comes first must not depend on chance."""
    with torch.no_grad():
        encoder.position_embeddings.weight[:, 2] = 100.0


def run(rows: list[tuple[str, int, int]], items: int = 24, k: int = 3, batch: int = 256) -> dict:
    catalog = Catalog(item_ids(items))
    histories, _ = known_histories(table_of(rows), catalog, list(EVENT_KINDS))
    cases = cases_of(histories, LEAVE_ONE_OUT)
    encoder = ordered_model(items)
    signs(encoder, cases)
    return evaluate(encoder, catalog, cases, k=k, batch=batch)


def test_evaluation_by_hand():
    rows = [
        ("a", 9, 0), ("a", 1, 1),  # found first: rank 0
        ("b", 1, 0), ("b", 3, 1),  # 1 is seen, so the order is 2, 3: rank 1
        ("c", 20, 0), ("c", 10, 1),  # rank 9
        ("d", 7, 0),  # a single event is no case
    ]  # fmt: skip
    found = run(rows)
    assert found["cases"] == 3
    assert found["recall@3"] == pytest.approx(2 / 3)
    assert found["ndcg@3"] == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10) / 3)
    assert found["coverage@3"] == 4 / 24  # 1, 2, 3 for a and c, and 2, 3, 4 for b
    assert run(rows, batch=1) == found


def test_a_seen_target_is_a_miss_however_small_the_catalog():
    for items in (4, 24):
        found = run([("a", 1, 0), ("a", 2, 1), ("a", 1, 2)], items=items, k=10)
        assert found["recall@10"] == 0
        assert found["ndcg@10"] == 0
        assert found["mrr"] < 1 / max(items, 10)


def test_coverage_counts_recommended_items_only():
    # three of five items are seen: two are left to recommend, however many are asked for
    found = run([("a", 1, 0), ("a", 2, 1), ("a", 3, 2), ("a", 4, 3)], items=5, k=10)
    assert found["coverage@10"] == 2 / 5
    assert found["recall@10"] == 1


def test_a_model_to_which_all_items_are_alike_finds_nothing():
    catalog = Catalog(item_ids(24))
    histories, _ = known_histories(table_of(ROWS), catalog, list(EVENT_KINDS))
    encoder = ordered_model(24)
    with torch.no_grad():
        encoder.item_embeddings.weight[1:] = encoder.item_embeddings.weight[1].clone()
    found = evaluate(encoder, catalog, cases_of(histories, TEMPORAL), k=3)
    assert found["recall@3"] == 0
    with torch.no_grad():
        encoder.interest_to_item[:] = float("nan")
    assert evaluate(encoder, catalog, cases_of(histories, TEMPORAL), k=3)["recall@3"] == 0


def test_temporal_histories_advance_while_weights_stay():
    catalog = Catalog(item_ids(24))
    rows = [("a", 9, 0), ("a", 1, 80), ("a", 2, 90), ("a", 3, 100)]
    histories, _ = known_histories(table_of(rows), catalog, list(EVENT_KINDS))
    encoder = ordered_model(24)
    cases = cases_of(histories, TEMPORAL)
    signs(encoder, cases)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    # each target is the first of those that are not seen by then
    assert evaluate(encoder, catalog, cases, k=1)["recall@1"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
