"""Operations: the status, metrics, a rollback, the health, and the page."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serving.prometheus import render
from serving.rollout import learner_handle
from serving.routes.dependencies import Replica, json_response
from serving.schemas import RollbackRequest
from serving.status import Status

PAGE = Path(__file__).parents[1] / "page.html"
router = APIRouter()


@router.get("/v1/status", response_model=Status)
async def get_status(replica: Replica) -> Response:
    """Return versions per replica, freshness, log offsets, pushes and rejected updates."""
    status = await replica.status()
    return Response(status.model_dump_json(), media_type="application/json")  # its parts were checked where made


@router.get("/metrics")
async def get_metrics(replica: Replica) -> Response:
    """Return the same in the Prometheus text format."""
    return Response(render(await replica.status()), media_type=CONTENT_TYPE_LATEST)


@router.post("/v1/rollback")
async def post_rollback(replica: Replica, request: RollbackRequest) -> Response:
    """Bring a stored version's weights back, as a new version, on every replica."""
    try:
        learner: Any = await asyncio.to_thread(learner_handle)
    except ValueError:
        raise HTTPException(503, "no learner is running; start one to roll back") from None
    # not repeated when the learner dies: the rollback may have been done, and more learned since
    call = learner.rollback.options(max_task_retries=0).remote(request.version)
    outcome = await asyncio.wait_for(call, replica.config.actor_timeout)
    if "error" in outcome:
        raise HTTPException(404, outcome["error"])
    return json_response(outcome)


@router.get("/healthz")
async def get_health(replica: Replica) -> Response:
    """Answer 200 while this replica can answer."""
    return json_response({"status": "ok", "model_version": replica.models.live.version})


@router.get("/", response_class=HTMLResponse)
async def get_page() -> Response:
    """Return the page."""
    return HTMLResponse(PAGE.read_text())
