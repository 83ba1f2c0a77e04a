"""The HTTP interface of a replica: requests checked and turned into calls, answers and errors into JSON."""

import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.data.events import Event, validate_event
from lib.data.guard import CleaningRules
from lib.data.history import History
from lib.errors import EventRejected, InputError
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, RankedItem
from serving.aggregator import DUPLICATE
from serving.aggregators import Feedback
from serving.errors import DEADLINE_HEADER, ERROR_ANSWERS
from serving.fast_path import FastPath, deadline_of
from serving.prometheus import render
from serving.schemas import (
    EVENTS_BODY,
    LARGEST_BODY,
    LARGEST_EVENT_BATCH,
    LARGEST_K,
    ItemsRequest,
    RecommendationRequest,
    Recommendations,
    RollbackRequest,
)

if TYPE_CHECKING:
    from serving.recommendations import Recommendations as Replica

Deadline = Annotated[
    str | None, Header(alias=DEADLINE_HEADER, description="milliseconds to wait for an answer; 504 if it takes longer")
]
PAGE = Path(__file__).with_name("page.html")


def http_application(replica: "Replica") -> FastPath:
    """The ASGI application of one replica."""
    app = FastAPI(
        title="Afterclick", description="A recommender that learns from the click you just made.", version="1"
    )
    rules = replica.cleaning
    app.add_middleware(BoundedBody)
    for kind, error_answer in ERROR_ANSWERS.items():
        app.exception_handler(kind)(error_answer)

    async def recommend(question: Question, user_id: str | None, deadline: float | None) -> Response:
        start = time.perf_counter()
        answered = await replica.ask(question, user_id, deadline)
        replica.count_answer(time.perf_counter() - start)
        request_id = uuid.uuid4().hex
        if answered.arm is not None and user_id is not None and replica.challenger is not None:
            request_id = replica.challenger.note(request_id, user_id, answered)
        replica.record(request_id, user_id, answered)
        return answer(request_id, answered.version, answered.items, answered.arm)

    def answer(request_id: str, version: int, items: list[RankedItem], arm: str | None = None) -> Response:
        titles = replica.recommender.catalog.titles
        listed = []
        for item_id, score, reason, propensity in items:
            fields: dict[str, Any] = {"item_id": item_id, "score": score}
            if (title := titles.get(item_id)) is not None:
                fields["title"] = title
            if reason is not None:
                fields["reason"] = reason
            if propensity is not None:
                fields["propensity"] = propensity
            listed.append(fields)
        shown = {} if arm is None else {"arm": arm}
        return _json({"request_id": request_id, "model_version": version, **shown, "items": listed})

    async def answer_request(request: RecommendationRequest, deadline: float | None) -> Response:
        history = _history(request, rules)
        filter = ItemFilter.of(request.filter)
        if filter is not None:
            await replica.check_filter(filter)
        question = Question(history, request.k, filter, request.exclude_seen, request.explain)
        return await recommend(question, request.user_id, deadline)

    @app.post("/v1/recommendations", response_model=Recommendations)
    async def post_recommendations(
        http: Request, request: RecommendationRequest, deadline: Deadline = None
    ) -> Response:
        """Items for a user, or for a history that comes with the request."""
        return await answer_request(request, deadline_of(http.scope["headers"]))  # what FastPath could not read

    @app.get("/v1/users/{user_id:path}/recommendations", response_model=Recommendations)
    async def get_recommendations(
        http: Request, user_id: str, k: int = Query(10, ge=1, le=LARGEST_K), deadline: Deadline = None
    ) -> Response:
        """Items for a user; someone unknown gets what is popular, marked as such."""
        return await recommend(Question(History(), k), user_id, deadline_of(http.scope["headers"]))

    @app.put("/v1/items")
    async def put_items(request: ItemsRequest) -> Response:
        """Add items, or change the attributes of known ones; 200 means that it is durable.

        Filters and titles know them from the next answer on; a new item can be recommended within a second.
        """
        items = {item.item_id: item.__pydantic_extra__ for item in request.items}
        await replica.check_items(items)
        await replica.aggregators.change_items(list(items.items()))
        return _json({"accepted": len(items)})

    @app.delete("/v1/items/{item_id:path}")
    async def delete_item(item_id: str) -> Response:
        """Take an item out of every answer from the next one on, for good, or until it is put again."""
        if not await replica.has_item(item_id):
            raise HTTPException(404, f"item_id: the catalog has no item {item_id!r}")
        await replica.aggregators.change_items([(item_id, None)])
        return _json({"item_id": item_id, "deleted": True})

    @app.get("/v1/items/{item_id:path}/similar", response_model=Recommendations)
    async def get_similar(item_id: str, k: int = Query(10, ge=1, le=LARGEST_K)) -> Response:
        """The items nearest to an item."""
        try:
            version, items = await replica.similar(item_id, k)
        except KeyError:
            raise HTTPException(404, f"item_id: the catalog has no item {item_id!r}") from None
        return answer(uuid.uuid4().hex, version, items)

    async def take_events(body: bytes) -> Response:
        events = _events_of(body)
        now = time.time_ns() // 1_000_000
        rejected: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        valid: list[tuple[int, Event]] = []
        named: set[str] = set()
        for index, fields in enumerate(events):
            try:
                event = validate_event(fields, now, rules.future_tolerance_ms)
            except EventRejected as error:
                rejected.append({"index": index, "reason": str(error)})
                reasons[error.reason] += 1
                continue
            if event.event_id is None and fields.get("timestamp") is None:
                # an id of its own, as nothing else identifies it: a repeated call to the aggregator cannot double it
                name = uuid.uuid4().hex
                named.add(name)
                event = event._replace(event_id=name)
            valid.append((index, event))
        outcomes = await replica.aggregators.append(Feedback([event for _, event in valid], named, reasons))
        for (index, _), outcome in zip(valid, outcomes, strict=True):
            if outcome is not None and outcome != DUPLICATE:
                rejected.append({"index": index, "reason": outcome})
        if replica.challenger is not None:
            replica.challenger.react([e for (_, e), outcome in zip(valid, outcomes, strict=True) if outcome is None])
        duplicates = outcomes.count(DUPLICATE)
        replica.counts["events"] += len(events)
        accepted = len(events) - duplicates - len(rejected)
        rejected.sort(key=lambda rejection: rejection["index"])
        return _json({"accepted": accepted, "duplicates": duplicates, "rejected": rejected})

    @app.post("/v1/events", openapi_extra=EVENTS_BODY)
    async def post_events(request: Request) -> Response:
        """Take feedback; 200 means that what was accepted is durable and in the history behind the next answer."""
        return await take_events(await request.body())

    @app.get("/v1/users")
    async def get_users(limit: int = Query(50, ge=1, le=1000)) -> Response:
        """Some users and the number of their events."""
        users = await replica.aggregators.users(limit)
        return _json({"users": [{"user_id": user_id, "events": events} for user_id, events in users]})

    @app.get("/v1/users/{user_id:path}/export")
    async def get_export(user_id: str) -> Response:
        """The events of one user that the service keeps, oldest first."""
        [history] = await replica.aggregators.get_histories([user_id])
        if len(history) == 0:
            raise HTTPException(404, f"user_id: there are no events of {user_id!r}")
        titles = replica.recommender.catalog.titles
        columns = zip(history.item_ids, history.events, history.values, history.timestamps, strict=True)
        events = [
            _without_nulls({"item_id": i, "event": e, "value": v, "timestamp": t, "title": titles.get(i)})
            for i, e, v, t in columns
        ]
        return _json({"user_id": user_id, "events": events})

    @app.get("/v1/status")
    async def get_status() -> Response:
        """Versions per replica, freshness, log offsets, pushes and rejected updates."""
        return _json(await replica.status())

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """The same in the Prometheus text format."""
        return Response(render(await replica.status()), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/rollback")
    async def post_rollback(request: RollbackRequest) -> Response:
        """Bring a stored version's weights back, as a new version, on every replica."""
        try:
            outcome = await replica.rollback(request.version)
        except ValueError:
            raise HTTPException(503, "no learner is running; start one to roll back") from None
        if "error" in outcome:
            raise HTTPException(404, outcome["error"])
        return _json(outcome)

    @app.get("/healthz")
    async def get_health() -> Response:
        """200 while this replica can answer."""
        return _json({"status": "ok", "model_version": replica.recommender.version})

    @app.get("/", response_class=HTMLResponse)
    async def get_page() -> Response:
        """The page."""
        return HTMLResponse(PAGE.read_text())

    return FastPath(app, answer_request, take_events)


def _history(request: RecommendationRequest, rules: CleaningRules) -> History:
    """The history that came with the request, each event checked as feedback is."""
    now = time.time_ns() // 1_000_000
    events = []
    for index, event in enumerate(request.history or ()):
        try:
            fields = {"user_id": "anonymous", **event.model_dump(exclude_none=True)}
            events.append(validate_event(fields, now, rules.future_tolerance_ms))
        except EventRejected as error:
            raise InputError(f"history.{index}.{error.field}: {error}") from error
    return History.of(events)


def _events_of(body: bytes) -> list[Any]:
    """The list of events in a request's body."""
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


class BoundedBody:
    """Stops reading a request whose body grows beyond LARGEST_BODY."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, f"body: more than {LARGEST_BODY} bytes; send several requests")
            return message

        await self.app(scope, bounded, send)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
