"""What a replica knows of users and items, brought up to date before every batch.

One call to each aggregator that is concerned, or none where the boards say that nothing has changed.
"""

import logging
from collections.abc import Set

from ray.exceptions import RayActorError

from lib.data.history import History
from lib.log.errors import LogUnavailable
from serving.aggregator import MOST_CHANGES
from serving.aggregators import Aggregators
from serving.history_cache import HistoryCache, last_offsets
from serving.live_models import LiveModels

WARMED_TOGETHER = 32  # users whose histories are fetched in one call: no one else waits for long
logger = logging.getLogger("ray.serve")


class LiveHistories:
    """Reads users' histories, and has the models take over what changed of the items."""

    def __init__(self, aggregators: Aggregators, cache: HistoryCache, models: LiveModels):
        self.aggregators = aggregators
        self.cache = cache
        self.models = models
        self.items_counter: int | None = None  # of changes, before those of the catalog were asked for

    async def read(self, user_ids: Set[str]) -> dict[str, History]:
        """Return these users' histories as the aggregators have them now; the catalog is as new then.

        Raises:
            TimeoutError: an aggregator does not answer.
        """
        self.cache.take(self.aggregators.news())
        counters, items = self.aggregators.counters(user_ids), self.aggregators.items_counter()
        histories, lacking = self.cache.split(user_ids, counters)
        items_known = items is not None and items == self.items_counter
        if not lacking and items_known:
            return histories
        revision = self.models.item_revision
        newer, changes = await self.aggregators.newer(last_offsets(lacking), revision, not items_known)
        while changes:
            await self.models.change_items(changes)
            more = len(changes) >= MOST_CHANGES
            _, changes = await self.aggregators.newer([], changes[-1].revision) if more else ([], [])
        self.items_counter = items
        return histories | self.cache.update(lacking, newer, counters)

    async def warm_up(self) -> None:
        """Copy the histories of those who acted last, so that their first question takes no longer than the next."""
        try:
            users = (await self.aggregators.latest_users())[: self.cache.users]
            for start in range(0, len(users), WARMED_TOGETHER):
                await self.read({*users[start : start + WARMED_TOGETHER]})
        except (TimeoutError, RayActorError, LogUnavailable) as error:
            logger.warning("copies of histories are made as users ask: %r", error)
