"""The feedback log in shards: which of them a user belongs to, and how the log of a state folder was split.

All events of a user are in one shard, so that their order, their duplicates and the user's history need no other. The
number of shards therefore stays what it was when the first event came.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

from lib.errors import InputError
from lib.log.feedback import FeedbackLog, FeedbackLogReader, LogWriteError
from lib.log.order import LogOrder, ShardedLogReader

SQLITE = "sqlite"  # the log is a file in the state folder
LOG_FILE = "feedback.sqlite"
COPY_FILE = "kafka-copy.sqlite"  # of a log on Kafka
ORDER_FILE = "order.sqlite"  # of the events of several shards
LOCK_SECONDS = 30.0  # a restarted aggregator can overlap for a moment with the one that is dying
COPY_HINT = "it is a copy of {}: delete it, and it is made again"
KAFKA_SECONDS = 10.0  # to wait for its brokers at the start
RECORD = "log.json"  # in the state folder, where the log is not one SQLite file
LogReader = FeedbackLogReader | ShardedLogReader


class PartlyWritten(LogWriteError):
    """The log of one shard could not be written, and another one was."""


@dataclass(frozen=True)
class Shard:
    """One of `count` shards, numbered from 0."""

    number: int = 0
    count: int = 1

    def named(self, name: str) -> str:
        """A name of the shard's own, "log.db" -> "log-2.db"; the only shard has the name as it is."""
        if self.count == 1:
            return name
        path = Path(name)
        return f"{path.stem}-{self.number}{path.suffix}"

    def has(self, user_id: str) -> bool:
        """Whether the events of a user belong to this shard."""
        return shard_of(user_id, self.count) == self.number


ONLY = Shard()


def shard_of(user_id: str, count: int) -> int:
    """The number of a user's shard: the same in every process and on every machine, for good."""
    if count == 1:
        return 0
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "big") % count


@dataclass(frozen=True)
class LogLayout:
    """Where the feedback log is, and in how many shards."""

    aggregators: int = 1
    log: str = SQLITE  # or kafka://host:port[,host:port]/topic[?setting=value&...]

    def shards(self) -> list[Shard]:
        """All of them."""
        return [Shard(number, self.aggregators) for number in range(self.aggregators)]

    def files(self, state: str | Path) -> list[Path]:
        """The files from which the logs of the shards are read."""
        name = LOG_FILE if self.log == SQLITE else COPY_FILE
        return [Path(state, shard.named(name)) for shard in self.shards()]

    def open(self, state: str | Path, shard: Shard) -> FeedbackLog:
        """The log of a shard, to write; waits for a dying writer's lock, and for brokers that are away.

        Raises:
            InputError: it cannot be opened.
        """
        path = self.files(state)[shard.number]
        if self.log == SQLITE:
            return FeedbackLog(path, wait_for_lock=LOCK_SECONDS)
        from lib.log.kafka import KafkaLog  # its package is optional

        return KafkaLog(self.log, shard, path, wait_for_lock=LOCK_SECONDS, wait_for_brokers=True)

    @classmethod
    def of(cls, state: str | Path) -> "LogLayout":
        """The layout that a state folder was made with; the default where it holds no record.

        Raises:
            InputError: the record is damaged.
        """
        path = Path(state, RECORD)
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise InputError(f"state: {path} is damaged ({error}); restore it from a copy") from error

    def check(self, state: str | Path) -> None:
        """Refuse another layout than the state folder's, and a topic that cannot be used.

        Raises:
            InputError: it names the argument and how to go on.
        """
        made = self.of(state)
        if made == LogLayout() and not Path(state, LOG_FILE).exists():
            made = self  # no event has come yet
        others = {"aggregators": made.aggregators != self.aggregators, "log": made._topic != self._topic}
        for name in (name for name, other in others.items() if other):
            then, now = getattr(made, name), getattr(self._public, name)
            raise InputError(
                f"{name}: the feedback log in {state} was made with {then}, not {now}; "
                f"start with --{name} {then}, or begin another folder with --state"
            )
        if self.log != SQLITE:
            from lib.log.kafka import Topic

            Topic.of(self.log).check(self.aggregators, KAFKA_SECONDS)

    @property
    def _topic(self) -> str:
        """What tells two logs apart: brokers may move."""
        return self._public.log.rpartition("/")[2]

    @property
    def _public(self) -> "LogLayout":
        """The same without settings of the log's client, among which may be a password."""
        return replace(self, log=self.log.partition("?")[0])

    def record(self, state: str | Path) -> None:
        """Have the state folder remember this layout, durably, before the first event comes."""
        path = Path(state, RECORD)
        if self == LogLayout() or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.aggregators > 1:
            LogOrder.create(path.with_name(ORDER_FILE))
        unfinished = path.with_name(f".{RECORD}.{os.getpid()}")
        with unfinished.open("w") as file:
            json.dump(asdict(self._public), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_log(state: str | Path) -> LogReader:
    """The feedback log of a state folder, to read beside whoever writes it.

    Raises:
        InputError: there is none, or it is damaged.
    """
    layout = LogLayout.of(state)
    logs = [FeedbackLogReader(path) for path in layout.files(state)]
    return logs[0] if layout.aggregators == 1 else ShardedLogReader(logs, LogOrder(Path(state, ORDER_FILE)))
