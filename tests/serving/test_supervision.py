"""The watch over the actors goes on whatever one look at them raises."""

import threading

import pytest

from lib.live.settings import LearnerConfig
from serving.supervision import Supervisor


@pytest.mark.parametrize("error", [OSError("storage is away"), KeyError("nobody thought of it")])
def test_one_look_that_fails_does_not_end_the_watch(monkeypatch, error):
    monkeypatch.setattr("serving.supervision.PERIOD_SECONDS", 0.01)
    supervisor, stop, looks = Supervisor("state", LearnerConfig(), 1), threading.Event(), []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            raise error
        stop.set()

    monkeypatch.setattr(supervisor, "look", look)
    supervisor.watch(stop)
    assert looks == [0, 1]
