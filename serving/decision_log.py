"""The record of explored answers: which items stood where, with what propensity, for off-policy evaluation.

One line of JSON an answer, in a file of each replica; the events that name an answer's `request_id` are its reactions.
`lib/ranking/off_policy.py` has the estimator that reads them (`estimated_value`).
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.ranking.recommender import RankedItem

FOLDER = "decisions"
logger = logging.getLogger("ray.serve")


class DecisionLog:
    """Appends to <state>/decisions/<replica>.jsonl; a line is handed to the system as soon as its answer is made."""

    def __init__(self, state: str, replica_id: str):
        """Open the file.

        Raises:
            InputError: the state is not in a folder.
        """
        if "://" in state:
            raise InputError("exploration_temperature: exploring needs --state in a folder, where its answers are kept")
        path = Path(state) / FOLDER / f"{replica_id}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self.unrecorded = 0  # answers that could not be written

    def append(
        self, request_id: str, user_id: str | None, version: int, items: Sequence[RankedItem], arm: str | None = None
    ) -> None:
        """Record one answer whose items have propensities; `arm` is that of two models side by side.

        An answer that a full disk does not take is given all the same, and counted.
        """
        decision = {
            "request_id": request_id,
            "user_id": user_id,
            "model_version": version,
            "arm": arm,
            "time": time.time_ns() // 1_000_000,
            "items": [item.item_id for item in items],
            "scores": [item.score for item in items],
            "propensities": [item.propensity for item in items],
        }
        try:
            self._file.write(json.dumps(decision) + "\n")
        except OSError as error:
            self.unrecorded += 1
            logger.error("an explored answer could not be recorded: %s", error)
