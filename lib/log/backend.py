"""Where a feedback log can be kept: in a file of the state folder, or in a topic on Kafka."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib.log.errors import LogCorrupt
from lib.log.feedback import FeedbackLog
from lib.log.shard import Shard

SQLITE = "sqlite"  # the location of a log in the state folder
LOG_FILE = "feedback.sqlite"
COPY_FILE = "kafka-copy.sqlite"
LOCK_SECONDS = 30.0  # a restarted aggregator can overlap for a moment with the one that is dying
KAFKA_SECONDS = 10.0  # to wait for the brokers at the start


class LogBackend(Protocol):
    """What a layout needs to know of how its log is kept."""

    @property
    def location(self) -> str:
        """Where the log is, without settings of a client, among which may be a password."""
        ...

    @property
    def identity(self) -> str:
        """What tells two logs apart."""
        ...

    @property
    def file(self) -> str:
        """Name of the file in the state folder that the log is read from."""
        ...

    @property
    def is_copy(self) -> bool:
        """Whether that file is a copy, which may be behind until an aggregator opens it."""
        ...

    @property
    def remedy(self) -> str:
        """What is added to the message that the file is damaged."""
        ...

    def check(self, shards: int) -> None:
        """Refuse a log that cannot be used.

        Raises:
            InputError: it says why, and what to do.
        """
        ...

    def open(self, path: Path, shard: Shard) -> FeedbackLog:
        """Open the log of a shard, with its file at `path`, to write.

        Raises:
            InputError: it cannot be opened.
        """
        ...


@dataclass(frozen=True)
class SqliteBackend:
    """A file in the state folder."""

    location = identity = SQLITE
    file = LOG_FILE
    is_copy = False
    remedy = ""

    def check(self, shards: int) -> None:
        """Refuse nothing: any number of shards can be made."""

    def open(self, path: Path, shard: Shard) -> FeedbackLog:
        """Open the log of a shard; wait for the lock of a dying writer."""
        return FeedbackLog.open(path, wait_for_lock=LOCK_SECONDS)


@dataclass(frozen=True)
class KafkaBackend:
    """A topic with a partition for each shard, and a copy of each in the state folder."""

    address: str  # kafka://host:port[,host:port]/topic[?setting=value&...]

    file = COPY_FILE
    is_copy = True

    @property
    def location(self) -> str:
        """The address without settings."""
        return self.address.partition("?")[0]

    @property
    def identity(self) -> str:
        """The topic alone: its brokers may move."""
        return self.location.rpartition("/")[2]

    @property
    def remedy(self) -> str:
        """That the copy can be deleted."""
        return f"; it is a copy of {self.location}: delete it, and it is made again"

    def check(self, shards: int) -> None:
        """Refuse a topic that cannot be reached, or that has too few partitions."""
        from lib.log.kafka import Topic  # its package is optional

        Topic.of(self.address).check(shards, KAFKA_SECONDS)

    def open(self, path: Path, shard: Shard) -> FeedbackLog:
        """Open the log of a shard; wait for the lock of a dying writer, and for brokers that are away."""
        from lib.log.kafka import KafkaStore

        try:
            store = KafkaStore(self.address, shard, path, wait_for_lock=LOCK_SECONDS, wait_for_brokers=True)
        except LogCorrupt as error:
            raise LogCorrupt(f"{error}{self.remedy}") from error
        return FeedbackLog(store)


def backend_of(location: str) -> LogBackend:
    """Return what keeps the log at a location: sqlite, or the address of a topic."""
    return SqliteBackend() if location == SQLITE else KafkaBackend(location)
