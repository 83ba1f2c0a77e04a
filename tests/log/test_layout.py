"""Several aggregators share the users out, and the learner learns from each of them every event once."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from fastapi import Request

from lib.data.events import Event
from lib.data.guard import CleaningRules
from lib.errors import InputError
from lib.live.learner import NearlineLearner
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.log.errors import LogFull, LogUnavailable, PartlyWritten
from lib.log.layout import LogLayout, read_log
from lib.log.one_machine import on_one_machine
from lib.log.order import LogOrder
from lib.log.shard import Shard, shard_of
from lib.model.facts import VersionFacts
from lib.versions.accounts import Accounts
from lib.versions.ledger import check
from lib.versions.registry import Registry
from serving.aggregator import Aggregator, AggregatorConfig, aggregator_handle
from serving.aggregators import Aggregators, Feedback, running_aggregators
from serving.app import ServeArguments, check_state
from serving.batch_source import BatchSource
from serving.errors import partly_taken
from serving.history_cache import HistoryCache, last_offsets
from serving.status import AggregatorsStatus
from tests.helpers.logs import connection_of
from tests.helpers.service import PATIENCE
from tests.helpers.tiny import NOW, history, micro_batch, started_registry

USERS = [f"user-{number}" for number in range(40)]
LAYOUT = LogLayout(aggregators=2)
CONFIG = LearnerConfig(negatives=8, snapshot_every=10_000)


def clicks(count: int, first: int = 0) -> list[Event]:
    return [
        Event(USERS[number % len(USERS)], f"i{1 + number % 24}", "click", None, NOW + number, f"e-{number}")
        for number in range(first, first + count)
    ]


def feedback(*events: Event, named: Iterable[str] = (), rejected: Counter[str] | None = None) -> Feedback:
    return Feedback(list(events), set(named), rejected or Counter())


# ------------------------------------------------------------------------------------------------------- who is where


def test_a_user_has_the_same_shard_for_good():
    """These places are on disk: another hash would look for a user's events where they are not."""
    assert [shard_of(user, 4) for user in ("alice", "bob", "ünï", "日本", "")] == [1, 2, 3, 2, 0]
    assert {shard_of(user, 1) for user in USERS} == {0}


def test_users_are_shared_out_evenly():
    counts = Counter(shard_of(f"user-{number}", 4) for number in range(4000))
    assert all(900 < counts[number] < 1100 for number in range(4))
    assert all(sum(shard.has(user) for shard in LogLayout(3).shards()) == 1 for user in USERS)


def test_the_only_shard_has_the_names_as_they_are():
    assert Shard().named("feedback.sqlite") == "feedback.sqlite"
    assert [shard.named("feedback.sqlite") for shard in LAYOUT.shards()] == ["feedback-0.sqlite", "feedback-1.sqlite"]
    assert Shard(1, 2).named("aggregator") == "aggregator-1"


# ------------------------------------------------------------------------------------------- the state folder's record


def test_a_state_folder_keeps_its_layout(tmp_path):
    LAYOUT.check(tmp_path)
    LAYOUT.begin(tmp_path)
    assert LogLayout.of(tmp_path) == LAYOUT
    LAYOUT.check(tmp_path)
    with pytest.raises(InputError, match=r"^aggregators: .* with 2, not 3; start with --aggregators 2, or .* --state$"):
        LogLayout(3).check(tmp_path)


def test_a_folder_without_a_record_has_one_shard(tmp_path):
    (tmp_path / "feedback.sqlite").touch()
    LogLayout().check(tmp_path)
    with pytest.raises(InputError, match="was made with 1, not 2"):
        ServeArguments(model="absent", state=str(tmp_path), aggregators=2).check()


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (LogLayout(), ["feedback.sqlite", "items.sqlite", "log.json"]),
        (LAYOUT, ["feedback-0.sqlite", "feedback-1.sqlite", "items.sqlite", "log.json", "order.sqlite"]),
    ],
)
def test_logs_are_begun_once_for_good(tmp_path, layout, names):
    state = tmp_path / "state"
    layout.begin(state)
    assert sorted(path.name for path in state.iterdir()) == names
    with layout.open(state, layout.shards()[0]) as log:
        log.append(clicks(1)).result()
    layout.begin(state)
    with layout.open(state, layout.shards()[0]) as log:
        assert log.last_offset() == 1


@pytest.mark.parametrize("name", ["log.json", "feedback.sqlite", "items.sqlite", ""])
def test_nothing_is_begun_in_place_of_what_is_missing(tmp_path, name):
    state, layout = tmp_path / "state", LogLayout()
    layout.begin(state)
    (state / name).rename(tmp_path / "elsewhere")
    aggregator = Aggregator(str(state), layout=layout)
    for _ in range(2):  # the second is answered without another look
        with pytest.raises(
            LogUnavailable, match=rf"{name or 'log.json'} is missing, and nothing is begun in its place"
        ):
            asyncio.run(aggregator.append(clicks(1)))
    assert not (state / name).exists()
    if name not in ("log.json", ""):
        with pytest.raises(InputError, match=f"{name} is missing"):
            check_state(str(state))
        with pytest.raises(InputError, match=f"{name} is missing"):
            layout.begin(state)
    (tmp_path / "elsewhere").rename(state / name)
    aggregator.failed_at = 0.0  # a second has passed
    assert asyncio.run(aggregator.append(clicks(1))) == [None]
    asyncio.run(aggregator.close())


def test_a_log_that_ends_before_what_was_learned_of_it_takes_no_events(tmp_path):
    """An older copy of the log, put in place of the newest."""
    learner = NearlineLearner(started_registry(tmp_path), CONFIG)
    LogLayout().begin(tmp_path)
    learner.learn(micro_batch(3, [history([1, 2, 3])]))
    aggregator = Aggregator(str(tmp_path), layout=LogLayout())
    with pytest.raises(LogUnavailable, match=r"ends at offset 0, but versions in .* have learned up to 3; restore"):
        asyncio.run(aggregator.append(clicks(1)))


def test_a_shard_that_ends_before_what_is_in_the_order_takes_no_events(tmp_path):
    started_registry(tmp_path)
    LAYOUT.begin(tmp_path)
    with LogOrder(tmp_path / "order.sqlite") as order:
        order.extend(1, 0, 5)
    whole, behind = (Aggregator(str(tmp_path), shard=shard, layout=LAYOUT) for shard in LAYOUT.shards())
    with pytest.raises(
        LogUnavailable, match=r"feedback-1\.sqlite ends at offset 0, but .* put 5 of its events in order"
    ):
        asyncio.run(behind.status())
    assert asyncio.run(whole.status()).log_offset == 0
    asyncio.run(whole.close())


def test_versions_are_where_the_record_says(tmp_path):
    state, versions = tmp_path / "state", tmp_path / "versions"
    layout = LogLayout(versions=str(versions))
    layout.begin(state)
    layout.check(state)
    started_registry(versions)
    assert Registry.of(state).head() == Registry(versions).head() == 1
    assert Registry.of(versions).head() == 1
    with pytest.raises(
        InputError, match=rf"^versions: {state} was made with {versions}, not None; start with --versions"
    ):
        LogLayout().check(state)
    LogLayout().begin(tmp_path / "another")
    with pytest.raises(
        InputError, match=r"^versions: .* was made with None, not s3://a/b; start without --versions, or"
    ):
        LogLayout(versions="s3://a/b").check(tmp_path / "another")


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps({"shards": 2}))
    with pytest.raises(InputError, match=r"log\.json is damaged"):
        LAYOUT.check(tmp_path)


# --------------------------------------------------------------------------------------------------- two that are live


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    LAYOUT.begin(tmp_path)
    return started_registry(tmp_path)


@pytest.fixture
def aggregators(ray_session: object, registry: Registry) -> Iterator[Aggregators]:
    config = AggregatorConfig(largest_batch=50, cleaning=CleaningRules(rate_events=0))
    started = Aggregators(registry.store.root, None, config, LAYOUT, PATIENCE)
    try:
        yield started
    finally:
        for handle in started.handles:
            ray.kill(handle)


def learn_up_to(learner: NearlineLearner, batches: BatchSource, offset: int) -> list[int]:
    """Learn until so many events are learned; the last offset of each micro-batch."""
    learned = []
    while learner.log_offset < offset:
        batch = batches.next(learner.log_offset, learner.item_revision, learner.sample_sizes)
        if isinstance(batch, MicroBatch):
            learned.append(batch.last_offset)
            learner.learn(batch)
        elif batch is not None:
            learner.change_items(batch)
    return learned


def assert_each_learned_once(registry: Registry) -> None:
    with read_log(registry.store.root) as log:
        ledger = check(Accounts(registry).newest_lineage(), log)
        assert (ledger.faults, ledger.erased, ledger.waiting) == ([], 0, 0)
        assert ledger.events_trained + ledger.events_rejected == ledger.log_offset == log.count()


def test_two_aggregators_are_as_one(aggregators: Aggregators, registry: Registry) -> None:
    asyncio.run(assert_as_one(aggregators))
    assert [aggregator_handle(shard) for shard in LAYOUT.shards()] == aggregators.handles
    assert len([handle for handle in running_aggregators() if handle in aggregators.handles]) == 2
    learner = NearlineLearner(registry, CONFIG)
    ends = learn_up_to(learner, BatchSource(registry.store.root), 161)
    assert learner.item_revision == 1
    with LogOrder(Path(registry.store.root, "order.sqlite")) as order:
        assert len({run.shard for end in ends[:-1] if (run := order.after(end)) is not None}) == 2, "they take turns"
    assert_each_learned_once(registry)

    # a learner that ends after it has put events in order, and before it has learned them, learns these very events
    live, away = aggregators.handles
    assert asyncio.run(aggregators.append(feedback(*clicks(30, first=1000)))) == [None] * 30
    given = None
    while not isinstance(given, MicroBatch):
        given = BatchSource(registry.store.root).next(learner.log_offset, learner.item_revision, learner.sample_sizes)
    learner = NearlineLearner(registry, CONFIG)
    assert learn_up_to(learner, BatchSource(registry.store.root), 191)[0] == given.last_offset
    assert_each_learned_once(registry)

    # the one that is away holds nobody up but its own users, and comes back with all that it had
    status: Any = ray.get(away.status.remote())
    os.kill(status.process, signal.SIGKILL)
    theirs = [event for event in clicks(100, first=2000) if shard_of(event.user_id, 2) == 0]
    assert ray.get(live.append.remote(theirs)) == [None] * len(theirs)
    batches = BatchSource(registry.store.root)
    learn_up_to(learner, batches, 191 + len(theirs))
    assert asyncio.run(aggregators.append(feedback(*clicks(160)))) == ["duplicate"] * 160
    assert asyncio.run(aggregators.append(feedback(*clicks(10, first=3000)))) == [None] * 10
    last = 201 + len(theirs)
    learn_up_to(learner, batches, last)
    assert_each_learned_once(registry)

    # weights that know less have the rest again, in the same order
    learner.adopt(registry.load(1), VersionFacts())
    assert (learner.log_offset, learner.lineage.events_trained) == (0, 0)
    again = learn_up_to(learner, batches, last)
    assert (again[-1], learner.lineage.events_trained + learner.lineage.events_rejected) == (last, last)
    assert_each_learned_once(registry)
    assert_a_full_log_fails_its_own_users_alone(aggregators)


async def assert_as_one(aggregators: Aggregators) -> None:
    events = clicks(160)
    assert await aggregators.append(feedback(*events)) == [None] * 160
    again = [events[7], events[3]._replace(event_id="another"), events[3]]
    assert await aggregators.append(feedback(*again, rejected=Counter(empty_id=2))) == ["duplicate", None, "duplicate"]
    assert await aggregators.append(feedback(events[3]._replace(event_id="another"), named={"another"})) == [None]
    by_time = sorted([*events, again[1]], key=lambda event: event.timestamp)
    for user in (USERS[0], USERS[3]):
        [history] = await aggregators.get_histories([user])
        assert history.item_ids == [event.item_id for event in by_time if event.user_id == user]
    assert sorted(user for user, _ in await aggregators.users(1000)) == sorted(USERS)
    assert len(await aggregators.users(7)) == 7

    await aggregators.open_boards()
    cache, counters = HistoryCache(100, 100), aggregators.counters(USERS)
    copies = dict.fromkeys(USERS)
    newer, changes = await aggregators.newer(last_offsets(copies), 0)
    histories = cache.update(copies, newer, counters)
    assert {user: len(history) for user, history in histories.items()} == dict(await aggregators.users(1000))
    assert (changes, await aggregators.newer([], 0)) == ([], ([], []))
    if on_one_machine():
        assert cache.split(USERS, aggregators.counters(USERS))[1] == {}
    items = aggregators.items_counter()
    assert await aggregators.change_items([("new", {"title": "New"})]) == 1
    assert items is None or aggregators.items_counter() == items + 1
    assert [change.item_id for change in (await aggregators.newer([], 0))[1]] == ["new"]

    status = await aggregators.status()
    assert isinstance(status, AggregatorsStatus)
    assert (status.log_offset, status.events, status.duplicates, status.users) == (161, 161, 2, 40)
    assert (status.rejected, status.item_revision) == ({"empty_id": 2}, 1)
    assert [shard.shard for shard in status.shards] == [0, 1]
    assert sum(shard.log_offset for shard in status.shards) == 161
    assert min(shard.log_offset for shard in status.shards) > 40


def fill_up(aggregator: Aggregator) -> None:
    """As if its disk had no room."""
    pages = connection_of(aggregator.log).execute("PRAGMA page_count").fetchone()[0]
    connection_of(aggregator.log).execute(f"PRAGMA max_page_count = {pages}")


def assert_a_full_log_fails_its_own_users_alone(aggregators: Aggregators) -> None:
    ray.get(aggregators.handles[1].__ray_call__.remote(fill_up))
    large = [event._replace(request_id="r" * 3000) for event in clicks(40, first=9000)]
    with pytest.raises(PartlyWritten, match=r"feedback-1\.sqlite could not be written"):
        asyncio.run(aggregators.append(feedback(*large)))
    theirs = [[event for event in large if shard_of(event.user_id, 2) == shard] for shard in range(2)]
    with pytest.raises(LogFull):
        asyncio.run(aggregators.append(feedback(*theirs[1])))
    assert asyncio.run(aggregators.append(feedback(*theirs[0]))) == ["duplicate"] * len(theirs[0])
    response = asyncio.run(partly_taken(Request({"type": "http"}), PartlyWritten("the log")))
    assert response.status_code == 503
    assert "send it again" in bytes(response.body).decode()
