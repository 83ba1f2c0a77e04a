"""Which scale ratings have, and what is a dislike on it."""

from collections import Counter

import numpy as np
import pytest

from lib.data.events import Event
from lib.data.ratings import STARS, RatingScale, is_dislike, recognised_scale, rounded_counts
from lib.errors import InputError

HALVES = [0.5 * place for place in range(1, 11)]


@pytest.mark.parametrize(
    ("values", "scale", "dislikes"),
    [
        ([1, 2, 3, 4, 5], "1-5", [1, 2]),
        ([3, 4], "1-5", []),
        (HALVES, "0.5-5", [0.5, 1, 1.5, 2]),
        ([0, 1, 2, 3, 4, 5], "0-5", [0, 1]),
        (range(1, 11), "1-10", [1, 2, 3, 4]),
        (range(11), "0-10", [0, 1, 2, 3]),
        ([2, 6, 9], "1-10", [2]),
        ([0, 20, 37, 38, 80, 100], "0-100", [0, 20, 37]),
        ([55, 70, 85], "0-100", []),
        ([0, 1], "0-1", [0]),
        ([0.1, 0.3, 0.5, 0.98], "0-1", [0.1, 0.3]),
        ([-1, 1], "-1-1", [-1]),
        ([-1, 0, 1], "-1-1", [-1]),
        ([-10, -2, 0, 7], "-10-10", [-10]),
        ([1], "implicit", []),
        ([0, 0], "implicit", []),
        ([4.5], "implicit", []),
        ([1, 20, 35_000], "implicit", []),  # how often something was played
    ],
)
def test_a_scale_is_recognised_and_says_what_a_dislike_is(values, scale, dislikes):
    found = recognised_scale(Counter(map(float, values)))
    assert str(found) == scale
    assert RatingScale.parse(scale) == found
    assert [value for value in sorted(set(values)) if value < found.dislikes_below] == dislikes


@pytest.mark.parametrize(
    ("marks", "scale"),
    [([1, 2], "1-2"), ([1, 2, 3], "1-3"), ([1, 4, 7], "1-7"), ([0, 10, 20], "0-20"), ([2, 3, 4], "1-4")],
)
def test_many_ratings_show_their_best_mark(marks, scale):
    assert str(recognised_scale(dict.fromkeys(map(float, marks), 500))) == scale


def test_a_few_stray_values_change_no_scale():
    assert str(recognised_scale({-999.0: 1, 1.0: 900, 5.0: 1200, 99.0: 2})) == "1-5"


def test_values_without_steps_are_counted_in_bounded_memory():
    values = np.random.default_rng(0).random(200_000).astype(np.float32)
    counts = rounded_counts(np.append(values, np.nan).astype(np.float32))
    assert counts.total() == 200_000
    assert len(counts) < 5000
    assert rounded_counts(np.array([4.5, -1.0, 0.0, 0.5, 4.5], dtype=np.float32)) == {4.5: 2, -1: 1, 0: 1, 0.5: 1}


@pytest.mark.parametrize("text", ["", "10", "1-", "10-1", "5-5", "1:10", "one-ten", "1-nan"])
def test_what_is_no_scale_is_said(text):
    with pytest.raises(InputError, match="write the worst and the best mark as 1-10, or implicit"):
        RatingScale.parse(text)


def test_dislikes_by_kind_and_by_value():
    def disliked(kind: str, value: float | None = None, ratings: RatingScale = STARS) -> bool:
        return is_dislike(Event("u", "i", kind, value, 0), ratings)

    assert disliked("dislike")
    assert disliked("skip")
    assert disliked("rating", 2.0)
    assert not disliked("rating", 3.0)
    assert disliked("rating", 3.0, RatingScale(1, 10))
    assert not disliked("rating")
    assert not disliked("rating", 1.0, RatingScale.parse("implicit"))
    assert not disliked("purchase", 1.0)
