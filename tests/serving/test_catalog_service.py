"""Items that are put and deleted through the running service, and requests with a deadline."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.service import LiveService, assert_refused, ids

REPLICAS_ASKED = 12  # new connections, which HAProxy spreads over the replicas


def put(service: LiveService, *items: dict[str, Any]) -> Any:
    return service.client.put("/v1/items", json={"items": list(items)})


def recommended(service: LiveService, k: int = 1000, **filter: Any) -> list[str]:
    """Items for somebody with a history that comes with the request."""
    history = [{"item_id": item, "event": "click"} for item in service.items()[:2]]
    body = {"history": history, "k": k, "filter": filter}
    return ids(service.client.post("/v1/recommendations", json=body).raise_for_status().json())


@pytest.fixture
def new_item(service: LiveService) -> Iterator[str]:
    put(service, {"item_id": "put", "title": "Just put", "category": "novelty", "weight": 2.5}).raise_for_status()
    yield "put"
    service.client.delete("/v1/items/put").raise_for_status()


def live_everywhere(service: LiveService, item: str, **filter: Any) -> None:
    """Wait until every replica recommends an item that was put."""
    service.wait_until("the item has a row", lambda _: item in recommended(service, **filter))
    for _ in range(REPLICAS_ASKED):
        assert item in recommended(service, **filter)


def test_a_put_item_is_recommended_on_every_replica(service, new_item):
    live_everywhere(service, new_item, category="novelty")
    assert recommended(service, category="novelty") == [new_item]
    assert recommended(service, weight={"min": 2, "max": 3}) == [new_item]
    similar = service.client.get(f"/v1/items/{new_item}/similar").raise_for_status().json()
    assert len(similar["items"]) == 10
    answer = service.client.post(
        "/v1/recommendations", json={"user_id": "nobody yet", "k": 1, "filter": {"allow": [new_item]}}
    ).json()
    assert answer["items"][0]["title"] == "Just put"


def test_other_attributes_are_in_the_filters_of_the_next_answer(service, new_item):
    live_everywhere(service, new_item)
    for category in ("second", "third"):
        put(service, {"item_id": new_item, "category": category}).raise_for_status()
        for _ in range(REPLICAS_ASKED):
            assert new_item in recommended(service, category=category)
            assert new_item not in recommended(service, category="novelty")


def test_a_deleted_item_is_gone_from_the_next_answer_of_every_replica(service, new_item):
    live_everywhere(service, new_item)
    assert service.client.delete(f"/v1/items/{new_item}").json() == {"item_id": new_item, "deleted": True}
    for _ in range(REPLICAS_ASKED):
        assert new_item not in recommended(service)
    assert_refused(service.client.delete(f"/v1/items/{new_item}"), 404, "item_id", new_item)
    assert_refused(service.client.get(f"/v1/items/{new_item}/similar"), 404, "item_id", new_item)
    put(service, {"item_id": new_item}).raise_for_status()
    assert new_item in recommended(service), "it has its row still"


def test_feedback_on_a_put_item_is_learned(service, new_item):
    event = {"user_id": "finder", "item_id": new_item, "event": "click", "event_id": "found"}
    service.send(event)
    service.wait_until_learned()
    assert new_item in [item["item_id"] for item in service.export("finder")]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"items": []}, 422, ["items"]),
        ({"items": [{"title": "no id"}]}, 422, ["items.0.item_id"]),
        ({"items": [{"item_id": ""}]}, 422, ["items.0.item_id"]),
        ({"items": [{"item_id": "a\x00"}]}, 422, ["items.0.item_id", "U+0000"]),
        ({"items": [{"item_id": "x", "nested": {"a": 1}}]}, 422, ["items.0.nested"]),
        ({"items": [{"item_id": "x", "title": 3}]}, 422, ["title"]),
        ({"items": [{"item_id": "x"}], "more": 1}, 422, ["more"]),
        ({"items": [{"item_id": str(number)} for number in range(1001)]}, 422, ["items"]),
        ({}, 422, ["items"]),
    ],
)
def test_bad_items_are_refused_with_their_field(service, body, status, words):
    assert_refused(service.client.put("/v1/items", json=body), status, *words)


def test_an_item_that_does_not_exist_cannot_be_deleted(service):
    assert_refused(service.client.delete("/v1/items/never was"), 404, "item_id", "never was")


@pytest.mark.parametrize("path", ["/v1/recommendations", "/v1/users/visitor-00001/recommendations"])
def test_a_deadline_is_honoured(service, path):
    def ask(deadline: str) -> Any:
        headers = {"X-Deadline-Ms": deadline}
        if path == "/v1/recommendations":
            return service.client.post(path, json={"user_id": "visitor-00001"}, headers=headers)
        return service.client.get(path, headers=headers)

    assert len(ask("60000").raise_for_status().json()["items"]) == 10
    assert_refused(ask("0.001"), 504, "X-Deadline-Ms")
    for wrong in ("soon", "-5", "0", "nan", "inf"):
        assert_refused(ask(wrong), 422, "X-Deadline-Ms")
