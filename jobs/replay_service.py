"""The arm `service` of a replay: the same stream through a running service, over real HTTP."""

import asyncio
import time
from collections.abc import Sequence

import httpx
import numpy as np

from lib.data.events import Event
from lib.data.tables import events_of
from lib.errors import InputError
from lib.live.prequential import MISSED, Outcome, Stream
from lib.live.prequential_comparison import DEEPEST

AT_ONCE = 64  # events whose users are served at the same time; one user's own go one after another
TIMEOUT = 30.0  # seconds
PATIENCE = 60.0  # seconds of 503 answers until a replay is given up
LEARNED_EVERY = 0.2  # seconds between two looks whether everything is learned


def through_service(url: str, stream: Stream) -> Outcome:
    """Ask, find the item that the person then chose, send the event; in order of time, user by user.

    Nothing is asked before an event that turned an item down: it is no target.

    The service must have started from the stream's oldest part: its model, and its users' histories.

    Raises:
        InputError: there is no such service, or it refuses an event.
    """
    return asyncio.run(_checked(url.rstrip("/"), stream))


async def _checked(url: str, stream: Stream) -> Outcome:
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        await _check(client, stream)
    return await send_stream(url, stream)


async def send_stream(url: str, stream: Stream) -> Outcome:
    """Ask and send, whatever the service has learned before."""
    events = events_of(stream.newest)
    ranks = np.full(len(events), MISSED, dtype=np.int64)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        for start in range(0, len(events), AT_ONCE):
            by_user: dict[str, list[int]] = {}
            for number in range(start, min(start + AT_ONCE, len(events))):
                by_user.setdefault(events[number].user_id, []).append(number)
            await asyncio.gather(*(_one_user(client, stream, events, numbers, ranks) for numbers in by_user.values()))
        facts = await _facts(client)
    return Outcome(ranks[stream.targets], facts=facts)


async def _check(client: httpx.AsyncClient, stream: Stream) -> None:
    """Refuse a service that does not know the stream's past, or knows its future."""
    try:
        status = (await client.get("/v1/status")).raise_for_status().json()
    except httpx.HTTPError as error:
        raise InputError(
            f"through: {client.base_url} does not answer ({error}); start it with afterclick serve"
        ) from None
    users = len(stream.oldest["user_id"].unique())
    found = status["aggregator"].get("users")
    if found != users or status["aggregator"].get("log_offset"):
        raise InputError(
            f"through: the service has {found} users and {status['aggregator'].get('log_offset')} logged events, not "
            f"{users} and 0; start it anew with --model and --data of the replay's --out folder"
        )


async def _one_user(
    client: httpx.AsyncClient, stream: Stream, events: Sequence[Event], numbers: Sequence[int], ranks: np.ndarray
) -> None:
    """Send one user's events; ask before each that is a target."""
    for number in numbers:
        event = events[number]
        if stream.targets[number]:
            question = {"user_id": event.user_id, "k": DEEPEST, "exclude_seen": not stream.repeats}
            answer = await _post(client, "/v1/recommendations", question)
            items = [item["item_id"] for item in answer["items"]]
            if event.item_id in items:
                ranks[number] = items.index(event.item_id)
        fields = {"user_id": event.user_id, "item_id": event.item_id, "event": event.event}
        sent = fields | {"timestamp": event.timestamp, "event_id": f"replay-{number}"}
        if event.value is not None:
            sent["value"] = event.value
        answer = await _post(client, "/v1/events", {"events": [sent]})
        if answer["rejected"]:
            raise InputError(
                f"through: the service refused event {number}: {answer['rejected'][0]['reason']}; a replay is faster "
                "than people are, so start the service with limits that let it through"
            )


async def _post(client: httpx.AsyncClient, path: str, body: dict) -> dict:
    """Return the answer; a service that is overloaded for a moment is asked again, as every client should."""
    deadline = time.monotonic() + PATIENCE
    while True:
        response = await client.post(path, json=body)
        if response.status_code != 503 or time.monotonic() > deadline:
            return response.raise_for_status().json()
        await asyncio.sleep(float(response.headers.get("Retry-After", 1)))


async def _facts(client: httpx.AsyncClient) -> dict:
    """Return what the learner says when everything is learned."""
    deadline = time.monotonic() + PATIENCE
    while True:
        status = (await client.get("/v1/status")).raise_for_status().json()
        learner = status["learner"]
        if learner.get("log_offset") == status["aggregator"].get("log_offset") or time.monotonic() > deadline:
            return {name: learner.get(name) for name in ("version", "pushes", "events_trained", "events_rejected")}
        await asyncio.sleep(LEARNED_EVERY)
