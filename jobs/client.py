"""Requests to a running service over HTTP."""

from typing import Any

import httpx

from lib.errors import InputError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 30


def get_json(url: str, path: str) -> Any:
    """Get an answer from a running service.

    Raises:
        InputError: no service answers at this address, or it refuses the request.
        RuntimeError: the service failed.
    """
    return _request("GET", url, path)


def post_json(url: str, path: str, body: Any) -> Any:
    """Post to a running service, and return its answer.

    Raises:
        InputError: no service answers at this address, or it refuses the request.
        RuntimeError: the service failed.
    """
    return _request("POST", url, path, json=body)


def _request(method: str, url: str, path: str, **arguments: Any) -> Any:
    try:
        response = httpx.request(method, f"{url.rstrip('/')}{path}", timeout=TIMEOUT_SECONDS, **arguments)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise InputError(f"url: no service answers at {url} ({error}); start one with `afterclick serve`") from error
    except httpx.RemoteProtocolError as error:
        raise InputError(
            f"url: what answers at {url} is no HTTP service ({error}); give the service's --url"
        ) from error
    try:
        answer = response.json()
    except ValueError as error:
        raise InputError(
            f"url: what answers at {url} is no afterclick service ({response.status_code}, and no JSON, at {path})"
        ) from error
    if response.is_client_error:
        raise InputError(f"the service at {url} refused: {answer.get('detail', answer)}")
    if not response.is_success:
        raise RuntimeError(f"the service at {url} answered {response.status_code}: {answer.get('detail', answer)}")
    return answer
