"""The model whose weights stay as they were before the first click: what the live weights are compared with."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from lib.data.history import History
from lib.ranking.recommender import Question, Recommender
from lib.retrieval.index import use_threads

Frozen = Callable[[list[History], int], list[list[str]]]
"""(histories, oldest event first, k) -> k item ids a history, best first, seen items left out."""


def frozen_model(model: Path) -> Frozen:
    """Load a model that answers and does not learn."""
    use_threads(1)  # the cores belong to the service
    recommender = Recommender.load(model)
    busy = threading.Lock()

    def recommend(histories: list[History], k: int) -> list[list[str]]:
        with busy:
            answers = recommender.recommend([Question(history, k) for history in histories])
        return [[item.item_id for item in items] for items in answers]

    return recommend


class FrozenBatches:
    """Asks the frozen model for all histories that wait at once, in a thread."""

    def __init__(self, frozen: Frozen, k: int):
        self.frozen, self.k = frozen, k
        self.waiting: list[tuple[History, asyncio.Future[list[str]]]] = []
        self.running = asyncio.Lock()

    async def top(self, history: History) -> list[str]:
        """Return the k item ids of a history."""
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self.waiting.append((history, answer))
        async with self.running:
            # whoever gets here first answers for all that wait; the others find their answer done
            if not answer.done():
                batch, self.waiting = self.waiting, []
                tops = await asyncio.to_thread(self.frozen, [history for history, _ in batch], self.k)
                for (_, waiting), top in zip(batch, tops, strict=True):
                    waiting.set_result(top)
        return answer.result()
