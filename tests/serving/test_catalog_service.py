"""Items that are put and deleted through the running service, and requests with a deadline."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.helpers.service import LiveService, assert_refused, click, ids

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


def test_an_item_that_events_alone_name_has_a_row_once_two_users_have_met_it(service):
    before = service.wait_until_learned()["learner"]["unknown_items"]
    for number in range(3):
        service.send(click("finder-1", "found", timestamp=1_700_000_000_000 + number))
    service.send(*(click("maker-up", f"made-up-{number}", timestamp=1_700_000_000_000) for number in range(20)))
    after = service.wait_until_learned()["learner"]["unknown_items"]
    assert (after["waiting"], after["rows"]) == (before["waiting"] + 21, before["rows"])
    for _ in range(REPLICAS_ASKED):
        assert "found" not in recommended(service)
    assert [event["item_id"] for event in service.export("finder-1")] == ["found"] * 3
    assert service.recommend("finder-1")["items"]
    service.send(click("finder-2", "found"))
    after = service.wait_until_learned()["learner"]["unknown_items"]
    assert (after["waiting"], after["rows"]) == (before["waiting"] + 20, before["rows"] + 1)
    live_everywhere(service, "found")
    service.client.delete("/v1/items/found").raise_for_status()


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


def test_of_two_concurrent_puts_that_disagree_on_a_type_one_is_refused_and_answers_go_on(service):
    for number in range(4):  # the requests go to both replicas, neither of which has seen the other's
        column, barrier = f"size{number}", threading.Barrier(2)

        def put_one(value: Any, column: str = column, barrier: threading.Barrier = barrier) -> httpx.Response:
            barrier.wait()
            return put(service, {"item_id": f"sized{value}", column: value})

        with ThreadPoolExecutor(2) as threads:
            text, whole = threads.map(put_one, ("XL", 42))
        assert sorted([text.status_code, whole.status_code]) == [200, 422], (text.text, whole.text)
        refused, value = (whole, 42) if whole.status_code == 422 else (text, "'XL'")
        assert_refused(refused, 422, column, str(value), "send ")
        for _ in range(REPLICAS_ASKED):
            assert recommended(service)
        assert put(service, {"item_id": "after", "title": "After"}).status_code == 200
    service.client.delete("/v1/items/after").raise_for_status()
    put(service, {"item_id": "learned", "title": "Learned"}).raise_for_status()
    live_everywhere(service, "learned")  # the learner has gone on, too
    for item in ("sizedXL", "sized42", "learned"):
        service.client.delete(f"/v1/items/{item}")


def test_a_fraction_widens_a_column_of_whole_numbers(service, new_item):
    put(service, {"item_id": new_item, "shelf_number": 19}).raise_for_status()
    put(service, {"item_id": new_item, "shelf_number": 19.99}).raise_for_status()
    service.wait_until("the item has a row", lambda _: new_item in recommended(service))
    for _ in range(REPLICAS_ASKED):
        assert recommended(service, shelf_number={"max": 19.5}) == []
        assert recommended(service, shelf_number={"min": 19.5, "max": 19.99}) == [new_item]


def test_an_empty_list_fixes_no_type(service, new_item):
    put(service, {"item_id": new_item, "labels": []}).raise_for_status()
    put(service, {"item_id": new_item, "labels": ["sale"]}).raise_for_status()
    service.wait_until("the item has a row", lambda _: new_item in recommended(service))
    assert recommended(service, labels="sale") == [new_item]


def test_a_newly_put_attribute_filters_on_every_replica_at_once(service, new_item):
    live_everywhere(service, new_item)
    history = [{"item_id": item, "event": "click"} for item in service.items()[:2]]
    for number in range(5):
        column = f"fresh{number}"
        question = {"history": history, "filter": {column: True}}
        for _ in range(REPLICAS_ASKED):
            answer = service.client.post("/v1/recommendations", json=question).raise_for_status().json()
            assert answer["items"] == []
            [note] = answer["notes"]
            assert note.startswith(f"filter.{column}: no item has this attribute, so none matches; there are ")
        put(service, {"item_id": new_item, column: True}).raise_for_status()
        for _ in range(REPLICAS_ASKED):
            answer = service.client.post("/v1/recommendations", json=question).raise_for_status().json()
            assert ids(answer) == [new_item]
            assert "notes" not in answer


def test_notes_are_documented(service):
    schemas = service.client.get("/openapi.json").raise_for_status().json()["components"]["schemas"]
    assert "notes" in schemas["RecommendationResponse"]["properties"]


def test_a_filter_that_costs_too_much_is_refused_with_the_cap(service):
    def ask(**filter: Any) -> Any:
        body = {"user_id": "visitor-00001", "filter": filter}
        return service.client.post("/v1/recommendations", json=body)

    assert ask(brand=[f"brand {number}" for number in range(500)]).status_code == 200
    assert_refused(ask(brand=[f"brand {number}" for number in range(1001)]), 422, "filter.brand", "1000")
    assert_refused(ask(**{f"a{number}": 1 for number in range(51)}), 422, "filter", "50")
    assert_refused(ask(deny=[str(number) for number in range(10_001)]), 422, "filter.deny", "10000")
    assert_refused(ask(title={"min": 3}), 422, "filter.title", "needs numbers")


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
