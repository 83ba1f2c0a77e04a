"""An evaluation's contenders: the whole answer, each source of candidates alone, and the whole without each."""

import numpy as np
import pytest
import torch

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.data.holdout import LEAVE_ONE_OUT
from lib.evaluation.comparison import WHOLE
from lib.evaluation.protocols import Cases, cases_of, model_contender, rank
from lib.model.encoder import BehaviourEncoder
from lib.ranking.candidates import SOURCES
from lib.ranking.contender import ALONE, answer_contender, answers, catalog_stage, rank_sources, ranks_alone
from lib.ranking.features import FEATURES, Candidates
from lib.ranking.fit import Whole, count_all
from lib.ranking.stage import RankingStage
from tests.helpers.tiny import NOW, SECOND, item_ids, tiny_encoder

ITEMS = 24
MISSED = 1000
CATALOG = Catalog(item_ids(ITEMS))


@pytest.fixture(scope="module")
def histories() -> Histories:
    """People who took 1, 2 and 3 after one another, and some who took others."""
    generator = np.random.default_rng(0)
    rows = [[1, 2, 3]] * 6 + [generator.permutation(np.arange(1, ITEMS + 1))[:6].tolist() for _ in range(20)]
    lengths = [len(own) for own in rows]
    count = sum(lengths)
    return Histories(
        [f"u{number}" for number in range(len(rows))],
        np.cumsum([0, *lengths]),
        np.array([row for own in rows for row in own], dtype=np.int32),
        np.full(count, EVENT_KINDS.index("click") + 1, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * SECOND,
    )


@pytest.fixture(scope="module")
def encoder(histories: Histories) -> BehaviourEncoder:
    made = tiny_encoder(ITEMS + 9)  # with spare rows
    made.add_ranker(8, len(FEATURES))
    count_all(made, Whole(histories))
    assert made.ranker is not None
    made.ranker.weights += torch.randn(len(made.ranker.weights), generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def stage(encoder: BehaviourEncoder) -> RankingStage:
    made = catalog_stage(encoder, CATALOG)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def cases(histories: Histories) -> Cases:
    return cases_of(histories, LEAVE_ONE_OUT)


def test_a_target_is_ranked_among_its_persons_candidates_and_ties_count_against_it():
    features = np.zeros((5, len(FEATURES)), dtype=np.float32)
    features[:, FEATURES.index("follows")] = [3, 1, 2, 0, 0]
    features[:, FEATURES.index("age")] = [1, 2, 3, 0.5, 0.1]
    found = Candidates(np.array([0, 0, 0, 2, 2]), np.array([4, 5, 6, 4, 9]), features, np.ones(5, dtype=np.int64))
    ranks = ranks_alone(found, np.array([6, 4, 4]), ["following", "new"], MISSED)
    assert ranks["following"].tolist() == [1, MISSED, 1]  # nobody has candidates; two that nothing is said of
    assert ranks["new"].tolist() == [2, MISSED, 1]
    assert ranks_alone(found, np.array([7, 0, 6]), ["new"], MISSED)["new"].tolist() == [MISSED] * 3


def test_every_source_says_something_alone():
    assert ALONE.keys() == SOURCES.keys()
    assert {name for names in ALONE.values() for name in names} <= set(FEATURES)


def test_the_sources_are_ranked_beside_the_whole(encoder, stage, cases):
    found = rank_sources(stage, CATALOG, CATALOG, cases)
    whole = rank(answer_contender("m", encoder, CATALOG, CATALOG), cases)
    assert found[WHOLE].ranks.tolist() == whole.ranks.tolist()
    assert found[WHOLE].recommended.tolist() == whole.recommended.tolist()
    nearest = rank(model_contender("m", encoder, CATALOG, CATALOG), cases)
    assert found["nearest"].ranks.tolist() == nearest.ranks.tolist()
    for name in ("nearest", "following", "together", "trending", "new"):
        others = [other for other in SOURCES if other != name]
        without = rank(answer_contender("m", encoder, CATALOG, CATALOG, sources=others), cases)
        assert found[f"without {name}"].ranks.tolist() == without.ranks.tolist()
    assert found["following"].ranks[:6].tolist() == [0] * 6
    assert found["without following"].ranks.tolist() != found[WHOLE].ranks.tolist()
    assert "without seen" not in found
    assert list(rank_sources(stage, CATALOG, CATALOG, cases, ["new"])) == [WHOLE, "new"]


def test_what_is_ranked_by_tables_is_ranked_by_candidates(stage, cases, histories):
    tables = rank_sources(stage, CATALOG, CATALOG, cases)
    inputs = histories.oldest(cases.users, cases.inputs)
    (answer,) = answers(stage, inputs)
    assert answer[0].tolist() == list(range(len(cases.users)))
    speaking = [name for name in SOURCES if name != "seen"]
    for name, ranks in ranks_alone(answer[2], cases.targets.astype(np.int64), speaking, ITEMS).items():
        assert np.array_equal(np.minimum(ranks, ITEMS), np.minimum(tables[name].ranks, ITEMS)), name
