"""Whoever has no history gets what is popular."""

import numpy as np
import pytest

from lib.ranking import cold_start
from lib.ranking.cold_start import Popularity, most_popular


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


@pytest.mark.parametrize("kept", [1000, 10, 3])
def test_what_is_kept_of_a_version_gives_what_all_of_it_gives(monkeypatch, kept):
    monkeypatch.setattr(cold_start, "KEPT", kept)
    generator = np.random.default_rng(0)
    shares = generator.random(50) * (generator.random(50) < 0.5)
    popular, masks = Popularity(shares), [generator.random(50) < share for share in (1.0, 0.5, 0.1, 0.0)]
    for mask in masks:
        for count in (1, 5, 60):
            expected = most_popular(shares, mask, count)
            found = popular.best(count, mask)
            assert len(found) == len(expected[1])
            assert shares[found].tolist() == expected[0].tolist()
            weights = generator.normal(size=50)
            assert popular.best(count, mask, weights).tolist() == most_popular(shares, mask, count, weights)[1].tolist()
    assert sorted(popular.best(60)) == [row for row in range(1, 50) if shares[row] > 0]
