"""What the feedback log has of its own on Kafka; the promises that it shares are in test_feedback.py."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer

from cluster.local import free_port
from lib.errors import InputError
from lib.log.errors import LogWriteError
from lib.log.feedback import FeedbackLog
from lib.log.integrity import check_ends, check_log
from lib.log.kafka import FOREIGN_KEPT, BrokersAway, KafkaStore, Topic
from lib.log.layout import LogLayout
from lib.log.shard import ONLY, Shard
from lib.log.store import AppendResult
from serving.aggregator import Aggregator
from tests.helpers.logs import ROOT, hold_the_writer, make_event, wait_until


def kafka_log(location: str, shard: Shard, copy: Path, timeout: float = 10.0) -> FeedbackLog:
    return FeedbackLog(KafkaStore(location, shard, copy, timeout=timeout))


@pytest.fixture
def log(kafka_topic: str, tmp_path: Path) -> Iterator[FeedbackLog]:
    with kafka_log(kafka_topic, ONLY, tmp_path / "copy") as log:
        yield log


def everything(log: FeedbackLog) -> list[tuple[int, str, int]]:
    return [(logged.offset, logged.event.item_id, logged.received_at) for logged in log.replay()]


# ---------------------------------------------------------------------------------------------------- where the log is


@pytest.mark.parametrize("location", ["kafka", "kafka://", "kafka://host:9092", "kafka://h/a/b", "redis://h/topic", ""])
def test_what_is_no_location_is_refused(location):
    with pytest.raises(InputError, match=r"^log: .* must be kafka://host:port/topic, or sqlite$"):
        LogLayout(log=location).check("absent")


def test_a_location_holds_settings_of_the_client():
    topic = Topic.of("kafka://a:1,b:2/events?security.protocol=SASL_SSL&sasl.password=se%26cret")
    assert (topic.name, topic.location) == ("events", "kafka://a:1,b:2/events")
    assert topic.settings == {
        "bootstrap.servers": "a:1,b:2",
        "security.protocol": "SASL_SSL",
        "sasl.password": "se&cret",
    }


def test_brokers_that_do_not_answer_are_bad_input(tmp_path):
    location = f"kafka://127.0.0.1:{free_port()}/events"
    with pytest.raises(BrokersAway, match=rf"^log: {location} cannot be reached within 0\.3 s .*; start its brokers"):
        kafka_log(f"{location}?sasl.password=secret", ONLY, tmp_path / "copy", timeout=0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_bad_input(kafka_topic):
    with pytest.raises(InputError, match=r"has a wrong setting: .*sasl\.pass"):
        LogLayout(log=f"{kafka_topic}?sasl.pass=secret").check("absent")


def test_each_shard_needs_a_partition(kafka_topic):
    LogLayout(4, kafka_topic).check("absent")
    with pytest.raises(InputError, match="has 4 partitions, and 5 aggregators need one each"):
        LogLayout(5, kafka_topic).check("absent")


def test_a_state_folder_remembers_the_topic_and_no_password(kafka_topic, tmp_path):
    layout = LogLayout(2, f"{kafka_topic}?client.id=shop&sasl.password=secret")
    layout.begin(tmp_path)
    layout.check(tmp_path)
    assert "secret" not in (tmp_path / "log.json").read_text()
    moved = LogLayout(2, kafka_topic.replace("kafka://", "kafka://127.0.0.1:1,"))
    moved.check(tmp_path)
    with pytest.raises(InputError, match=rf"^log: .* made with {kafka_topic}, not sqlite; start with --log kafka://"):
        LogLayout(2).check(tmp_path)


# ------------------------------------------------------------------------------------------------- topic, copy, offsets


def test_a_lost_copy_is_made_again_with_the_same_offsets(log, kafka_topic, tmp_path):
    for start in range(0, 60, 6):
        log.append([make_event(number, user=f"user-{number % 7}") for number in range(start, start + 9)]).result()
    expected = everything(log)
    assert [offset for offset, _, _ in expected] == list(range(1, 64))
    with kafka_log(kafka_topic, ONLY, tmp_path / "another") as again:
        assert everything(again) == expected
        assert again.append([make_event(7, user="user-0"), make_event(70)]).result() == AppendResult([None, 64])


def test_a_damaged_copy_says_that_it_can_be_deleted(log, kafka_topic, tmp_path):
    (tmp_path / "kafka-copy.sqlite").write_bytes(b"no database")
    with pytest.raises(InputError, match=rf"it is a copy of {kafka_topic}: delete it"):
        LogLayout(log=kafka_topic).open(tmp_path, ONLY)


def test_a_damaged_copy_is_found_before_anything_starts(log, kafka_topic, tmp_path):
    LogLayout(log=kafka_topic).begin(tmp_path)
    check_log(tmp_path, 5)
    (tmp_path / "kafka-copy.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=rf"kafka-copy\.sqlite is damaged .* it is a copy of {kafka_topic}: delete it"):
        check_log(tmp_path, 0)
    with pytest.raises(InputError, match=r"kafka-copy\.sqlite ends at offset 2, but versions in .* learned up to 3"):
        check_ends(tmp_path, 3, [2])


def test_two_writers_number_the_events_alike(log, kafka_topic, tmp_path):
    """A restarted aggregator on another machine, while the one before it is not yet dead."""
    with kafka_log(kafka_topic, ONLY, tmp_path / "other") as other:
        assert log.append([make_event(1), make_event(2)]).result() == AppendResult([1, 2])
        assert other.append([make_event(2), make_event(3)]).result() == AppendResult([None, 3])
        assert log.append([make_event(3), make_event(4), make_event(1)]).result() == AppendResult([None, 4, None])
        assert other.append([make_event(5)]).result() == AppendResult([5])
        assert everything(other)[:4] == everything(log)
        late = log.append([make_event(2), make_event(6)]).result()
        assert (late.offsets, [entry.event for entry in late.others]) == ([None, 6], [make_event(5)])
        assert [item for _, item, _ in everything(other)] == [f"item-{number}" for number in range(1, 6)]


def test_partitions_are_logs_of_their_own(kafka_topic, tmp_path):
    first, second = (kafka_log(kafka_topic, Shard(n, 2), tmp_path / f"copy-{n}") for n in range(2))
    with first, second:
        assert first.append([make_event(1)]).result() == second.append([make_event(1)]).result() == AppendResult([1])
    with pytest.raises(InputError, match="was written by 2 aggregators; start with --aggregators 2"):
        kafka_log(kafka_topic, ONLY, tmp_path / "copy")


@pytest.mark.parametrize(
    "value",
    [
        b"\xff",
        b"[]",
        orjson.dumps({"shard": [], "received_at": 1, "events": []}),
        orjson.dumps({"shard": [0, 1], "received_at": 1e300, "events": [make_event(1)._asdict()]}),
        orjson.dumps({"shard": [0, 1], "received_at": 1, "events": [{"user_id": "u"}]}),
        orjson.dumps({"shard": [0, 1], "received_at": 1, "events": [make_event(1, item_id="")._asdict()]}),
    ],
)
def test_a_message_of_another_program_is_passed_over_and_said(kafka_brokers, kafka_topic, tmp_path, value):
    def disturb() -> None:
        producer = Producer({"bootstrap.servers": kafka_brokers})
        producer.produce(Topic.of(kafka_topic).name, value, partition=0)
        producer.flush()

    async def live() -> None:
        layout = LogLayout(log=kafka_topic)
        layout.begin(tmp_path)
        aggregator = Aggregator(str(tmp_path), layout=layout)
        assert await aggregator.append([make_event(1)]) == [None]
        disturb()  # beside a live service
        assert await aggregator.append([make_event(2)]) == [None]
        assert await aggregator.append([make_event(2), make_event(3)]) == ["duplicate", None]
        status = await aggregator.status()
        assert status.rejected == {"foreign_message": 2}
        assert [damage.partition(" is no feedback")[0] for damage in status.damage] == [
            f"message {place} in partition 0 of {kafka_topic}" for place in (0, 2)
        ]
        assert (await aggregator.get_histories(["user"]))[0].offsets == [1, 2, 3]
        await aggregator.close()

    disturb()  # before it starts
    asyncio.run(live())
    with kafka_log(kafka_topic, ONLY, tmp_path / "made again") as log:
        assert [(offset, item) for offset, item, _ in everything(log)] == [(n, f"item-{n}") for n in (1, 2, 3)]
        assert (log.passed_over.count, len(log.passed_over.newest)) == (2, 2)
    with kafka_log(kafka_topic, ONLY, tmp_path / "made again") as log:
        assert (log.passed_over.count, len(log.passed_over.newest)) == (2, 2)


def test_of_foreign_messages_the_newest_are_kept_and_all_are_counted(kafka_brokers, kafka_topic, tmp_path):
    producer = Producer({"bootstrap.servers": kafka_brokers})
    for number in range(2 * FOREIGN_KEPT + 3):
        event = {"user_id": "u", "x" * 10_000: number}
        foreign = orjson.dumps({"shard": [0, 1], "received_at": 1, "events": [event]})
        producer.produce(Topic.of(kafka_topic).name, foreign, partition=0)
    producer.flush()
    for _ in range(2):  # also from the copy
        with kafka_log(kafka_topic, ONLY, tmp_path / "log") as log:
            assert log.passed_over.count == 2 * FOREIGN_KEPT + 3
            assert len(log.passed_over.newest) == FOREIGN_KEPT
            assert log.passed_over.newest[-1].startswith(f"message {2 * FOREIGN_KEPT + 2} ")
            assert max(map(len, log.passed_over.newest)) < 1_000
            assert isinstance(log.store, KafkaStore)
            rows = log.store.copy.database.connection.execute("SELECT COUNT(*) FROM passed_over").fetchone()
            assert rows == (FOREIGN_KEPT,)


def test_messages_that_are_gone_are_noticed(log, kafka_topic, tmp_path):
    with pytest.raises(InputError, match=r"^log: messages 3 to 4 in partition 0 .* are gone; .* retention\.ms"):
        log.store._end((5, 9), 3)  # the brokers of the tests never delete
    log.append([make_event(1)]).result()
    log.close()
    another = kafka_topic + "-made-again"
    Producer({"bootstrap.servers": Topic.of(another).settings["bootstrap.servers"]}).list_topics(
        Topic.of(another).name, timeout=10
    )
    with pytest.raises(InputError, match=r"ends at message 0, and .*copy has read 1; restore the topic"):
        kafka_log(another, ONLY, tmp_path / "copy")


def test_a_user_cannot_be_erased_from_a_topic(log):
    with pytest.raises(InputError, match=r"^log: kafka://.* cannot forget a user.*--log sqlite"):
        log.erase("user")


def test_an_aggregator_keeps_its_log_on_kafka(kafka_topic, tmp_path):
    async def live(*numbers: int) -> tuple[list[str | None], list[str]]:
        LogLayout(log=kafka_topic).begin(tmp_path)
        aggregator = Aggregator(str(tmp_path), layout=LogLayout(log=kafka_topic))
        answers = await aggregator.append([make_event(number) for number in numbers])
        [history] = await aggregator.get_histories(["user"])
        await aggregator.close()
        return answers, history.item_ids

    assert asyncio.run(live(1, 2)) == ([None, None], ["item-1", "item-2"])
    assert asyncio.run(live(2, 3)) == (["duplicate", None], ["item-1", "item-2", "item-3"])
    assert not (tmp_path / "feedback.sqlite").exists()


def test_an_event_that_came_otherwise_is_in_the_history_after_the_next_append(kafka_topic, tmp_path):
    async def live(other: FeedbackLog) -> list[str]:
        LogLayout(log=kafka_topic).begin(tmp_path)
        aggregator = Aggregator(str(tmp_path), layout=LogLayout(log=kafka_topic))
        assert await aggregator.append([make_event(1)]) == [None]
        other.append([make_event(2)]).result()
        assert await aggregator.append([make_event(3)]) == [None]
        assert await aggregator.append([make_event(2)]) == ["duplicate"]
        [history] = await aggregator.get_histories(["user"])
        await aggregator.close()
        assert history.offsets == [1, 2, 3]
        return history.item_ids

    with kafka_log(kafka_topic, ONLY, tmp_path / "other") as other:
        assert asyncio.run(live(other)) == ["item-1", "item-2", "item-3"]


# ------------------------------------------------------------------------------------------------------- failed writes


def test_a_message_that_is_too_large_fails_alone(kafka_topic, tmp_path):
    with kafka_log(f"{kafka_topic}?message.max.bytes=2000", ONLY, tmp_path / "copy") as log:
        outside = hold_the_writer(log)
        first = log.append([make_event(1)])
        wait_until(first.running)
        large = log.append([make_event(number) for number in range(100, 200)])
        last = log.append([make_event(2)])
        outside.execute("ROLLBACK")
        outside.close()
        assert (first.result(), last.result()) == (AppendResult([1]), AppendResult([2]))
        with pytest.raises(LogWriteError, match=rf"^feedback log {kafka_topic} could not be written: .*too large"):
            large.result()
        assert log.append([make_event(3)]).result() == AppendResult([3])


BROKERS = """
import sys
from confluent_kafka import Producer
producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})
brokers = producer.list_topics("events", timeout=20).brokers.values()
print(",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def brokers() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Brokers in a process of their own, which can be stopped; and their topic."""
    process = subprocess.Popen(
        [sys.executable, "-c", BROKERS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    yield process, f"kafka://{process.stdout.readline().strip()}/events"
    process.kill()
    process.communicate()


def all_stopped(process: int) -> bool:
    """Whether every thread has heard of the signal: another core may still run one when the call returns."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


def test_brokers_that_stop_answering_fail_the_write_and_what_they_kept_counts_once(brokers, tmp_path):
    process, location = brokers
    store = KafkaStore(location, ONLY, tmp_path / "copy", timeout=3.0)
    with FeedbackLog(store) as log:
        assert log.append([make_event(1)]).result() == AppendResult([1])
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: all_stopped(process.pid))
        with pytest.raises(LogWriteError, match=rf"^feedback log {location} could not be written: "):
            log.append([make_event(2), make_event(3)]).result()
        store.timeout = 0.3
        with pytest.raises(LogWriteError, match=r"did not answer|cannot be reached"):
            log.append([make_event(4)]).result()
        assert log.last_offset() == 1
        os.kill(process.pid, signal.SIGCONT)
        store.timeout = 20.0
        # whether the brokers took it after all is theirs; sent again it is there once, in one piece, and told of once
        again = log.append([make_event(2), make_event(3)]).result()
        told = [other.offset for other in again.others]
        assert (again.offsets, told) in [([2, 3], []), ([None, None], [2, 3])]
        last = log.append([make_event(5)]).result()
        assert (last.offsets, last.others) == ([4], [])
        expected = everything(log)
        assert [(offset, item) for offset, item, _ in expected] == [
            (1, "item-1"), (2, "item-2"), (3, "item-3"), (4, "item-5")
        ]  # fmt: skip
    with kafka_log(location, ONLY, tmp_path / "another", timeout=20.0) as again:
        assert everything(again) == expected
