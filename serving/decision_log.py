"""The record of explored answers: which items stood where, with what propensity, for off-policy evaluation.

One line of JSON an answer, in files of each replica; the events that name an answer's `request_id` are its reactions.
`lib/ranking/off_policy.py` has the estimator that reads them (`estimated_value`).
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from lib.errors import InputError
from lib.ranking.recommender import RankedItem

FOLDER = "decisions"
FILES = 8  # that the room of all replicas is divided into; the oldest one goes first
logger = logging.getLogger("ray.serve")


class DecisionLog:
    """Appends to <state>/decisions/<replica>-<number>.jsonl; a line is handed to the system as its answer is made.

    A file is full at an eighth of `keep_bytes`. Then the next one begins, and the oldest ones of all replicas are
    deleted, those of replicas that are gone among them, so that all files together take no more than that.
    """

    def __init__(self, state: str, replica_id: str, keep_bytes: int):
        """Open a new file.

        Raises:
            InputError: the state is not in a folder.
        """
        if "://" in state:
            raise InputError("exploration_temperature: exploring needs --state in a folder, where its answers are kept")
        self.folder = Path(state) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.replica_id = replica_id
        self.keep_bytes = keep_bytes
        self.unrecorded = 0  # answers that could not be written
        self._number = 0
        self._size = 0  # bytes of the newest file
        self._file: TextIOWrapper | None = None

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
        line = json.dumps(decision) + "\n"  # in ASCII: a byte a character
        try:
            self._open().write(line)
            self._size += len(line)
        except OSError as error:
            self.unrecorded += 1
            logger.error("an explored answer could not be recorded: %s", error)

    def _open(self) -> TextIOWrapper:
        """Return the file that takes the next line: a new one where the last is full, or another replica deleted it."""
        if self._file is not None and self._size < self.keep_bytes // FILES and self._path.exists():
            return self._file
        if self._file is not None:
            self._file.close()
        self._make_room()
        self._number += 1
        self._file = self._path.open("a", buffering=1)
        self._size = self._path.stat().st_size
        return self._file

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.replica_id}-{self._number:06d}.jsonl"

    def _make_room(self) -> None:
        """Delete the oldest files, as many as leave room for a full one."""
        found = []
        for path in self.folder.glob("*.jsonl"):
            with suppress(FileNotFoundError):  # another replica makes room, too
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken <= self.keep_bytes - self.keep_bytes // FILES:
                break
            path.unlink(missing_ok=True)
            taken -= size
