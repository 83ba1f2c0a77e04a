"""An explanation names the events whose absence costs the item most."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.data.attributes import attribute_codes
from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.histories import Histories
from lib.data.history import History, to_histories
from lib.model.batches import SequenceBatches
from lib.model.encoder import BehaviourEncoder
from lib.ranking import explain
from lib.ranking.candidates import asked
from lib.ranking.explain import GROUPS, Influence, influences, most_influential, occluded, shares
from lib.ranking.features import FEATURES, Candidates
from lib.ranking.fit import Whole, count_all
from lib.ranking.recommender import Question, Recommender
from lib.ranking.rules import RankingRules
from tests.helpers.tiny import NOW, SECOND, history, item_ids, tiny_encoder

ITEMS = 24


@pytest.fixture(scope="module")
def encoder() -> BehaviourEncoder:
    return tiny_encoder(ITEMS)


def told(encoder: BehaviourEncoder, history: History):
    """What the encoder knows of a history."""
    assert encoder.config.event_kinds is not None
    kinds = {kind: place + 1 for place, kind in enumerate(encoder.config.event_kinds)}
    return to_histories([history], Catalog(item_ids(ITEMS)), kinds)


def mixed_history(events: int, seed: int = 0) -> History:
    """Events of several kinds, some with values, at times from seconds to hours apart."""
    generator = np.random.default_rng(seed)
    times = NOW + np.cumsum(2 ** generator.integers(0, 14, events)) * SECOND
    kinds = generator.choice(["click", "rating", "purchase"], events)
    return History(
        [f"i{row}" for row in generator.integers(1, ITEMS + 1, events)],
        kinds.tolist(),
        [float(generator.integers(3, 6)) if kind == "rating" else None for kind in kinds],
        times.tolist(),
        [0] * events,
    )


def without(history: History, event: int) -> History:
    """The same history, had one event never happened."""
    rest = history.slice(0, event)
    rest.extend(history.slice(event + 1, len(history)))
    return rest


@torch.no_grad()
def scores_of(encoder: BehaviourEncoder, history: History) -> np.ndarray:
    """(items + 1,) s = uT A v, through the batches that training and evaluation read."""
    _, batch = next(SequenceBatches(told(encoder, history), encoder.config).inference())
    u = encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, batch.rows)[0, int(batch.lengths[0]) - 1]
    return (encoder.queries(u) @ encoder.item_vectors().T).numpy()


def queries_of(encoder: BehaviourEncoder):
    """The encoder as a function of (4, T) codes, one history at a time."""

    @torch.no_grad()
    def queries(histories) -> np.ndarray:
        lines = []
        for codes in histories:
            rows, kinds, gaps, values = torch.from_numpy(codes)[:, None]
            u = encoder.interests(kinds, gaps, values, torch.tensor([codes.shape[1]]), rows)
            lines.append(encoder.queries(u).numpy()[0])
        return np.stack(lines)

    return queries


@pytest.mark.parametrize("events", [2, 5, 8, 9, 10, 15])  # the encoder reads 8
def test_influence_is_what_the_score_loses_without_the_event(encoder, events):
    history, items = mixed_history(events), np.array([3, 9, 20])
    vectors = encoder.item_vectors().detach().numpy()[items]
    found = influences(told(encoder, history), encoder.config, queries_of(encoder), vectors)
    explained = range(max(events - 8, 0), events)
    whole = scores_of(encoder, history)[items]
    expected = [whole - scores_of(encoder, without(history, event))[items] for event in explained]
    assert found.shape == (len(explained), 3)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.01


def test_the_only_event_has_all_the_influence(encoder):
    history = mixed_history(1)
    vectors = encoder.item_vectors().detach().numpy()[[3, 9]]
    found = influences(told(encoder, history), encoder.config, queries_of(encoder), vectors)
    assert np.allclose(found, scores_of(encoder, history)[None, [3, 9]], atol=1e-6)


def test_the_whole_history_comes_first_and_then_without_each_event_from_the_oldest(encoder):
    history = mixed_history(11)
    events = told(encoder, history)
    whole, *others = occluded(events, encoder.config)
    assert whole[0].tolist() == events.rows[3:].tolist()
    assert len(others) == 8
    for place, codes in enumerate(others):
        assert codes[0].tolist() == np.delete(events.rows, 3 + place)[-8:].tolist()


def test_events_that_the_encoder_does_not_look_at_have_no_influence():
    """Without attention the newest event alone makes the interest."""
    changed = tiny_encoder(ITEMS)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "blocks" in name:
                parameter.zero_()
    history = mixed_history(6)
    vectors = changed.item_vectors().detach().numpy()
    found = influences(told(changed, history), changed.config, queries_of(changed), vectors)
    assert np.allclose(found[:-2], 0, atol=1e-6)  # the gap of the newest event is from the one before
    assert (np.abs(found[-1]) > 0.01).mean() > 0.5


def test_the_strongest_events_that_raised_the_score_are_named():
    influence = np.array([[0.1, -0.2], [0.3, 0.0], [-0.1, -0.3], [0.2, -0.1], [0.05, 0.4]])
    assert most_influential(influence) == [
        [Influence(1, 0.3), Influence(3, 0.2), Influence(0, 0.1)],
        [Influence(4, 0.4)],
    ]
    assert most_influential(influence, 1) == [[Influence(1, 0.3)], [Influence(4, 0.4)]]
    assert most_influential(-np.ones((2, 1))) == [[]]


# ---------------------------------------------------------------------------------------------------------------------
# What the ranker goes by


def histories_of(*users: list[int]) -> Histories:
    """Clicks, in the order of the users."""
    count = sum(map(len, users))
    return Histories(
        [f"u{number}" for number in range(len(users))],
        np.cumsum([0, *map(len, users)]),
        np.array([item for own in users for item in own], dtype=np.int32),
        np.full(count, EVENT_KINDS.index("click") + 1, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * SECOND,
    )


def ranking(line: dict[str, float], *users: list[int], repeats: bool = False) -> Recommender:
    """A model whose ranker has this line alone, and whose items 5 and 6 came last, one of them for a new genre.

    Before them came what these users had.
    """
    described = {"item_id": item_ids(ITEMS), "title": [f"Film {row}" for row in range(1, ITEMS + 1)]}
    genres = [["Comedy", "War"] if row == 6 else ["War"] for row in range(1, ITEMS + 1)]
    catalog = Catalog(item_ids(ITEMS), pa.table(described | {"genres": genres}))
    values = ["genres=War", "genres=Comedy"]
    made = tiny_encoder(ITEMS, attribute_values=values, attributes_per_item=2, repeats=repeats)
    made.item_attributes.copy_(torch.from_numpy(attribute_codes(catalog, values, 2)))
    made.add_ranker(32, len(FEATURES))
    count_all(made, Whole(histories_of(*[[1, 2]] * 20, *[[3, 4]] * 3, [1, 7], *users, [5], [6])))
    assert made.ranker is not None
    line_of = torch.tensor([line.get(name, 0.0) for name in FEATURES])
    made.ranker.start(torch.zeros(len(FEATURES)), torch.ones(len(FEATURES)), line_of, seed=0)
    made.ranker.weights.split(made.ranker.parts)[-1].zero_()  # no hidden layer: what a feature adds is known
    return Recommender(made, catalog, version=1)


def why(recommender: Recommender, *items: int, **question) -> dict[str, str | None]:
    answer = recommender.recommend([Question(history(items), ITEMS, explain=True, **question)])[0]
    return {item.item_id: item.reason for item in answer}


@pytest.mark.parametrize(
    ("line", "item", "reason"),
    [
        ({"together": 1.0}, "i2", "often taken together with Film 1 (100%)"),
        ({"together_long": 1.0}, "i4", "often taken together with Film 3 (100%)"),
        ({"follows": 1.0}, "i2", "comes after Film 1 (100%)"),
        ({"trend_100": 1.0}, "i2", "trending now (100%)"),
        ({"popularity": 1.0}, "i2", "popular of late (100%)"),
        ({"age": -1.0}, "i9", None),  # nobody has met it: it is not new, and no older than what is
    ],
)
def test_a_reason_says_what_the_ranker_goes_by(line, item, reason):
    assert why(ranking(line), 3, 1)[item] == reason


def test_the_item_that_is_named_is_one_that_the_answer_looked_up(monkeypatch):
    fillers = range(11, 18)
    recommender = ranking({"together": 1.0, "follows": 1.0}, [10, 2])
    reason = why(recommender, 1, *fillers, 10)["i2"]  # 1 is the ninth of the newest
    assert re.findall("Film [0-9]+", str(reason)) == ["Film 10", "Film 10"]
    recommender = ranking({"together": 1.0}, [8, 9], [3, 9])
    for module in (asked, explain):
        monkeypatch.setattr(module, "STRONGEST", 1)  # of 3 that is 4
    assert why(recommender, 8, 11, 12, 3)["i9"] == "often taken together with Film 8 (100%)"


@pytest.mark.parametrize(
    ("source", "feature", "item"),
    [("together", "together", "i2"), ("following", "follows", "i2"), ("seen",) * 2 + ("i1",)],
)
def test_what_a_source_knows_is_no_reason_where_it_is_switched_off(source, feature, item):
    whole = ranking({feature: -1.0}, repeats=True)
    assert whole.encoder.ranker is not None
    whole.encoder.ranker.mean[FEATURES.index(feature)] = 1.0  # so that having less than others raises the score
    rules = RankingRules(without_sources=(source,))
    recommender = Recommender(whole.encoder, whole.catalog, version=1, rules=rules)
    assert why(recommender, 3, 1)[item] is None


def test_what_is_new_names_the_value_that_was_liked_before():
    recommender = ranking({"age": 1.0})
    counts = recommender.encoder.counts
    assert counts is not None
    counts.clock += 5  # so that its age is not 0, which is the mean
    assert why(recommender, 5)["i6"] == "new in War (100%)"
    recommender.encoder.item_attributes[5] = torch.tensor([2, 0])
    assert why(recommender, 5)["i6"] == "new in Comedy (100%)"


def test_what_was_seen_is_said_where_people_come_back():
    assert why(ranking({"seen": 1.0}, repeats=True), 3, 1)["i1"] == "you had it before (100%)"
    assert "i1" not in why(ranking({"seen": 1.0}), 3, 1)


def test_the_interest_names_what_was_done_with_the_event_of_most_influence():
    recommender = ranking({"interest": 1.0})
    reasons = why(recommender, 3)
    assert {reason for reason in reasons.values() if reason} == {"because you clicked Film 3 (100%)"}
    mixed = history([3])
    mixed.add(Event("u", "i4", "purchase", None, NOW + 60_000))
    [answer] = recommender.recommend([Question(mixed, ITEMS, explain=True)])
    said = {item.reason for item in answer}
    assert said <= {"because you clicked Film 3 (100%)", "because you bought Film 4 (100%)", None}
    assert len(said) > 1
    assert {reason for reason in why(recommender).values() if reason != "popular"} <= {"popular with newcomers (100%)"}


def test_an_explanation_uses_the_candidates_that_the_answer_found(monkeypatch):
    recommender = ranking({"together": 1.0, "interest": 1.0})
    assert recommender.stage is not None
    calls, find = [], recommender.stage.candidates

    def candidates(*arguments: Any, **named: Any) -> Candidates:
        calls.append(arguments)
        return find(*arguments, **named)

    monkeypatch.setattr(recommender.stage, "candidates", candidates)
    reasons = why(recommender, 3, 1)
    assert len(calls) == 1
    assert reasons["i2"] is not None
    pinned = Recommender(recommender.encoder, recommender.catalog, 1, rules=RankingRules(pin={1: "i9"}))
    assert why(pinned, 3, 1) == reasons


def test_shares_are_of_all_that_raised_the_score_and_the_strongest_come_first():
    recommender = ranking({"together": 3.0, "follows": 1.0, "popularity": 0.01, "trend_100": -5.0})
    reason = why(recommender, 3, 1)["i2"]
    assert reason is not None
    found = re.findall(r"(.+?) \((\d+)%\)(?:; |$)", reason)
    assert [words for words, _ in found] == ["often taken together with Film 1", "comes after Film 1"]
    assert sum(int(share) for _, share in found) in (99, 100, 101)
    assert recommender.stage is not None
    features = torch.zeros(1, len(FEATURES))
    features[0, [FEATURES.index("together"), FEATURES.index("follows")]] = torch.tensor([2.0, 4.0])
    parts = dict(zip(GROUPS, shares(recommender.stage.ranker, features, torch.tensor([1]))[:, 0].tolist(), strict=True))
    assert parts["together"] == pytest.approx(0.6)
    assert parts["follows"] == pytest.approx(0.4)
    assert sum(parts.values()) == pytest.approx(1)


def test_many_explanations_are_those_of_each_question_alone():
    recommender = ranking({"interest": 1.0, "together": 1.0, "popularity": 0.2})
    questions = [Question(history(items), 10, explain=True) for items in ([3, 1], [], [2], ["unknown"], [3, 4, 9])]
    together = recommender.recommend(questions)
    for question, answer in zip(questions, together, strict=True):
        alone = recommender.recommend([question])[0]
        assert [(item.item_id, item.reason) for item in answer] == [(item.item_id, item.reason) for item in alone]
    assert all(item.reason for item in together[0])
