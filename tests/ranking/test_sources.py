"""Each source of candidates alone: whoever asks, for whatever, is answered, if with fewer items or none."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.evaluate import evaluate_models
from lib.data.catalog import Catalog
from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA, Event
from lib.data.history import History
from lib.data.holdout import LEAVE_ONE_OUT
from lib.evaluation.comparison import WHOLE
from lib.live.prequential import MISSED, ranks_of
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import TrainingFacts
from lib.model.folder import Manifest, save_model
from lib.ranking.candidates import SOURCES
from lib.ranking.features import FEATURES
from lib.ranking.filters import ItemFilter
from lib.ranking.fit import Whole, count_all
from lib.ranking.recommender import Question, Recommender
from lib.ranking.rules import RankingRules
from lib.ranking.stage import stage_of
from tests.helpers.tiny import NOW, SECOND, history, item_ids, random_histories, tiny_encoder

ITEMS, MET = 24, 12  # of which people have met the first ones
NAMES = item_ids(ITEMS)
CATALOG = Catalog(NAMES, pa.table({"item_id": NAMES, "number": list(range(1, ITEMS + 1))}))
NOTHING = {"allow": ["nothing"]}
FILTERS = [None, {"number": {"min": 7}}, {"number": {"max": 1}}, NOTHING]
RULES = [
    {},
    {"boost": [{"filter": {"number": 20}, "weight": 0.1}]},
    {"bury": [{"filter": {"number": 3}}], "pin": {1: "i9"}},
    {"diversity_lambda": 0.5, "at_most": {"number": 1}, "exploration_temperature": 0.05},
]


@pytest.fixture(scope="module", params=[True, False], ids=["counted", "nothing counted"])
def encoder(request: pytest.FixtureRequest) -> BehaviourEncoder:
    made = tiny_encoder(ITEMS + 5)  # with spare rows
    made.add_ranker(8, len(FEATURES))
    assert made.ranker is not None
    made.ranker.weights += torch.randn(len(made.ranker.weights), generator=torch.Generator().manual_seed(0))
    if request.param:
        count_all(made, Whole(random_histories(40, MET, np.random.default_rng(0))))
        made.item_popularity[1 : MET + 1] = torch.arange(MET, 0, -1, dtype=torch.float32)
    return made


def disliked(*before: int) -> History:
    """Return a history that ends with a dislike."""
    made = history(before)
    made.add(Event("u", "i4", "dislike", None, NOW + 1000 * SECOND))
    return made


def people() -> list[History]:
    everything = history(range(1, ITEMS + 1))
    return [history([3]), history([1, 2, 1]), History(), history(["unknown"]), disliked(), disliked(1, 5), everything]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rules", RULES)
def test_everybody_is_answered(encoder, source, rules):
    off = tuple(name for name in SOURCES if name != source)
    recommender = Recommender(encoder, CATALOG, 1, rules=RankingRules(without_sources=off, **rules))
    longest = 0
    for written in FILTERS:
        passing = {name for number, name in enumerate(NAMES, start=1) if _passes(written, number)}
        filter = None if written is None else ItemFilter.of(written)
        for exclude_seen in (True, False):
            asked = [Question(own, 5, filter, exclude_seen, explain=True) for own in people()]
            for question, answer in zip(asked, recommender.recommend(asked), strict=True):
                found = [item.item_id for item in answer]
                assert len(found) == len(set(found)) <= 5
                assert set(found) <= passing
                assert not exclude_seen or not set(found) & set(question.history.item_ids)
                longest = max(longest, len(found))
    assert encoder.counts is not None
    assert longest > 0 or int(encoder.counts.clock) == 0


def _passes(written: dict | None, number: int) -> bool:
    if written is None or written == NOTHING:
        return written is None
    bounds = written["number"]
    return bounds.get("min", 0) <= number <= bounds.get("max", ITEMS)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_replay_ranks_by_it(encoder, source, exclude_seen):
    stage, targets = stage_of(encoder), ["i1", "i7", "i9", "i2", "i1", "unknown", "i3"]
    assert stage is not None
    ranks = ranks_of(encoder, CATALOG, people(), targets, exclude_seen, stage, [source])
    assert ranks[WHOLE].shape == (len(targets),)
    assert ranks[WHOLE][5] == MISSED
    assert (ranks[WHOLE] != MISSED).any() or (source == "seen" and exclude_seen) or int(stage.counts.clock) == 0
    assert (len(ranks) > 1) == (source != "seen" or not exclude_seen)


@pytest.mark.parametrize("source", SOURCES)
def test_an_evaluation_ranks_by_it(encoder, source, tmp_path: Path):
    save_model(tmp_path / "model", encoder, CATALOG, Manifest(training=TrainingFacts(holdout=LEAVE_ONE_OUT)))
    rows = [(f"u{user}", f"i{1 + (user + place) % ITEMS}", "click") for user in range(20) for place in range(3)]
    rows += [("d", "i3", "dislike"), ("d", "i4", "click"), ("n", "unknown", "click"), ("n", "i2", "click")]
    events = [
        {"user_id": user, "item_id": item, "event": kind, "timestamp": NOW + place}
        for place, (user, item, kind) in enumerate(rows)
    ]
    write_dataset(tmp_path / "data", pa.Table.from_pylist(events, EVENT_SCHEMA), None)
    off = [name for name in SOURCES if name != source]
    found = evaluate_models(tmp_path / "data", [tmp_path / "model"], LEAVE_ONE_OUT, without_sources=off)
    told = found.sources["model"].results
    assert told[0].metrics["recall@10"].value == found.comparison.results[0].metrics["recall@10"].value
    assert (len(told) > 1) == (source != "seen")
    assert encoder.counts is not None
    known = source == "nearest" or (source != "seen" and int(encoder.counts.clock) > 0)
    assert (told[0].metrics["recall@10"].value > 0) == known, "where nothing is found nothing is answered"
