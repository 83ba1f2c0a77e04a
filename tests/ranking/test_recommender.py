"""Encoder, catalog and index as one value: the right k items, for anybody, of one version."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.history import History
from lib.errors import InputError
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig
from lib.model.delta import ROW_TENSORS, Delta, DeltaMismatch, state_of
from lib.model.encoder import BehaviourEncoder
from lib.model.fingerprint import fingerprint
from lib.model.folder import Manifest, save_model
from lib.model.inference import InferenceEncoder
from lib.model.item_counts import COUNT_TENSORS, WINDOW
from lib.ranking.candidates import SOURCES
from lib.ranking.features import FEATURES
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, RankedItem, Recommender
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from tests.helpers.tiny import (
    NOW,
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

ITEMS = 24


def described_catalog() -> Catalog:
    names = item_ids(ITEMS)
    attributes = {"item_id": names, "parity": ["even" if n % 2 == 0 else "odd" for n in range(1, ITEMS + 1)]}
    return Catalog(names, pa.table(attributes | {"number": list(range(1, ITEMS + 1))}))


@pytest.fixture
def recommender() -> Recommender:
    encoder = tiny_encoder(ITEMS + 5)  # five spare rows
    encoder.item_popularity[1 : ITEMS + 1] = torch.arange(ITEMS, dtype=torch.float32)
    return Recommender(encoder, described_catalog(), version=3, log_offset=7)


def ids(items: list[RankedItem]) -> list[str]:
    return [item.item_id for item in items]


def ask(recommender: Recommender, *items: int | str, k: int = 5, **question) -> list[RankedItem]:
    return recommender.recommend([Question(history(items), k, **question)])[0]


def filter_of(**written) -> ItemFilter:
    filter = ItemFilter.of(written)
    assert filter is not None
    return filter


@torch.no_grad()
def scores_of(encoder: BehaviourEncoder, *items: int) -> np.ndarray:
    """(items + 1,) s = uT A v of clicks a minute apart, computed the long way."""
    count = len(items)
    kinds = torch.full((1, count), 2)  # click
    gaps = torch.tensor([[0] + [6] * (count - 1)])  # 1 + log2(61 s), rounded down
    values = torch.zeros(1, count, dtype=torch.long)
    u = encoder(kinds, gaps, values, torch.tensor([count]), rows=torch.tensor([items]))[0, -1]
    v = torch.nn.functional.normalize(encoder.item_embeddings.weight, dim=-1)
    return (u @ encoder.interest_to_item @ v.T).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Who gets what


def test_the_ranking_is_by_u_a_v(recommender):
    scores = scores_of(recommender.encoder, 3, 9, 4)[: ITEMS + 1]
    scores[[0, 3, 9, 4]] = -np.inf
    found = ask(recommender, 3, 9, 4, k=10)
    assert ids(found) == [f"i{row}" for row in np.argsort(-scores)[:10]]
    assert np.allclose([item.score for item in found], np.sort(scores)[::-1][:10], atol=1e-5)
    assert all(item.reason is None for item in found)


def test_only_the_newest_events_count(recommender):
    recommender.encoder.gap_embeddings.weight.zero_()  # a first event has no gap, the same event in a history has one
    recommender.reader = InferenceEncoder(recommender.encoder)
    long = [1 + number % ITEMS for number in range(10, 30)]
    expected = ask(recommender, *long[-8:], k=3, exclude_seen=False)
    shifted = recommender.recommend([Question(history(long), 3, exclude_seen=False)])[0]
    assert ids(shifted) == ids(expected)


@pytest.mark.parametrize("k", [1, 5, 21, 22, 100])
def test_k_items_whenever_k_exist(recommender, k):
    found = ask(recommender, 1, 2, 3, k=k)
    assert len(found) == len(set(ids(found))) == min(k, ITEMS - 3)
    assert not {"i1", "i2", "i3", ""} & set(ids(found))
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)


def test_k_items_though_most_of_the_best_are_seen(recommender):
    best = ids(ask(recommender, 1, k=20))
    seen = [1, *(int(name[1:]) for name in best[:18])]
    found = ask(recommender, *seen, 1, k=5)
    assert len(found) == 5
    assert not {f"i{row}" for row in seen} & set(ids(found))


def test_with_everything_seen_nothing_is_left(recommender):
    assert ask(recommender, *range(1, ITEMS + 1), k=5) == []
    assert len(ask(recommender, *range(1, ITEMS), k=5)) == 1


def test_seen_items_may_be_asked_for(recommender):
    found = ask(recommender, 1, 2, 3, k=ITEMS, exclude_seen=False)
    assert len(found) == ITEMS
    assert {"i1", "i2", "i3"} <= set(ids(found))


def test_seen_is_the_whole_history_and_not_just_what_is_read(recommender):
    longer_than_the_encoder_reads = list(range(1, 13))
    found = ask(recommender, *longer_than_the_encoder_reads, k=ITEMS)
    assert not {f"i{row}" for row in longer_than_the_encoder_reads} & set(ids(found))


@pytest.mark.parametrize("k", [1, 3, 30])
def test_filters_leave_k_items_where_k_pass(recommender, k):
    even = ask(recommender, 2, 3, k=k, filter=filter_of(parity="even"))
    assert len(even) == min(k, 11)  # 2 is seen
    assert all(int(name[1:]) % 2 == 0 for name in ids(even))
    scores = scores_of(recommender.encoder, 2, 3)[: ITEMS + 1]
    best = [f"i{row}" for row in np.argsort(-scores) if row % 2 == 0 and row not in (0, 2)]
    assert ids(even) == best[:k]


def test_a_filter_that_leaves_one_item(recommender):
    assert ids(ask(recommender, 1, 2, filter=filter_of(number=17))) == ["i17"]
    assert ids(ask(recommender, 1, 2, filter=filter_of(allow=["i9"]))) == ["i9"]
    assert ids(ask(recommender, 1, 9, filter=filter_of(allow=["i9"]))) == []
    assert ids(ask(recommender, 1, 9, filter=filter_of(allow=["i9"]), exclude_seen=False)) == ["i9"]
    assert ids(ask(recommender, 1, filter=filter_of(number={"min": 23}, deny=["i24"]))) == ["i23"]
    assert ids(ask(recommender, filter=filter_of(number=17))) == ["i17"]
    assert ask(recommender, filter=filter_of(number=17, deny=["i17"])) == []


def test_people_who_ask_together_for_what_no_item_is_get_nothing_and_fail_nobody(recommender):
    questions = [Question(history([1, 2]), 5, filter_of(parity=parity)) for parity in ("none", "none", "even")]
    nothing, neither, even = recommender.recommend(questions)
    assert (nothing, neither, len(even)) == ([], [], 5)


def test_an_attribute_that_no_item_has_matches_nothing_until_one_has(recommender):
    red = filter_of(colour="red")
    for asked in ((1, 2), ()):
        assert ask(recommender, *asked, filter=red) == []
    assert recommender.check(red)[0].startswith("filter.colour: no item has this attribute")
    recommender.change_items({"i9": {"colour": "red"}})
    assert ids(ask(recommender, 1, 2, filter=red)) == ["i9"]
    assert recommender.check(red) == []


def test_a_filter_that_no_longer_goes_with_the_catalog_fails_nobody(recommender):
    """It was checked when the attribute was of numbers, or of nothing; the batch may hold others' questions."""
    sized = filter_of(size={"min": 3})
    recommender.check(sized)
    recommender.change_items({"i9": {"size": "XL"}})
    with pytest.raises(InputError, match=r"filter\.size: a range needs numbers, and this attribute is text"):
        recommender.check(sized)
    assert ask(recommender, 1, 2, filter=sized) == []


def test_rules_know_what_was_put_a_moment_ago():
    """No training, and no restart: the attribute is new with the put."""
    out_of_stock = RankingRules(**{"bury": [{"filter": {"in_stock": False}}], "at_most": {"shelf": 1}})
    recommender = Recommender(tiny_encoder(), described_catalog(), 1, rules=out_of_stock)
    before = ids(ask(recommender, 1, 2, k=ITEMS))
    assert [told.partition(":")[0] for told in recommender.idle_rules()] == ["bury.0.filter.in_stock", "at_most.shelf"]
    best, second, third = before[:3]
    recommender.change_items({best: {"in_stock": False}, second: {"in_stock": True, "shelf": "a"}})
    assert ids(ask(recommender, 1, 2, k=ITEMS)) == [*before[1:], best]
    recommender.change_items({third: {"in_stock": "sold out", "shelf": "a"}})  # the item log would refuse the text
    assert ids(ask(recommender, 1, 2, k=ITEMS)) == [second, *before[3:], best]
    assert recommender.idle_rules() == []


def test_masks_are_bounded_by_their_bytes(recommender, monkeypatch):
    monkeypatch.setattr("lib.ranking.recommender.MASK_BYTES", 100_000)
    for number in range(1000):
        recommender.check(filter_of(deny=[f"{number}" * 100]))
    assert 1 < len(recommender._masks) < 1000
    assert recommender._mask_bytes <= 100_000
    last = filter_of(deny=["999" * 100])
    assert last in recommender._masks
    recommender.change_items({"i9": {"colour": "red"}})
    assert (len(recommender._masks), recommender._mask_bytes) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing known


@pytest.mark.parametrize("items", [(), ("nobody", "knows"), ("",)])
def test_without_a_known_event_what_is_popular(recommender, items):
    found = ask(recommender, *items, k=4)
    assert ids(found) == ["i24", "i23", "i22", "i21"]
    assert all(item.reason == "popular" for item in found)
    assert [item.score for item in found] == pytest.approx([1.0, 22 / 23, 21 / 23, 20 / 23])


def test_an_event_of_an_unknown_kind_is_no_history():
    recommender = Recommender(tiny_encoder(event_kinds=["click"]), described_catalog(), 1)
    viewed = history([1, 2], event="view")
    assert all(item.reason == "popular" for item in recommender.recommend([Question(viewed, 3)])[0])


def test_popular_before_anything_happened_is_any_k_items():
    recommender = Recommender(tiny_encoder(), described_catalog(), 1)
    found = ask(recommender, k=5)
    assert len(set(ids(found))) == 5
    assert all(item.score == 0 for item in found)
    assert len(ask(recommender, k=500)) == ITEMS


def test_unknown_items_in_a_history_are_passed_over(recommender):
    assert ids(ask(recommender, 3, 4, k=6)) == ids(ask(recommender, 3, 4, k=6))
    mixed = History.of(
        [
            Event("u", "unknown", "click", None, NOW - 5000),
            Event("u", "i3", "click", None, NOW),
            Event("u", "i4", "click", None, NOW + 60_000),
            Event("u", "other", "click", None, NOW + 61_000),
        ]
    )
    assert recommender.recommend([Question(mixed, 6)])[0] == ask(recommender, 3, 4, k=6)


# ---------------------------------------------------------------------------------------------------------------------
# Many at once


def test_a_batch_answers_as_each_question_alone(recommender):
    random = np.random.default_rng(0)
    filters = [None, filter_of(parity="odd"), filter_of(number={"max": 9}), filter_of(deny=["i1", "i2"])]
    questions = [
        Question(
            history([int(item) for item in random.integers(1, ITEMS + 4, random.integers(0, 14))]),
            k=int(random.integers(1, 12)),
            filter=filters[place % 4],
            exclude_seen=bool(place % 3),
            explain=bool(place % 2),
        )
        for place in range(40)
    ]
    together = recommender.recommend(questions)
    for question, answer in zip(questions, together, strict=True):
        alone = recommender.recommend([question])[0]
        assert ids(alone) == ids(answer)
        assert [item.reason for item in alone] == [item.reason for item in answer]
        assert np.allclose([item.score for item in alone], [item.score for item in answer], atol=1e-5)
    assert recommender.recommend([]) == []


def test_what_is_kept_of_a_long_history_is_no_view_of_all_of_it(recommender):
    kept = recommender.encode(history([1 + place % ITEMS for place in range(1000)]))
    length = recommender.encoder.config.max_length
    assert kept.codes.shape == (4, length)
    for array in (kept.codes, kept.person.seen, kept.person.recent):
        assert array.base is None, "the memory of what it was cut from stays for as long as it does"


# ---------------------------------------------------------------------------------------------------------------------
# Similar items and reasons


def test_similar_items_are_the_nearest_without_itself(recommender):
    vectors = recommender.encoder.item_vectors().numpy()[: ITEMS + 1]
    nearness = vectors @ vectors[6]
    nearness[[0, 6]] = -np.inf
    found = recommender.similar("i6", 5)
    assert ids(found) == [f"i{row}" for row in np.argsort(-nearness)[:5]]
    assert "i6" not in ids(recommender.similar("i6", 500))
    assert len(recommender.similar("i6", 500)) == ITEMS - 1
    assert ids(recommender.similar("i6", 5, filter_of(number={"min": 23}))) in (["i23", "i24"], ["i24", "i23"])
    with pytest.raises(KeyError):
        recommender.similar("unknown", 5)


def test_an_explanation_names_the_events_that_raised_the_score_most(recommender):
    mixed = history([3])
    mixed.add(Event("u", "i4", "purchase", None, NOW + 60_000))
    mixed.add(Event("u", "unknown", "click", None, NOW + 61_000))
    names, alone = ("click i3", "purchase i4"), (mixed.slice(1, 2), mixed.slice(0, 1))

    def scores(events: History) -> dict[str, float]:
        return dict(item[:2] for item in recommender.recommend([Question(events, ITEMS, exclude_seen=False)])[0])

    whole, without = scores(mixed), [scores(events) for events in alone]
    found = recommender.recommend([Question(mixed, ITEMS, explain=True)])[0]
    assert len(found) == ITEMS - 2
    for item in found:
        raised = {name: whole[item.item_id] - w[item.item_id] for name, w in zip(names, without, strict=True)}
        expected = sorted((name for name in names if raised[name] > 0), key=lambda name: -raised[name])
        assert item.reason == (", ".join(expected) or None)
    assert len({item.reason for item in found}) > 1


def test_an_explanation_looks_past_unknown_items(recommender):
    found = ask(recommender, 3, *(f"unknown{number}" for number in range(20)), k=4, explain=True)
    assert [item.reason for item in found] == ["click i3"] * 4


def test_an_explanation_of_no_items(recommender):
    assert ask(recommender, 3, filter=filter_of(allow=[]), explain=True) == []
    assert {item.reason for item in ask(recommender, explain=True)} == {"popular"}


# ---------------------------------------------------------------------------------------------------------------------
# Ranking rules


def ruled(recommender: Recommender, **rules) -> Recommender:
    """The same model with ranking rules."""
    return Recommender(recommender.encoder, recommender.catalog, 3, 7, RankingRules(**rules))


def test_rules_that_are_off_change_nothing(recommender):
    assert ask(ruled(recommender), 3, 9, k=10) == ask(recommender, 3, 9, k=10)


def test_a_boost_finds_the_best_of_the_whole_catalog(recommender):
    weight = 0.1
    scores = {item.item_id: item.score for item in ask(recommender, 3, 9, k=ITEMS)}
    weighted = {name: score + weight * (int(name[1:]) % 2 == 0) for name, score in scores.items()}
    found = ask(ruled(recommender, boost=[{"filter": {"parity": "even"}, "weight": weight}]), 3, 9, k=6)
    assert ids(found) == sorted(weighted, key=lambda name: -weighted[name])[:6]
    assert all(item.score == pytest.approx(scores[item.item_id]) for item in found), "the score is s all the same"


def test_buried_items_come_last_and_pins_stand_where_they_were_put(recommender):
    rules = ruled(recommender, bury=[{"filter": {"parity": "odd"}}], pin={2: "i7", 3: "i3"})
    found = ids(ask(rules, 3, 9, k=ITEMS))
    assert found[1] == "i7"
    assert "i3" not in found, "it is seen"
    assert len(found) == ITEMS - 2
    parities = [int(name[1:]) % 2 for name in found if name != "i7"]
    assert parities == sorted(parities)
    filtered = ids(ask(rules, 3, 9, k=3, filter=filter_of(parity="even")))
    assert "i7" not in filtered
    assert len(filtered) == 3


def test_limits_hold_for_everybody(recommender):
    rules = ruled(recommender, at_most={"parity": 2})
    for found in (ask(rules, 3, 9, k=10), ask(rules, k=10)):
        assert Counter(int(item.item_id[1:]) % 2 for item in found) == {0: 2, 1: 2}
    assert {item.reason for item in ask(rules, k=10)} == {"popular"}


def test_exploration_tells_its_propensities(recommender):
    rules = ruled(recommender, exploration_temperature=0.05)
    found = ask(rules, 3, 9, k=5)
    assert all(item.propensity is not None and 0 < item.propensity <= 1 for item in found)
    assert len({tuple(ids(ask(rules, 3, 9, k=5))) for _ in range(20)}) > 1
    assert all(item.propensity is None for item in ask(recommender, 3, 9, k=5))


def test_rules_follow_the_catalog(recommender):
    rules = ruled(recommender, bury=[{"filter": {"parity": "odd"}}])
    best = ids(ask(rules, 3, 9, k=1))[0]
    rules.change_items({best: {"parity": "odd", "number": 1}})
    assert ids(ask(rules, 3, 9, k=1))[0] != best


def test_limits_follow_the_catalog_without_reading_all_of_it(recommender, monkeypatch):
    rules = ruled(recommender, at_most={"parity": 2})
    shown = ids(ask(rules, 3, 9, k=10))
    monkeypatch.setattr("lib.data.item_table.ItemTable.table", lambda _: pytest.fail("all items are read"))
    rules.change_items({shown[0]: {"parity": "neither"}})
    changed = ids(ask(rules, 3, 9, k=10))
    assert {*shown} < {*changed}
    assert len(changed) == 5, "one more, as the first is of a value of its own"


# ---------------------------------------------------------------------------------------------------------------------
# One version


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


def replica_of(registry: Registry) -> Recommender:
    loaded = registry.load()
    return Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset)


def learned(registry: Registry, items: tuple[int | str, ...] = (1, 2, "new")) -> Delta:
    gate = GateConfig(held_out_users=0)
    learner = NearlineLearner(registry, LearnerConfig(negatives=8, gate=gate, learning_rate=0.05, new_item_users=1))
    outcome = learner.learn(micro_batch(learner.version * 10, [history(items)]))
    assert isinstance(outcome, Delta)
    return Delta.from_bytes(outcome.to_bytes())


def assert_one_version(replica: Recommender, registry: Registry) -> None:
    """All parts are what a replica that loads the newest version has."""
    fresh = replica_of(registry)
    assert replica.version == fresh.version == registry.head()
    assert replica.log_offset == fresh.log_offset
    assert replica.checksum == fresh.checksum == fingerprint(replica.encoder)
    assert_same_state(copied_state(replica.encoder), copied_state(fresh.encoder))
    assert np.array_equal(replica.index.vectors, fresh.index.vectors)
    assert np.array_equal(replica.index.vectors, replica.encoder.item_vectors().numpy())
    assert replica.catalog.item_ids == fresh.catalog.item_ids
    questions = [Question(history(items), 10) for items in ([1, 2], ["new"], [], [5, 9, 1])]
    assert replica.recommend(questions) == fresh.recommend(questions)


def test_after_a_delta_encoder_index_catalog_and_version_are_of_the_new_version(registry):
    replica = replica_of(registry)
    before = ask(replica, 1, 2, k=10)
    for number in range(3):
        replica.apply(learned(registry, (1, 2 + number, f"new{number}")))
        assert_one_version(replica, registry)
    assert ask(replica, 1, 2, k=10) != before


def test_a_delta_of_another_parent_changes_nothing(registry):
    replica, early = replica_of(registry), replica_of(registry)
    first = learned(registry)
    second = learned(registry, (4, 5, "newer"))
    state, vectors = copied_state(early.encoder), early.index.vectors.copy()
    with pytest.raises(DeltaMismatch, match="delta 3 follows version 2, this is 1"):
        early.apply(second)
    assert_same_state(state, copied_state(early.encoder))
    assert np.array_equal(vectors, early.index.vectors)
    assert (early.version, len(early.catalog), early.checksum) == (1, ITEMS, fingerprint(early.encoder))
    replica.apply(first)
    with pytest.raises(DeltaMismatch, match="delta 2 follows version 1, this is 2"):
        replica.apply(first)  # twice
    replica.apply(second)
    assert_one_version(replica, registry)


@pytest.mark.parametrize("name", ["interest_to_item", "item_embeddings.weight", "item_popularity"])
def test_a_delta_that_comes_out_otherwise_is_noticed(registry, name):
    replica = replica_of(registry)
    delta = learned(registry)
    delta.tensors[name] = delta.tensors[name] + np.float32(1e-3)
    with pytest.raises(DeltaMismatch, match="version 2 came out as"):
        replica.apply(delta)
    assert replica.version == 1


def test_a_replica_that_drifted_is_noticed(registry):
    learned(registry)
    loaded = registry.load()
    delta = learned(registry)
    row = np.setdiff1d(np.arange(1, ITEMS + 1), delta.rows)[0]  # one that the delta does not mend
    loaded.encoder.item_popularity[int(row)] += 1e-3
    with pytest.raises(DeltaMismatch, match="version 3 came out as"):
        Recommender(loaded.encoder, loaded.catalog, loaded.version).apply(delta)


def test_a_model_folder_makes_a_recommender(tmp_path):
    save_model(tmp_path / "model", tiny_encoder(), described_catalog(), Manifest(version=4, log_offset=9))
    loaded = Recommender.load(tmp_path / "model")
    assert (loaded.version, loaded.log_offset) == (4, 9)
    assert ask(loaded, 1, 2) == ask(Recommender(tiny_encoder(), described_catalog(), 4), 1, 2)
    with pytest.raises(InputError, match="no folder"):
        Recommender.load(tmp_path / "missing")


# ---------------------------------------------------------------------------------------------------------------------
# What people turn down

GENRE = 20  # items of each of three genres


def genres_recommender(rules: RankingRules | None = None, **changes) -> Recommender:
    """Three genres of items that are like each other; the interest is near the last item that was read."""
    encoder = tiny_encoder(3 * GENRE, **changes)
    generator = torch.Generator().manual_seed(1)
    centers = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q.T  # orthogonal
    noise = torch.nn.functional.normalize(torch.randn(3 * GENRE, 16, generator=generator), dim=1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        encoder.item_embeddings.weight[1:] = centers.repeat_interleave(GENRE, 0) + 0.7 * noise
        encoder.item_embeddings.weight[3 * GENRE] = centers[:2].sum(0)  # between the first genre and the second
        encoder.interest_to_item.copy_(torch.eye(16))
    encoder.item_popularity[1:] = 1.0
    return Recommender(encoder, Catalog(item_ids(3 * GENRE)), 1, rules=rules)


def after(recommender: Recommender, kind: str | None, value: float | None = None, reactions: int = 5) -> list[int]:
    """The rows that are answered after three clicks and so many reactions to items of the first genre."""
    events = [Event("u", f"i{item}", "click", None, NOW + item) for item in (45, 50, 3 * GENRE)]
    if kind is not None:
        events += [Event("u", f"i{item}", kind, value, NOW + 1000 + item) for item in range(1, 1 + reactions)]
    (items,) = recommender.recommend([Question(History.of(events), 30)])
    met = [f"i{item}" for item in range(1, 6)]
    return [int(item.item_id[1:]) for item in items if item.item_id not in met][:20]


def of_first_genre(rows: list[int]) -> int:
    return sum(row <= GENRE for row in rows)


@pytest.mark.parametrize(
    ("kind", "value", "scale"),
    [("dislike", None, "1-5"), ("skip", None, "1-5"), ("rating", 1.0, "1-5"), ("rating", 4.0, "1-10")],
)
@pytest.mark.parametrize("rules", [RankingRules(), RankingRules(pin={100: "i1"})])  # beyond every answer
def test_less_like_it_is_answered_after_a_dislike_than_after_nothing_and_more_after_a_like(kind, value, scale, rules):
    recommender = genres_recommender(rules, rating_scale=scale)
    nothing, liked, disliked = after(recommender, None), after(recommender, "like"), after(recommender, kind, value)
    assert of_first_genre(liked) > of_first_genre(nothing) > of_first_genre(disliked)
    assert np.mean([disliked.index(row) for row in disliked if row <= GENRE] or [20]) > np.mean(
        [nothing.index(row) for row in nothing if row <= GENRE]
    )


def test_more_dislikes_push_farther_and_none_changes_the_interest():
    recommender = genres_recommender()
    answers = [after(recommender, "dislike", reactions=count) for count in (0, 1, 2, 5)]
    counts = [of_first_genre(rows) for rows in answers]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[3]
    firsts = [min((place for place, row in enumerate(rows) if row <= GENRE), default=20) for rows in answers]
    assert firsts == sorted(firsts)
    assert firsts[3] > firsts[0]
    off = genres_recommender(RankingRules(dislike_weight=0.0))
    assert after(off, "dislike") == after(off, None)


def test_who_has_turned_down_everything_gets_what_is_popular_and_not_like_it():
    recommender = genres_recommender()
    events = [Event("u", f"i{item}", "dislike", None, NOW + item) for item in (1, 2, 3)]
    (items,) = recommender.recommend([Question(History.of(events), 40)])
    assert all(item.reason == "popular" for item in items)
    assert of_first_genre([int(item.item_id[1:]) for item in items]) == 0
    (whole,) = recommender.recommend([Question(History.of(events), 100)])
    assert len(whole) == 3 * GENRE - 3
    assert not {"i1", "i2", "i3"} & set(ids(whole))


def test_a_dislike_is_no_reason():
    recommender = genres_recommender()
    events = [Event("u", f"i{item}", "click", None, NOW + item) for item in (21, 22)]
    events.append(Event("u", "i1", "dislike", None, NOW + 100))
    (items,) = recommender.recommend([Question(History.of(events), 20, explain=True)])
    assert all("dislike" not in (item.reason or "") for item in items)
    assert any(item.reason for item in items)


# ---------------------------------------------------------------------------------------------------------------------
# With counts and a ranker


def counting_encoder() -> BehaviourEncoder:
    """Return an encoder with counts of some histories and a ranker whose every weight matters."""
    encoder = tiny_encoder(ITEMS)
    encoder.item_popularity[1:] = torch.arange(ITEMS, dtype=torch.float32)
    encoder.add_ranker(4, len(FEATURES))
    assert encoder.ranker is not None
    encoder.ranker.weights += torch.randn(len(encoder.ranker.weights), generator=torch.Generator().manual_seed(0))
    count(encoder, *[(1 + number % ITEMS, 1 + (number * 7) % ITEMS) for number in range(60)])
    return encoder


def count(encoder: BehaviourEncoder, *pairs: tuple[int, int]) -> np.ndarray:
    """Count an event of the second item of each pair after the first; return the changed rows."""
    assert encoder.counts is not None
    contexts, items = np.array([[before] for before, _ in pairs]), np.array([item for _, item in pairs])
    times = int(encoder.counts.clock) + 1 + np.arange(len(pairs))
    encoder.counts.count(contexts, items, np.ones(len(pairs)), times)
    return encoder.counts.rows_of(contexts, items)


def counted_delta(encoder: BehaviourEncoder, version: int, *pairs: tuple[int, int]) -> Delta:
    """Count, move the ranker and a row of the items, and say what has changed."""
    assert encoder.ranker is not None
    rows = count(encoder, *pairs)
    encoder.ranker.weights += 0.1 * torch.randn(len(encoder.ranker.weights))
    with torch.no_grad():
        encoder.item_embeddings.weight[5] += 0.5
        encoder.item_popularity[5] += 40
    state, changed = state_of(encoder), np.array([5])
    tensors = {name: state[name].numpy()[changed] for name in ROW_TENSORS}
    tensors |= {name: state[name].numpy()[rows] for name in COUNT_TENSORS}
    tensors |= {name: state[name].numpy().copy() for name in ("counts.clock", "ranker.weights")}
    return Delta(version, version - 1, fingerprint(encoder), 9, ITEMS + 1, changed, tensors, count_rows=rows)


def assert_same_answer(one: list[RankedItem], other: list[RankedItem]) -> None:
    """Equal items, and scores but for the last bits, which depend on where in memory the weights lie."""
    assert ids(one) == ids(other)
    assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-5)


def test_counts_change_who_gets_what_and_the_right_number_comes():
    recommender = Recommender(counting_encoder(), described_catalog(), version=1)
    plain = Recommender(tiny_encoder(ITEMS), described_catalog(), version=1)
    assert ids(ask(recommender, 3, 9, k=10)) != ids(ask(plain, 3, 9, k=10))
    for k in (1, 5, 22, 100):
        found = ask(recommender, 3, 9, k=k)
        assert len(found) == len(set(ids(found))) == min(k, ITEMS - 2)
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    even = ids(ask(recommender, 2, 3, k=30, filter=filter_of(parity="even")))
    assert sorted(int(name[1:]) for name in even) == [row for row in range(4, ITEMS + 1, 2)]
    assert {item.reason for item in ask(recommender, k=3)} == {"popular"}


@pytest.mark.parametrize("passing", [1, 3, 150])
@pytest.mark.parametrize("source", [None, "nearest", "trending", "the encoder"])
def test_a_newcomer_gets_what_is_popular_among_what_passes_however_rare_that_is(passing, source):
    """Of what is kept in order, the most popular of all and the newest of all, nothing passes."""
    items = 3000
    encoder = tiny_encoder(items)
    met = np.random.default_rng(0).permutation(items) + 1  # times that each item was met
    met[:passing] = np.random.default_rng(1).permutation(passing) + 1  # the first ones least of all
    met[passing:] += passing
    encoder.item_popularity[1:] = torch.from_numpy(met)
    off = [] if source in (None, "the encoder") else [name for name in SOURCES if name != source]
    if source != "the encoder":
        encoder.add_ranker(4, len(FEATURES))  # which orders newcomers' items by popularity before it is fitted
        assert encoder.counts is not None
        rows = np.arange(1, items + 1)  # in the order in which they came
        encoder.counts.count(np.zeros((items, WINDOW), dtype=np.int64), rows, met.astype(float), rows)
    names = item_ids(items)
    described = {"item_id": names, "category": ["rare" if row < passing else "other" for row in range(items)]}
    rules = RankingRules(without_sources=tuple(off))
    recommender = Recommender(encoder, Catalog(names, pa.table(described)), version=1, rules=rules)
    answer = ask(recommender, k=10, filter=filter_of(category="rare"))
    assert ids(answer) == [f"i{row + 1}" for row in np.argsort(-met[:passing])[:10]]
    assert {item.reason for item in answer} == {"popular"}
    assert ids(ask(recommender, k=10)) == [f"i{row + 1}" for row in np.argsort(-met, kind="stable")[:10]]


def test_a_source_that_the_rules_switch_off_is_not_asked():
    encoder = counting_encoder()
    trends = RankingRules(without_sources=("nearest", "following", "together", "new", "seen"))
    found = ids(ask(Recommender(encoder, described_catalog(), version=1, rules=trends), 3, k=30))
    assert encoder.counts is not None
    met = (encoder.counts.events.numpy() > 0).nonzero()[0].tolist()
    assert sorted(found) == sorted(f"i{row}" for row in met if row != 3)
    with pytest.raises(InputError, match="without_sources: there is no source 'trends'"):
        RankingRules(without_sources=("trends",))
    (idle,) = Recommender(tiny_encoder(ITEMS), described_catalog(), version=1, rules=trends).idle_rules()
    assert idle.startswith("without_sources: this model has no ranker")


@pytest.mark.parametrize("repeats", [False, True])
def test_seen_items_compete_where_people_come_back_unless_the_question_says_otherwise(repeats):
    encoder = counting_encoder()
    encoder.config.repeats = repeats
    recommender = Recommender(encoder, described_catalog(), version=1)
    answers = {
        exclude: set(ids(ask(recommender, 3, 9, k=ITEMS, exclude_seen=exclude))) for exclude in (None, True, False)
    }
    assert not {"i3", "i9"} & answers[True]
    assert {"i3", "i9"} <= answers[False]
    assert answers[None] == answers[not repeats]
    together = recommender.recommend(
        [Question(history([3, 9]), ITEMS, exclude_seen=own) for own in (None, True, False)]
    )
    assert [set(ids(items)) for items in together] == list(answers.values())


def test_a_delta_with_counts_gives_the_recommender_that_a_fresh_start_gives():
    leader, follower = counting_encoder(), Recommender(counting_encoder(), described_catalog(), version=1)
    before = ask(follower, 3, 9, k=10)
    for version, pairs in [(2, [(3, 14), (9, 14)]), (3, [(14, 21)] * 3)]:
        follower.apply(Delta.from_bytes(counted_delta(leader, version, *pairs).to_bytes()))
    leading = tiny_encoder(ITEMS)
    leading.add_ranker(4, len(FEATURES))
    leading.load_state_dict(copied_state(leader))
    fresh = Recommender(leading, described_catalog(), version=3)
    assert follower.checksum == fresh.checksum
    questions = [Question(history(items), 10) for items in ([3, 9], [14], [], [1, 2, 3, 14, 5])]
    for one, other in zip(follower.recommend(questions), fresh.recommend(questions), strict=True):
        assert_same_answer(one, other)
    assert ids(ask(follower, 3, 9, k=10)) != ids(before)


def test_counts_at_other_rows_than_a_delta_says_are_noticed():
    leader, follower = counting_encoder(), Recommender(counting_encoder(), described_catalog(), version=1)
    delta = counted_delta(leader, 2, (3, 14))
    delta.count_rows = delta.count_rows + 1
    with pytest.raises(DeltaMismatch, match=r"^version 2 came out as"):
        follower.apply(delta)


def test_a_model_folder_keeps_counts_and_ranker(tmp_path):
    encoder = counting_encoder()
    encoder.config.repeats = True
    save_model(tmp_path / "model", encoder, described_catalog(), Manifest(version=1))
    loaded = Recommender.load(tmp_path / "model")
    assert loaded.checksum == fingerprint(encoder)
    assert loaded.encoder.config.repeats
    assert_same_answer(ask(loaded, 3, 9), ask(Recommender(encoder, described_catalog(), version=1), 3, 9))
