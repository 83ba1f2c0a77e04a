"""Ranking rules in the running service: whatever is put while it is live, they rank every answer and fail none."""

from itertools import combinations

import pytest

from lib.ranking.rules import RankingRules
from tests.helpers.service import LiveService, assert_refused, ids

TAGS = [f"tag-{number}" for number in range(5)]
RULES = RankingRules(
    **{
        "pin": {1: "pinned later", 2: "never"},
        "boost": [{"filter": {"tags": tag}, "weight": 0.01 * 2**place} for place, tag in enumerate(TAGS)],
        "bury": [{"filter": {"in_stock": False}}],
        "at_most": {"series": 1},
    }
)
ASKED = 12  # new connections, which HAProxy spreads over the replicas


@pytest.fixture(scope="module")
def ranked(mortal_service: LiveService) -> LiveService:
    """The service with rules, on the catalog of the shop, which has none of the attributes that they name."""
    mortal_service.stop()
    mortal_service.start(ranking=RULES)
    return mortal_service


def idle_rules(service: LiveService) -> list[list[str]]:
    return [replica["idle_rules"] for replica in service.status()["replicas"]]


def put(service: LiveService, *items: dict[str, object]) -> None:
    service.client.put("/v1/items", json={"items": list(items)}).raise_for_status()


def test_rules_without_effect_are_listed_and_puts_of_every_combination_fail_no_answer(ranked: LiveService) -> None:
    before = ids(ranked.recommend("somebody", 50))
    for told in idle_rules(ranked):
        assert told[0] == "pin.1: there is no item 'pinned later'; until it is put, another one has its place"
        assert told[1].startswith("pin.2: there is no item 'never'")
        assert any(rule.startswith("bury.0.filter.in_stock: no item has this attribute") for rule in told)
        assert any(rule.startswith("at_most.series: no item has this attribute") for rule in told)
    sets = [own for count in range(1, 6) for own in combinations(TAGS, count)]
    for item, own in zip(before, sets, strict=False):  # more sums of weights than are searched for singly
        put(ranked, {"item_id": item, "title": item, "tags": list(own)})
        assert len(ids(ranked.recommend("somebody"))) == 10
    boosted = {
        item: sum(RULES.boost[TAGS.index(tag)].weight for tag in own) for item, own in zip(before, sets, strict=False)
    }
    history = [{"item_id": before[40], "event": "click"}]
    plain = {"history": history, "k": 1000, "exclude_seen": False}
    for _ in range(ASKED):
        shown = ranked.client.post("/v1/recommendations", json=plain).raise_for_status().json()["items"]
        weighted = [item["score"] + boosted.get(item["item_id"], 0.0) for item in shown]
        assert weighted == sorted(weighted, reverse=True)
        assert len(shown) == 200


def test_rules_follow_what_is_put(ranked: LiveService) -> None:
    first, second, third = ids(ranked.recommend("anybody", 3))
    put(
        ranked,
        {"item_id": first, "in_stock": False},
        {"item_id": second, "in_stock": True, "series": "one"},
        {"item_id": third, "in_stock": True, "series": "one"},
        {"item_id": "pinned later", "in_stock": True},
    )
    ranked.wait_until("the pinned item has a row", lambda _: ids(ranked.recommend("anybody", 1)) == ["pinned later"])
    for _ in range(ASKED):
        found = ids(ranked.recommend("anybody", 1000))
        assert found[0] == "pinned later"
        assert found[-1] == first
        assert len({second, third} & set(found)) == 1
    assert all(len(told) == 1 and told[0].startswith("pin.2") for told in idle_rules(ranked))


def test_what_the_rules_cannot_use_is_the_putters_error_or_no_error(ranked: LiveService) -> None:
    """An attribute that a limit counts may be put in any type; rules never make an answer fail."""
    put(ranked, {"item_id": "pinned later", "in_stock": None, "series": None, "tags": []})
    assert_refused(ranked.client.put("/v1/items", json={"items": [{"item_id": "x", "tags": 5}]}), 422, "tags")
    assert len(ids(ranked.recommend("anybody"))) == 10
