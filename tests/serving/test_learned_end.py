"""A restarted aggregator takes events whatever the storage of the versions does, and checks its log once it can."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.errors import InputError
from lib.live.learner import NearlineLearner
from lib.log.errors import LogUnavailable
from lib.log.feedback import FeedbackLog
from lib.log.layout import LogLayout
from lib.log.shard import ONLY
from lib.versions.accounts import Accounts
from serving.aggregator import Aggregator
from tests.helpers.learners import CONFIG, update
from tests.helpers.logs import make_event
from tests.helpers.tiny import started_registry

EVENTS = 3


@pytest.fixture
def begun(tmp_path) -> SimpleNamespace:
    """A state of three events, all learned, whose versions are in a folder of their own."""
    versions, state = tmp_path / "versions", tmp_path / "state"
    layout = LogLayout(versions=str(versions))
    layout.begin(state)
    with layout.open(state, ONLY) as log:
        append(log, EVENTS)
    learner = NearlineLearner(started_registry(versions), CONFIG)
    for number in range(1, EVENTS + 1):
        update(learner, number)
    return SimpleNamespace(state=state, versions=versions, layout=layout, registry=learner.lineage.registry)


def append(log: FeedbackLog, count: int) -> None:
    log.append([make_event(number) for number in range(count)]).result()


def forget_events(begun: SimpleNamespace) -> None:
    """Put an older copy of the log in place of the log: one event is left."""
    for file in begun.state.glob("feedback.sqlite*"):
        file.unlink()
    with FeedbackLog.open(begun.state / "feedback.sqlite") as log:
        append(log, 1)


@contextmanager
def unreadable(folder: Path, how: str) -> Iterator[None]:
    """Have a folder away, with a file or nothing in its place."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    if how == "a file":
        folder.write_text("")
    try:
        yield
    finally:
        folder.unlink(missing_ok=True)
        elsewhere.rename(folder)


async def until_checked(aggregator: Aggregator) -> None:
    async with asyncio.timeout(30):
        await aggregator.checking


@pytest.mark.parametrize("instead", ["a file", "nothing"])
def test_events_are_taken_while_the_versions_are_away(begun, instead):
    async def run() -> None:
        aggregator = Aggregator(str(begun.state), layout=begun.layout)
        with unreadable(begun.versions, instead):
            assert await aggregator.append([make_event(100)]) == [None]
            [said] = (await aggregator.status()).damage
            assert said.startswith("state: whether the log reaches as far as versions have learned of it is not known")
        await until_checked(aggregator)
        assert (await aggregator.status()).damage == []
        assert await aggregator.append([make_event(101)]) == [None]
        await aggregator.close()

    asyncio.run(run())


def test_storage_that_hangs_holds_nothing_up(begun, monkeypatch):
    monkeypatch.setattr("serving.learned_end.LONGEST_WAIT", 0.05)

    async def run() -> None:
        loop, answers = asyncio.get_running_loop(), asyncio.Event()
        aggregator = Aggregator(str(begun.state), layout=begun.layout)
        hang = asyncio.run_coroutine_threadsafe
        monkeypatch.setattr(aggregator.learned_end, "_read", lambda: hang(answers.wait(), loop).result() and EVENTS)
        assert await aggregator.append([make_event(100)]) == [None]
        [said] = (await aggregator.status()).damage
        assert said.endswith("the storage of the versions does not answer")
        answers.set()
        await until_checked(aggregator)
        assert (await aggregator.status()).damage == []
        await aggregator.close()

    asyncio.run(run())


def test_a_log_that_ends_too_early_is_closed_once_that_is_known(begun):
    forget_events(begun)

    async def run() -> None:
        aggregator = Aggregator(str(begun.state), layout=begun.layout)
        with unreadable(begun.versions, "a file"):
            assert await aggregator.append([make_event(100 + number) for number in range(5)]) == [None] * 5
        await until_checked(aggregator)
        for _ in range(2):
            with pytest.raises(LogUnavailable, match=r"ends at offset 1, but versions in .* have learned up to 3"):
                await aggregator.append([make_event(200)])

    asyncio.run(run())


def test_beside_damaged_versions_the_newest_that_can_be_read_says_how_far_they_learned(begun):
    delta = begun.versions / "deltas" / f"{EVENTS + 1:010d}"
    delta.write_bytes(b"torn")
    assert Accounts(begun.registry).newest_log_offset() == EVENTS - 1
    forget_events(begun)

    async def refused() -> None:
        with pytest.raises(LogUnavailable, match=r"ends at offset 1, but versions in .* have learned up to 2"):
            await Aggregator(str(begun.state), layout=begun.layout).append([make_event(100)])

    asyncio.run(refused())


def test_versions_of_which_none_can_be_read_are_said(begun):
    for file in [*begun.versions.glob("deltas/*"), *begun.versions.glob("snapshots/*/manifest.json")]:
        file.write_bytes(b"torn")
    with pytest.raises(InputError, match="are damaged; restore them from a copy"):
        Accounts(begun.registry).newest_log_offset()
