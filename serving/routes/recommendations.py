"""Recommendations: for a user, for a history that comes with the request, and beside an item."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response

from lib.data.events import validate_event
from lib.data.history import History
from lib.errors import EventRejected, InputError
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, Relation
from serving.challenger import Answer
from serving.recommendations import Recommendations
from serving.request_id import new_request_id
from serving.routes.dependencies import Deadline, K, Replica, json_response
from serving.schemas import ItemId, RecommendationRequest, RecommendationResponse, UserId

router = APIRouter()
ItemRelation = Annotated[
    Relation, Query(description="similar: what may take the item's place; together: what is taken with it")
]


@router.post("/v1/recommendations", response_model=RecommendationResponse)
async def post_recommendations(replica: Replica, request: RecommendationRequest, deadline: Deadline) -> Response:
    """Recommend items to a user, or to whoever has the history that comes with the request."""
    return await answer_request(replica, request, deadline)  # only what FastPath could not read comes here


@router.get("/v1/users/{user_id:id}/recommendations", response_model=RecommendationResponse)
async def get_recommendations(replica: Replica, user_id: UserId, deadline: Deadline, k: K = 10) -> Response:
    """Recommend items to a user; someone unknown gets what is popular, marked as such."""
    return await _recommend(replica, Question(History(), k), user_id, deadline)


@router.get("/v1/items/{item_id:id}/similar", response_model=RecommendationResponse)
async def get_similar(replica: Replica, item_id: ItemId, k: K = 10, relation: ItemRelation = "similar") -> Response:
    """Return the items that are similar to an item, or are taken together with it."""
    models = await replica.current_models()
    try:
        answer = await models.similar(item_id, k, relation)
    except KeyError:
        raise HTTPException(404, f"item_id: the catalog has no item {item_id!r}") from None
    return json_response(_content(replica, new_request_id(), answer))


async def answer_request(replica: Recommendations, request: RecommendationRequest, deadline: float | None) -> Response:
    """Answer a request within `deadline` seconds, if there is a deadline."""
    history = _history(request, replica.cleaning.future_tolerance_ms)
    filter, notes = ItemFilter.of(request.filter), []
    if filter is not None:
        models = replica.models if replica.models.knows(filter) else await replica.current_models()
        notes = await models.check_filter(filter)
    question = Question(history, request.k, filter=filter, exclude_seen=request.exclude_seen, explain=request.explain)
    return await _recommend(replica, question, request.user_id, deadline, notes)


async def _recommend(
    replica: Recommendations,
    question: Question,
    user_id: str | None,
    deadline: float | None,
    notes: Sequence[str] = (),
) -> Response:
    request_id, answer = await replica.recommend(question, user_id, deadline)
    return json_response(_content(replica, request_id, answer, notes))


def _history(request: RecommendationRequest, future_tolerance_ms: int) -> History:
    """Read the history that came with the request, each event checked as feedback is."""
    now = time.time_ns() // 1_000_000
    events = []
    for index, event in enumerate(request.history or ()):
        try:
            fields = {"user_id": "anonymous", **event.model_dump(exclude_none=True)}
            events.append(validate_event(fields, now, future_tolerance_ms))
        except EventRejected as error:
            raise InputError(f"history.{index}.{error.field}: {error}") from error
    return History.of(events)


def _content(replica: Recommendations, request_id: str, answer: Answer, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return what an answer shows: a RecommendationResponse without the fields that it does not have."""
    titles = replica.models.live.catalog.titles
    listed = []
    for item_id, score, reason, propensity in answer.items:
        fields: dict[str, Any] = {"item_id": item_id, "score": score}
        if (title := titles.get(item_id)) is not None:
            fields["title"] = title
        if reason is not None:
            fields["reason"] = reason
        if propensity is not None:
            fields["propensity"] = propensity
        listed.append(fields)
    shown: dict[str, Any] = {} if answer.arm is None else {"arm": answer.arm}
    if notes:
        shown["notes"] = notes
    return {"request_id": request_id, "model_version": answer.version, **shown, "items": listed}
