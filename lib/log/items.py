"""The durable record of items that were put or deleted while live: the newest state of each, in the order of change.

It is small beside the feedback log and seldom written: one SQLite file, one transaction and fsync per call.
"""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import InputError
from lib.log.errors import write_error
from lib.log.write_ahead_log import last_commit_is_torn
from lib.sqlite import Database

# A change replaces the item's earlier one, so a new reader reads each item once. The newest change of all is never
# replaced, so the highest revision in the table is the last one that was given.
SCHEMA = """
CREATE TABLE IF NOT EXISTS items(item_id TEXT PRIMARY KEY, revision INTEGER NOT NULL UNIQUE, attributes TEXT);
"""
PUT = """
INSERT INTO items(item_id, revision, attributes) VALUES(?, ?, ?)
ON CONFLICT(item_id) DO UPDATE SET revision = excluded.revision, attributes = excluded.attributes
"""


class ItemChange(NamedTuple):
    """The state of an item since a revision."""

    revision: int
    item_id: str
    attributes: dict[str, Any] | None  # None: it is deleted


class ItemLog:
    """Writes and reads the record; thread-safe.

    Raises:
        InputError: the file cannot be used; the message names it.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.torn = last_commit_is_torn(path)
        self._database = Database(path, "rwc", self._error)
        with self._database.opening():
            self._database.connection.execute(SCHEMA)
        self.revision: int = self._database.rows("SELECT COALESCE(MAX(revision), 0) FROM items")[0][0]

    def append(self, items: Sequence[tuple[str, dict[str, Any] | None]]) -> int:
        """Make items with their attributes durable, None for a deleted one; return the newest revision.

        Raises:
            LogWriteError: the file could not be written; nothing of the call is recorded then.
        """
        revision = self.revision
        try:
            with self._database.transaction() as connection:
                for item_id, attributes in items:
                    revision += 1
                    text = None if attributes is None else json.dumps(attributes)
                    connection.execute(PUT, (item_id, revision, text))
        except sqlite3.Error as error:
            raise write_error(f"item log {self.path}", error) from error
        self.revision = revision
        return revision

    def after(self, revision: int) -> list[ItemChange]:
        """Return the items that changed after a revision, in the order of their newest change."""
        found = self._database.rows(
            "SELECT revision, item_id, attributes FROM items WHERE revision > ? ORDER BY revision", revision
        )
        return [ItemChange(r, item_id, None if text is None else json.loads(text)) for r, item_id, text in found]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _error(self, error: sqlite3.Error) -> InputError:
        return InputError(f"item log {self.path} cannot be used: {error}; free the disk or restore a copy")
