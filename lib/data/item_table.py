"""The attributes of items: a table that was loaded, and the items that were put since, with an index of each column.

A put costs the same however many came before it: it goes beside the table, which never changes, and into the indexes
that were made so far, the words of much text a little later. Readers never fail on a value that does not fit its
column: it is left out, counted and logged.
"""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lib.data.attribute_kinds import NUMBER, TEXT, TEXTS, TYPES, WHOLE, fitting, kind_of_type
from lib.data.column_index import NO_LINES, NumberIndex, WordIndex, as_numbers
from lib.data.conditions import bounds_of, numbers_of, texts_of, values_of
from lib.errors import InputError

MOST_LOGGED = 20  # attributes that are left out
logger = logging.getLogger(__name__)
Index = TypeVar("Index", WordIndex, NumberIndex)


class ItemTable:
    """Lines of attributes, keyed by item_id; an item that is changed has a line of its own beyond the loaded ones."""

    def __init__(self, loaded: pa.Table | None):
        self.loaded = None if loaded is None else _described_once(loaded)
        ids = [] if self.loaded is None else self.loaded["item_id"].to_pylist()
        self.line_of: dict[str, int] = {item_id: line for line, item_id in enumerate(ids)}
        self.kinds = {"item_id": TEXT}  # column -> what its values are; of columns that have had any
        for field in [] if self.loaded is None else self.loaded.schema:
            if (kind := kind_of_type(field.type)) is not None:
                self.kinds[field.name] = kind
        self.skipped = 0  # attributes that did not fit their columns
        self.changes = 0
        self._loaded_lines = len(self.line_of)
        self._replaced: list[int] = []  # loaded lines of items that were changed since
        self._put: list[dict[str, Any]] = []  # lines beyond the loaded ones
        self._table: tuple[int, pa.Table | None] = (0, self.loaded)  # with so many changes
        self._words: dict[str, WordIndex] = {}
        self._numbers: dict[str, NumberIndex] = {}
        self._changing = threading.Lock()  # held while lines or indexes are added

    def __len__(self) -> int:
        """Return the number of lines, those of changed items included."""
        return self._loaded_lines + len(self._put)

    @property
    def columns(self) -> list[str]:
        """The attributes that any item has had, and item_id."""
        return list(self.kinds)

    def put(self, item_id: str, attributes: Mapping[str, Any]) -> int:
        """Give an item other attributes in place of all that it has; return its line.

        Its texts are found once `catch_up` has read them. An attribute that does not fit its column is left out,
        counted and logged.
        """
        fitted = self._fitted(item_id, attributes) | {"item_id": item_id}
        with self._changing:
            self.changes += 1
            line, before = self.line_of.get(item_id, -1), {}
            if line >= self._loaded_lines:
                before, self._put[line - self._loaded_lines] = self._put[line - self._loaded_lines], fitted
            else:
                if line >= 0:
                    self._replaced.append(line)
                line = self.line_of[item_id] = len(self)
                self._put.append(fitted)
            for column in before.keys() | fitted.keys():
                was, now = before.get(column), fitted.get(column)
                if type(was) is not type(now) or was != now:
                    for index in self._indexes_of(column):
                        index.change(line, was, now)
        return line

    def catch_up(self, most: int | None = None) -> None:
        """Have what was put found by its texts, those of columns with at most so many characters to read."""
        for index in [*self._words.values()]:
            if (late := index.late) and (most is None or late <= most):
                index.catch_up()

    @property
    def late(self) -> bool:
        """Whether some of what was put is not found by its texts yet."""
        return any(index.late for index in [*self._words.values()])

    def _fitted(self, item_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
        fitted = {}
        for column, value in attributes.items():
            try:
                kind = fitting(item_id, column, value, self.kinds.get(column))
            except InputError as error:
                self.skipped += 1
                if self.skipped <= MOST_LOGGED:  # the others are counted
                    logger.warning("an attribute is left out: %s", error)
                continue
            if kind is not None:
                self.kinds[column] = kind
            if value is not None and (value != [] or kind == TEXTS):
                fitted[column] = value
        return fitted

    def attributes_of(self, item_id: str) -> dict[str, Any]:
        """Return the attributes of an item, without those that it does not have."""
        line = self.line_of.get(item_id)
        if line is None:
            return {}
        if line >= self._loaded_lines:
            found = self._put[line - self._loaded_lines]
        else:
            assert self.loaded is not None
            [found] = self.loaded.slice(line, 1).to_pylist()
        return {name: value for name, value in found.items() if name != "item_id" and value is not None}

    def loaded_kinds(self, columns: Iterable[str]) -> dict[str, str]:
        """Return the kinds of those of these columns that were loaded."""
        names = [] if self.loaded is None else self.loaded.column_names
        return {name: self.kinds[name] for name in columns if name in names and name in self.kinds}

    def put_ids(self) -> list[str]:
        """Return the items that were put, in the order in which they first were."""
        return [line["item_id"] for line in self._put]

    # ------------------------------------------------------------------------------------------------------ as a table

    def table(self) -> pa.Table | None:
        """Return the attributes of all items, one line each; made anew after a change."""
        if self._table[0] != self.changes:
            loaded = None if self.loaded is None else self.loaded.filter(pa.array(self._kept()[: self._loaded_lines]))
            self._table = (self.changes, self._joined(loaded, self._put))
        return self._table[1]

    def _kept(self) -> np.ndarray:
        kept = np.ones(len(self), dtype=bool)
        kept[self._replaced] = False
        return kept

    def select(self, item_ids: Sequence[str]) -> pa.Table | None:
        """Return the attributes of those of these items that have any."""
        lines = [self.line_of[item_id] for item_id in item_ids if item_id in self.line_of]
        loaded = [line for line in lines if line < self._loaded_lines]
        put = [self._put[line - self._loaded_lines] for line in lines if line >= self._loaded_lines]
        table = None if self.loaded is None else self.loaded.take(pa.array(loaded, pa.int64()))
        return self._joined(table, put)

    def _joined(self, loaded: pa.Table | None, put: Sequence[Mapping[str, Any]]) -> pa.Table | None:
        """Return lines that were loaded and lines that were put as one table; its columns are as wide as they must."""
        if not put:
            return loaded
        columns = {}
        for name in dict.fromkeys([*(() if loaded is None else loaded.column_names), *self.kinds]):
            values = [line.get(name) for line in put]
            before = None if loaded is None or name not in loaded.column_names else loaded[name]
            columns[name] = _column(before, values, self.kinds.get(name), 0 if loaded is None else len(loaded))
        return pa.table(columns)

    # --------------------------------------------------------------------------------------------------------- lookups

    def prepare(self, conditions: Mapping[str, Any]) -> None:
        """Make the indexes that conditions need; takes seconds for a million items, on any thread.

        Raises:
            InputError: a column cannot be compared with its condition.
        """
        for column, condition in conditions.items():
            if column in self.kinds and isinstance(index := self._index_for(column, condition), WordIndex):
                index.catch_up()

    def is_prepared(self, conditions: Mapping[str, Any]) -> bool:
        """Return whether the indexes that conditions need are made, and know all that was put."""
        needed = [(self._needs_numbers(name, value), name) for name, value in conditions.items() if name in self.kinds]
        return all(
            name in self._numbers if numbers else name in self._words and not self._words[name].late
            for numbers, name in needed
        )

    def lines(self, column: str, condition: Any) -> np.ndarray:
        """Return the lines that meet a condition (lib/data/conditions.py), some of them more than once.

        Raises:
            InputError: the column cannot be compared with the condition.
        """
        if column not in self.kinds:
            return NO_LINES
        index = self._index_for(column, condition)
        if isinstance(index, WordIndex):
            return index.lines(dict.fromkeys(text for value in values_of(condition) for text in texts_of(value)))
        if isinstance(condition, Mapping):
            return index.between(*bounds_of(condition))
        return index.lines(number for value in values_of(condition) for number in numbers_of(value))

    def _needs_numbers(self, column: str, condition: Any) -> bool:
        return isinstance(condition, Mapping) or self.kinds[column] in (WHOLE, NUMBER)

    def _index_for(self, column: str, condition: Any) -> WordIndex | NumberIndex:
        if not self._needs_numbers(column, condition):
            try:
                return self._made(self._words, WordIndex, column)
            except pa.ArrowNotImplementedError as error:
                kind = self.kinds[column]
                raise InputError(f"filter.{column}: an attribute of type {kind} cannot be filtered by") from error
        try:
            if self._loaded_column(column) is None and self.kinds[column] not in (WHOLE, NUMBER):
                raise pa.ArrowInvalid("a text that was put is no number")
            return self._made(self._numbers, NumberIndex, column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = self.kinds[column]
            raise InputError(f"filter.{column}: a range needs numbers, and this attribute is {kind}") from error

    def words(self, column: str) -> WordIndex:
        """Return the index of a column by text, which knows all that was put."""
        index = self._made(self._words, WordIndex, column)
        index.catch_up()
        return index

    def _made(self, indexes: dict[str, Index], kind: type[Index], column: str) -> Index:
        """Return an index, made if need be: of the loaded lines, which never change, without holding others up."""
        if column in indexes:
            return indexes[column]
        loaded = self._loaded_column(column)
        index = kind(pa.chunked_array([pa.nulls(self._loaded_lines, pa.string())]) if loaded is None else loaded)
        with self._changing:
            for line, put in enumerate(self._put, start=self._loaded_lines):
                if column in put:
                    index.change(line, None, put[column])
            index = indexes.setdefault(column, index)
        if isinstance(index, WordIndex):
            index.catch_up()
        return index

    def _loaded_column(self, column: str) -> pa.ChunkedArray | None:
        """Return a column as it was loaded, None where it had no values then."""
        if self.loaded is None or column not in self.loaded.column_names:
            return None
        return None if kind_of_type(self.loaded.schema.field(column).type) is None else self.loaded[column]

    def prepare_like(self, other: "ItemTable") -> None:
        """Make the indexes that another table has, as far as the columns are here and of the same kind."""
        for column in [*other._words]:
            if column in self.kinds and not self._needs_numbers(column, None):
                self.words(column)
        for column in [*other._numbers]:
            with suppress(InputError):
                self.prepare({column: {"min": 0}})

    def _indexes_of(self, column: str) -> list[WordIndex | NumberIndex]:
        return [indexes[column] for indexes in (self._words, self._numbers) if column in indexes]


def _described_once(table: pa.Table) -> pa.Table:
    """Return the first line of each item."""
    ids = table["item_id"].to_pylist()
    if len(set(ids)) == len(ids):
        return table
    return table.take(pa.array(np.sort(np.unique(ids, return_index=True)[1])))


def _column(before: pa.ChunkedArray | None, put: list[Any], kind: str | None, lines: int) -> pa.ChunkedArray:
    """Return a column with values that were put behind its own, `lines` nulls where it was not there."""
    kept = pa.null() if before is None else before.type
    wanted = TYPES.get(kind or "", kept) if any(value is not None for value in put) else kept
    if before is None or (wanted != kept and kind_of_type(kept) is None):
        own = pa.chunked_array([pa.nulls(lines, wanted)])
    else:
        own = before
    try:
        own = as_numbers(own) if wanted == pa.float64() else own.cast(wanted)
    except pa.ArrowInvalid:  # larger whole numbers than fit
        own, wanted = as_numbers(own), pa.float64()
    if pa.types.is_floating(wanted):
        put = [None if value is None else float(value) for value in put]
    return pa.chunked_array([*own.chunks, pa.array(put, wanted)], wanted)
