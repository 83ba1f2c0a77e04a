"""What people turn down is not read as an interest, and pushes down what is like it."""

import math

import numpy as np
import pytest

from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.history import History, Opinions, to_histories
from lib.model.dislikes import (
    KERNEL_WIDTH,
    NEWEST,
    RECENCY_HALF_LIFE,
    UNRELATED,
    candidate_count,
    push_down,
    without_dislikes,
)
from tests.helpers.tiny import NOW, SECOND, item_ids, tiny_config

CATALOG = Catalog(item_ids(24))


def histories_of(*people: list[tuple]):
    """Each person's (item, kind) or (item, kind, value) events, oldest first."""
    told = []
    for person in people:
        events = [
            Event("u", f"i{item}", kind, value[0] if value else None, NOW + place * SECOND)
            for place, (item, kind, *value) in enumerate(person)
        ]
        told.append(History.of(events))
    return to_histories(told, CATALOG, tiny_config().kind_codes)


def test_what_was_turned_down_is_left_out_with_what_came_before_it_of_the_same_item():
    histories = histories_of(
        [(1, "click"), (2, "click"), (1, "dislike"), (3, "rating", 2.0), (4, "rating", 4.0), (1, "like"), (5, "skip")],
        [(1, "click"), (3, "rating", 5.0)],
    )
    liked, opinions = without_dislikes(histories, tiny_config())
    assert liked.rows.tolist() == [2, 4, 1, 1, 3]
    assert liked.offsets.tolist() == [0, 3, 5]
    assert opinions[1] is None
    assert opinions[0] is not None
    assert opinions[0].rows.tolist() == [1, 2, 1, 3, 4, 1, 5]
    assert np.sign(opinions[0].weights).tolist() == [0, 1, -1, -1, 1, 1, -1]
    assert np.abs(opinions[0].weights[-1]) == 1
    assert np.abs(opinions[0].weights[-3] / opinions[0].weights[-1]) == pytest.approx(0.5 ** (2 / RECENCY_HALF_LIFE))


def test_histories_without_dislikes_are_as_they_were():
    histories = histories_of([(1, "click"), (2, "rating", 3.0)], [])
    liked, opinions = without_dislikes(histories, tiny_config())
    assert liked is histories
    assert opinions == [None, None]


def test_the_scale_of_the_model_says_what_a_low_rating_is():
    rated = histories_of([(1, "click"), (2, "rating", 4.0)])
    assert without_dislikes(rated, tiny_config())[1] == [None]
    liked, (opinions,) = without_dislikes(rated, tiny_config(rating_scale="1-10"))
    assert liked.rows.tolist() == [1]
    assert opinions is not None


def test_a_dislike_of_long_ago_is_no_opinion_of_late_and_still_not_read():
    old = [(1, "dislike"), *((2 + n % 20, "click") for n in range(NEWEST))]
    liked, opinions = without_dislikes(histories_of(old), tiny_config())
    assert 1 not in liked.rows
    assert opinions == [None]


def test_a_score_falls_by_the_squared_share_of_dislikes_times_the_chance_that_the_item_is_one():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.stack([generator.permutation(30)[:12] for _ in range(3)])
    scores = -np.sort(-generator.random((3, 12)).astype(np.float32), axis=1)
    scores[2, -2:] = -np.inf
    rows[2, -2:] = -1
    some = Opinions(np.array([3, 5, 7], dtype=np.int32), np.array([0.5, -0.7, 1.0], dtype=np.float32))
    all_ = Opinions(np.array([9], dtype=np.int32), np.array([-1.0], dtype=np.float32))
    found, order = push_down(scores, rows, [some, None, all_], vectors, 0.5)
    assert found[1].tolist() == scores[1].tolist()
    assert order[1].tolist() == rows[1].tolist()
    assert (np.diff(found[[0, 1]]) <= 0).all()
    assert sorted(order[0]) == sorted(rows[0])
    assert np.isneginf(found[2, -2:]).all()
    assert order[2, -2:].tolist() == [-1, -1]
    for line, own in ((0, some), (2, all_)):
        before = dict(zip(rows[line].tolist(), scores[line].tolist(), strict=True))
        for row, score in zip(order[line].tolist(), found[line].tolist(), strict=True):
            if row < 0:
                continue
            near = [
                abs(weight) * math.exp((float(vectors[row] @ vectors[event]) - 1) / KERNEL_WIDTH)
                for event, weight in zip(own.rows, own.weights, strict=True)
            ]
            disliked = sum(k for k, weight in zip(near, own.weights, strict=True) if weight < 0)
            share = -own.weights[own.weights < 0].sum() / np.abs(own.weights).sum()
            assert score == pytest.approx(before[row] - 0.5 * share**2 * disliked / (UNRELATED + sum(near)), abs=1e-5)
    same = push_down(scores, rows, [some, None, all_], vectors, 0.0)
    assert same[0] is scores


def test_there_are_candidates_for_those_that_fall():
    assert candidate_count(10) == 70
    assert candidate_count(500) == 1000
    assert candidate_count(5000) == 5000
