"""The status has one meaning: for those who read its JSON, for /metrics, and in the schema of /v1/status."""

from typing import Any

import pytest
from pydantic import ValidationError

from serving.http import http_application
from serving.latency import BOUNDS, LatencyHistogram
from serving.prometheus import render
from serving.status import (
    AggregatorsStatus,
    AggregatorStatus,
    AggregatorsUnavailable,
    FreshnessStatus,
    LearnerStatus,
    Status,
    StoredVersionsStatus,
    Unavailable,
    UnknownItemsStatus,
)

AWAY = Unavailable(state="restarting")


def shard(number: int) -> AggregatorStatus:
    return AggregatorStatus(
        state="models/shop/live",
        shard=number,
        process=10 + number,
        log_offset=7,
        learned_offset=5,
        pending=2,
        events=7,
        duplicates=1,
        rejected={"flood": 3},
        noticed={},
        users=4,
        commits=6,
        item_revision=0,
        damage=[],
    )


def learner() -> LearnerStatus:
    return LearnerStatus(
        state="running",
        storage_error=None,
        damage=[],
        version=9,
        checksum="c",
        base=1,
        log_offset=5,
        events_trained=4,
        events_rejected=1,
        rejected_updates=1,
        last_rejection=None,
        stored=StoredVersionsStatus(bytes=120, keep_bytes=200, pruned=5),
        unknown_items=UnknownItemsStatus(waiting=2, rows=1, refused=6),
        set_aside_updates=0,
        set_aside=[],
        pushes=8,
        loss=None,
        unreached_replicas=0,
        freshness=FreshnessStatus(last_ms=1.0, p50_ms=2.0, p99_ms=3.0, count=4),
        workers=1,
        process=3,
    )


def total(*shards: AggregatorStatus) -> AggregatorsStatus:
    return AggregatorsStatus(**dict(shards[0]), shards=list(shards))


def status(**parts: Any) -> Status:
    return Status(
        **{"model_version": 9, "replicas": [], "learner": AWAY, "aggregator": AWAY, "freshness": None} | parts
    )


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"learner": learner(), "aggregator": shard(0)},
        {"aggregator": total(shard(0), shard(1))},
        {"aggregator": AggregatorsUnavailable(state="restarting", shards=[shard(1)])},
    ],
    ids=["everything is away", "one aggregator", "two aggregators", "one of two aggregators"],
)
def test_json_is_read_back_as_what_it_was(parts):
    whole = status(**parts)
    assert Status.model_validate_json(whole.model_dump_json()) == whole


def test_a_part_that_is_away_says_only_so():
    shown = status().model_dump(mode="json")
    assert (shown["learner"], shown["aggregator"]) == ({"state": "restarting"}, {"state": "restarting"})


def test_a_part_that_says_less_than_it_should_is_not_taken_for_one_that_is_away():
    shown = status(learner=learner()).model_dump(mode="json")
    del shown["learner"]["checksum"]
    with pytest.raises(ValidationError, match="checksum"):
        Status.model_validate(shown)


def test_metrics_say_which_part_is_away():
    text = render(status(learner=learner())).decode()
    assert "afterclick_learner_up 1.0" in text
    assert "afterclick_pushes_total 8.0" in text
    assert "afterclick_stored_versions_bytes 120.0" in text
    assert "afterclick_new_items_refused_total 6.0" in text
    assert "afterclick_freshness_p99_ms 3.0" in text
    assert "afterclick_aggregator_up 0.0" in text
    assert "afterclick_log_offset" not in text
    assert 'afterclick_events_refused_total{reason="flood"} 3.0' in render(status(aggregator=shard(0))).decode()


def test_the_interface_documents_the_status():
    replica: Any = None  # its routes are the same whoever answers
    document = http_application(replica).app.openapi()
    answer = document["paths"]["/v1/status"]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"] == {"$ref": "#/components/schemas/Status"}
    schemas = document["components"]["schemas"]
    assert set(schemas["Status"]["properties"]) == set(Status.model_fields)
    assert set(schemas["LearnerStatus"]["required"]) <= set(learner().model_dump())


def test_answers_are_counted_by_how_long_they_took():
    latency = LatencyHistogram()
    for seconds in (0.0005, 0.001, 0.0011, 0.3, 5.0, 60.0):
        latency.observe(seconds)
    buckets = dict(latency.buckets())
    assert list(buckets) == [*map(str, BOUNDS), "+Inf"]
    assert {bound: count for bound, count in buckets.items() if count} == {
        "0.001": 2,
        "0.002": 1,
        "0.5": 1,
        "5.0": 1,
        "+Inf": 1,
    }
    assert latency.sum == pytest.approx(65.3026)
