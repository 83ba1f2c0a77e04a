"""The ranking stage: every source by hand, what unites them, and the order of the answer."""

import numpy as np
import pytest
import torch

from lib.data.histories import Person
from lib.errors import InputError
from lib.model.encoder import BehaviourEncoder
from lib.model.item_counts import WINDOW, ItemCounts
from lib.ranking import features as features_module
from lib.ranking.candidates import SOURCES, nearest, sources_without
from lib.ranking.features import FEATURES, LEAST, Candidates, padded
from lib.ranking.fit import examples_of, nobody
from lib.ranking.stage import RankingStage, stage_of
from tests.helpers.tiny import tiny_encoder

ITEMS = 24


def person(*newest_first: int, kind: int = 2) -> Person:
    """Return a person with one event of each of these rows."""
    ago = {row: place for place, row in enumerate(newest_first)}
    seen = sorted(ago)
    return Person(
        recent=np.array([*newest_first, *[0] * (WINDOW - len(newest_first))], dtype=np.int64)[:WINDOW],
        seen=np.array(seen, dtype=np.int32),
        times=np.ones(len(seen), dtype=np.float32),
        ago=np.array([ago[row] for row in seen], dtype=np.float32),
        length=len(newest_first),
        kind=kind,
    )


def count(counts: ItemCounts, *histories: list[int]) -> None:
    """Count users' histories of these rows, oldest first."""
    for rows in histories:
        for place, row in enumerate(rows):
            before = list(dict.fromkeys(rows[:place][::-1]))[:WINDOW]
            context = np.array([[*before, *[0] * (WINDOW - len(before))]], dtype=np.int64)
            counts.count(context, np.array([row]), np.ones(1), counts.clock.numpy() + 1)


@pytest.fixture
def encoder() -> BehaviourEncoder:
    made = tiny_encoder(ITEMS)
    made.add_ranker(8, len(FEATURES))
    assert made.counts is not None
    count(made.counts, [3, 5, 7], [3, 5, 9], [3, 7], [11, 12])
    made.item_popularity[1:] = torch.arange(ITEMS, 0, -1, dtype=torch.float32)
    return made


def stage_with(encoder: BehaviourEncoder) -> RankingStage:
    stage = stage_of(encoder)
    assert stage is not None
    return stage


def queries(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def values(found: Candidates, name: str, line: int = 0) -> dict[int, float]:
    """Return a feature of each candidate of a person."""
    own = found.lines == line
    return dict(zip(found.rows[own].tolist(), found.features[own, FEATURES.index(name)].tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The sources


def test_what_follows_is_a_share_weighted_by_recency(encoder):
    found = stage_with(encoder).candidates([person(3, 11)], queries(0), 5, sources=["following"])
    # after 3 came 5 twice at once, 7 once at once and once behind 5, 9 once behind 5; after 11 came 12
    followed = 2 + 1.5 + 0.5
    expected = {5: 2 / (followed + 1), 7: 1.5 / (followed + 1), 9: 0.5 / (followed + 1), 12: 2**-0.5 / 2}
    logs = {row: np.log(share + LEAST["follows"]) - np.log(LEAST["follows"]) for row, share in expected.items()}
    assert values(found, "follows") == pytest.approx(logs, rel=1e-5)
    assert set(values(found, "together").values()) == {0.0}


def test_what_goes_together_is_a_cosine_summed_over_the_recent_items(encoder):
    found = stage_with(encoder).candidates([person(5, 7)], queries(0), 5, sources=["together"])
    # 3 was with 5 twice and with 7 twice, 9 with 5 once; events: 3 of 3, 2 of 5, 2 of 7, 1 of 9
    for name, half_life in (("together", 2.0), ("together_long", 8.0)):
        sums = {3: (2 + 2 * 2 ** (-1 / half_life)) / 3**0.5 / 4**0.5, 9: 1 / 3**0.5 / 2**0.5}
        logs = {row: np.log(own + LEAST[name]) - np.log(LEAST[name]) for row, own in sums.items()}
        assert values(found, name) == pytest.approx(logs, rel=1e-5)


@pytest.mark.parametrize("searched", [False, True])
def test_the_encoder_finds_its_nearest_items(encoder, monkeypatch, searched):
    asked, stage = queries(0, 1), stage_with(encoder)
    if searched:  # as in a catalog that is too large for all products
        monkeypatch.setattr(stage.index, "products", lambda *_: None)
    found = stage.candidates([person(3), person(5, 1)], asked, 5, sources=["nearest"])
    products = asked @ encoder.item_vectors(torch.arange(ITEMS + 1)).detach().T
    for line, seen in enumerate(({3}, {1, 5})):
        own = values(found, "interest", line)
        assert set(own) == set(range(1, ITEMS + 1)) - seen
        assert own == pytest.approx({row: float(products[line, row]) for row in own}, abs=1e-5)


@pytest.mark.parametrize("searched", [False, True])
def test_one_product_and_a_search_find_the_same_candidates(encoder, monkeypatch, searched):
    monkeypatch.setattr(nearest, "LEAST", 6)
    stage, mask = stage_with(encoder), np.arange(ITEMS + 1) % 3 > 0
    if searched:
        monkeypatch.setattr(stage.index, "products", lambda *_: None)
    people = [person(3, 5), nobody(), person(7)]
    found = stage.candidates(people, queries(0, 1, 2), 3, mask, sources=["nearest"])
    products = (queries(0, 1, 2) @ encoder.item_vectors(torch.arange(ITEMS + 1)).detach().T).numpy()
    for line in (0, 2):
        allowed = [row for row in range(1, ITEMS + 1) if mask[row] and row not in people[line].seen]
        best = sorted(allowed, key=lambda row: -products[line, row])[:6]
        assert found.rows[found.lines == line].tolist() == sorted(best)
    assert (found.lines == 1).sum() == 6


def test_who_has_no_history_is_found_what_is_popular_by_no_search(encoder, monkeypatch):
    stage = stage_with(encoder)
    turned_down = nobody()._replace(seen=np.array([1, 2], dtype=np.int32))  # what was disliked is seen, and no history
    people, mask = [person(3), nobody(), turned_down], np.arange(ITEMS + 1) % 2 == 1
    searched, search = [], stage.index.search

    def counted(queries, *others):
        searched.append(len(queries))
        return search(queries, *others)

    monkeypatch.setattr(stage.index, "search", counted)
    monkeypatch.setattr(stage.index, "products", lambda *_: None)
    asked = queries(0, 1, 2)
    found = stage.candidates(people, asked, 5, mask, sources=["nearest"])
    assert searched == [1]
    odd = range(1, ITEMS + 1, 2)
    assert [set(values(found, "interest", line)) for line in range(3)] == [set(odd) - {3}, set(odd), set(odd) - {1}]
    encoder.item_popularity[10:] = 0
    stage.follow(np.zeros(0, dtype=np.int64))
    found = stage.candidates(people, asked, 5, sources=["nearest"])
    assert set(values(found, "interest", 1)) == set(range(1, 10))  # with no mask none that nobody has met
    weights = np.where(np.arange(ITEMS + 1) == 20, 5.0, 0.0)
    monkeypatch.setattr(nearest, "LEAST", 1)
    found = stage.candidates(
        [nobody()], asked[:1], 1, np.ones(ITEMS + 1, dtype=bool), weights=weights, sources=["nearest"]
    )
    assert set(values(found, "interest")) == {20, 1}


def test_what_trends_and_what_is_new_is_the_same_for_everybody(encoder):
    for name in ("trending", "new"):
        found = stage_with(encoder).candidates([nobody(), nobody()], torch.zeros(2, 16), 5, sources=[name])
        for line in (0, 1):
            assert set(values(found, "age", line)) == {3, 5, 7, 9, 11, 12}
    assert values(found, "age") == pytest.approx(
        {row: np.log1p(since) / 10 for row, since in {3: 9, 5: 8, 7: 7, 9: 4, 11: 1, 12: 0}.items()}, rel=1e-5
    )


def test_what_was_seen_comes_back_where_people_come_back(encoder):
    people = [person(4, 8)._replace(times=np.array([3, 1], dtype=np.float32)), person(6), nobody()]
    found = stage_with(encoder).candidates(
        people, queries(0, 1, 2), 5, repeats=np.array([True, False, True]), sources=["seen"]
    )
    assert found.lines.tolist() == [0, 0]
    assert values(found, "seen") == pytest.approx({4: np.log(4), 8: np.log(2)}, rel=1e-5)
    assert values(found, "seen_recently") == {4: 1.0, 8: 0.5}
    assert values(found, "is_newest") == {4: 1.0, 8: 0.0}
    assert set(values(found, "history").values()) == {np.float32(np.log1p(2))}


def test_who_has_no_history_is_interested_in_what_is_popular(encoder):
    found = stage_with(encoder).candidates([nobody()], torch.zeros(1, 16), 5, sources=["trending"])
    popular = {row: (ITEMS + 1 - row) / ITEMS for row in (3, 5, 7, 9, 11, 12)}
    assert values(found, "interest") == pytest.approx(popular, rel=1e-5)
    assert set(found.kinds.tolist()) == {0}


def test_a_source_that_is_switched_off_finds_nothing_and_says_nothing(encoder):
    left = sources_without(["together", "new"])
    assert left == tuple(name for name in SOURCES if name not in ("together", "new"))
    found = stage_with(encoder).candidates([person(5)], queries(0), 5, sources=left)
    assert set(values(found, "together").values()) == {0.0}
    assert max(values(found, "follows").values()) > 0
    with pytest.raises(InputError, match="without_sources: there is no source 'trend'; there are nearest, following"):
        sources_without(["trend"])
    with pytest.raises(InputError, match="without_sources: none is left; keep one"):
        sources_without(SOURCES)


# ---------------------------------------------------------------------------------------------------------------------
# United


@pytest.mark.parametrize("repeats", [True, False])
def test_both_ways_of_uniting_give_the_same_to_the_bit(encoder, monkeypatch, repeats):
    people = [person(3, 11), nobody(), person(5, 7, 3)]
    again, mask = np.full(3, repeats), np.arange(ITEMS + 1) % 4 != 0
    stage = stage_with(encoder)
    by_table = stage.candidates(people, queries(0, 1, 2), 5, mask, again)
    monkeypatch.setattr(features_module, "SCRATCH", 0)
    by_sorting = stage.candidates(people, queries(0, 1, 2), 5, mask, again)
    for one, other in zip(by_table, by_sorting, strict=True):
        assert np.array_equal(one, other)
    keys = by_table.lines * 100 + by_table.rows
    assert (np.diff(keys) > 0).all()  # each once, one person's after another's
    assert mask[by_table.rows].all()
    assert by_table.rows.min() > 0
    if not repeats:
        assert not {3, 11} & set(by_table.rows[by_table.lines == 0].tolist())
    assert by_table.kinds.tolist() == [people[line].kind for line in by_table.lines]


def test_values_of_several_sources_meet_in_one_candidate(encoder):
    found = stage_with(encoder).candidates([person(5)], queries(0), 5)
    alone = [
        stage_with(encoder).candidates([person(5)], queries(0), 5, sources=[name]) for name in ("following", "together")
    ]
    assert values(found, "follows")[9] == values(alone[0], "follows")[9] > 0
    assert values(found, "together")[9] == values(alone[1], "together")[9] > 0


def test_padding_keeps_every_candidate_at_its_place(encoder):
    found = stage_with(encoder).candidates(
        [nobody(), person(3), person(11)], queries(0, 1, 2), 5, sources=["following"]
    )
    table, rows = padded(found, 3)
    assert rows.tolist() == [[0, 0, 0], [5, 7, 9], [12, 0, 0]]
    assert torch.isneginf(table[..., 0]).tolist() == [[True] * 3, [False] * 3, [False, True, True]]
    assert np.array_equal(table[1].numpy(), found.features[:3])


def test_people_of_whom_nobody_has_a_candidate_are_no_examples(encoder):
    people = [person(*range(1, ITEMS + 1))]
    examples = examples_of(stage_with(encoder), people, queries(0), np.array([4]))
    assert examples.found.tolist() == [False]
    assert len(examples.features) == len(examples.targets) == 0


def test_examples_are_of_those_whose_item_is_a_candidate(encoder):
    people = [person(3), person(5), nobody()]
    examples = examples_of(stage_with(encoder), people, queries(0, 1, 2), np.array([9, 5, 3]))
    assert examples.found.tolist() == [True, False, True]
    assert examples.targets.tolist() == [7, 2]  # of all but 3, of all
    assert examples.kinds.tolist() == [2, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The answer


def ranked(stage, people, queries, k, mask=None, weights=None):
    """Scores and rows of the best k candidates."""
    return stage.rank(stage.candidates(people, queries, k, mask, weights=weights), len(people), k, weights)


def test_before_it_is_fitted_the_order_is_the_encoders(encoder):
    scores, rows = ranked(stage_with(encoder), [person(3, 9)], queries(0), 10)
    products = (queries(0) @ encoder.item_vectors(torch.arange(ITEMS + 1)).detach().T)[0].numpy()
    products[[0, 3, 9]] = -np.inf
    assert rows[0].tolist() == np.argsort(-products)[:10].tolist()
    assert np.allclose(scores[0], products[rows[0]], atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 11, 12, 22, 40])
def test_the_answer_is_the_best_by_score_and_the_rest_is_empty(encoder, k):
    assert encoder.ranker is not None
    encoder.ranker.weights += torch.randn(len(encoder.ranker.weights), generator=torch.Generator().manual_seed(0))
    stage, people = stage_with(encoder), [person(3, 9), nobody()]
    scores, rows = ranked(stage, people, queries(0, 1) * torch.tensor([[1.0], [0.0]]), k)
    assert scores.shape == rows.shape == (2, k)
    for line, there in enumerate((ITEMS - 2, ITEMS)):
        found = rows[line][rows[line] >= 0]
        assert len(found) == len(set(found.tolist())) == min(k, there)
        assert np.isneginf(scores[line][len(found) :]).all()
        assert (np.diff(scores[line][: len(found)]) <= 0).all()
    whole, _ = ranked(stage, people, queries(0, 1) * torch.tensor([[1.0], [0.0]]), ITEMS)
    assert np.array_equal(scores[:, :ITEMS], whole[:, :k])


def test_weights_of_rules_order_and_stay_out_of_the_score(encoder):
    weights = np.zeros(ITEMS + 1)
    weights[[17, 4]] = [9.0, 5.0]
    weights[7] = -9.0
    stage = stage_with(encoder)
    plain = dict(zip(*[each[0].tolist() for each in ranked(stage, [person(3)], queries(0), ITEMS)][::-1], strict=True))
    scores, rows = ranked(stage, [person(3)], queries(0), ITEMS - 1, weights=weights)
    assert rows[0, :2].tolist() == [17, 4]
    assert rows[0, -1] == 7
    assert scores[0].tolist() == pytest.approx([plain[row] for row in rows[0].tolist()], abs=1e-6)


def test_a_mask_that_leaves_few_items_is_filled_by_the_index(encoder):
    mask = np.zeros(ITEMS + 1, dtype=bool)
    mask[[14, 20, 3]] = True  # 14 and 20 were never counted
    scores, rows = ranked(stage_with(encoder), [person(3), nobody()], queries(0, 1), 5, mask)
    assert sorted(rows[0].tolist()) == [-1, -1, -1, 14, 20]
    assert sorted(rows[1].tolist()) == [-1, -1, 3, 14, 20]
    assert np.isfinite(scores).sum(axis=1).tolist() == [2, 3]
    _, none = ranked(stage_with(encoder), [person(3)], queries(0), 5, np.zeros(ITEMS + 1, dtype=bool))
    assert none.tolist() == [[-1] * 5]


def test_the_padding_row_is_never_found_nor_counted(encoder):
    assert encoder.counts is not None
    encoder.counts.clear()
    _, rows = ranked(stage_with(encoder), [nobody(), person(2)], torch.zeros(2, 16), 40)
    assert 0 not in rows
    assert (rows >= 0).sum(axis=1).tolist() == [ITEMS, ITEMS - 1]
