"""Ranking rules: each does what it promises, and says how likely what it drew was."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.ranking.off_policy import estimated_value, propensities_of
from lib.ranking.rerank import RankedRows, rerank
from lib.ranking.rules import LONGEST_PARTED, BoundRules, RankingRules

ITEMS = 60
COLOURS = ("red", "blue", "green")
GENRES = ("Comedy", "Drama", "War", "Western")
NOTHING = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """Items i1 ... i60; what i61 and i62 are is known, but they have no row."""
    generator = np.random.default_rng(5)
    numbers = range(1, ITEMS + 3)
    several = [list(generator.choice(GENRES, generator.integers(0, 3), replace=False)) for _ in numbers]
    attributes = {
        "item_id": [f"i{number}" for number in numbers],
        "colour": [COLOURS[number % 3] for number in numbers],
        "genres": [" ".join(sorted(members)) or None for members in several],
        "tags": several,
        "price": [number % 7 for number in numbers],
    }
    return Catalog([f"i{number}" for number in range(1, ITEMS + 1)], pa.table(attributes))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((ITEMS + 1, 8)).astype(np.float32)
    vectors[0] = 0
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def scores(vectors) -> np.ndarray:
    """(items + 1,) what one person thinks of every item."""
    query = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    return vectors @ (query / np.linalg.norm(query))


def bound(catalog: Catalog, **rules) -> BoundRules:
    return BoundRules.of(RankingRules(**rules), catalog)


def best(
    scores: np.ndarray, mask: np.ndarray, count: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The index, the long way."""
    rows = np.flatnonzero(mask & (np.arange(len(mask)) > 0))
    merit = scores if weights is None else scores + weights
    rows = rows[np.argsort(-merit[rows], kind="stable")[:count]]
    return rows, scores[rows]


def answer(
    rules: BoundRules,
    scores: np.ndarray,
    vectors: np.ndarray,
    k: int,
    mask: np.ndarray | None = None,
    seen: np.ndarray = NOTHING,
    seed: int = 0,
) -> RankedRows:
    """An answer whose candidates come from the searches that the rules ask for."""
    mask = np.ones(len(scores), dtype=bool) if mask is None else mask.copy()
    pinned = rules.pinned(mask, seen)
    mask[seen] = False
    found, _ = rules.find(mask, lambda among, weights: best(scores, among, rules.candidates(k), weights))
    rows = np.concatenate([found, pinned])
    generator = np.random.default_rng(seed)
    return rerank(
        rows,
        scores[rows],
        k,
        rules,
        vectors,
        generator,
        lambda among, weights: best(scores, mask & among, 20, weights),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_every_rule_is_off_by_default(catalog, scores, vectors):
    assert not RankingRules().active
    found = answer(bound(catalog), scores, vectors, 10)
    assert found.rows.tolist() == best(scores, scores < 9, 10)[0].tolist()
    assert found.scores.tolist() == scores[found.rows].tolist()
    assert found.propensities is None
    assert bound(catalog).candidates(10) == 10
    assert bound(catalog).groups == (None,)


@pytest.mark.parametrize(
    ("written", "candidates"),
    [
        ({"pin": {1: "i3"}}, 10),
        ({"boost": [{"filter": {"colour": "red"}, "weight": 0.1}]}, 10),
        ({"bury": [{"filter": {"deny": ["i2"]}}]}, 10),
        ({"at_most": {"genres": 3}}, 200),
        ({"diversity_lambda": 0.7}, 200),
        ({"exploration_temperature": 0.02}, 200),
        ({"exploration_temperature": 0.02, "candidates": 5}, 20),
    ],
)
def test_any_rule_makes_the_rules_active(catalog, written, candidates):
    rules = RankingRules(**written)
    assert rules.active
    assert BoundRules.of(rules, catalog).candidates(10) == candidates
    assert RankingRules.model_validate_json(rules.model_dump_json()) == rules


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"boots": []}, "boots: no such setting, did you mean boost? there are pin, boost, bury, at_most"),
        ({"pin": ["i3"]}, "pin: input should be a valid dictionary"),
        ({"pin": {0: "i3"}}, "pin.0: input should be greater than or equal to 1, got 0"),
        ({"pin": {1: 50}}, "pin.1: input should be a valid string, got 50"),
        ({"pin": {1: "i3", 2: "i3"}}, "pin: item 'i3' has more than one place; keep one"),
        ({"boost": [{"filter": {"colour": "red"}}]}, "boost.0.weight: field required; add it"),
        ({"boost": [{"filter": {}, "weight": 1}]}, "boost.0.filter: it is empty; say which items"),
        ({"boost": [{"filter": {"deny": "i3"}, "weight": 1}]}, "boost.0.filter.deny: give a list of item ids"),
        ({"boost": [{"filter": {"colour": "red"}, "weight": -1}]}, "boost.0.weight: input should be greater than 0"),
        ({"boost": [{"filter": {"colour": "red"}, "weight": True}]}, "boost.0.weight: input should be a valid number"),
        (
            {"bury": [{"filter": {"colour": "red"}, "wait": 1}]},
            "bury.0.wait: no such setting, did you mean weight? there are filter, weight",
        ),
        ({"at_most": {"genres": 0}}, "at_most.genres: input should be greater than or equal to 1, got 0"),
        ({"at_most": {"genres": "3"}}, "at_most.genres: input should be a valid integer, got '3'"),
        ({"diversity_lambda": 0}, "diversity_lambda: input should be greater than or equal to 0.01, got 0"),
        ({"diversity_lambda": 1.5}, "diversity_lambda: input should be less than or equal to 1, got 1.5"),
        ({"exploration_temperature": float("nan")}, "exploration_temperature: input should be "),
        ({"candidates": 0}, "candidates: input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_rule_is_named(written, message):
    with pytest.raises(InputError) as raised:
        RankingRules(**written)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"boost": [{"filter": {"colour": {"min": 1}}, "weight": 1}]}, "boost.0.filter.colour: a range needs numbers"),
    ],
)
def test_a_rule_that_does_not_suit_the_catalog_is_named_and_has_no_effect(catalog, scores, vectors, written, message):
    rules = bound(catalog, **written)
    with pytest.raises(InputError) as raised:
        rules.check()
    assert str(raised.value).startswith(message)
    assert answer(rules, scores, vectors, 10).rows.tolist() == best(scores, scores < 9, 10)[0].tolist()


@pytest.mark.parametrize(
    ("written", "idle"),
    [
        ({"pin": {2: "i99", 1: "i5"}}, ["pin.2: there is no item 'i99'"]),
        (
            {"boost": [{"filter": {"size": 3}, "weight": 1}]},
            ["boost.0.filter.size: no item has this attribute, so none matches; there are colour, genres, tags, price"],
        ),
        ({"bury": [{"filter": {"deny": ["i1"], "in_stock": False}}]}, ["bury.0.filter.in_stock: no item has"]),
        ({"at_most": {"size": 3, "colour": 100}}, ["at_most.size: no item has this attribute"]),
        ({"at_most": {"item_id": 3}}, ["at_most.item_id: no item has this attribute"]),
    ],
)
def test_a_rule_of_what_nothing_has_yet_is_named_and_has_no_effect(catalog, scores, vectors, written, idle):
    rules = bound(catalog, **written)
    rules.check()
    assert len(rules.idle) == len(idle)
    assert all(told.startswith(expected) for told, expected in zip(rules.idle, idle, strict=True))
    expected = best(scores, scores < 9, 10)[0].tolist()
    if "pin" in written:
        expected = [5, *(row for row in expected if row != 5)][:10]
    assert answer(rules, scores, vectors, 10).rows.tolist() == expected


def test_limits_without_attributes_have_no_effect():
    assert bound(Catalog(["a"]), at_most={"genres": 1}).idle == (
        "at_most.genres: no item has this attribute, so nothing is limited",
    )


def test_more_rules_than_an_answer_can_afford_are_refused_when_they_are_read():
    for kind in ("boost", "bury"):
        RankingRules.model_validate({kind: [{"filter": {"colour": "red"}, "weight": 1}] * 100})
        with pytest.raises(InputError, match=rf"^{kind}: tuple should have at most 100 items"):
            bound(Catalog(), **{kind: [{"filter": {"colour": "red"}, "weight": 1}] * 101})
    with pytest.raises(InputError, match=r"^at_most: dictionary should have at most 100 items"):
        bound(Catalog(), at_most={f"attribute-{number}": 1 for number in range(101)})


def test_an_item_with_more_values_than_are_counted_changes_nothing_for_others(scores, vectors):
    """Its codes take room of their own; the first 256 are counted."""
    tags = [[f"t{number}" for number in range(100_000)], ["t1"], ["t99999"], ["t99999"], None]
    catalog = Catalog(list("abcde"), pa.table({"item_id": list("abcde"), "tags": tags}))
    rules = bound(catalog, at_most={"tags": 1})
    assert rules.categories[0].of_rows(np.array([1])).shape == (1, 256)
    assert rules.categories[0].of_rows(np.array([2, 5])).tolist() == [[2], [0]]
    rows, values = np.arange(1, 6), np.array([0.5, 0.4, 0.3, 0.2, 0.1])
    found = rerank(rows, values, 5, rules, vectors, np.random.default_rng(0))
    assert found.rows.tolist() == [1, 3, 5]


def test_rules_are_bound_anew_when_the_catalog_changed():
    catalog = Catalog(["a", "b"], pa.table({"item_id": ["a", "b"], "colour": ["red", "blue"]}))
    rules = RankingRules(**{"boost": [{"filter": {"colour": "red"}, "weight": 1}], "pin": {1: "c"}})
    old = BoundRules.of(rules, catalog, rows=5)  # two spare rows
    assert old.fits(catalog, 5)
    assert not old.fits(catalog, 6)
    catalog.change({"b": {"colour": "red"}})
    assert not old.fits(catalog, 5)
    new = BoundRules.of(rules, catalog, rows=5)
    assert (old.weights.tolist(), new.weights.tolist()) == ([0, 1, 0, 0, 0], [0, 1, 1, 0, 0])
    catalog.extend(["c"])
    assert not new.fits(catalog, 5)
    assert (dict(new.pins), dict(BoundRules.of(rules, catalog, rows=5).pins)) == ({}, {3: 0})


ATTRIBUTES = ("colour", "genres", "tags", "price", "size", "shelf")


def counted(rules: BoundRules, known: Catalog) -> list[list[set[Any]]]:
    """The values of each limited attribute that each row counts for."""
    value_of = [{code: value for value, code in limited.code_of.items()} for limited in rules.categories]
    return [
        [{values[code] for code in codes if code} for codes in limited.of_rows(np.arange(len(known) + 1)).tolist()]
        for limited, values in zip(rules.categories, value_of, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_limits_that_follow_the_changes_are_those_that_are_read_anew(seed):
    generator = np.random.default_rng(seed)
    names = [f"i{number}" for number in range(40)]
    described = {
        "item_id": names[:20],
        "colour": [COLOURS[number % 3] for number in range(20)],
        "genres": [" ".join(GENRES[: 1 + number % 3]) for number in range(20)],
        "tags": [list(GENRES[: number % 3]) for number in range(20)],
        "price": pa.array([number / 4 for number in range(20)], pa.float32()),
        "size": [number % 5 for number in range(20)],
    }
    catalog = Catalog(names[:20], pa.table(described))
    rules = RankingRules(at_most=dict.fromkeys(ATTRIBUTES, 2))
    following = BoundRules.of(rules, catalog, rows=50)
    for _ in range(30):
        changed = generator.choice(names, 3, replace=False).tolist()
        put: list[dict[str, Any] | None] = [
            {
                "colour": str(generator.choice([*COLOURS, "red;blue"])),
                "genres": str(generator.choice(["Comedy War", "Drama", "Western Comedy"])),
                "tags": generator.choice(GENRES, 2).tolist(),
                "price": float(generator.integers(9)) / 4,
            },
            {"size": float(generator.integers(9)) / 2, "shelf": str(generator.choice(["A|B", "B", ""]))},
            None,
        ]
        items = dict(zip(changed, put, strict=True))
        catalog.change(items)
        described_now = {*items, *catalog.extend(generator.choice(names, 1).tolist())}
        following = BoundRules.of(rules, catalog, 50, following, described_now)
        anew = BoundRules.of(rules, catalog, 50)
        assert counted(following, catalog) == counted(anew, catalog)
        for own, limited in zip(following.categories, anew.categories, strict=True):
            full = [*limited.code_of][:2]
            without = own.without([own.code_of[value] for value in full])
            assert without.tolist() == limited.without([limited.code_of[value] for value in full]).tolist()
    assert len(following.categories) == len(ATTRIBUTES)


def test_a_changed_item_costs_no_reading_of_the_others(catalog, monkeypatch):
    """The rules are bound in the event loop of a replica, at the first answer after a change."""
    rules = RankingRules(at_most={"colour": 2, "tags": 1, "price": 3})
    known = Catalog(catalog.item_ids[1:], catalog.attributes)
    before = BoundRules.of(rules, known)
    known.change({"i3": {"colour": "violet"}})
    monkeypatch.setattr("lib.data.item_table.ItemTable.table", lambda _: pytest.fail("all items are read"))
    monkeypatch.setattr("lib.ranking.rules.Categories.of", lambda *_: pytest.fail("all items are read"))
    after = BoundRules.of(rules, known, before=before, changed=["i3"])
    assert counted(after, known)[0][3] == {"violet"}


# ---------------------------------------------------------------------------------------------------------------------
# Pin, boost, bury


def test_pinned_items_stand_at_their_places(catalog, scores, vectors):
    rules = bound(catalog, pin={1: "i7", 3: "i8", 9: "i9", 2: "unknown"})
    found = answer(rules, scores, vectors, 5).rows.tolist()
    others = np.ones(ITEMS + 1, dtype=bool)
    others[[7, 8, 9]] = False
    first, second, third = best(scores, others, 3)[0].tolist()
    assert found == [7, first, 8, second, third]


PINS = {2: "i7", 5: "i8", 50: "i9"}
BOOSTS = [{"filter": {"colour": "red"}, "weight": 2}, {"filter": {"colour": "blue"}, "weight": 3}]


@pytest.mark.parametrize(
    "written", [{}, {"bury": [{"filter": {"colour": "red"}}]}, {"pin": PINS}, {"pin": PINS, "boost": BOOSTS}]
)
@pytest.mark.parametrize("k", [1, 4, 5, 70])
def test_a_rule_that_changes_nothing_changes_nothing(catalog, scores, vectors, written, k):
    """Answers that are sorted are those that are filled place by place."""
    idle = bound(catalog, at_most={"colour": 100}, candidates=1, **written)
    assert (
        answer(bound(catalog, **written), scores, vectors, k).rows.tolist()
        == answer(idle, scores, vectors, k).rows.tolist()
    )


def test_pinned_items_that_are_filtered_or_seen_give_way(catalog, scores, vectors):
    rules = bound(catalog, pin={1: "i7", 2: "i8", 3: "i9"})
    mask = np.ones(ITEMS + 1, dtype=bool)
    mask[7] = False
    found = answer(rules, scores, vectors, 5, mask, seen=np.array([8])).rows.tolist()
    assert found[2] == 9
    assert not {7, 8} & set(found)
    assert len(found) == 5


def test_in_a_short_answer_pinned_items_move_up(catalog, scores, vectors):
    mask = np.zeros(ITEMS + 1, dtype=bool)
    mask[[4, 7]] = True
    assert answer(bound(catalog, pin={5: "i7"}), scores, vectors, 10, mask).rows.tolist() == [4, 7]


def test_weights_reach_the_whole_catalog(catalog, scores, vectors):
    boost = [{"filter": {"colour": "red"}, "weight": 0.4}, {"filter": {"price": {"max": 1}}, "weight": 0.7}]
    rules = bound(catalog, boost=boost, bury=[{"filter": {"genres": "War"}, "weight": 0.5}])
    weighted = scores + 0.4 * catalog.mask({"colour": "red"}) + 0.7 * catalog.mask({"price": {"max": 1}})
    weighted -= 0.5 * catalog.mask({"genres": "War"})
    for k in (1, 3, 10, ITEMS):
        found = answer(rules, scores, vectors, k)
        assert found.rows.tolist() == best(weighted, scores < 9, k)[0].tolist()
        assert found.scores.tolist() == scores[found.rows].tolist()  # s, without the weight


def random_filter(generator: np.random.Generator) -> dict:
    """Some filter, over attributes that items have and one that they only may get."""
    conditions = {
        "colour": [str(value) for value in generator.choice(COLOURS, generator.integers(1, 3), replace=False)],
        "tags": str(generator.choice(GENRES)),
        "price": {"min": int(generator.integers(0, 5)), "max": int(generator.integers(3, 8))},
        "size": int(generator.integers(0, 3)),
        "deny": [f"i{number}" for number in generator.integers(1, ITEMS, 20)],
    }
    chosen = generator.choice(list(conditions), generator.integers(1, 3), replace=False)
    return {str(name): conditions[str(name)] for name in chosen}


def weighted_by_hand(written: dict, catalog: Catalog, row: int) -> float:
    """What the rules add to the score of a row, item by item."""
    assert catalog.attributes is not None
    own = next(line for line in catalog.attributes.to_pylist() if line["item_id"] == catalog.item_ids[row])
    total = 0.0
    for sign, rule in [(1, rule) for rule in written["boost"]] + [(-1, rule) for rule in written["bury"]]:
        passes = True
        for name, condition in rule["filter"].items():
            value = own["item_id"] if name == "deny" else own.get(name)
            if name == "deny":
                passes &= value not in condition
            elif name == "price":
                passes &= value is not None and condition["min"] <= value <= condition["max"]
            else:
                wanted = condition if isinstance(condition, list) else [condition]
                passes &= any(each in (value if isinstance(value, list) else [value]) for each in wanted)
        total += sign * rule.get("weight", 1e6) * passes
    return total


@pytest.mark.parametrize("seed", range(30))
def test_any_rules_and_any_puts_give_what_scoring_every_item_gives(catalog, scores, vectors, seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 13))
    written = {"boost": [], "bury": []}
    for _ in range(count):
        rule = {"filter": random_filter(generator), "weight": float(generator.choice([0.1, 0.2, 0.3, 0.7]))}
        kind = str(generator.choice(["boost", "bury"]))
        if kind == "bury" and generator.random() < 0.2:
            del rule["weight"]
        written[kind].append(rule)
    live = Catalog(catalog.item_ids[1:], catalog.attributes)
    for _ in range(4):
        for item in generator.choice(live.item_ids[1:], 5, replace=False):
            put = {"colour": str(generator.choice([*COLOURS, "black"])), "price": int(generator.integers(0, 9))}
            put |= {"tags": [str(tag) for tag in generator.choice(GENRES, 2, replace=False)]}
            put |= {"size": int(generator.integers(0, 3))} if generator.random() < 0.5 else {}
            live.change({str(item): put})
        rules = bound(live, **written)
        assert rules.faults == ()
        weights = np.array([0.0, *(weighted_by_hand(written, live, row) for row in range(1, ITEMS + 1))])
        assert rules.weights == pytest.approx(weights)
        expected = best(scores.astype(np.float64) + weights, scores < 9, 12)[0]
        found = answer(rules, scores, vectors, 12)
        assert found.rows.tolist() == expected.tolist()
        assert found.scores.tolist() == scores[expected].tolist()


@pytest.mark.parametrize("others", [{}, {"at_most": {"tags": 2}}, {"diversity_lambda": 0.6}, {"pin": {2: "i7"}}])
def test_rows_of_many_weights_are_weighed_in_one_search_with_the_same_answer(catalog, scores, vectors, others):
    """The rules of the report: five that overlap in every way, and one more weight than is searched for singly."""
    items = np.arange(1, ITEMS + 1)
    boost = [
        {"filter": {"allow": [f"i{item}" for item in items if item >> bit & 1]}, "weight": 0.01 * 2**bit}
        for bit in range(5)
    ]
    rules = bound(catalog, boost=boost, **others)
    assert rules.groups == ()
    weights = np.unique(rules.weights)
    every_group = replace(rules, groups=tuple(rules.weights == value for value in weights))
    for group in every_group.groups:
        assert group is not None
        group[list(rules.pins)] = False
    for k in (1, 5, 30):
        one, many = answer(rules, scores, vectors, k), answer(every_group, scores, vectors, k)
        assert one.rows.tolist() == many.rows.tolist()
        assert one.scores.tolist() == many.scores.tolist()


def test_a_weight_of_two_puts_before_all_others(catalog, scores, vectors):
    worst = int(best(-scores, scores < 9, 1)[0][0])
    rules = bound(catalog, boost=[{"filter": {"allow": [f"i{worst}"]}, "weight": 2}])
    assert answer(rules, scores, vectors, 3).rows[0] == worst


@pytest.mark.parametrize("others", [{}, {"diversity_lambda": 0.3}, {"exploration_temperature": 1.0}])
def test_what_is_buried_comes_last(catalog, scores, vectors, others):
    buried = catalog.mask({"colour": ["red", "blue"]})
    boost = [{"filter": {"colour": "red"}, "weight": 50}]
    rules = bound(catalog, bury=[{"filter": {"colour": ["red", "blue"]}}], boost=boost, **others)
    found = answer(rules, scores, vectors, 30).rows
    assert len(found) == 30
    assert buried[found].tolist() == [False] * 20 + [True] * 10


# ---------------------------------------------------------------------------------------------------------------------
# At most n of a category


def categories_of(catalog: Catalog, row: int, attribute: str) -> list[str]:
    assert catalog.attributes is not None
    value = catalog.attributes[attribute].to_pylist()[row - 1]
    return value.split() if attribute == "genres" and value else value if isinstance(value, list) else [str(value)]


def limited(catalog: Catalog, order: np.ndarray, at_most: dict[str, int], k: int) -> list[int]:
    """The first k rows of an order that keep the limits, the long way."""
    found: list[int] = []
    counts: dict[str, int] = {}
    for row in order.tolist():
        own = [
            (f"{name}={value}", n) for name, n in at_most.items() for value in categories_of(catalog, row, name) or []
        ]
        if len(found) < k and all(counts.get(value, 0) < n for value, n in own):
            found.append(row)
            counts.update({value: counts.get(value, 0) + 1 for value, _ in own})
    return found


@pytest.mark.parametrize("at_most", [{"colour": 2}, {"tags": 1}, {"tags": 3}, {"price": 2, "colour": 4}])
@pytest.mark.parametrize("candidates", [1, 200])
def test_at_most_n_of_a_category(catalog, scores, vectors, at_most, candidates):
    """The best that the limit admits, also where the first candidates are used up and more are searched for."""
    rules = bound(catalog, at_most=at_most, candidates=candidates)
    expected = limited(catalog, best(scores, scores < 9, ITEMS)[0], at_most, 8)
    found = answer(rules, scores, vectors, 8).rows.tolist()
    assert found[: len(expected)] == expected
    assert len(found) == len(expected)


def test_the_words_of_a_text_are_categories_where_texts_share_them(catalog, scores, vectors):
    found = answer(bound(catalog, at_most={"genres": 2}), scores, vectors, 20).rows.tolist()
    assert found == answer(bound(catalog, at_most={"tags": 2}), scores, vectors, 20).rows.tolist()
    brands = pa.table({"item_id": list("abcd"), "brand": ["The North Face", "The Body Shop", "The Body Shop", None]})
    other = Catalog(list("abcd"), brands)
    rows, values = np.arange(1, 5), np.array([0.4, 0.3, 0.2, 0.1])
    rules = bound(other, at_most={"brand": 1})
    found = rerank(rows, values, 4, rules, vectors, np.random.default_rng(0))
    assert found.rows.tolist() == [1, 2, 4]


def test_a_long_text_is_one_category():
    parted, long = ";".join(["red"] * (LONGEST_PARTED // 4)), "red;" * LONGEST_PARTED
    colours = pa.table({"item_id": list("abcd"), "colour": ["red;blue", "red", "blue", "green"]})
    catalog, rules = Catalog(list("abcd"), colours), RankingRules(at_most={"colour": 1})
    catalog.change({"b": {"colour": parted}, "c": {"colour": long}, "d": {"colour": long}})
    assert counted(BoundRules.of(rules, catalog), catalog) == [[set(), {"red", "blue"}, {"red"}, {long}, {long}]]


def test_the_limit_is_hard(catalog, scores, vectors):
    found = answer(bound(catalog, at_most={"colour": 2}), scores, vectors, 30).rows
    assert sorted(categories_of(catalog, row, "colour")[0] for row in found) == sorted(COLOURS * 2)


def test_pinned_items_count_and_are_shown_whatever_the_limit(catalog, scores, vectors):
    red = [f"i{row}" for row in np.flatnonzero(catalog.mask({"colour": "red"}))[:2]]
    rules = bound(catalog, pin={2: red[0], 6: red[1]}, at_most={"colour": 1})
    found = answer(rules, scores, vectors, 10).rows
    assert [categories_of(catalog, row, "colour")[0] for row in found].count("red") == 2
    assert len(found) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Diversity


def marginal_relevance(rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, trade: float, k: int) -> list[int]:
    """Carbonell & Goldstein 1998, the long way."""
    found: list[int] = []
    for _ in range(k):
        merit = {}
        for row in set(rows.tolist()) - set(found):
            likeness = max((float(vectors[row] @ vectors[other]) for other in found), default=0.0)
            merit[row] = trade * scores[row] - (1 - trade) * likeness
        found.append(max(merit, key=lambda row: merit[row]))
    return found


@pytest.mark.parametrize("trade", [0.9, 0.5, 0.1])
def test_diversity_is_maximal_marginal_relevance(catalog, scores, vectors, trade):
    rules = bound(catalog, diversity_lambda=trade)
    expected = marginal_relevance(np.arange(1, ITEMS + 1), scores, vectors, trade, 12)
    assert answer(rules, scores, vectors, 12).rows.tolist() == expected


def test_a_lower_lambda_makes_answers_less_alike(catalog, scores, vectors):
    likeness = []
    for trade in (1.0, 0.7, 0.4):
        found = vectors[answer(bound(catalog, diversity_lambda=trade), scores, vectors, 10).rows]
        likeness.append(float((found @ found.T).mean()))
    assert likeness[0] > likeness[1] > likeness[2]


def test_candidates_that_are_searched_later_are_compared_with_the_answer(catalog, scores, vectors):
    written = {"diversity_lambda": 0.4, "at_most": {"colour": 3}}
    rules = bound(catalog, **written)
    rows = np.flatnonzero(catalog.mask({"colour": "red"}))
    generator = np.random.default_rng(0)
    found = rerank(rows, scores[rows], 4, rules, vectors, generator, lambda *among: best(scores, among[0], ITEMS)).rows
    others = np.flatnonzero(~catalog.mask({"colour": "red"}))[1:]
    merit = 0.4 * scores[others] - 0.6 * (vectors[others] @ vectors[found[:3]].T).max(axis=1)
    assert found[3] == others[merit.argmax()]


# ---------------------------------------------------------------------------------------------------------------------
# Exploration

EXPLORING = [
    {},
    {"at_most": {"colour": 1}},
    {"diversity_lambda": 0.5},
    {"pin": {2: "i4"}, "at_most": {"price": 1}, "bury": [{"filter": {"deny": ["i5", "i6"]}, "weight": 0.2}]},
]


def all_lists(
    rules: BoundRules, rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int
) -> dict[tuple[int, ...], np.ndarray]:
    """Every order of k candidates, with the propensities that it has as an answer."""
    lists = permutations(rows.tolist(), k)
    return {shown: propensities_of(np.array(shown), rows, scores[rows], rules, vectors) for shown in lists}


@pytest.mark.parametrize("others", EXPLORING)
def test_propensities_are_the_probabilities_of_what_is_shown(catalog, scores, vectors, others):
    rules = bound(catalog, exploration_temperature=0.3, **others)
    rows, draws = np.arange(1, 8), 4000
    expected = all_lists(rules, rows, scores, vectors, 3)
    assert sum(own.prod() for own in expected.values()) == pytest.approx(1.0)
    generator = np.random.default_rng(3)
    counts = dict.fromkeys((shown for shown, own in expected.items() if own.all()), 0)
    for _ in range(draws):
        found = rerank(rows, scores[rows], 3, rules, vectors, generator)
        shown = tuple(found.rows.tolist())
        assert found.propensities == pytest.approx(expected[shown])
        counts[shown] += 1
    # Pearson's chi-squared has a mean of its degrees of freedom f and a variance of 2 f
    hoped = np.array([draws * expected[shown].prod() for shown in counts])
    excess = ((np.array(list(counts.values())) - hoped) ** 2 / hoped).sum() - len(counts)
    assert excess < 4 * np.sqrt(2 * len(counts))


def test_without_exploration_one_answer_has_all_the_probability(catalog, scores, vectors):
    rules = bound(catalog, diversity_lambda=0.5, pin={2: "i4"})
    rows = np.arange(1, 7)
    shown = rerank(rows, scores[rows], 3, rules, vectors, np.random.default_rng(0)).rows
    found = all_lists(rules, rows, scores, vectors, 3)
    assert {key for key, own in found.items() if own.all()} == {tuple(shown.tolist())}
    assert found[tuple(shown.tolist())].tolist() == [1.0, 1.0, 1.0]


def test_a_low_temperature_changes_little_and_a_high_one_much(catalog, scores, vectors):
    first = int(best(scores, scores < 9, 1)[0][0])
    shares = []
    for temperature in (0.001, 0.05, 1.0):
        rules = bound(catalog, exploration_temperature=temperature)
        shares.append(np.mean([answer(rules, scores, vectors, 1, seed=seed).rows[0] == first for seed in range(100)]))
    assert shares[0] == 1.0 > shares[1] > shares[2]


def test_the_value_of_another_policy_is_estimated_from_what_was_logged(catalog, scores, vectors):
    """Clicks of a known model: people read down, click what they like, and stop after a click more often than not."""
    rows, k, people = np.arange(1, 7), 3, 20_000
    liking = np.array([0.0, 0.05, 0.7, 0.1, 0.6, 0.05, 0.1])
    logging = bound(catalog, exploration_temperature=0.6)
    other = liking  # a model that knows what people like
    target = bound(catalog, exploration_temperature=0.2, at_most={"colour": 1})

    def expected_clicks(shown: tuple[int, ...]) -> float:
        reading, clicks = 1.0, 0.0
        for row in shown:
            clicks += reading * liking[row]
            reading *= 1 - 0.7 * liking[row]
        return clicks

    target_lists = all_lists(target, rows, other, vectors, k)
    truth = sum(own.prod() * expected_clicks(shown) for shown, own in target_lists.items())

    generator = np.random.default_rng(9)
    clicks, logged, wanted = np.zeros((people, k)), np.ones((people, k)), np.zeros((people, k))
    for person in range(people):
        found = rerank(rows, scores[rows], k, logging, vectors, generator)
        assert found.propensities is not None
        logged[person] = found.propensities
        wanted[person] = target_lists[tuple(found.rows.tolist())]
        for place, row in enumerate(found.rows):
            clicks[person, place] = generator.random() < liking[row]
            if clicks[person, place] and generator.random() < 0.7:
                break
    value, error = estimated_value(clicks, logged, wanted)
    assert error < 0.05 * truth
    assert abs(value - truth) < 3 * error
    assert abs(clicks.sum(axis=1).mean() - truth) > 6 * error  # what was shown earned something else


# ---------------------------------------------------------------------------------------------------------------------
# All at once


@pytest.mark.parametrize("seed", range(20))
def test_rules_keep_to_each_other(catalog, scores, vectors, seed):
    generator = np.random.default_rng(seed)
    mask = generator.random(ITEMS + 1) < 0.7
    seen = np.unique(generator.integers(1, ITEMS + 1, 10))
    at_most = {"colour": int(generator.integers(2, 5)), "tags": int(generator.integers(2, 5))}
    rules = bound(
        catalog,
        pin={2: f"i{generator.integers(1, ITEMS + 1)}"},
        boost=[{"filter": {"price": {"max": 2}}, "weight": 0.3}],
        bury=[{"filter": {"colour": "red"}}],
        at_most=at_most,
        diversity_lambda=0.6,
        exploration_temperature=0.1,
        candidates=1,
    )
    found = answer(rules, scores, vectors, 9, mask, seen, seed)
    assert len(set(found.rows.tolist())) == len(found.rows)
    assert mask[found.rows].all()
    assert not np.isin(found.rows, seen).any()
    assert limited(catalog, found.rows, at_most, 9) == found.rows.tolist()
    assert found.propensities is not None
    assert ((found.propensities > 0) & (found.propensities <= 1)).all()
    again = answer(rules, scores, vectors, 9, mask, seen, seed)
    assert again.rows.tolist() == found.rows.tolist()
