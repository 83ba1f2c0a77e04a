"""Errors as HTTP answers: each has its status and one line in `detail`; the reason of a defect is in the log alone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from math import ceil

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from ray.exceptions import GetTimeoutError, RayActorError
from starlette.exceptions import HTTPException

from lib.errors import InputError, origin_of
from lib.log.errors import LogFull, LogUnavailable, LogUnsure, LogWriteError, PartlyWritten
from serving.batches import Overloaded

logger = logging.getLogger("ray.serve")
NO_OBJECT = {"missing", "model_attributes_type", "model_type"}  # what pydantic calls a body that is no JSON object
DEADLINE_HEADER = "X-Deadline-Ms"  # milliseconds that the client will wait for an answer
ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]


class DeadlineMissed(RuntimeError):
    """The client's deadline is sooner than the answer."""

    def __init__(self, deadline: float):
        super().__init__(f"{DEADLINE_HEADER}: no answer within {deadline * 1000:g} ms; try again with more, or later")


class NoModel(RuntimeError):
    """No version can be answered with: a change of the weights failed, and none can be loaded yet."""

    def __init__(self):
        super().__init__("a version could not be applied, and the newest one cannot be loaded yet")


async def bad_input(request: Request, error: Exception) -> Response:
    """Answer 422: a field has a value that it cannot have."""
    return _error(422, str(error))


async def refused(request: Request, error: Exception) -> Response:
    """Answer what a handler raised: there is no such thing, or it cannot be had now."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and error.detail == "Not Found":
        return _error(404, f"path: there is nothing at {request.url.path}; see /docs")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return _error(405, f"method: {request.method} is not allowed here; use {allowed}", error.headers)
    return _error(error.status_code, str(error.detail), error.headers)


async def bad_request(request: Request, error: Exception) -> Response:
    """Answer 400 or 422: the body or a parameter has another form than it should."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _error(400, f"the body is not valid JSON: {reason}")
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if not place and first["type"] in NO_OBJECT:
        return _error(422, "body: a JSON object is required, with the header content-type: application/json")
    message = first["msg"].removeprefix("Value error, ").removeprefix(f"{first['loc'][-1]} ")  # named once
    return _error(422, f"{place}: {message}" if place else message)


async def restarting(request: Request, error: Exception) -> Response:
    """Answer 503: something that is needed comes back in a moment."""
    logger.warning("a part of the service cannot be reached: %s", error)
    return _error(503, "a part of the service is restarting; try again", {"Retry-After": "1"})


async def log_away(request: Request, error: Exception) -> Response:
    """Answer 503: an aggregator cannot open its log, and tries again."""
    reason = origin_of(error)
    logger.error("a request was refused: %s", reason)
    return _error(503, f"the log cannot be opened now, and it is tried again: {reason}", {"Retry-After": "1"})


async def not_durable(request: Request, error: Exception) -> Response:
    """Answer 503: what was sent could not be written."""
    logger.error("a request was refused: %s", error)
    return _error(503, "the log could not be written, so nothing of the request was taken; try again")


async def unsure(request: Request, error: Exception) -> Response:
    """Answer 503: what was sent may have been written, or not."""
    logger.error("of a request it is not known whether it was taken: %s", error)
    return _error(
        503, "the disk of the log confirms nothing, so the request may have been taken, or not; send it again"
    )


async def disk_full(request: Request, error: Exception) -> Response:
    """Answer 507: there is no room for what was sent."""
    logger.error("a request was refused: %s", error)
    return _error(507, "the disk of the log is full, so nothing of the request was taken; make room, and send it again")


async def partly_taken(request: Request, error: Exception) -> Response:
    """Answer 503: of several logs one could not be written."""
    logger.error("a part of a request was refused: %s", error)
    return _error(503, "the log could not be written for all users of the request, only for some; send it again")


async def overloaded(request: Request, error: Exception) -> Response:
    """Answer 503 at once, so that those who were taken are answered in time."""
    assert isinstance(error, Overloaded)
    return _error(503, "more is asked than can be answered in time; try again", {"Retry-After": str(ceil(error.wait))})


async def deadline_missed(request: Request, error: Exception) -> Response:
    """Answer 504: the client does not wait any longer."""
    return _error(504, str(error))


async def defect(request: Request, error: Exception) -> Response:
    """Answer 500: a fault of this program, raised again, for the log, once it is answered."""
    return _error(500, "internal error; the log of the service has the reason")


ERROR_ANSWERS: Mapping[type[Exception], ErrorAnswer] = {
    InputError: bad_input,
    HTTPException: refused,
    RequestValidationError: bad_request,
    NoModel: restarting,
    RayActorError: restarting,
    LogUnavailable: log_away,
    GetTimeoutError: restarting,
    asyncio.TimeoutError: restarting,
    LogWriteError: not_durable,
    LogFull: disk_full,
    LogUnsure: unsure,
    PartlyWritten: partly_taken,
    Overloaded: overloaded,
    DeadlineMissed: deadline_missed,
    Exception: defect,
}


def answer_of(error: Exception) -> ErrorAnswer:
    """Return the answer to the nearest kind of the error."""
    return next(ERROR_ANSWERS[kind] for kind in type(error).__mro__ if kind in ERROR_ANSWERS)


def _error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error in one line of valid Unicode, whatever the request held."""
    line = " ".join(detail.encode(errors="replace").decode().split())
    return Response(orjson.dumps({"detail": line}), status, headers, "application/json")
