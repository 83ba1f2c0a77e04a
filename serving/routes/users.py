"""Users: who they are, and what the service keeps of one."""

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Response

from serving.routes.dependencies import Replica, json_response
from serving.schemas import UserId

router = APIRouter()


@router.get("/v1/users")
async def get_users(replica: Replica, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
    """Return the users who acted last, the latest first, and the number of their events."""
    users = await replica.aggregators.users(limit)
    return json_response({"users": [{"user_id": user_id, "events": events} for user_id, events in users]})


@router.get("/v1/users/{user_id:id}/export")
async def get_export(replica: Replica, user_id: UserId) -> Response:
    """Return the events of one user that the service keeps, oldest first."""
    [history] = await replica.aggregators.get_histories([user_id])
    if len(history) == 0:
        raise HTTPException(404, f"user_id: there are no events of {user_id!r}")
    titles = replica.models.live.catalog.titles
    events = []
    columns = zip(history.item_ids, history.events, history.values, history.timestamps, strict=True)
    for item_id, event, value, timestamp in columns:
        fields = {"item_id": item_id, "event": event, "value": value, "timestamp": timestamp}
        fields["title"] = titles.get(item_id)
        events.append({name: value for name, value in fields.items() if value is not None})
    return json_response({"user_id": user_id, "events": events})
