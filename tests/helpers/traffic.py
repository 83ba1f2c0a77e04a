"""Visitors for the service under test: threads that send events and ask, and note every answer and every failure.

A sender that got no answer, or a 503, sends the same events again, as every client should.
"""

import itertools
import threading
import time
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from tests.helpers.service import PATIENCE, LiveService

PAUSE = 0.01  # seconds between a thread's requests
UNANSWERED = "no answer"  # how a failure of the connection is noted
USERS = 40  # so many share the events, which keeps each below what counts as a flood


class Traffic:
    """While the block runs, `senders` threads send events (`burst` a request) and `askers` ask for recommendations."""

    def __init__(self, service: LiveService, name: str, senders: int = 2, askers: int = 2, burst: int = 1):
        self.service = service
        self.name = name
        self.burst = burst
        self.items = service.items()
        self.acknowledged: list[tuple[str, str]] = []  # (user_id, event_id) of every event that a 200 accepted
        self.versions: list[int] = []  # of every answer to an asker
        self.failures: list[str] = []
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send_events) for _ in range(senders)]
        self._threads += [threading.Thread(target=self._ask) for _ in range(askers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, events: int, answers: int = 0) -> None:
        """Wait until so many more events are acknowledged, and so many more questions answered."""
        goal = (len(self.acknowledged) + events, len(self.versions) + answers)
        deadline = time.monotonic() + PATIENCE
        while len(self.acknowledged) < goal[0] or len(self.versions) < goal[1]:
            if time.monotonic() > deadline:
                pytest.fail(f"no more traffic gets through; the last failures: {self.failures[-3:]}")
            time.sleep(0.02)

    def _user(self, number: int) -> str:
        return f"{self.name}-{number % USERS}"

    def _events(self) -> list[dict[str, Any]]:
        numbers = [next(self._numbers) for _ in range(self.burst)]
        items = [self.items[number % len(self.items)] for number in numbers]
        return [
            {"user_id": self._user(number), "item_id": item, "event": "click", "event_id": str(number)}
            for number, item in zip(numbers, items, strict=True)
        ]

    def _send_events(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=PATIENCE) as client:
            events = self._events()
            while not self._stop.wait(PAUSE):
                answer = self._post(client, "/v1/events", {"events": events})
                if answer is None:
                    continue
                if answer["accepted"] + answer["duplicates"] != len(events):
                    self.failures.append(f"events: {answer}")
                self.acknowledged += [(event["user_id"], event["event_id"]) for event in events]
                events = self._events()

    def _ask(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=PATIENCE) as client:
            while not self._stop.wait(PAUSE):
                user = self._user(next(self._numbers))
                answer = self._post(client, "/v1/recommendations", {"user_id": user, "k": 5})
                if answer is None:
                    continue
                if len(answer["items"]) != 5:
                    self.failures.append(f"recommendations: {answer}")
                self.versions.append(answer["model_version"])

    def _post(self, client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            response = client.post(path, json=body)
        except httpx.TransportError as error:
            self.failures.append(f"{path}: {UNANSWERED} {error!r}")
            return None
        if response.status_code != 200:
            self.failures.append(f"{path}: {response.status_code} {response.text}")
            return None
        return response.json()
