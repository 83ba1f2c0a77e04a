"""What the handlers share: their replica, parameters that several take, and JSON answers."""

from typing import Annotated, Any

import orjson
from fastapi import Depends, Header, Query, Request, Response
from starlette.convertors import PathConvertor, register_url_convertor

from lib.errors import InputError
from serving.errors import DEADLINE_HEADER
from serving.fast_path import deadline_of
from serving.recommendations import Recommendations
from serving.schemas import LARGEST_K


class IdConvertor(PathConvertor):
    """Any text in a path, line breaks included: what an id may hold is for the handler to say, not for the router."""

    regex = "(?s:.*)"


register_url_convertor("id", IdConvertor())
DEADLINE = Header(alias=DEADLINE_HEADER, description="milliseconds to wait for an answer; 504 if it takes longer")


async def replica_of(request: Request) -> Recommendations:
    """Return the replica whose application this is."""
    return request.app.state.replica


async def seconds_to_wait(request: Request, deadline: Annotated[str | None, DEADLINE] = None) -> float | None:
    """Return the client's deadline."""
    return deadline_of(request.scope["headers"])


async def known_parameters(request: Request) -> None:
    """Refuse a query parameter that the request does not have, as bodies refuse unknown fields.

    Raises:
        InputError: it names the parameter, and those there are.
    """
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "this request has none"
            raise InputError(f"{name}: no such query parameter; {there_are}")


Replica = Annotated[Recommendations, Depends(replica_of)]
Deadline = Annotated[float | None, Depends(seconds_to_wait)]
K = Annotated[int, Query(ge=1, le=LARGEST_K, description="number of items")]


def json_response(content: Any) -> Response:
    """Return an answer whose content needs no further check."""
    return Response(orjson.dumps(content), media_type="application/json")
