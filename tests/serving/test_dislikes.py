"""Through a real service: after dislikes less like them is answered than after nothing, and after likes more."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.helpers.service import LiveService

SHOWN, MET = 40, 5  # items


def categories_of(dataset: Path) -> dict[str, list[str]]:
    """The items of each category that has more of them than are met."""
    items = pq.read_table(dataset / "items.parquet")
    found: dict[str, list[str]] = defaultdict(list)
    for item_id, category in zip(items["item_id"].to_pylist(), items["category"].to_pylist(), strict=True):
        found[category].append(item_id)
    return {category: own for category, own in found.items() if len(own) > MET + 2}


def shown(service: LiveService, **question: Any) -> list[str]:
    answer = service.client.post("/v1/recommendations", json={"k": SHOWN} | question).raise_for_status().json()
    return [item["item_id"] for item in answer["items"]]


def test_an_answer_follows_dislikes_down_and_likes_up(service, shop_dataset):
    categories = categories_of(shop_dataset)
    names = sorted(categories)
    counts = {reaction: 0 for reaction in ("nothing", "like", "dislike", "skip", "rating")}
    for place, name in enumerate(names):
        met, rest = categories[name][:MET], set(categories[name][MET:])
        others = [categories[names[(place + step) % len(names)]][0] for step in (3, 5, 7)]
        clicks = [{"item_id": item, "event": "click"} for item in others]
        for reaction in counts:
            rating = {"value": 1.0} if reaction == "rating" else {}
            reactions = [{"item_id": item, "event": reaction} | rating for item in met if reaction != "nothing"]
            counts[reaction] += len(rest.intersection(shown(service, history=clicks + reactions)))
    assert counts["like"] > counts["nothing"]
    assert counts["nothing"] > max(counts["dislike"], counts["skip"], counts["rating"])


def test_what_a_user_turns_down_falls_in_the_next_answer(service, shop_dataset):
    category = max(categories_of(shop_dataset).values(), key=len)

    def mean_place() -> float:
        everything = shown(service, user_id="turns down", k=1000)
        return sum(everything.index(item) for item in category[8:]) / len(category[8:])

    service.send(*({"user_id": "turns down", "item_id": item, "event": "click"} for item in category[:3]))
    before = mean_place()
    service.send(*({"user_id": "turns down", "item_id": item, "event": "dislike"} for item in category[3:8]))
    assert mean_place() > before
