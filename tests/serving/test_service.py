"""The HTTP interface of the running service: what it promises, and what it says to bad input."""

import json
import time
from typing import Any
from urllib.parse import quote

import pytest

from serving.schemas import LARGEST_BODY, LARGEST_EVENT_BATCH, LARGEST_K
from tests.helpers.service import LiveService, assert_refused, click, ids, metrics

ENDPOINTS = {
    ("post", "/v1/recommendations"),
    ("get", "/v1/users/{user_id}/recommendations"),
    ("get", "/v1/items/{item_id}/similar"),
    ("post", "/v1/events"),
    ("put", "/v1/items"),
    ("delete", "/v1/items/{item_id}"),
    ("get", "/v1/users"),
    ("get", "/v1/users/{user_id}/export"),
    ("get", "/v1/status"),
    ("post", "/v1/rollback"),
    ("get", "/healthz"),
    ("get", "/metrics"),
}


@pytest.fixture(scope="module")
def items(service: LiveService) -> list[str]:
    return service.items()


# ------------------------------------------------------------------------------------------------------------- promises


def test_the_next_answer_knows_the_event_just_acknowledged(service: LiveService) -> None:
    before = {replica["replica_id"]: replica["answers"] for replica in service.status()["replicas"]}
    for number in range(100):
        user = f"reader-{number % 5}"
        clicked = ids(service.recommend(user))[0]
        assert service.send(click(user, clicked)) == {"accepted": 1, "duplicates": 0, "rejected": []}
        assert service.export(user)[-1]["item_id"] == clicked
        assert clicked not in ids(service.recommend(user, exclude_seen=True))
    after = {replica["replica_id"]: replica["answers"] for replica in service.status()["replicas"]}
    assert all(after[replica] > before[replica] for replica in before), "one replica answered everything"


def test_a_history_that_comes_with_the_request_changes_the_answer(service: LiveService, items: list[str]) -> None:
    def ask(*item_ids: str, **fields: Any) -> dict[str, Any]:
        history = [{"item_id": item_id, "event": "click"} for item_id in item_ids]
        return service.client.post("/v1/recommendations", json={"history": history, **fields}).raise_for_status().json()

    assert ids(ask(items[0])) != ids(ask(items[50]))
    assert items[0] not in ids(ask(items[0], k=200, exclude_seen=True))
    assert items[0] in ids(ask(items[0], k=200, exclude_seen=False))
    assert ids(ask(items[0], k=200)) == ids(ask(items[0], k=200, exclude_seen=False)), "people come back in this shop"
    explained = ask(items[0], k=200, explain=True)["items"]
    [title] = [item["title"] for item in explained if item["item_id"] == items[0]]
    assert any(f"because you clicked {title}" in item["reason"] for item in explained)
    assert {item.get("reason") for item in ask()["items"]} == {"popular"}


def test_a_filter_is_obeyed_whole(service: LiveService, items: list[str]) -> None:
    def ask(**filter: Any) -> list[dict[str, Any]]:
        body = {"user_id": "visitor-00001", "k": 100, "filter": filter}
        return service.client.post("/v1/recommendations", json=body).raise_for_status().json()["items"]

    tents = ask(category="Tents")
    assert tents
    assert len(tents) < 20
    assert {item["item_id"] for item in ask(allow=items[:5])} <= set(items[:5])
    assert not {item["item_id"] for item in ask(deny=items[:5])} & set(items[:5])
    assert ask(price={"max": 0}) == []


def test_somebody_unknown_gets_what_is_popular_and_is_told_so(service: LiveService) -> None:
    for response in (
        service.client.post("/v1/recommendations", json={"user_id": "never seen"}),
        service.client.get("/v1/users/never%20seen/recommendations"),
    ):
        answer = response.raise_for_status().json()
        assert len(answer["items"]) == 10
        assert {item["reason"] for item in answer["items"]} == {"popular"}
        assert answer["model_version"] >= 1


def test_ids_may_hold_any_character(service: LiveService) -> None:
    user, item = "a/b ?#&%/é\u2028", "x/y ü?"
    assert service.send(click(user, item), click("another", item))["accepted"] == 2  # so that it gets a row
    export = service.client.get(f"/v1/users/{quote(user, safe='')}/export").raise_for_status().json()
    assert export["user_id"] == user
    assert [event["item_id"] for event in export["events"]] == [item]
    service.wait_until_learned()
    similar = service.client.get(f"/v1/items/{quote(item, safe='')}/similar?k=3").raise_for_status().json()
    assert len(similar["items"]) == 3


def test_an_item_named_for_the_first_time_can_be_asked_for(service: LiveService) -> None:
    assert_refused(service.client.get("/v1/items/arrived%20now/similar"), 404, "item_id", "arrived now")
    service.send(click("opener", "arrived now"), click("second opener", "arrived now"))
    service.wait_until_learned()
    answer = service.client.get("/v1/items/arrived%20now/similar").raise_for_status().json()
    assert len(answer["items"]) == 10
    assert "arrived now" not in ids(answer)


def test_similar_items_are_alike_or_taken_together(service: LiveService, items: list[str]) -> None:
    similar = f"/v1/items/{items[0]}/similar?k=3"
    together = service.client.get(f"{similar}&relation=together").raise_for_status().json()["items"]
    nearest = service.client.get(similar).raise_for_status().json()["items"]
    assert len(together) == len(nearest) == 3
    assert together != nearest


def test_values_come_back_as_they_were_given(service: LiveService, items: list[str]) -> None:
    values = [71.95, 0.1, 5, 1234567.89, 1e-7]
    service.send(*(click("spender", item, value=value) for item, value in zip(items, values, strict=False)))
    assert [event["value"] for event in service.export("spender")] == values


def test_who_came_last_is_listed_first(service: LiveService, items: list[str]) -> None:
    for user in ("came first", "came last"):
        service.send(click(user, items[0]))
    listed = service.client.get("/v1/users?limit=3").raise_for_status().json()["users"]
    assert [user["user_id"] for user in listed[:2]] == ["came last", "came first"]
    assert (len(listed), listed[0]["events"]) == (3, 1)


def test_events_that_name_an_answer_that_there_never_was_are_counted(service: LiveService, items: list[str]) -> None:
    def counted() -> int:
        count = service.status()["aggregator"]["noticed"].get("unknown_request_id", 0)
        samples = metrics(service).get("afterclick_events_noticed_total", [])
        assert {labels["reason"]: value for labels, value in samples}.get("unknown_request_id", 0) == count
        return count

    similar = service.client.get(f"/v1/items/{quote(items[0], safe='')}/similar").raise_for_status().json()
    known = [service.recommend("chooser")["request_id"], similar["request_id"]]
    before = counted()
    for number, request_id in enumerate(known):
        assert service.send(click("chooser", items[number], request_id=request_id))["accepted"] == 1
    assert counted() == before
    for number, wrong in enumerate(("mine", known[0][:-1] + ("0" if known[0][-1] != "0" else "1"), known[0] + "0")):
        named = click("chooser", items[number], request_id=wrong, event_id=f"named {number}")
        assert service.send(named)["accepted"] == 1
        assert service.send(named)["duplicates"] == 1
        assert counted() == before + 1 + number, "a repeated event is counted once"


# ------------------------------------------------------------------------------------------------ duplicates and floods


def test_a_repeated_event_counts_once(service: LiveService, items: list[str]) -> None:
    once = {"accepted": 1, "duplicates": 0, "rejected": []}
    again = {"accepted": 0, "duplicates": 1, "rejected": []}
    named = click("repeater", items[0], event_id="first")
    assert [service.send(named), service.send(named)] == [once, again]
    assert service.send(click("repeater", items[1], event_id="first")) == again, "the id alone decides"
    timed = click("repeater", items[1], timestamp=1_700_000_000_000)
    assert [service.send(timed), service.send(timed)] == [once, again]
    assert service.send(timed | {"event": "cart"}) == once
    both = service.send(click("repeater", items[2], event_id="x"), click("repeater", items[2], event_id="x"))
    assert both == {"accepted": 1, "duplicates": 1, "rejected": []}
    without_identity = click("repeater", items[3])
    assert [service.send(without_identity), service.send(without_identity)] == [once, once]
    assert len(service.export("repeater")) == 6


def test_a_flood_is_refused_and_counted_and_others_are_not_touched(service: LiveService, items: list[str]) -> None:
    before = service.status()["aggregator"]["rejected"].get("flood", 0)
    first = int(time.time() * 1000) - 3_600_000
    answer = service.send(*(click("bot", items[n % 100], timestamp=first + 100 * n) for n in range(400)))
    assert answer["accepted"] == 300
    assert [rejection["index"] for rejection in answer["rejected"]] == list(range(300, 400))
    assert all(rejection["reason"].startswith("flood") for rejection in answer["rejected"])
    assert service.send(click("not a bot", items[0]))["accepted"] == 1
    assert service.status()["aggregator"]["rejected"]["flood"] == before + 100
    refused = {labels["reason"]: value for labels, value in metrics(service)["afterclick_events_refused_total"]}
    assert refused["flood"] == before + 100
    assert len(service.export("bot")) == 300
    service.wait_until_learned()


# ------------------------------------------------------------------------------------------------------------ bad input

BAD_EVENTS = [
    ("not an object", "object"),
    (None, "object"),
    ({"item_id": "i", "event": "click"}, "user_id"),
    ({"user_id": "u", "event": "click"}, "item_id"),
    ({"user_id": "u", "item_id": "i"}, "event"),
    ({"user_id": "", "item_id": "i", "event": "click"}, "user_id"),
    ({"user_id": "u", "item_id": "  ", "event": "click"}, "item_id"),
    ({"user_id": 7, "item_id": "i", "event": "click"}, "user_id"),
    ({"user_id": "u", "item_id": ["i"], "event": "click"}, "item_id"),
    ({"user_id": "u" * 257, "item_id": "i", "event": "click"}, "user_id"),
    ({"user_id": "u", "item_id": "i", "event": "glance"}, "event"),
    ({"user_id": "u", "item_id": "i", "event": 1}, "event"),
    ({"user_id": "u", "item_id": "i", "event": "rating", "value": "5"}, "value"),
    ({"user_id": "u", "item_id": "i", "event": "rating", "value": True}, "value"),
    ({"user_id": "u", "item_id": "i", "event": "rating", "value": 1e300}, "value"),
    ({"user_id": "u", "item_id": "i", "event": "click", "timestamp": 12}, "timestamp"),
    ({"user_id": "u", "item_id": "i", "event": "click", "timestamp": 1_700_000_000}, "timestamp"),
    ({"user_id": "u", "item_id": "i", "event": "click", "timestamp": 4_000_000_000_000}, "timestamp"),
    ({"user_id": "u", "item_id": "i", "event": "click", "timestamp": "now"}, "timestamp"),
    ({"user_id": "u", "item_id": "i", "event": "click", "timestamp": 1.7e12}, "timestamp"),
    ({"user_id": "u", "item_id": "i", "event": "click", "event_id": ""}, "event_id"),
    ({"user_id": "u", "item_id": "i", "event": "click", "event_id": 5}, "event_id"),
    ({"user_id": "u\x00", "item_id": "i", "event": "click"}, "user_id"),
    ({"user_id": "u", "item_id": "a\nb", "event": "click"}, "item_id"),
    ({"user_id": "u", "item_id": "i", "event": "click", "event_id": "\x1b"}, "event_id"),
    ({"user_id": "u", "item_id": "i", "event": "click", "request_id": "\x85"}, "request_id"),
    ({"user_id": "u", "item_id": "i", "event": "click", "request_id": {}}, "request_id"),
    ({"user_id": "u", "item_id": "i", "event": "click", "price": 5}, "price"),
]


def test_the_good_part_of_a_batch_is_kept(service: LiveService, items: list[str]) -> None:
    before = service.status()["aggregator"]
    batch = [event for n, (bad, _) in enumerate(BAD_EVENTS) for event in (bad, click("keeper", items[n]))]
    response = service.client.post("/v1/events", json={"events": batch})
    answer = response.raise_for_status().json()
    assert (answer["accepted"], answer["duplicates"]) == (len(BAD_EVENTS), 0)
    assert [rejection["index"] for rejection in answer["rejected"]] == list(range(0, len(batch), 2))
    for rejection, (_, field) in zip(answer["rejected"], BAD_EVENTS, strict=True):
        assert field in rejection["reason"]
        assert "\n" not in rejection["reason"]
    assert len(service.export("keeper")) == len(BAD_EVENTS)
    after = service.status()["aggregator"]
    assert after["events"] - before["events"] == len(BAD_EVENTS)
    assert sum(after["rejected"].values()) - sum(before["rejected"].values()) == len(BAD_EVENTS)


def test_a_large_request_that_is_repeated_changes_nothing(service: LiveService, items: list[str]) -> None:
    now = time.time_ns() // 1_000_000
    recent = [click("repeating", items[n % 40], timestamp=now - 200 * n) for n in range(250)]
    years = [
        click("importing", items[n % 40], timestamp=now - 36_000_000 * n) for n in range(1, LARGEST_EVENT_BATCH + 1)
    ]
    for events in (recent, years):
        assert service.send(*events) == {"accepted": len(events), "duplicates": 0, "rejected": []}
        for _ in range(2):
            assert service.send(*events) == {"accepted": 0, "duplicates": len(events), "rejected": []}
    assert service.send(click("repeating", items[50]), click("importing", items[50]))["accepted"] == 2
    service.wait_until_learned()


def test_an_event_that_comes_late_is_read_where_it_was(service: LiveService, items: list[str]) -> None:
    now = time.time_ns() // 1_000_000
    times = [now - 60_000 * minutes for minutes in (50, 40, 30, 20, 10)]
    service.send(*(click("on time", item, timestamp=at) for item, at in zip(items, times, strict=False)))
    for place in (4, 0, 3, 1, 2):
        service.send(click("late", items[place], timestamp=times[place]))
        for _ in range(4):  # by copies of both replicas
            service.recommend("late")
    assert [event["timestamp"] for event in service.export("late")] == times
    assert service.export("late") == service.export("on time")
    service.wait_until_learned()
    expected = service.recommend("on time")["items"]
    assert [service.recommend("late")["items"] for _ in range(4)] == [expected] * 4
    history = [{"item_id": items[place], "timestamp": times[place]} for place in (4, 0, 3, 1, 2)]
    answer = service.client.post("/v1/recommendations", json={"history": history}).raise_for_status()
    assert answer.json()["items"] == expected


def test_odd_but_valid_events_are_learned(service: LiveService, items: list[str]) -> None:
    service.send(
        click("odd", items[0], value=3.4e38, timestamp=631_152_000_000),
        click("odd", items[1], value=-3.4e38),
        {"user_id": "odd", "item_id": items[2], "event": "dislike"},
        {"user_id": "odd, and one event only", "item_id": "an item with one dislike", "event": "dislike"},
        click("odd", "\u2028\u202e\ufeff\u0300", request_id="r" * 256),
    )
    service.wait_until_learned()
    assert len(ids(service.recommend("odd"))) == 10


EVENTS, RECOMMENDATIONS, ROLLBACK = "/v1/events", "/v1/recommendations", "/v1/rollback"
GOOD = {"user_id": "u", "item_id": "i", "event": "click"}
BAD_BODIES: list[tuple[str, Any, int, tuple[str, ...]]] = [
    (EVENTS, b"", 400, ("JSON",)),
    (EVENTS, b"{", 400, ("JSON",)),
    (EVENTS, b'{"events": [{"user_id": "\xff"}]}', 400, ("JSON",)),
    (EVENTS, b'{"events": [{"value": NaN}]}', 400, ("JSON",)),
    (EVENTS, b"[" * 100_000, 400, ("JSON",)),
    (EVENTS, [GOOD], 422, ("events",)),
    (EVENTS, "text", 422, ("events",)),
    (EVENTS, {}, 422, ("events",)),
    (EVENTS, {"events": GOOD}, 422, ("events",)),
    (EVENTS, {"events": []}, 422, ("events", "empty")),
    (EVENTS, {"events": [GOOD], "debug": True}, 422, ("debug",)),
    (EVENTS, {"events": [GOOD] * (LARGEST_EVENT_BATCH + 1)}, 422, ("events", str(LARGEST_EVENT_BATCH))),
    (RECOMMENDATIONS, b"", 422, ("equired",)),
    (RECOMMENDATIONS, b"{", 400, ("JSON",)),
    (RECOMMENDATIONS, b'{"user_id": "\xff"}', 400, ("body",)),
    (RECOMMENDATIONS, b"[" * 100_000, 400, ("body",)),
    (RECOMMENDATIONS, [], 422, ()),
    (RECOMMENDATIONS, {}, 422, ("user_id", "history")),
    (RECOMMENDATIONS, {"user_id": "u", "history": []}, 422, ("user_id", "history")),
    (RECOMMENDATIONS, {"user_id": ""}, 422, ("user_id",)),
    (RECOMMENDATIONS, {"user_id": 5}, 422, ("user_id",)),
    (RECOMMENDATIONS, {"user_id": "a\x00"}, 422, ("user_id", "U+0000")),
    (RECOMMENDATIONS, {"history": [{"item_id": "a\nb"}]}, 422, ("history.0.item_id", "U+000A")),
    (RECOMMENDATIONS, b'{"user_id": "\\ud800"}', 422, ("user_id",)),
    (RECOMMENDATIONS, b'{"user_id": "u", "\\ud800": 1}', 422, ()),
    (RECOMMENDATIONS, {"user_id": "u", "k": 0}, 422, ("k", "1")),
    (RECOMMENDATIONS, {"user_id": "u", "k": 1_000_000}, 422, ("k", str(LARGEST_K))),
    (RECOMMENDATIONS, {"user_id": "u", "k": "ten"}, 422, ("k",)),
    (RECOMMENDATIONS, {"user_id": "u", "k": True}, 422, ("k",)),
    (RECOMMENDATIONS, {"user_id": "u", "k": 2.5}, 422, ("k",)),
    (RECOMMENDATIONS, {"user_id": "u", "limit": 5}, 422, ("limit",)),
    (RECOMMENDATIONS, {"user_id": "u", "filter": {"price": {"under": 3}}}, 422, ("filter.price", "max")),
    (RECOMMENDATIONS, {"user_id": "u", "filter": {"title": {"max": 3}}}, 422, ("filter.title",)),
    (RECOMMENDATIONS, {"user_id": "u", "filter": {"price": None}}, 422, ("filter.price",)),
    (RECOMMENDATIONS, {"user_id": "u", "filter": {"allow": "item-1"}}, 422, ("filter.allow",)),
    (RECOMMENDATIONS, {"user_id": "u", "filter": {"deny": [3]}}, 422, ("filter.deny",)),
    (RECOMMENDATIONS, {"user_id": "u", "filter": ["Tents"]}, 422, ("filter",)),
    (RECOMMENDATIONS, b'{"user_id": "u", "filter": {"\\ud800": 1}}', 422, ("filter",)),
    (RECOMMENDATIONS, {"history": [{"event": "click"}]}, 422, ("history.0.item_id",)),
    (RECOMMENDATIONS, {"history": [{"item_id": "i", "event": "glance"}]}, 422, ("history.0.event", "glance")),
    (RECOMMENDATIONS, {"history": [{"item_id": "i", "timestamp": 5}]}, 422, ("history.0.timestamp",)),
    (RECOMMENDATIONS, b'{"history": [{"item_id": "i", "value": NaN}]}', 422, ("history.0.value",)),
    (RECOMMENDATIONS, {"history": [{"item_id": "i", "user_id": "u"}]}, 422, ("history.0.user_id",)),
    (RECOMMENDATIONS, {"history": [{"item_id": "i"}] * 10_001}, 422, ("history",)),
    (ROLLBACK, {}, 422, ("version",)),
    (ROLLBACK, {"version": "1"}, 422, ("version",)),
    (ROLLBACK, {"version": 0}, 422, ("version",)),
    (ROLLBACK, {"version": 1, "force": True}, 422, ("force",)),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD_BODIES, ids=lambda value: repr(value)[:40])
def test_a_bad_body_is_refused_with_its_field(
    service: LiveService, path: str, body: Any, status: int, words: tuple[str, ...]
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = service.client.post(path, content=content, headers={"content-type": "application/json"})
    assert_refused(response, status, *words)
    assert len(service.recommend("visitor-00001")["items"]) == 10


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/users/u/recommendations?k=0", 422, ("k",)),
        ("GET", "/v1/users/u/recommendations?k=1000000", 422, ("k", str(LARGEST_K))),
        ("GET", "/v1/users/u/recommendations?k=ten", 422, ("k",)),
        ("GET", "/v1/items/no-such-item/similar", 404, ("item_id", "no-such-item")),
        ("GET", "/v1/users/nobody/export", 404, ("user_id", "nobody")),
        ("GET", "/v1/users/a%0Ab/export", 422, ("user_id", "U+000A")),
        ("GET", "/v1/users/a%0A/recommendations?k=3", 422, ("user_id", "U+000A")),
        ("GET", "/v1/items/%7F/similar", 422, ("item_id", "U+007F")),
        ("DELETE", "/v1/items/a%0A", 422, ("item_id", "U+000A")),
        ("GET", "/v1/users?limit=x", 422, ("limit",)),
        ("GET", "/v1/users/u/recommendations?n=5", 422, ("n: no such query parameter; there are k",)),
        ("GET", "/v1/users/u/recommendations?k=5&explain=true", 422, ("explain: no such", "k")),
        ("GET", "/v1/users/u/export?limit=5", 422, ("limit: no such query parameter; this request has none",)),
        ("GET", "/v1/items/no-such-item/similar?K=5", 422, ("K: no such", "k")),
        ("GET", "/v1/items/no-such-item/similar?relation=alike", 422, ("relation: ", "'similar'", "'together'")),
        ("GET", "/v1/users?k=5", 422, ("k: no such", "limit")),
        ("GET", "/v1/status?verbose=1", 422, ("verbose",)),
        ("POST", "/v1/events?dry_run=1", 422, ("dry_run",)),
        ("POST", "/v1/recommendations?k=5", 422, ("k: no such",)),
        ("PUT", "/v1/items?dry_run=1", 422, ("dry_run",)),
        ("DELETE", "/v1/items/no-such-item?force=1", 422, ("force",)),
        ("GET", "/v1/nothing", 404, ("/v1/nothing",)),
        ("GET", "/v1/events", 405, ("GET", "POST")),
        ("DELETE", "/v1/recommendations", 405, ("DELETE", "POST")),
        ("PUT", "/v1/status", 405, ("PUT", "GET")),
    ],
)
def test_a_bad_address_is_refused_with_its_field(
    service: LiveService, method: str, path: str, status: int, words: tuple[str, ...]
) -> None:
    assert_refused(service.client.request(method, path), status, *words)


@pytest.mark.parametrize("path", [EVENTS, RECOMMENDATIONS])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_without_end_is_not_read_to_its_end(service: LiveService, path: str, chunked: bool) -> None:
    body = b"[" + b" " * (LARGEST_BODY + 1)
    content = (body[start : start + 2**16] for start in range(0, len(body), 2**16)) if chunked else body
    response = service.client.post(path, content=content)
    assert_refused(response, 413, "body", str(LARGEST_BODY))
    assert len(service.recommend("visitor-00001")["items"]) == 10


# ----------------------------------------------------------------------------------------------------- status and pages


def test_metrics_say_what_the_status_says_of_every_part(service: LiveService, items: list[str]) -> None:
    service.send(*(click(f"measured-{number}", items[number]) for number in range(20)))
    for number in range(20):
        service.recommend(f"measured-{number}")
    service.wait_until_learned()
    status = service.wait_until("nothing changes", lambda status: status if status == service.status() else None)
    found = metrics(service)
    replicas = {replica["replica_id"]: replica for replica in status["replicas"]}
    assert len(replicas) == 2
    for name, field in (
        ("afterclick_replica_version", "version"),
        ("afterclick_replica_users_cached", "users_cached"),
        ("afterclick_replica_answers_total", "answers"),
        ("afterclick_replica_batches_total", "batches"),
        ("afterclick_replica_events_total", "events"),
        ("afterclick_replica_deltas_total", "deltas"),
        ("afterclick_replica_catch_ups_total", "catch_ups"),
        ("afterclick_replica_mismatches_total", "mismatches"),
        ("afterclick_answer_seconds_count", "answers"),
    ):
        by_replica = {labels["replica"]: value for labels, value in found[name]}
        assert by_replica == {replica: facts[field] for replica, facts in replicas.items()}, name
    learner, aggregator = status["learner"], status["aggregator"]
    for name, value in (
        ("afterclick_model_version", learner["version"]),
        ("afterclick_learner_up", 1),
        ("afterclick_pushes_total", learner["pushes"]),
        ("afterclick_unreached_replicas", learner["unreached_replicas"]),
        ("afterclick_rejected_updates_total", learner["rejected_updates"]),
        ("afterclick_events_trained_total", learner["events_trained"]),
        ("afterclick_aggregator_up", 1),
        ("afterclick_events_accepted_total", aggregator["events"]),
        ("afterclick_events_duplicate_total", aggregator["duplicates"]),
        ("afterclick_log_offset", aggregator["log_offset"]),
    ):
        assert found[name] == [({}, value)], name
    assert found["afterclick_freshness_p50_ms"][0][1] > 0


def test_health_names_the_version(service: LiveService) -> None:
    version = service.wait_until_learned()["model_version"]
    assert service.client.get("/healthz").raise_for_status().json() == {"status": "ok", "model_version": version}


def test_users_are_listed_with_their_events(service: LiveService) -> None:
    users = service.client.get("/v1/users?limit=3").raise_for_status().json()["users"]
    assert len(users) == 3
    assert all(len(service.export(user["user_id"])) == user["events"] for user in users)


def test_every_endpoint_is_documented(service: LiveService) -> None:
    document = service.client.get("/openapi.json").raise_for_status().json()
    assert {(method, path) for path, methods in document["paths"].items() for method in methods} >= ENDPOINTS
    assert "swagger" in service.client.get("/docs").raise_for_status().text.lower()


def test_the_page_is_served(service: LiveService) -> None:
    response = service.client.get("/").raise_for_status()
    assert response.headers["content-type"].startswith("text/html")
    assert "<title>Afterclick</title>" in response.text
