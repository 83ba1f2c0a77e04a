"""A full disk, a corrupt last record, a torn checkpoint, a clock that jumps: a clear state and a clear message each."""

import asyncio
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import Request
from ray.exceptions import RayTaskError

from jobs.command_line import run_command
from jobs.serve import serve_command
from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.guard import CleaningRules
from lib.data.replay import ReplaySample
from lib.errors import InputError
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner
from lib.live.micro_batch import MicroBatch, SampleSizes
from lib.live.settings import LearnerConfig
from lib.log.backend import LOG_FILE, SQLITE
from lib.log.errors import LogCorrupt, LogFull, LogUnsure, LogWriteError
from lib.log.feedback import FeedbackLog
from lib.log.items import ItemLog
from lib.log.write_ahead_log import Tail, read_tail
from lib.model.delta import Delta, DeltaMismatch
from lib.model.folder import Manifest, save_model
from lib.ranking.recommender import Question, RankedItem, Recommender
from lib.versions.accounts import Accounts
from lib.versions.ledger import check
from lib.versions.registry import Registry
from serving.aggregator import Aggregator, AggregatorConfig
from serving.app import check_state
from serving.decision_log import DecisionLog
from serving.errors import answer_of
from tests.helpers.logs import STREAM, connection_of, make_event
from tests.helpers.tiny import (
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), snapshot_every=1000)
HOUR = 3_600_000  # milliseconds
SAMPLE = SampleSizes(history_length=8, replay=ReplaySample(0), held_out_users=0, held_out_length=8)


# --------------------------------------------------------------------------------------------------------- a full disk


@contextmanager
def files_up_to(size: int) -> Iterator[Callable[[], None]]:
    """No file of this process may grow beyond so many bytes; gives what lifts the limit again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield lift
    finally:
        lift()


def batch_of(log: FeedbackLog) -> MicroBatch:
    """Two more events of a log."""
    after = log.last_offset()
    log.append([make_event(after + 1), make_event(after + 2)]).result()
    return micro_batch(log.last_offset(), [history([1, 2, f"new{after}"])], [2])


def learn(learner: NearlineLearner, log: FeedbackLog) -> Delta:
    """Append two events and learn them."""
    delta = learner.learn(batch_of(log))
    assert isinstance(delta, Delta)
    return delta


@pytest.mark.parametrize(("snapshot_every", "stored"), [(1000, 2), (1, 3)], ids=["delta", "snapshot"])
def test_a_version_that_cannot_be_stored_waits_for_room_and_is_learned_once(tmp_path, snapshot_every, stored):
    registry, errors = started_registry(tmp_path / "store", items=5000), []
    config = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), snapshot_every=snapshot_every)
    steady = NearlineLearner(started_registry(tmp_path / "steady", items=5000), config)
    with FeedbackLog.open(tmp_path / "log") as log, FeedbackLog.open(tmp_path / "steady log") as steady_log:

        def wait(error: OSError) -> None:
            errors.append(error)
            assert Registry(registry.store.root).head() == stored
            assert not [path for path in (tmp_path / "store").rglob("*") if path.name.startswith(".")]
            if len(errors) == 3:
                lift()

        learner = NearlineLearner(registry, config, wait)
        for _ in range(2):
            learn(steady, steady_log)
        learn(learner, log)
        batch, room = batch_of(log), (tmp_path / "steady" / "deltas" / "0000000003").stat().st_size
        with files_up_to(room - 1 if stored == 2 else room) as lift:  # a snapshot is larger
            learner.learn(batch)
        assert len(errors) == 3
        assert all("File too large" in str(error) for error in errors)
        learn(learner, log)
        learn(steady, steady_log)
        assert_same_state(copied_state(learner.model.encoder), copied_state(steady.model.encoder))
        ledger = check(Accounts(Registry(registry.store.root)).newest_lineage(), log)
        assert (ledger.faults, ledger.events_trained, ledger.waiting) == ([], 6, 0)
        assert_same_state(copied_state(registry.load().encoder), copied_state(learner.model.encoder))


def test_a_version_that_cannot_be_stored_fails_where_nobody_waits(tmp_path):
    learner = NearlineLearner(started_registry(tmp_path / "store"), CONFIG)
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        learner.learn(micro_batch(1, [history([1, 2])]))


def test_an_aggregator_with_a_full_disk_takes_nothing_and_goes_on_once_there_is_room(tmp_path):
    rules = CleaningRules(flood_events=3)
    events = [make_event(number, request_id="r" * 200) for number in range(3)]

    async def run() -> None:
        aggregator = Aggregator(str(tmp_path), config=AggregatorConfig(cleaning=rules))
        await aggregator.open()
        pages = connection_of(aggregator.log).execute("PRAGMA page_count").fetchone()[0]
        connection_of(aggregator.log).execute(f"PRAGMA max_page_count = {pages}")
        large = [make_event(number, f"user-{number}", request_id="r" * 250) for number in range(50)]
        for _ in range(2):
            with pytest.raises(LogFull, match=r"feedback\.sqlite could not be written: .* full"):
                await aggregator.append([*events, *large])
            assert await aggregator.get_histories(["user"]) == [aggregator.histories.get("nobody")]
            status = await aggregator.status()
            assert (status.log_offset, status.events, status.pending) == (0, 0, 0)
        connection_of(aggregator.log).execute("PRAGMA max_page_count = 100000")
        assert await aggregator.append(events) == [None, None, None], "what was not taken is no flood"
        [answer] = await aggregator.append([make_event(4)])
        assert answer is not None
        assert answer.startswith("flood")
        batch = await aggregator.next_batch(0, 0, SAMPLE, 5000)
        assert isinstance(batch, MicroBatch)
        assert (batch.last_offset, batch.new) == (3, [[0, 1, 2]])
        await aggregator.close()

    asyncio.run(run())


def test_items_that_cannot_be_written_are_not_there(tmp_path):
    log = ItemLog(tmp_path / "items.sqlite")
    pages = log._database.connection.execute("PRAGMA page_count").fetchone()[0]
    log._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LogFull, match=r"items\.sqlite could not be written"):
        log.append([(f"item-{number}", {"text": "t" * 1000}) for number in range(50)])
    assert (log.after(0), log.revision) == ([], 0)
    log._database.connection.execute("PRAGMA max_page_count = 100000")
    assert log.append([("a", {})]) == 1


def test_an_explored_answer_that_cannot_be_recorded_is_given_and_counted(tmp_path):
    decisions = DecisionLog(str(tmp_path), "replica", 1_000_000)
    with files_up_to(300):
        for number in range(5):
            decisions.append(f"request-{number}", "user", 1, [RankedItem("item", 0.5, None, 0.5)] * 10)
    assert 3 <= decisions.unrecorded <= 5


@pytest.mark.parametrize(("kind", "status", "words"), [(LogFull, 507, "full"), (LogWriteError, 503, "try again")])
def test_a_write_that_failed_in_the_aggregator_is_answered_with_what_to_do(kind, status, words):
    error = RayTaskError("append", "the traceback", kind("the log")).as_instanceof_cause()  # as a replica gets it
    response = asyncio.run(_awaited(answer_of(error)(Request({"type": "http"}), error)))
    assert response.status_code == status
    assert words in bytes(response.body).decode()
    assert "nothing of the request was taken" in bytes(response.body).decode()


def test_a_write_that_may_have_been_taken_is_answered_so():
    error = RayTaskError("append", "the traceback", LogUnsure("the log")).as_instanceof_cause()
    response = asyncio.run(_awaited(answer_of(error)(Request({"type": "http"}), error)))
    assert response.status_code == 503
    assert "may have been taken, or not; send it again" in bytes(response.body).decode()


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


# ------------------------------------------------------------------------------------------------ a corrupt last record


@pytest.fixture
def killed_log(tmp_path: Path, start_process) -> tuple[Path, list[str]]:
    """A log whose writer was killed with its commits in the write-ahead log, and the ids of those that it has."""
    path = tmp_path / LOG_FILE
    process = start_process(STREAM, SQLITE, path.parent, "life")
    for _ in range(200):
        process.stdout.readline()
    process.kill()
    process.communicate()
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    ids = [name for (name,) in connection.execute("SELECT event_id FROM events ORDER BY offset")]
    connection.close()
    return path, ids


def frame_places(wal: Path) -> list[int]:
    """Where the frames of the commits that are whole begin, by SQLite's own count of them."""
    data, page = wal.read_bytes(), 4096
    return [place for place in range(32, len(data), page + 24) if data[place + 8 : place + 16] == data[16:24]]


def end_at_last_commit(wal: Path) -> None:
    data = wal.read_bytes()
    last = max(place for place in frame_places(wal) if any(data[place + 4 : place + 8]))
    wal.write_bytes(data[: last + 4096 + 24])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_what_a_killed_writer_leaves_is_whole(killed_log):
    path, ids = killed_log
    tail = read_tail(Path(f"{path}-wal"))
    assert (tail.torn, tail.damaged) == (False, False)
    assert 0 < tail.commits <= len(ids)
    with FeedbackLog.open(path) as log:
        assert not log.torn
        assert log.count() == len(ids)


def test_a_torn_last_commit_is_dropped_and_said(killed_log):
    path, ids = killed_log
    wal = Path(f"{path}-wal")
    end_at_last_commit(wal)  # the kill may have come between two frames of the next one
    commits = read_tail(wal).commits
    flip(wal, frame_places(wal)[-1] + 2000)
    assert read_tail(wal) == Tail(commits - 1, torn=True, damaged=False)
    aggregator = Aggregator(str(path.parent))
    status = asyncio.run(aggregator.status())
    assert status.damage == [
        f"{path}: the last commit was torn when the machine stopped, and is dropped; it was not acknowledged"
    ]
    assert [logged.event.event_id for logged in aggregator.log.replay()] == ids[: aggregator.log.count()]
    assert 0 < aggregator.log.count() < len(ids)
    asyncio.run(aggregator.close())
    assert not FeedbackLog.open(path).torn


def test_damage_behind_which_commits_were_durable_is_refused_until_they_are_given_up(killed_log):
    path, ids = killed_log
    wal = Path(f"{path}-wal")
    flip(wal, frame_places(wal)[len(frame_places(wal)) // 2] + 2000)
    before = path.read_bytes(), wal.read_bytes()
    with pytest.raises(LogCorrupt, match=r"wal is damaged.*restore both files.*PRAGMA wal_checkpoint") as error:
        FeedbackLog.open(path)
    assert (path.read_bytes(), wal.read_bytes()) == before
    with pytest.raises(LogCorrupt, match="wal is damaged"):
        check_state(str(path.parent))
    remedy = str(error.value).split("'")[1]
    connection = sqlite3.connect(path)
    connection.execute(remedy)
    connection.close()
    with FeedbackLog.open(path) as log:
        assert [logged.event.event_id for logged in log.replay()] == ids[: log.count()]
        assert log.append([make_event(1)]).result().offsets == [log.last_offset()]


def test_a_file_that_is_no_write_ahead_log_has_no_tail(tmp_path):
    wal = tmp_path / "log-wal"
    for content in (None, b"", b"x" * 31, bytes(5000)):
        if content is not None:
            wal.write_bytes(content)
        assert read_tail(wal) == Tail(0, torn=False, damaged=False)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A model that was served: a log of 6 events, of which 3 updates learned."""
    save_model(tmp_path / "model", tiny_encoder(), Catalog(item_ids(24)), Manifest(version=1))
    registry = Registry(tmp_path / "model" / "live")
    registry.start_from(tmp_path / "model")
    with FeedbackLog.open(tmp_path / "model" / "live" / LOG_FILE) as log:
        for _ in range(3):
            learn(NearlineLearner(registry, CONFIG), log)
    return tmp_path / "model"


def serve(model: Path) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(serve_command, ["--model", str(model), "--port", "9"])
    return end.value.code  # pyright: ignore[reportReturnType]


def test_serve_refuses_a_damaged_log_before_it_starts_anything(served, capsys):
    log = served / "live" / LOG_FILE
    with log.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xa5" * 4096)
    assert serve(served) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: feedback log {log} is damaged")
    assert "restore it from a copy" in error


def test_serve_refuses_a_log_that_ends_before_what_was_learned_of_it(served, capsys):
    """Its new events would have offsets that were learned already, and would never be learned."""
    log, live = served / "live" / LOG_FILE, served / "live"
    log.unlink()
    assert serve(served) == 2
    assert "ends at offset 0, but versions" in capsys.readouterr().err
    with FeedbackLog.open(log) as copy:
        copy.append([make_event(1), make_event(2), make_event(3)]).result()
    assert serve(served) == 2
    assert "ends at offset 3, but versions in" in capsys.readouterr().err
    for version in (3, 4):  # what the message says
        (live / "deltas" / f"{version:010d}").unlink()
    check_state(str(live))
    assert NearlineLearner(Registry(live), CONFIG).log_offset == 2


# --------------------------------------------------------------------------------------------------- a torn checkpoint


@pytest.mark.parametrize("lost", [1, 3])
def test_after_a_torn_delta_the_events_are_learned_again_under_new_versions(tmp_path, lost):
    registry = started_registry(tmp_path / "store")
    with FeedbackLog.open(tmp_path / "log") as log:
        first = NearlineLearner(registry, CONFIG)
        for _ in range(4):
            learn(first, log)
        whole, head = 5 - lost, 5
        path = tmp_path / "store" / "deltas" / f"{whole + 1:010d}"
        path.write_bytes(path.read_bytes()[:-100])
        replica = recommender(registry.load(whole))
        stale = recommender(registry.load(whole))
        stale.version = head  # what a replica has that was pushed to before the damage

        learner = NearlineLearner(registry, CONFIG)
        assert (learner.version, learner.log_offset) == (whole, 2 * (whole - 1))
        [damage] = learner.damage
        assert str(path) in damage
        delta = learner.store_whole()
        assert (delta.version, delta.parent, delta.log_offset) == (head + 1, whole, learner.log_offset)
        replica.apply(Delta.from_bytes(delta.to_bytes()))
        with pytest.raises(DeltaMismatch, match=f"delta {head + 1} follows version {whole}"):
            stale.apply(delta)
        assert recommender(registry.load()).checksum == replica.checksum == learner.model.checksum
        assert registry.load().damage == []

        ledger = check(Accounts(registry).newest_lineage(), log)
        assert (ledger.faults, ledger.waiting) == ([], 2 * lost)
        waiting = log.read(learner.log_offset, 100)
        assert len(waiting) == 2 * lost
        learner.learn(micro_batch(waiting[-1].offset, [history(range(1, 10))], [len(waiting)]))
        ledger = check(Accounts(Registry(registry.store.root)).newest_lineage(), log)
        assert (ledger.faults, ledger.waiting, ledger.events_trained) == ([], 0, log.count())
        restarted = NearlineLearner(registry, CONFIG)
        assert (restarted.version, restarted.model.checksum, restarted.damage) == (head + 2, learner.model.checksum, [])


def test_a_learner_that_did_not_store_a_whole_version_first_is_loaded_too(tmp_path):
    registry = started_registry(tmp_path / "store")
    with FeedbackLog.open(tmp_path / "log") as log:
        for _ in range(3):
            learn(NearlineLearner(registry, CONFIG), log)
        (tmp_path / "store" / "deltas" / "0000000003").unlink()
        learner = NearlineLearner(registry, CONFIG)
        learner.learn(micro_batch(6, [history([1, 2, 3, 4])], [4]))
        assert registry.load().version == learner.version == 5
        assert registry.load().damage == []
        assert check(Accounts(registry).newest_lineage(), log).faults == []


def test_a_torn_snapshot_costs_nothing_where_its_deltas_are_there(tmp_path):
    registry = started_registry(tmp_path / "store")
    config = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), snapshot_every=2)
    with FeedbackLog.open(tmp_path / "log") as log:
        learner = NearlineLearner(registry, config)
        for _ in range(4):
            learn(learner, log)
        file = tmp_path / "store" / "snapshots" / "0000000004" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
        again = NearlineLearner(registry, config)
        assert (again.version, again.model.checksum, again.log_offset) == (5, learner.model.checksum, 8)
        assert str(file) in again.damage[0]
        again.store_whole()
        assert NearlineLearner(registry, config).damage == []
        assert check(Accounts(registry).newest_lineage(), log).faults == []


def test_without_any_whole_snapshot_the_message_names_the_file(tmp_path):
    registry = started_registry(tmp_path / "store")
    file = tmp_path / "store" / "snapshots" / "0000000001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=rf"{file} is not the file that the manifest describes; restore it"):
        NearlineLearner(registry, CONFIG)


def recommender(loaded) -> Recommender:
    """A replica."""
    return Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset)


# --------------------------------------------------------------------------------------------------- a clock that jumps


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the system's clock, to this process, so many milliseconds forwards."""
    real = time.time_ns

    def set_clock(by: int) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: real() + by * 1_000_000)
        monkeypatch.setattr(time, "time", lambda: (real() + by * 1_000_000) / 1e9)

    return set_clock


@pytest.mark.parametrize("by", [-5 * HOUR, 5 * HOUR])
def test_a_clock_that_jumps_stalls_no_trigger_and_floods_nobody(tmp_path, jump, by):
    rules = CleaningRules(flood_events=2, flood_window_ms=1500)

    def event_now(number: int) -> Event:
        return make_event(number, timestamp=time.time_ns() // 1_000_000)

    async def run() -> None:
        aggregator = Aggregator(str(tmp_path), config=AggregatorConfig(cleaning=rules))
        assert await aggregator.append([event_now(1), event_now(2)]) == [None, None]
        jump(by)
        [answer] = await aggregator.append([event_now(3)])
        assert answer is not None, "the minute of a flood is not over because the clock was set"
        batch = await aggregator.next_batch(0, 0, SAMPLE, 20_000)
        assert isinstance(batch, MicroBatch), "the trigger waits for hours"
        assert batch.last_offset == 2
        delays = [time.time() * 1000 - received for received in batch.received_at]
        assert all(0 <= delay < HOUR / 2 for delay in delays)
        await asyncio.sleep(1.6)
        assert await aggregator.append([event_now(4), event_now(5)]) == [None, None]
        await aggregator.close()

    asyncio.run(run())


def test_a_clock_that_jumps_neither_wipes_nor_inflates_popularity(tmp_path):
    learner = NearlineLearner(started_registry(tmp_path / "store"), CONFIG)
    now = 1_800_000_000_000
    learner.learn(micro_batch(1, [history([1], start=now), history([1], start=now)], [1, 1]))
    reference = int(learner.model.encoder.popularity_reference)
    for offset, by in ((2, 5 * HOUR), (3, -5 * HOUR), (4, 0)):
        learner.learn(micro_batch(offset, [history([2, 3], start=now), history([3], start=now + by)], [1, 1]))
    counts = learner.model.encoder.item_popularity
    assert int(learner.model.encoder.popularity_reference) == reference
    assert float(counts[1] / 2) == pytest.approx(float(counts[3] / 6), rel=0.05)


def test_a_history_whose_times_go_backwards_is_answered(tmp_path):
    replica = recommender(started_registry(tmp_path / "store").load())
    backwards = history([1, 2])
    for event in history([3, 4], start=backwards.timestamps[0] - 5 * HOUR).timestamps:
        backwards.extend(history([5], start=event))
    items = replica.recommend([Question(backwards, 10)])[0]
    assert len(items) == 10
    assert np.isfinite([item.score for item in items]).all()
