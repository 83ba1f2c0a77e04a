"""The models that answer in one replica: the live one, as it moves from version to version, and maybe a challenger.

A batch is answered in the event loop. On a thread of its own it would have to wait for Python's lock some forty times,
and a replica that refuses a thousand requests a second would hardly answer any. Deltas and catch-ups may take long and
run on a thread; a lock keeps them and the batches apart, so every answer is of one version.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from lib.data.catalog import Catalog
from lib.log.items import ItemChange
from lib.model.delta import Delta, DeltaMismatch
from lib.model.version_format import OtherFormat
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, Recommender, Relation
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from serving.challenger import Answer, Challenger
from serving.errors import NoModel

logger = logging.getLogger("ray.serve")


class LiveModels:
    """Answers questions between two changes of the live model (`live`) and of the catalog."""

    def __init__(self, registry: Registry, rules: RankingRules):
        self.registry = registry
        self.rules = rules
        self.unchanging = asyncio.Lock()  # held by whoever reads or changes the live model
        self.loading = asyncio.Lock()  # held while a version is loaded beside the one that answers
        self.changing_thread = ThreadPoolExecutor(1, thread_name_prefix="changes")
        self.loading_thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self.preparing_thread = ThreadPoolExecutor(1, thread_name_prefix="preparing")
        self.counts: Counter[str] = Counter()  # deltas, catch_ups, mismatches
        self.changed_items: dict[str, dict[str, Any] | None] = {}  # that were changed while live; None: deleted
        self.item_revision = 0  # the newest of them
        self.reading_texts: asyncio.Task[None] | None = None  # long ones that were put; who filters by them waits
        self.live = self._load({})
        self.whole = True  # False: a change failed half-way, and a version must be loaded before anything is answered
        self.mending: asyncio.Task[None] | None = None  # the load that those who find it not whole wait for
        self.challenger: Challenger | None = None

    def _load(
        self, changed_items: Mapping[str, Mapping[str, Any] | None], before: Recommender | None = None
    ) -> Recommender:
        loaded = self.registry.load()
        for damage in loaded.damage:
            logger.warning("version %d is the newest whole one: %s", loaded.version, damage)
        recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset, self.rules)
        recommender.change_items(changed_items)
        recommender.prepare(before)
        return recommender

    async def _change(self, function: Callable[[], Any]) -> Any:
        """Run on the thread that may change the live model, while nobody reads it."""
        async with self.unchanging:
            return await asyncio.get_running_loop().run_in_executor(self.changing_thread, function)

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[Recommender]:
        """Have the live model within the block, unchanging and whole.

        Raises:
            NoModel: a change failed half-way, and no version can be loaded in its place yet.
        """
        if not self.whole:
            await self._mend()
        async with self.unchanging:
            if not self.whole:
                raise NoModel
            yield self.live

    async def _mend(self) -> None:
        """Load a version in place of a mixture; whoever comes while it is loaded waits for the same load."""
        if self.mending is None or self.mending.done():
            self.mending = asyncio.create_task(self.catch_up(self.live.version))
        await asyncio.shield(self.mending)

    # --------------------------------------------------------------------------------------------------------- answers

    async def answer(self, questions: Sequence[Question], user_ids: Sequence[str | None]) -> list[Answer]:
        """Answer a batch; a user's id says in which arm of an experiment they are, None in none."""
        async with self._answering() as live:
            if self.challenger is not None:
                return self.challenger.answer(live, questions, user_ids)
            version = live.version
            return [Answer(version, items) for items in live.recommend(questions)]

    async def similar(self, item_id: str, k: int, relation: Relation) -> Answer:
        """Return the items that are similar to an item, or are taken together with it.

        Raises:
            KeyError: the catalog does not have the item.
            InputError: the model does not know what is taken together.
        """
        async with self._answering() as live:
            return Answer(live.version, live.similar(item_id, k, relation=relation))

    async def check_filter(self, filter: ItemFilter) -> list[str]:
        """Refuse a filter that does not go with the catalog: it is the asker's error, not the batch's.

        Returns:
            What is to be noted in the answer.

        Raises:
            InputError: it names the attribute.
        """
        reading = self._read_late_texts()
        if reading and not all(known.table.is_prepared(filter.conditions) for known in self._catalogs()):
            await asyncio.shield(reading)
        for catalog in self._catalogs():
            if not catalog.table.is_prepared(filter.conditions):
                known = {name: value for name, value in filter.conditions.items() if name in catalog.table.kinds}
                prepare = partial(catalog.table.prepare, known)
                await asyncio.get_running_loop().run_in_executor(self.preparing_thread, prepare)
        if self.live.is_checked(filter):
            return filter.notes(self.live.catalog)  # no mask is made here, where the catalog may change meanwhile
        return await self._change(lambda: self.live.check(filter))

    def knows(self, filter: ItemFilter) -> bool:
        """Return whether an item of the catalog has had each attribute that a filter names."""
        return filter.conditions.keys() <= self.live.catalog.table.kinds.keys()

    async def run_challenger(self, challenger: Challenger) -> None:
        """Let an experiment run to its end, after which there is one model again."""
        try:
            await challenger.run()
        except Exception:
            logger.exception("a challenger failed, so the live model answers its users, too")
        self.challenger = None

    # ----------------------------------------------------------------------------------------------------------- items

    def has_item(self, item_id: str) -> bool:
        """Return whether the catalog has an item now, with or without a row."""
        put = self.changed_items.get(item_id) is not None
        return put or any(item_id in known.row_of and item_id not in known.removed for known in self._catalogs())

    def _catalogs(self) -> list[Catalog]:
        """Return the catalogs of all models that answer."""
        return [model.catalog for model in (self.live, self.challenger and self.challenger.recommender) if model]

    async def served_kinds(self, columns: Collection[str]) -> dict[str, str]:
        """Return the kinds that attributes have in the catalog that was loaded; the item log has those put since."""
        async with self.unchanging:
            return self.live.catalog.table.loaded_kinds(columns)

    async def change_items(self, changes: Sequence[ItemChange]) -> None:
        """Make changes of items part of the catalog, whatever version answers."""
        await self._change(partial(self._change_items, changes))
        self._read_late_texts()

    def _read_late_texts(self) -> asyncio.Task[None] | None:
        """Start to read long texts where there are any; return what ends once they are read."""
        if (self.reading_texts is None or self.reading_texts.done()) and self._are_late():
            self.reading_texts = asyncio.create_task(self._read_texts())
        return self.reading_texts

    def _are_late(self) -> bool:
        return any(catalog.table.late for catalog in self._catalogs())

    async def _read_texts(self) -> None:
        """Have items found by the long texts that they were put with; all is answered meanwhile, as if without them."""
        loop = asyncio.get_running_loop()
        try:
            while self._are_late():
                for catalog in self._catalogs():
                    await loop.run_in_executor(self.preparing_thread, catalog.table.catch_up)
                await self._change(self._caught_up)
        except Exception:  # no memory, say: the next change or filter tries again
            logger.exception("long texts of items are not indexed yet")

    def _caught_up(self) -> None:
        self.live.caught_up()
        if self.challenger is not None:
            self.challenger.caught_up()

    def _change_items(self, changes: Sequence[ItemChange]) -> None:
        # two reads may come back in the other order: what is older than what is known was answered already
        items = {change.item_id: change.attributes for change in changes if change.revision > self.item_revision}
        self.live.change_items(items, texts_later=True)
        if self.challenger is not None:
            self.challenger.change_items(items)
        self.changed_items |= items
        self.item_revision = max(self.item_revision, changes[-1].revision)

    # -------------------------------------------------------------------------------------------------------- versions

    async def read_delta(self, data: bytes) -> Delta:
        """Read a pushed delta while questions are answered; those that are read one after another stay in order.

        Raises:
            DeltaMismatch, OtherFormat: as Delta.from_bytes.
        """
        return await asyncio.get_running_loop().run_in_executor(self.changing_thread, Delta.from_bytes, data)

    async def apply(self, delta: Delta) -> None:
        """Move to a pushed delta's version between two batches, if the delta follows the live one."""
        await self._change(partial(self._apply_next, delta))
        await self.catch_up(self.live.version)

    def _apply_next(self, delta: Delta) -> None:
        self.counts["deltas"] += self._apply_following(delta)

    def _apply_following(self, delta: Delta) -> bool:
        """Move to a delta's version if it follows the live one; else it is known, or one before it was missed."""
        return self.whole and delta.parent == self.live.version and self._apply(delta)

    def _apply(self, delta: Delta) -> bool:
        """Move to a delta's version; returns False where that fails, and a version must be loaded whole."""
        try:
            self.live.apply(delta)
        except Exception as error:  # whatever it is, the weights may be of two versions now
            logger.warning("version %d was not applied, so the newest one is loaded whole: %r", delta.version, error)
            self.counts["mismatches"] += 1
            self.whole = False
        return self.whole

    async def catch_up(self, version: int) -> None:
        """Move to a version by way of the registry, if a push was missed or failed, or the version is a new base.

        Where it cannot be read the replica stays as it is; it is told of the version again in a moment.
        """
        if self._has(version):
            return
        async with self.loading:
            if self._has(version):
                return
            self.counts["catch_ups"] += self.whole
            while self.whole and self.live.version < version and await self._apply_missing(self.live.version + 1):
                continue
            if self._has(version):
                return
            try:
                await self._replace()
            except Exception as error:  # a damaged file, a disk that is away, no memory: tried again
                logger.error("version %d cannot be loaded: %s", version, error)

    def _has(self, version: int) -> bool:
        return self.whole and self.live.version >= version

    async def _apply_missing(self, version: int) -> bool:
        """Apply a delta that is missing; returns False where one cannot be read or applied, or does not follow.

        It is read while questions are answered, and so they are between this delta and the next.
        """
        loop = asyncio.get_running_loop()
        try:
            delta = await loop.run_in_executor(self.loading_thread, self.registry.read_delta, version)
        except (FileNotFoundError, DeltaMismatch, OtherFormat) as error:
            logger.warning("loading the newest version beside this one: %s", error)
            return False
        return await self._change(partial(self._apply_following, delta)) or self._has(version)

    async def _replace(self) -> None:
        """Load the newest version beside the one that answers; it takes over between two batches."""
        changed = dict(self.changed_items)
        loop = asyncio.get_running_loop()
        recommender = await loop.run_in_executor(self.loading_thread, self._load, changed, self.live)
        await self._change(partial(self._take_over, recommender, changed))
        self._read_late_texts()

    def _take_over(self, recommender: Recommender, changed: Mapping[str, Mapping[str, Any] | None]) -> None:
        if self._has(recommender.version):
            return
        if recommender.version < self.live.version:  # newer ones are damaged; the learner stores one whole
            logger.error(
                "nothing is answered until a version from %d on can be loaded: version %d would be a step back",
                self.live.version,
                recommender.version,
            )
            return
        while_loaded = {
            item_id: attributes
            for item_id, attributes in self.changed_items.items()
            if item_id not in changed or changed[item_id] is not attributes
        }
        recommender.change_items(while_loaded, texts_later=True)
        self.live, self.whole = recommender, True
