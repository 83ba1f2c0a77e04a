"""The catalog: item ids and their rows, with the attributes that filters and titles need.

Row 0 is padding. Items get rows 1, 2, 3, ... in the order in which they came and keep them for good, so that a row is
the same item in every version of the weights.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.data.attribute_kinds import TEXT, TEXTS
from lib.data.column_index import SOON, words_of
from lib.data.conditions import check_condition
from lib.data.item_table import ItemTable
from lib.data.text_splits import split_of
from lib.errors import InputError

TITLE_COLUMNS = ("title", "name")
REMOVED = b"afterclick.removed"  # key of the removed items in the metadata of catalog.parquet
SPLITS = b"afterclick.splits"  # key of how each text column is split into parts
MOST_LIKES = 2000  # lines that are looked at for one item; what has more says little
TEXT_KINDS = (TEXT, TEXTS)


class Catalog:
    """Item ids <-> rows, a table of attributes, and what was removed; no row is ever given up."""

    def __init__(
        self,
        item_ids: Iterable[str] = (),
        attributes: pa.Table | None = None,
        removed: Iterable[str] = (),
        splits: Mapping[str, str] | None = None,
    ):
        self.item_ids: list[str] = [""]
        self.row_of: dict[str, int] = {}
        self.table = ItemTable(attributes)
        self._splits = dict(splits or {})  # of text columns, see lib/data/text_splits.py
        self.removed = set(removed)  # never recommended; they keep their rows
        self.changes = 0  # how often items were added, described or removed
        self._row_of_line = np.zeros(len(self.table), dtype=np.int32)  # 0: its item has no row, or another line now
        self.extend(item_ids)
        self.titles = _titles(attributes)

    @classmethod
    def of_dataset(cls, item_ids: Iterable[str], items: pa.Table | None) -> "Catalog":
        """Make a catalog of the items of a dataset's events, then of those that only its items table has."""
        catalog = cls(item_ids, items)
        if items is not None:
            catalog.extend(items["item_id"].to_pylist())
        return catalog

    @property
    def attributes(self) -> pa.Table | None:
        """One line for each item that has any attributes, keyed by item_id; made anew after a change."""
        return self.table.table()

    def rows_of_loaded(self) -> np.ndarray:
        """Return for each line of `table.loaded` the row of its item; 0 where it has none, or was changed since."""
        return self._row_of_line[: 0 if self.table.loaded is None else len(self.table.loaded)]

    def __len__(self) -> int:
        """Return the number of items; rows 1..len(catalog) are in use."""
        return len(self.row_of)

    def extend(self, item_ids: Iterable[str]) -> list[str]:
        """Give each unknown item a row; return the new ones, in order."""
        new = []
        for item_id in item_ids:
            if item_id in self.row_of:
                continue
            row = self.row_of[item_id] = len(self.item_ids)
            self.item_ids.append(item_id)
            if (line := self.table.line_of.get(item_id)) is not None:
                self._row_of_line[line] = row
            new.append(item_id)
        self.changes += bool(new)
        return new

    def shorten(self, items: int) -> None:
        """Take back the rows of all items but the first so many."""
        for item_id in self.item_ids[items + 1 :]:
            del self.row_of[item_id]
            if (line := self.table.line_of.get(item_id)) is not None:
                self._row_of_line[line] = 0
        del self.item_ids[items + 1 :]
        self.changes += 1

    def rows(self, item_ids: Iterable[str]) -> list[int]:
        """Return the rows of those items that have one."""
        return [self.row_of[item_id] for item_id in item_ids if item_id in self.row_of]

    def change(self, items: Mapping[str, Mapping[str, Any] | None], texts_later: bool = False) -> None:
        """Give items other attributes, or remove them (None); a removed item that gets attributes is back.

        What is changed is found by its texts at once; `texts_later` leaves those that take long to `catch_up`.
        Only `extend` gives rows, so an item may be described before it has one. An attribute that does not fit its
        column is left out, counted (`table.skipped`) and logged: the item log (lib/log/items.py) has refused such.
        """
        for item_id, attributes in items.items():
            if attributes is None:
                self.removed.add(item_id)
                continue
            self._describe(item_id, attributes)
            self.removed.discard(item_id)
        self.table.catch_up(SOON if texts_later else None)
        self.changes += 1

    def caught_up(self) -> None:
        """Note that items are found by texts that were left for later: what was read of the catalog is out of date."""
        self.changes += 1

    def _describe(self, item_id: str, attributes: Mapping[str, Any]) -> None:
        before = self.table.line_of.get(item_id)
        line = self.table.put(item_id, attributes)
        if line >= len(self._row_of_line):
            self._row_of_line = np.concatenate([self._row_of_line, np.zeros(line + 64, dtype=np.int32)])
        if before is not None:
            self._row_of_line[before] = 0
        self._row_of_line[line] = self.row_of.get(item_id, 0)
        title = next((attributes[name] for name in TITLE_COLUMNS if attributes.get(name) is not None), None)
        if title is None:
            self.titles.pop(item_id, None)
        else:
            self.titles[item_id] = str(title)

    def described(self, item_ids: Sequence[str]) -> "Catalog":
        """Return a catalog of these items alone."""
        return Catalog(item_ids, self.table.select(item_ids), splits=self.all_splits())

    def joined(self, other: "Catalog") -> "Catalog":
        """Return the items of this catalog in their rows, then those that only the other has, as that describes them.

        Raises:
            InputError: an attribute has another type in the other catalog.
        """
        missing = [item_id for item_id in other.item_ids[1:] if item_id not in self.row_of]
        described = [self.attributes, other.table.select(missing) if missing else None]
        tables = [table for table in described if table is not None]
        try:
            attributes = pa.concat_tables(tables, promote_options="permissive") if tables else None
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"catalog: two models describe their items in different types ({error})") from error
        splits = other.all_splits() | self.all_splits()
        return Catalog([*self.item_ids[1:], *missing], attributes, self.removed | other.removed, splits)

    def split(self, column: str) -> str:
        """Return how a text column is split into parts; one that no model was trained with, by its texts of now."""
        known = self.all_splits()
        if column in known:
            return known[column]
        assert self.attributes is not None, "a column is of a table"
        return split_of(self.attributes[column].to_pylist())

    def all_splits(self) -> dict[str, str]:
        """Return how each text column that was loaded is split; decided once, on what was loaded, and saved with it."""
        loaded = self.table.loaded
        for column, kind in self.table.loaded_kinds(self.table.columns).items():
            if kind == TEXT and column not in self._splits and column != "item_id" and loaded is not None:
                self._splits[column] = split_of(loaded[column].to_pylist())
        return self._splits

    def _likes_columns(self) -> list[str]:
        kinds = self.table.kinds
        return [name for name, kind in kinds.items() if kind in TEXT_KINDS and name not in ("item_id", *TITLE_COLUMNS)]

    def prepare_likes(self) -> None:
        """Make the indexes that `likes` needs: it takes seconds where there are a million items."""
        for column in self._likes_columns():
            self.table.words(column)

    def likes(self, item_id: str, known: int) -> np.ndarray:
        """Return (R,) of the rows up to `known` those most like an item, by the words of texts and members of lists.

        Rare words say more, and come first. Words of so many items that looking at each takes long only choose among
        those that the rarer words have found.
        """
        words, attributes = [], self.table.attributes_of(item_id)
        for column in attributes.keys() & self._likes_columns():
            value, index = attributes[column], self.table.words(column)
            for word in dict.fromkeys(words_of(value) if isinstance(value, str) else value):
                if 1 < (count := index.count(word)) <= len(self) / 2:
                    words.append((count, column, word))
        room, own, found = MOST_LIKES, self.row_of.get(item_id, 0), []
        words.sort()
        while words and (words[0][0] <= room or not found):
            count, column, word = words.pop(0)
            lines = self.table.words(column).lines([word])
            lines = lines[:: -(-len(lines) // MOST_LIKES)]
            rows = self._row_of_line[lines]
            found.append((np.log(len(self) / count), lines[(rows > 0) & (rows != own) & (rows <= known)]))
            room -= count
        if not any(len(lines) for _, lines in found):
            return np.zeros(0, dtype=np.int64)
        weights = np.repeat([weight for weight, _ in found], [len(lines) for _, lines in found])
        lines, places = np.unique(np.concatenate([lines for _, lines in found]), return_inverse=True)
        shared = np.bincount(places, weights)
        alike = lines[shared >= shared.max() - 1e-9]
        for _, column, word in words:
            holding = self.table.words(column).holds(word, alike)
            alike = alike[holding] if holding.any() else alike
        return np.sort(self._row_of_line[alike]).astype(np.int64)

    def mask(self, conditions: Mapping[str, Any]) -> np.ndarray:
        """Return (len + 1,) bool: the rows whose item meets every condition of a filter.

        A condition is a value, a list of admissible values, or {"min": x, "max": y}. A text matches as a whole, by one
        of its parts between | , ; or by one of its words, so {"genres": "Comedy"} finds "Comedy Drama"; a list matches
        by one of its members. An attribute that no item has ever had matches nothing.

        Raises:
            InputError: a condition has another form, or does not go with the values of its attribute.
        """
        keep = np.zeros(len(self.item_ids), dtype=bool)
        keep[self._row_of_line[: len(self.table)]] = True
        for column, condition in conditions.items():
            check_condition(column, condition)
            meets = np.zeros(len(keep), dtype=bool)
            meets[self._row_of_line[self.table.lines(column, condition)]] = True
            keep &= meets
        keep[0] = False
        return keep

    def save(self, path: Path) -> None:
        """Write catalog.parquet: one line for each item in the order of the rows, with its attributes."""
        table = pa.table({"item_id": pa.array(self.item_ids[1:], pa.string())})
        attributes = self.attributes
        if attributes is not None:
            places = pc.index_in(table["item_id"], attributes["item_id"].combine_chunks())
            columns = attributes.drop_columns(["item_id"]).take(places)
            for name in columns.column_names:
                table = table.append_column(name, columns[name])
        said = {REMOVED: json.dumps(sorted(self.removed)), SPLITS: json.dumps(self.all_splits())}
        pq.write_table(table.replace_schema_metadata(said), path)

    @classmethod
    def load(cls, path: Path) -> "Catalog":
        """Read catalog.parquet."""
        table = pq.read_table(path)
        said = table.schema.metadata or {}
        removed, splits = json.loads(said.get(REMOVED, b"[]")), json.loads(said.get(SPLITS, b"{}"))
        return cls(table["item_id"].to_pylist(), table if table.num_columns > 1 else None, removed, splits)


def _titles(attributes: pa.Table | None) -> dict[str, str]:
    titles: dict[str, str] = {}
    for column in reversed(TITLE_COLUMNS):  # the first that an item has says its title, as where it is put
        if attributes is not None and column in attributes.column_names:
            pairs = zip(attributes["item_id"].to_pylist(), attributes[column].to_pylist(), strict=True)
            titles |= {item_id: str(title) for item_id, title in pairs if title is not None}
    return titles
