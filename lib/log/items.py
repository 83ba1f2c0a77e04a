"""The durable record of items that were put or deleted while live: the newest state of each, in the order of change.

It is small beside the feedback log and seldom written: one SQLite file, one transaction and fsync per call. Its single
writer decides of what kind the values of each attribute are, keeps that beside the items, and refuses what does not
fit: all who read the record can rely on it, whichever of two concurrent puts came first.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lib.data.attribute_kinds import widened, wider_kinds
from lib.data.events import CONTROL_CHARACTERS
from lib.errors import InputError
from lib.log.errors import write_error
from lib.log.write_ahead_log import last_commit_is_torn
from lib.sqlite import Database

# A change replaces the item's earlier one, so a new reader reads each item once. The newest change of all is never
# replaced, so the highest revision in the table is the last one that was given.
SCHEMA = """
CREATE TABLE IF NOT EXISTS items(item_id TEXT PRIMARY KEY, revision INTEGER NOT NULL UNIQUE, attributes TEXT);
"""
COLUMNS = "CREATE TABLE IF NOT EXISTS columns(name TEXT PRIMARY KEY, kind TEXT NOT NULL)"
PUT = """
INSERT INTO items(item_id, revision, attributes) VALUES(?, ?, ?)
ON CONFLICT(item_id) DO UPDATE SET revision = excluded.revision, attributes = excluded.attributes
"""

PUT_COLUMN = "INSERT INTO columns VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET kind = excluded.kind"
MOST_COLUMNS = 1000  # attributes of all items together
LONGEST_NAME = 256  # characters of an attribute's name
LARGEST_ITEM = 100_000  # characters of an item's attributes as JSON: each word of them is indexed in every process


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
        self._appending = threading.Lock()
        self.torn = last_commit_is_torn(path)
        self._database = Database(path, "rwc", self._error)
        with self._database.opening():
            self._database.connection.execute(SCHEMA)
            self._database.connection.execute(COLUMNS)
        self.revision: int = self._database.rows("SELECT COALESCE(MAX(revision), 0) FROM items")[0][0]
        self.kinds: dict[str, str] = dict(self._database.rows("SELECT name, kind FROM columns"))
        if not self.kinds:  # made before kinds were kept
            self.kinds = self._kinds_of_items()

    def append(
        self, items: Sequence[tuple[str, dict[str, Any] | None]], served: Mapping[str, str] | None = None
    ) -> int:
        """Make items with their attributes durable, None for a deleted one; return the newest revision.

        Args:
            items: each with all of its attributes.
            served: the kinds that these attributes have in the catalog that is served (lib/data/attribute_kinds.py).

        Raises:
            InputError: an attribute is not of the kind that it has for other items; nothing of the call is recorded.
            LogWriteError: the file could not be written; nothing of the call is recorded then.
        """
        with self._appending:
            revision = self.revision
            try:
                with self._database.transaction() as connection:
                    changed = self._changed_kinds(items, served or {})
                    connection.executemany(PUT_COLUMN, changed.items())
                    for item_id, attributes in items:
                        revision += 1
                        text = None if attributes is None else json.dumps(attributes)
                        connection.execute(PUT, (item_id, revision, text))
            except sqlite3.Error as error:
                raise write_error(f"item log {self.path}", error) from error
            self.revision = revision
            self.kinds |= changed
            return revision

    def _changed_kinds(
        self, items: Sequence[tuple[str, dict[str, Any] | None]], served: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the kinds that attributes have from this call on, where they are new or wider."""
        # what is served was trained with, so its kinds go before those of a record that contradicts it
        kinds = self.kinds | {name: widened(self.kinds.get(name), kind) or kind for name, kind in served.items()}
        for item_id, attributes in items:
            for name in attributes or ():
                _check_name(name)
            kinds |= wider_kinds(item_id, attributes or {}, kinds)
            if (size := len(json.dumps(attributes, ensure_ascii=False))) > LARGEST_ITEM:
                raise InputError(
                    f"items: the attributes of item {item_id!r} have {size} characters, more than {LARGEST_ITEM};"
                    " leave out what is neither shown nor filtered by"
                )
        if len(kinds) > max(MOST_COLUMNS, len(self.kinds)):
            raise InputError(
                f"items: {len(kinds)} different attributes are more than the {MOST_COLUMNS} that a catalog may have;"
                " put values under fewer names, such as a list of texts"
            )
        return {name: kind for name, kind in kinds.items() if self.kinds.get(name) != kind}

    def _kinds_of_items(self) -> dict[str, str]:
        """Return the kinds of the recorded attributes; where they contradict each other, the oldest one's."""
        kinds: dict[str, str] = {}
        for change in self.after(0):
            for name, value in (change.attributes or {}).items():
                with suppress(InputError):
                    kinds |= wider_kinds(change.item_id, {name: value}, kinds)
        return kinds

    def after(self, revision: int, limit: int = -1) -> list[ItemChange]:
        """Return the first `limit` items (-1: all) that changed after a revision, by their newest change."""
        found = self._database.rows(
            "SELECT revision, item_id, attributes FROM items WHERE revision > ? ORDER BY revision LIMIT ?",
            revision,
            limit,
        )
        return [ItemChange(r, item_id, None if text is None else json.loads(text)) for r, item_id, text in found]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _error(self, error: sqlite3.Error) -> InputError:
        return InputError(f"item log {self.path} cannot be used: {error}; free the disk or restore a copy")


def _check_name(name: str) -> None:
    """Refuse a name that no message can show: it would be in the notes and warnings of everybody else."""
    if len(name) > LONGEST_NAME:
        raise InputError(f"{name[:LONGEST_NAME]}...: a name has at most {LONGEST_NAME} characters")
    if not name.strip() or re.search(CONTROL_CHARACTERS, name):
        raise InputError(f"{name!r}: a name is not blank and has no control characters; give the attribute another one")
