"""What the way around FastAPI must not let through."""

import asyncio
from typing import Any

from fastapi import FastAPI

from serving.errors import ERROR_ANSWERS
from serving.fast_path import RECOMMENDATIONS, FastPath
from serving.http import BoundedBody
from serving.schemas import LARGEST_BODY, RecommendationRequest


def test_a_valid_body_that_is_too_large_is_refused_all_the_same():
    app = FastAPI()
    app.add_middleware(BoundedBody)
    for kind, answer_error in ERROR_ANSWERS.items():
        app.exception_handler(kind)(answer_error)

    @app.post(RECOMMENDATIONS)
    async def post(request: RecommendationRequest) -> None: ...

    async def answer(request: RecommendationRequest, deadline: float | None) -> Any:
        raise AssertionError("it is too large")

    async def take_events(body: bytes) -> Any:
        raise AssertionError("it is not for events")

    body = b'{"user_id": "u"}'.ljust(LARGEST_BODY + 1)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "path": RECOMMENDATIONS, "method": "POST", "headers": headers, "query_string": b""}
    asyncio.run(FastPath(app, answer, take_events)(scope, receive, send))
    assert sent[0]["status"] == 413
