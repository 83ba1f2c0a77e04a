"""Feedback: events in; each is accepted, known already, or rejected with a reason."""

import time
import uuid
from collections import Counter
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException, Request, Response

from lib.data.events import validate_event
from lib.errors import EventRejected
from serving.aggregator import DUPLICATE
from serving.aggregators import Feedback
from serving.recommendations import Recommendations
from serving.routes.dependencies import Replica, json_response
from serving.schemas import EVENTS_BODY, LARGEST_EVENT_BATCH

router = APIRouter()


@router.post("/v1/events", openapi_extra=EVENTS_BODY)
async def post_events(replica: Replica, request: Request) -> Response:
    """Take feedback; 200 means that what was accepted is durable and in the history behind the next answer."""
    return await take_events(replica, await request.body())


async def take_events(replica: Recommendations, body: bytes) -> Response:
    """Take the valid events of a request's body, and answer which were rejected and why."""
    events = _events_of(body)
    feedback, places, rejections = _validate(events, replica.cleaning.future_tolerance_ms)
    outcomes = await replica.take(feedback)
    for place, outcome in zip(places, outcomes, strict=True):
        if outcome is not None and outcome != DUPLICATE:
            rejections.append((place, outcome))
    duplicates = outcomes.count(DUPLICATE)
    accepted = len(events) - duplicates - len(rejections)
    rejected = [{"index": place, "reason": reason} for place, reason in sorted(rejections)]
    return json_response({"accepted": accepted, "duplicates": duplicates, "rejected": rejected})


def _validate(events: list[Any], future_tolerance_ms: int) -> tuple[Feedback, list[int], list[tuple[int, str]]]:
    """Return the valid events, their places in the request, and the places of the others with what is wrong."""
    now = time.time_ns() // 1_000_000
    feedback, places, rejections = Feedback([], set(), Counter()), [], []
    for place, fields in enumerate(events):
        try:
            event = validate_event(fields, now, future_tolerance_ms)
        except EventRejected as error:
            rejections.append((place, str(error)))
            feedback.rejected[error.reason] += 1
            continue
        if event.event_id is None and fields.get("timestamp") is None:
            # an id of its own, as nothing else identifies it: a repeated call to the aggregator cannot double it
            name = uuid.uuid4().hex
            feedback.named.add(name)
            event = event._replace(event_id=name)
        feedback.events.append(event)
        places.append(place)
    return feedback, places, rejections


def _events_of(body: bytes) -> list[Any]:
    """Return the list of events in a request's body.

    Raises:
        HTTPException: there is none, or it is too long.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("events"), list):
        raise HTTPException(422, 'events: send {"events": [...]} with a list of events')
    unknown = sorted(set(document) - {"events"})
    if unknown:
        raise HTTPException(422, f'{unknown[0]}: unknown field; send {{"events": [...]}}')
    if not document["events"]:
        raise HTTPException(422, "events: the list is empty; send at least one event")
    if len(document["events"]) > LARGEST_EVENT_BATCH:
        raise HTTPException(422, f"events: at most {LARGEST_EVENT_BATCH} in one request; send several requests")
    return document["events"]
