"""The feedback log on Kafka: a topic is the log, and a SQLite file beside the aggregator is a copy to read it from.

Notable features:

- A partition is a shard. A message is the events of one append, so they stay together; it is acknowledged once all
  in-sync replicas of the partition have it (acks=all, an idempotent producer).
- Offsets are no field of a message: they number the distinct events of the partition in its order, from 1 and without
  gaps. Whoever reads the same messages gives the same offsets, so a lost copy is made again and nothing depends on it.
- Duplicates are found in the copy before they are sent, and once more where messages are read, so also what came twice
  (a message that was written although its acknowledgement was lost) counts once.
- After a failed write the copy takes over what the partition really holds before anything else is written; so it does
  where another writer has put a message in between. The next append then tells of those events.

The topic must keep its messages: retention.ms=-1, retention.bytes=-1, no compaction. A missing message is noticed. One
of another program is passed over, and said; it has no offsets.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import parse_qsl, urlsplit

import orjson

from lib.data.events import EVENT_FIELDS, Event
from lib.errors import InputError
from lib.log.errors import LogWriteError
from lib.log.log_file import INT64_MAX, LoggedEvent, Row, event_of, insert_rows, row_of
from lib.log.shard import Shard
from lib.log.store import AppendResult, PassedOver, SqliteStore

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
except ImportError as error:
    raise InputError("log: Kafka needs confluent-kafka; pip install 'afterclick[kafka]'") from error

logger = logging.getLogger(__name__)
LARGEST_MESSAGE = 16 << 20  # bytes before compression; the broker's own limit is of what is left after it
MESSAGES_AT_ONCE = 1_000
ABSENT = {field.name: None for field in EVENT_FIELDS if field.optional}  # what a message may leave out
PASSED_OVER = "CREATE TABLE IF NOT EXISTS passed_over(place INTEGER PRIMARY KEY, reason TEXT NOT NULL)"
FOREIGN_MESSAGES = "CREATE TABLE IF NOT EXISTS foreign_messages(count INTEGER NOT NULL)"
POSITION = "CREATE TABLE IF NOT EXISTS position(next INTEGER NOT NULL)"  # of the partition's messages, from 0

# a copy that an earlier release made has a row for each
COUNT_FOREIGN = """
INSERT INTO foreign_messages SELECT (SELECT COUNT(*) FROM passed_over) WHERE NOT EXISTS (SELECT 1 FROM foreign_messages)
"""
FORGET_OLDEST = "DELETE FROM passed_over WHERE place NOT IN (SELECT place FROM passed_over ORDER BY place DESC LIMIT ?)"
FOREIGN_KEPT = 10  # messages of other programs of which is kept why they are no feedback, the newest; all are counted
LONGEST_REASON = 500  # characters


class BrokersAway(InputError):
    """The brokers cannot be reached; the message names their address."""


@dataclass(frozen=True)
class Topic:
    """Where the log is: the topic, how to reach its brokers, and what to call it in a message."""

    name: str
    location: str
    settings: dict[str, str]

    @classmethod
    def of(cls, location: str) -> "Topic":
        """Read kafka://host:port[,host:port]/topic[?setting=value&...]; the settings are librdkafka's.

        Raises:
            InputError: it is no such location.
        """
        parts = urlsplit(location)
        name = parts.path.strip("/")
        if parts.scheme != "kafka" or not parts.netloc or not name or "/" in name:
            raise InputError(f"log: {location} must be kafka://host:port/topic, or sqlite")
        settings = {"bootstrap.servers": parts.netloc, **dict(parse_qsl(parts.query))}
        return cls(name, location.partition("?")[0], settings)

    def check(self, partitions: int, timeout: float) -> None:
        """Refuse a topic that cannot be reached, or that has fewer partitions than there are shards.

        Raises:
            InputError: the message says why, and what to do; BrokersAway where it cannot be reached.
        """
        with self.reading(timeout) as consumer:
            found = consumer.list_topics(self.name, timeout=timeout).topics[self.name]
        if found.error is not None and found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise InputError(
                f"log: {self.location} does not exist; make the topic with {partitions} partitions and retention.ms=-1"
            )
        if found.error is not None:
            raise InputError(f"log: {self.location} cannot be used: {found.error.str()}")
        if len(found.partitions) < partitions:
            raise InputError(
                f"log: {self.location} has {len(found.partitions)} partitions, and {partitions} aggregators need "
                "one each; use fewer aggregators, or another topic"
            )

    @contextmanager
    def reading(self, timeout: float) -> Iterator[Consumer]:
        """Open a consumer for the length of a block.

        Raises:
            BrokersAway: they do not answer.
        """
        own = {"group.id": "afterclick", "enable.auto.commit": False, "auto.offset.reset": "error", "log_level": 2}
        try:
            with closing(Consumer(self.settings | own)) as consumer:
                yield consumer
        except KafkaException as error:
            if error.args[0].code() == KafkaError._INVALID_ARG:
                raise InputError(f"log: {self.location} has a wrong setting: {error.args[0].str()}") from error
            raise BrokersAway(
                f"log: {self.location} cannot be reached within {timeout:g} s ({error.args[0].str()}); "
                "start its brokers, or correct the address"
            ) from error

    def producer(self, timeout: float) -> Producer:
        """Make a producer whose acknowledged messages are durable; a message fails after `timeout` seconds."""
        usual = {"message.max.bytes": LARGEST_MESSAGE, "compression.type": "lz4", "linger.ms": 0}
        promised = {"acks": "all", "enable.idempotence": True, "message.timeout.ms": int(timeout * 1000)}
        return Producer(usual | self.settings | promised)


class _Message(NamedTuple):
    place: int  # in the partition
    rows: list[Row]  # of its events
    received_at: int
    foreign: str | None = None  # why it is no feedback, so that it has no rows


class KafkaStore:
    """The log of one shard in a partition of a topic, with its copy in a SQLite file.

    Args:
        location: of the topic, as Topic reads it.
        shard: whose log it is; its number is the partition's.
        copy: the file.
        wait_for_lock: see SqliteStore.
        wait_for_brokers: wait for those that are away.
        timeout: seconds that a write may take until it fails.

    Raises:
        BrokersAway: the topic cannot be reached.
        InputError: it cannot be used; LogLocked and LogCorrupt as SqliteStore raises them.
    """

    def __init__(
        self,
        location: str,
        shard: Shard,
        copy: Path,
        *,
        wait_for_lock: float = 0.0,
        wait_for_brokers: bool = False,
        timeout: float = 10.0,
    ) -> None:
        self.topic = Topic.of(location)
        self.name = self.topic.location
        self.path = copy
        self.torn = False  # a torn commit of a copy is read again
        self.commits = 0
        self.passed_over = PassedOver()
        self.shard = shard
        self.timeout = timeout
        self._others: list[LoggedEvent] = []  # taken over and not yet told of
        _patiently(lambda: self.topic.check(shard.count, timeout), wait_for_brokers)
        # a power loss may take the newest commits of a copy, which are read again
        self.copy = SqliteStore(copy, wait_for_lock=wait_for_lock, synchronous="NORMAL")
        try:
            self._rows(PASSED_OVER)
            self._rows(FOREIGN_MESSAGES)
            self._rows(COUNT_FOREIGN)
            self._rows(POSITION)
            self._rows("INSERT INTO position SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM position)")
            _patiently(self._catch_up, wait_for_brokers)
            self._others.clear()  # they are in the log that is opened
            self.passed_over = self._passed_over()
            self._producer: Producer | None = self.topic.producer(timeout)
        except BaseException:
            self.copy.close()
            raise

    def erase(self, user_id: str) -> int:
        """Refuse: what a topic has taken in stays in it.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"log: {self.name} cannot forget a user, as a topic keeps its messages; where users must be erased, "
            "keep the log in SQLite (--log sqlite)"
        )

    def close(self) -> None:
        """Close the copy and the connections."""
        self.copy.close()
        self._producer = None

    def append(self, batches: Sequence[list[Row]]) -> list[AppendResult | Exception]:
        """Send each batch as a message, and write into the copy what the partition then holds."""
        if self._producer is None:  # an earlier write failed, and what became of it is not known
            self._catch_up()
            self._producer = self.topic.producer(self.timeout)
        producer, self._producer = self._producer, None
        new = [[row for row in rows if not self._holds(row)] for rows in batches]
        received_at = time.time_ns() // 1_000_000
        places, failures = self._send(producer, new, received_at)
        sent = sorted(_Message(place, new[index], received_at) for index, place in places.items())
        follow = [message.place for message in sent] == list(range(self._position(), self._position() + len(sent)))
        offsets = self._store(sent) if follow else self._catch_up()
        if not failures:
            self._producer = producer
        self.commits += len(sent) > 0
        own = {offset for place in places.values() for offset in offsets[place]}
        self._others = [other for other in self._others if other.offset not in own]
        results: list[AppendResult | Exception] = []
        for index, (rows, new_rows) in enumerate(zip(batches, new, strict=True)):
            given = offsets[places[index]] if index in places else []
            results.append(failures[index] if index in failures else _result(rows, new_rows, given))
        self._tell_of_others([result for result in results if isinstance(result, AppendResult)])
        return results

    def _tell_of_others(self, results: list[AppendResult]) -> None:
        """Put each event that came another way into the result that follows it, or into the last one."""
        for result in results:
            last = max((offset for offset in result.offsets if offset is not None), default=0)
            before = [other for other in self._others if other.offset < last]
            result.others.extend(self._others if result is results[-1] else before)
            del self._others[: len(result.others)]

    def _send(
        self, producer: Producer, new: list[list[Row]], received_at: int
    ) -> tuple[dict[int, int], dict[int, Exception]]:
        """Send each batch of rows as a message; return by its index its place in the partition, or its failure."""
        places: dict[int, int] = {}
        failures: dict[int, Exception] = {}

        def fail(index: int, error: KafkaError) -> None:
            failures[index] = LogWriteError(f"feedback log {self.name} could not be written: {error.str()}")

        def delivered(index: int, error: KafkaError | None, message: Message) -> None:
            if error is not None:
                fail(index, error)
            else:
                places[index] = cast("int", message.offset())

        for index, rows in enumerate(new):
            if not rows:
                continue
            try:
                producer.produce(
                    self.topic.name,
                    self._encoded(rows, received_at),
                    partition=self.shard.number,
                    on_delivery=partial(delivered, index),
                )
            except KafkaException as error:
                fail(index, error.args[0])
        producer.flush()  # each message is delivered or has failed after the timeout
        return places, failures

    def _encoded(self, rows: list[Row], received_at: int) -> bytes:
        events = [{name: value for name, value in event_of(row)._asdict().items() if value is not None} for row in rows]
        shard = [self.shard.number, self.shard.count]
        return orjson.dumps({"shard": shard, "received_at": received_at, "events": events})

    def _decoded(self, message: Message) -> _Message:
        place, error = cast("int", message.offset()), message.error()
        if error is not None:
            raise KafkaException(error)
        try:
            fields = orjson.loads(message.value() or b"")
            count, received_at = fields["shard"][1], int(fields["received_at"])
            if abs(received_at) > INT64_MAX:
                raise ValueError(f"received_at {received_at} is no time")
            rows = [row_of(index, Event(**ABSENT | event)) for index, event in enumerate(fields["events"])]
        except (ValueError, TypeError, LookupError) as error:
            said = repr(error)[:LONGEST_REASON]  # it may quote the message
            reason = f"message {place} in partition {self.shard.number} of {self.name} is no feedback ({said})"
            logger.error("%s and is passed over", reason)
            return _Message(place, [], 0, f"{reason} and is passed over; use a topic of its own")
        if count != self.shard.count:
            raise InputError(f"log: {self.name} was written by {count} aggregators; start with --aggregators {count}")
        return _Message(place, rows, received_at)

    def _catch_up(self) -> dict[int, list[int | None]]:
        """Write into the copy what the partition holds beyond it; return the offsets of each message by its place."""
        offsets: dict[int, list[int | None]] = {}
        position = self._position()
        with self.topic.reading(self.timeout) as consumer:
            partition = TopicPartition(self.topic.name, self.shard.number, position)
            end = self._end(consumer.get_watermark_offsets(partition, timeout=self.timeout), position)
            consumer.assign([partition])
            while position < end:
                messages = consumer.consume(min(MESSAGES_AT_ONCE, end - position), self.timeout)
                if not messages:
                    raise BrokersAway(f"log: {self.name} gave no message within {self.timeout:g} s; see to its brokers")
                read = [self._decoded(message) for message in messages]
                offsets |= self._store(read)
                for place, rows, received_at, _ in read:
                    given = zip(offsets[place], rows, strict=True)
                    self._others += [LoggedEvent(o, event_of(row), received_at) for o, row in given if o is not None]
                position = read[-1].place + 1
        return offsets

    def _end(self, watermarks: tuple[int, int] | None, position: int) -> int:
        """Return where the partition ends, once it is known to hold everything that the copy lacks."""
        if watermarks is None:
            raise BrokersAway(f"log: {self.name} did not answer within {self.timeout:g} s; see to its brokers")
        first, end = watermarks
        if first > position:
            raise InputError(
                f"log: messages {position} to {first - 1} in partition {self.shard.number} of {self.name} are gone; "
                "restore the topic, and set its retention.ms and retention.bytes to -1"
            )
        if end < position:
            raise InputError(
                f"log: partition {self.shard.number} of {self.name} ends at message {end}, and {self.path} has read "
                f"{position}; restore the topic, or begin another folder with --state"
            )
        return end

    def _store(self, messages: Sequence[_Message]) -> dict[int, list[int | None]]:
        """Write the events of messages into the copy; return the offsets of each message by its place."""
        if not messages:
            return {}
        with self.copy.database.transaction() as connection:
            offsets = insert_rows(connection, [(message.rows, message.received_at) for message in messages])
            foreign = [(message.place, message.foreign) for message in messages if message.foreign is not None]
            if foreign:
                connection.executemany("INSERT INTO passed_over VALUES(?, ?)", foreign[-FOREIGN_KEPT:])
                connection.execute("UPDATE foreign_messages SET count = count + ?", (len(foreign),))
                connection.execute(FORGET_OLDEST, (FOREIGN_KEPT,))
            connection.execute("UPDATE position SET next = ?", (messages[-1].place + 1,))
        if foreign:
            self.passed_over = self._passed_over()
        return {message.place: given for message, given in zip(messages, offsets, strict=True)}

    def _passed_over(self) -> PassedOver:
        [(count,)] = self._rows("SELECT count FROM foreign_messages")
        newest = self._rows("SELECT reason FROM passed_over ORDER BY place")
        return PassedOver(count, tuple(reason for (reason,) in newest[-FOREIGN_KEPT:]))

    def _position(self) -> int:
        return self._rows("SELECT next FROM position")[0][0]

    def _holds(self, row: Row) -> bool:
        return bool(self._rows("SELECT 1 FROM events WHERE key = ?", row[0]))

    def _rows(self, statement: str, *parameters: object) -> list[tuple]:
        # on the writer's own connection and thread: an error is one of writing, which says whether the disk is full
        return self.copy.database.connection.execute(statement, parameters).fetchall()


def _patiently(call: Callable[[], object], wait: bool) -> None:
    """Call again as long as the brokers are away, if it is to wait for them."""
    while True:
        try:
            call()
            return
        except BrokersAway as error:
            if not wait:
                raise
            logger.warning("waiting for the brokers: %s", error)


def _result(rows: list[Row], new: list[Row], offsets: list[int | None]) -> AppendResult:
    """Return the offsets of all rows of a batch from those of its new ones; the others are duplicates."""
    given = iter(offsets)
    sent = {id(row) for row in new}
    return AppendResult([next(given) if id(row) in sent else None for row in rows])
