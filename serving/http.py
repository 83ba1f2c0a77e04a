"""The HTTP interface of a replica: its routes (serving/routes), what they have in common, and the fast path."""

from functools import partial

from fastapi import Depends, FastAPI, HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ERROR_ANSWERS
from serving.fast_path import FastPath
from serving.recommendations import Recommendations
from serving.routes import events, items, operations, recommendations, users
from serving.routes.dependencies import known_parameters
from serving.schemas import LARGEST_BODY


def http_application(replica: Recommendations) -> FastPath:
    """Return the ASGI application of one replica."""
    app = FastAPI(
        title="Afterclick",
        description="A recommender that learns from the click you just made.",
        version="1",
        dependencies=[Depends(known_parameters)],
    )
    app.state.replica = replica
    app.add_middleware(BoundedBody)
    for kind, error_answer in ERROR_ANSWERS.items():
        app.exception_handler(kind)(error_answer)
    for resource in (recommendations, events, items, users, operations):
        app.include_router(resource.router)
    return FastPath(app, partial(recommendations.answer_request, replica), partial(events.take_events, replica))


class BoundedBody:
    """Middleware that stops reading a request whose body grows beyond LARGEST_BODY."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, f"body: more than {LARGEST_BODY} bytes; send several requests")
            return message

        await self.app(scope, bounded, send)
