"""The near-line learner on several workers: each trains on its part of a micro-batch, and all stay equal to the bit.

The first worker is the learner's own process. It alone judges, publishes and pushes; the others do what it does,
beside it. Gradients are summed over all of them (lib/model/distributed.py), so that they learn what one would. A worker
that dies takes the others with it, and the learner that Ray starts again continues from the registry; one at which
learning raised leaves its traceback in the store where they met, so that a kill is told from an error.
"""

import logging
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as distributed
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lib.errors import InputError
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.model.distributed import require_equal
from lib.model.trainer import keep_freed_memory
from lib.versions.registry import Registry

logger = logging.getLogger(__name__)
NICENESS = 10  # below the replicas, and still moving when they take all of the cores
PATIENCE = timedelta(minutes=5)  # with a worker that hangs; one that dies is known at once
LOOPBACK = "127.0.0.1"
ERROR = "error"  # of a worker, in the store where all meet
GLOO = "gloo"  # in the message of an error that only says that another worker is gone


class WorkerKilled(RuntimeError):
    """A worker ended without an error of its own."""


def yield_to_replicas() -> None:
    """Lower priority and one thread, for the process's life."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    keep_freed_memory()


class LearnerWorkers:
    """A NearlineLearner (`first`) and the workers beside it; one worker is that learner and nothing else."""

    def __init__(
        self,
        state: str,
        config: LearnerConfig,
        when_storage_fails: Callable[[OSError], None] | None = None,
        workers: int = 1,
    ):
        self.others: list[ActorHandle] = []
        self.meeting: TCPStore | None = None
        if workers > 1:
            host = get_node_ip_address()
            store = self.meeting = TCPStore(host, 0, workers, is_master=True, wait_for_workers=False)
            other: Any = ray.remote(LearnerWorker).options(num_cpus=0.5)
            places = [(host, store.port, rank, workers) for rank in range(1, workers)]
            self.others = [other.remote(state, config, place) for place in places]
            joined = [each.join.remote() for each in self.others]
            _join(host, store, 0, workers)
            ray.get(joined)
        loaded = [each.load.remote() for each in self.others]
        self.first = NearlineLearner(Registry.of(state), config, when_storage_fails)
        ray.get(loaded)
        self._together("agree")

    def learn(self, batch: MicroBatch) -> Delta | Rejection:
        """Learn a micro-batch by all workers (NearlineLearner.learn)."""
        return self._together("learn", batch, seen_by_others=replace(batch, held_out=[]))

    def set_aside(self, batch: MicroBatch, traceback: str) -> Rejection:
        """Set a micro-batch aside by all workers (NearlineLearner.set_aside)."""
        return self._together("set_aside", batch, traceback)

    def set_aside_change(self, what: str, traceback: str, item_revision: int | None = None) -> Rejection:
        """Set a change aside by all workers (NearlineLearner.set_aside_change)."""
        return self._together("set_aside_change", what, traceback, item_revision)

    def change_items(self, changes: Sequence[ItemChange]) -> Delta | None:
        """Change items by all workers (NearlineLearner.change_items)."""
        return self._together("change_items", changes)

    def store_whole(self) -> Delta:
        """Store a version whole by all workers (NearlineLearner.store_whole)."""
        return self._together("store_whole")

    def restore(self, version: int) -> Delta | None:
        """Restore a version by all workers (NearlineLearner.restore).

        Raises:
            InputError: the version is not stored.
        """
        return self._together("restore", version)

    def take_over(self, name: str) -> None:
        """Take an offered model over by all workers (NearlineLearner.take_over).

        Raises:
            InputError: the model is damaged, or describes its items differently.
        """
        self._together("take_over", name)

    def _together(self, method: str, *arguments: Any, seen_by_others: Any = None) -> Any:
        if not self.others:
            return _do(self.first, method, *arguments)
        given = [ray.put(each) for each in (arguments if seen_by_others is None else (seen_by_others,))]
        calls = [other.do.remote(method, *given) for other in self.others]
        try:
            outcome = _do(self.first, method, *arguments)
            ray.get(calls)
        except InputError:  # the others have the same; after any other error they wait in vain
            ray.get(calls)
            raise
        except (RuntimeError, RayError) as error:
            if not _another_is_gone(error):
                raise
            raise self._reason_of_end() from error
        return outcome

    def _reason_of_end(self) -> RuntimeError:
        """Return what a worker that is gone has said, or that it said nothing."""
        assert self.meeting is not None
        if self.meeting.check([ERROR]):
            return RuntimeError(f"a worker of the learner raised:\n{self.meeting.get(ERROR).decode()}")
        return WorkerKilled("a worker of the learner was killed")


class LearnerWorker:
    """The actor of each worker but the first."""

    def __init__(self, state: str, config: LearnerConfig, place: tuple[str, int, int, int]):
        self.state = state
        self.config = config
        self.place = place
        yield_to_replicas()

    def join(self) -> None:
        """Meet the other workers."""
        host, port, rank, workers = self.place
        self.meeting = TCPStore(host, port, workers, is_master=False)
        _join(host, self.meeting, rank, workers)

    def load(self) -> None:
        """Load the newest version."""
        self.learner = NearlineLearner(Registry.of(self.state), self.config)

    def do(self, method: str, *arguments: Any) -> None:
        """Do what rank 0 does now; the others cannot go on without this worker, so an error ends the process."""
        try:
            _do(self.learner, method, *arguments)
        except InputError:
            return  # the first worker has the same, and answers it
        except Exception as error:
            said = traceback.format_exc()
            logger.error("a worker of the learner ends:\n%s", said)
            if not _another_is_gone(error):
                self.meeting.set(ERROR, said)
                self.meeting.get(ERROR)  # so that it is there before this process is not
            os._exit(1)


def _another_is_gone(error: Exception) -> bool:
    """Return whether an error only says that another worker has ended."""
    return isinstance(error, RayError) or (isinstance(error, RuntimeError) and GLOO in str(error).lower())


def _do(learner: NearlineLearner, method: str, *arguments: Any) -> Any:
    if method == "agree":
        return require_equal(learner.model.checksum)
    return getattr(learner, method)(*arguments)


def _join(host: str, store: TCPStore, rank: int, workers: int) -> None:
    if host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it listens on whatever the machine's name stands for
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=PATIENCE)
