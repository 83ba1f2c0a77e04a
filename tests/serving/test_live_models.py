"""The live model of a replica: whatever becomes of a change, no answer is made of two versions."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fastapi import Request, Response

from lib.data.column_index import SOON, WordIndex
from lib.data.history import History
from lib.live.learner import NearlineLearner
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.model.fingerprint import fingerprint
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question
from lib.ranking.rules import BoundRules, RankingRules
from lib.versions.registry import Registry
from serving.aggregator import MOST_CHANGES, Aggregator
from serving.aggregators import Aggregators
from serving.errors import NoModel, answer_of
from serving.history_cache import HistoryCache
from serving.live_histories import LiveHistories
from serving.live_models import LiveModels
from tests.helpers.learners import CONFIG, update
from tests.helpers.tiny import history, started_registry


@pytest.fixture
def registry(tmp_path) -> Registry:
    return started_registry(tmp_path / "store")


def answered_version(models: LiveModels) -> int:
    """Ask, and see that what answers is the stored version to the bit."""
    [answer] = asyncio.run(models.answer([Question(history([1, 2]), 5)], [None]))
    stored = models.registry.load(answer.version).encoder
    assert len(answer.items) == 5
    assert models.live.checksum == fingerprint(models.live.encoder) == fingerprint(stored)
    return answer.version


def fail(*arguments):
    raise MemoryError("no memory")


@pytest.mark.parametrize("step", ["encoder", "index", "fingerprint"])
def test_a_change_that_fails_half_way_is_in_no_answer(registry, monkeypatch, step):
    models = LiveModels(registry, RankingRules())
    delta = update(NearlineLearner(registry, CONFIG), 1)
    if step == "encoder":
        monkeypatch.setattr("lib.ranking.recommender.InferenceEncoder", fail)  # the weights have changed already
    else:
        monkeypatch.setattr(getattr(models.live, step), "update", fail)
    monkeypatch.setattr(models, "_load", fail)
    asyncio.run(models.apply(delta))
    with pytest.raises(NoModel):
        answered_version(models)
    assert asyncio.run(models.apply(delta)) is None  # the mixture takes no other delta
    monkeypatch.undo()
    assert answered_version(models) == 2
    assert (models.counts["mismatches"], models.counts["deltas"]) == (1, 0)


def test_a_replica_goes_back_to_no_older_version_where_newer_ones_are_damaged(registry, monkeypatch):
    models, learner = LiveModels(registry, RankingRules()), NearlineLearner(registry, CONFIG)
    for number in (1, 2, 3):
        update(learner, number)
    asyncio.run(models.catch_up(4))
    torn = Path(registry.store.path("deltas/0000000003"))
    torn.write_bytes(torn.read_bytes()[:-100])
    delta = update(learner, 4)
    with monkeypatch.context() as patch:
        patch.setattr(models.live.index, "update", fail)
        asyncio.run(models.apply(delta))
    assert registry.load().version == 2
    for _ in range(2):
        with pytest.raises(NoModel):
            answered_version(models)
        assert models.live.version == 4
    learner.store_whole()
    assert answered_version(models) == learner.version >= 5


def test_one_load_serves_all_who_wait_for_it(registry, monkeypatch):
    models, loads = LiveModels(registry, RankingRules()), []

    def load(*arguments: Any) -> Any:
        loads.append(arguments)
        raise MemoryError("no memory")

    async def ask_together() -> list[Any]:
        asked = [models.answer([Question(history([1, 2]), 5)], [None]) for _ in range(8)]
        return await asyncio.gather(*asked, return_exceptions=True)

    models.whole = False
    with monkeypatch.context() as patch:
        patch.setattr(models, "_load", load)
        assert {type(answer) for answer in asyncio.run(ask_together())} == {NoModel}
    assert len(loads) == 1
    assert {answers[0].version for answers in asyncio.run(ask_together())} == {1}


def test_a_delta_that_does_not_fit_is_refused_and_the_next_one_taken(registry):
    models, learner = LiveModels(registry, RankingRules()), NearlineLearner(registry, CONFIG)
    unfit = Delta(2, 1, "", 0, 25, np.zeros(0, dtype=np.int64), {"blocks.9.weight": np.zeros(3, np.float32)})
    asyncio.run(models.apply(unfit))
    assert answered_version(models) == 1
    asyncio.run(models.apply(update(learner, 1)))
    assert answered_version(models) == 2
    assert models.counts["deltas"] == 1


def test_a_replica_that_cannot_read_a_newer_release_stays_at_its_version(registry, monkeypatch):
    models, learner = LiveModels(registry, RankingRules()), NearlineLearner(registry, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr("lib.model.delta.FORMAT", 99)
        update(learner, 1)
    asyncio.run(models.catch_up(2))
    [answer] = asyncio.run(models.answer([Question(history([1, 2]), 5)], [None]))
    assert (answer.version, models.live.version) == (1, 1)


def test_without_a_whole_model_a_request_is_to_be_sent_again():
    async def answer() -> Response:
        return await answer_of(error)(Request({"type": "http"}), error)

    error = NoModel()
    answered = asyncio.run(answer())
    assert (answered.status_code, answered.headers["Retry-After"]) == (503, "1")


def test_questions_are_answered_between_the_deltas_of_a_catch_up(registry):
    async def scenario() -> list[int]:
        models = LiveModels(registry, RankingRules())
        learner = NearlineLearner(registry, CONFIG)
        for number in range(1, 9):
            update(learner, number)
        catching_up = asyncio.create_task(models.catch_up(9))
        answered = []
        while not catching_up.done():
            [answer] = await models.answer([Question(History(), k=3)], [None])
            answered.append(answer.version)
            await asyncio.sleep(0)
        await catching_up
        assert (models.live.version, models.live.checksum) == (9, learner.model.checksum)
        assert (models.counts["catch_ups"], models.counts["mismatches"]) == (1, 0)
        return answered

    answered = asyncio.run(scenario())
    assert answered == sorted(answered)
    assert len(set(answered) - {1, 9}) > 3, "versions in between have answered"


def test_a_delta_that_does_not_follow_ends_a_catch_up_with_a_whole_version(registry):
    """Where versions were damaged, a later one follows an earlier one than that before it."""

    async def scenario() -> None:
        models = LiveModels(registry, RankingRules())
        learner = NearlineLearner(registry, CONFIG)
        update(learner, 1)
        update(learner, 2)
        await models.catch_up(2)
        learner.adopt(registry.load(1), registry.load(1).facts)
        update(learner, 3)
        await models.catch_up(learner.version)
        assert (models.live.version, models.live.checksum) == (learner.version, learner.model.checksum)

    asyncio.run(scenario())


def test_a_mask_is_made_only_while_the_catalog_does_not_change(registry, monkeypatch):
    """It may be forgotten, on the thread that changes items, just after it was found to be known."""
    models = LiveModels(registry, RankingRules())
    filter = ItemFilter.of({"genres": "Comedy"})
    assert filter is not None
    made: list[bool] = []
    monkeypatch.setattr(models.live, "_mask", lambda _: made.append(models.unchanging.locked()) or np.ones(1, bool))
    monkeypatch.setattr(models.live, "is_checked", lambda _: True)
    assert isinstance(asyncio.run(models.check_filter(filter)), list)
    monkeypatch.setattr(models.live, "is_checked", lambda _: False)
    asyncio.run(models.check_filter(filter))
    assert made == [True]


DULL_LAST = {"bury": [{"filter": {"about": "dull"}}]}


def test_no_answer_waits_for_the_words_of_long_texts_but_that_of_a_filter_by_them(registry, monkeypatch):
    models, go_on = LiveModels(registry, RankingRules.model_validate(DULL_LAST)), threading.Event()
    read = WordIndex.catch_up

    async def scenario() -> None:
        await models.change_items([ItemChange(1, "i1", {"about": "short", "shelf": "front"})])
        by_word, by_shelf = ItemFilter.of({"about": "new"}), ItemFilter.of({"shelf": "back"})
        assert by_word is not None
        assert by_shelf is not None
        await models.check_filter(by_word)
        await models.check_filter(by_shelf)
        monkeypatch.setattr(WordIndex, "catch_up", lambda index: (go_on.wait(60), read(index)))
        text = "new dull" + " words" * SOON
        await models.change_items([ItemChange(2, "i2", {"about": text, "shelf": "back"})])
        [answer] = await models.answer([Question(history([1, 3]), 5)], [None])
        assert len(answer.items) == 5
        await models.check_filter(by_shelf)
        [answer] = await models.answer([Question(history([1, 3]), 5, by_shelf)], [None])
        assert [item.item_id for item in answer.items] == ["i2"]
        [answer] = await models.answer([Question(history([1, 3]), 5, by_word)], [None])  # it was checked before
        assert answer.items == []
        checking = asyncio.create_task(models.check_filter(by_word))
        await asyncio.sleep(0)
        assert not checking.done()
        go_on.set()
        await checking
        [answer] = await models.answer([Question(history([1, 3]), 5, by_word)], [None])
        assert [item.item_id for item in answer.items] == ["i2"]
        [answer] = await models.answer([Question(history([1, 3]), 100)], [None])
        assert answer.items[-1].item_id == "i2"  # the rule knows it, too

    asyncio.run(scenario())


def test_rules_are_bound_on_the_thread_that_changes_the_catalog(registry, monkeypatch):
    rules = RankingRules(**{"bury": [{"filter": {"shelf": "back"}}], "at_most": {"shelf": 2}})
    models, learner = LiveModels(registry, rules), NearlineLearner(registry, CONFIG)
    bind, threads = BoundRules.of, []

    def bound(*arguments: Any) -> BoundRules:
        threads.append(threading.current_thread().name.partition("_")[0])
        return bind(*arguments)

    monkeypatch.setattr(BoundRules, "of", bound)

    async def scenario() -> None:
        await models.change_items([ItemChange(1, "i1", {"shelf": "back"}), ItemChange(2, "new", {"shelf": "front"})])
        await models.answer([Question(history([1, 2]), 5)], [None])
        await models.apply(update(learner, 1, 1, 2, "new"))
        assert "new" in models.live.catalog.row_of
        [answer] = await models.answer([Question(history([1, 2]), 5)], [None])
        assert answer.version == 2

    asyncio.run(scenario())
    assert threads == ["changes", "changes"]


def test_changes_of_items_come_in_pages_and_all_of_them(registry, tmp_path):
    class Direct:
        """An aggregator, called without Ray."""

        def __init__(self, aggregator: Aggregator):
            self.newer = lambda users, revision, ask_for_items=True: aggregator.newer(users, revision)
            self.news = self.counters = lambda *_: {}
            self.items_counter = lambda: 1

    async def scenario() -> None:
        aggregator = Aggregator(str(tmp_path / "state"))
        count = 2 * MOST_CHANGES + 7
        await aggregator.change_items([(f"new-{number}", {"title": "New"}) for number in range(count)])
        _, first = await aggregator.newer([], 0)
        assert [change.revision for change in first] == list(range(1, MOST_CHANGES + 1))
        assert await aggregator.wait_until_due(0, count - 1, wait_ms=0)
        assert not await aggregator.wait_until_due(0, count, wait_ms=0)

        models = LiveModels(registry, RankingRules())
        direct: Any = Direct(aggregator)
        histories = LiveHistories(cast("Aggregators", direct), HistoryCache(10, 10), models)
        await histories.read(set())
        assert models.item_revision == count
        assert all(models.has_item(f"new-{number}") for number in (0, MOST_CHANGES, count - 1))
        await aggregator.close()

    asyncio.run(scenario())
