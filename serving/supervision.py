"""Supervision of the actors: what Ray does not restart by itself.

Ray starts a process again that ended. It does not notice one that hangs, and gives up an actor that was killed for
good. Replicas start such an aggregator anew when they next call it; the learner, which nobody calls, is started here.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from lib.live.settings import LearnerConfig
from lib.log.layout import LogLayout
from serving.aggregator import aggregator_handle
from serving.learner import start_learner

logger = logging.getLogger(__name__)
PERIOD_SECONDS = 1.0


class Question(NamedTuple):
    """Whether an actor is alive, as it was asked."""

    answer: ray.ObjectRef
    asked: float  # seconds of a monotonic clock


class Supervisor:
    """Asks the learner and the aggregators of a state folder whether they are alive."""

    def __init__(self, state: str, config: LearnerConfig, workers: int):
        self.state = state
        self.config = config
        self.workers = workers
        self.questions: dict[ActorHandle, Question] = {}  # that are not answered yet
        self.patience: dict[ActorHandle, float] = {}  # with those that were ended: starting takes a while

    def watch(self, stop: threading.Event) -> None:
        """Look after the actors until the event is set."""
        while not stop.wait(PERIOD_SECONDS):
            try:
                self.look()
            except (RayError, ValueError, OSError) as error:  # of a cluster, or a storage, that is away
                logger.warning("the actors cannot be looked after now: %s", error)
            except Exception:  # whatever it is, the watch must not end
                logger.exception("the actors cannot be looked after now")

    def look(self) -> None:
        """Start a learner where none is, ask who was not asked, and end who has not answered for too long."""
        learner = start_learner(self.state, self.config, self.workers)
        actors = {learner, *self._aggregators()}
        now = time.monotonic()
        for actor in actors - self.questions.keys():
            self.questions[actor] = Question(actor.ping.remote(), now)
        for actor, question in list(self.questions.items()):
            answered = ray.wait([question.answer], timeout=0)[0]
            patience = self.patience.get(actor, self.config.stalled_seconds)
            if answered or actor not in actors:
                del self.questions[actor]
                self.patience.pop(actor, None)
            elif now - question.asked > patience:
                logger.error("%s has not answered for %d s and is started again", actor, now - question.asked)
                ray.kill(actor, no_restart=False)
                del self.questions[actor]
                self.patience[actor] = 2 * patience

    def _aggregators(self) -> Iterator[ActorHandle]:
        for shard in LogLayout.of(self.state).shards():
            try:
                yield aggregator_handle(shard)
            except ValueError:  # a replica starts it
                continue


@contextmanager
def supervised(state: str, config: LearnerConfig, workers: int) -> Iterator[None]:
    """Look after the actors for the length of a block."""
    stop = threading.Event()
    watching = threading.Thread(target=Supervisor(state, config, workers).watch, args=(stop,), daemon=True)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join(PERIOD_SECONDS)
