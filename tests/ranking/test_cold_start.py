"""Whoever has no history gets what is popular."""

import numpy as np

from lib.ranking.cold_start import most_popular


def test_the_most_popular_come_in_order_without_padding():
    popularity = np.array([99.0, 1.0, 5.0, 3.0, 0.0, 5.0])
    scores, rows = most_popular(popularity, np.ones(6, dtype=bool), 3)
    assert (scores.tolist(), rows.tolist()) == ([5.0, 5.0, 3.0], [2, 5, 3])
    mask = np.array([True, True, False, True, True, False])
    assert most_popular(popularity, mask, 10)[1].tolist() == [3, 1, 4]
    assert mask[0]  # the mask that was given stays as it is
    assert most_popular(popularity, np.zeros(6, dtype=bool), 3)[1].tolist() == []
    everything = np.random.default_rng(0).random(500)
    assert (
        most_popular(everything, np.ones(500, dtype=bool), 20)[1].tolist()
        == (np.argsort(-everything[1:])[:20] + 1).tolist()
    )
