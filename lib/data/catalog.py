"""The catalog: item ids and their rows, with the attributes that filters and titles need.

Row 0 is padding. Items get rows 1, 2, 3, ... in the order in which they came and keep them for good, so that a row is
the same item in every version of the weights.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import InputError

TITLE_COLUMNS = ("title", "name")
SEPARATORS = re.compile(r"[\s|,;]")  # between the words of a text attribute
REMOVED = b"afterclick.removed"  # key of the removed items in the metadata of catalog.parquet
MOST_MASKS = 256  # that are kept


class Catalog:
    """Item ids <-> rows, a table of attributes, and what was removed; no row is ever given up."""

    def __init__(self, item_ids: Iterable[str] = (), attributes: pa.Table | None = None, removed: Iterable[str] = ()):
        self.item_ids: list[str] = [""]
        self.row_of: dict[str, int] = {}
        self.attributes = attributes  # one line for each item that has any, keyed by item_id
        self.removed = set(removed)  # never recommended; they keep their rows
        self._masks: dict[str, np.ndarray] = {}
        self.extend(item_ids)
        self.titles = _titles(attributes)

    @classmethod
    def of_dataset(cls, item_ids: Iterable[str], items: pa.Table | None) -> "Catalog":
        """Make a catalog of the items of a dataset's events, then of those that only its items table has."""
        catalog = cls(item_ids, items)
        if items is not None:
            catalog.extend(items["item_id"].to_pylist())
        return catalog

    def __len__(self) -> int:
        """Return the number of items; rows 1..len(catalog) are in use."""
        return len(self.row_of)

    def extend(self, item_ids: Iterable[str]) -> list[str]:
        """Give each unknown item a row; return the new ones, in order."""
        new = []
        for item_id in item_ids:
            if item_id in self.row_of:
                continue
            self.row_of[item_id] = len(self.item_ids)
            self.item_ids.append(item_id)
            new.append(item_id)
        if new:
            self._masks.clear()
        return new

    def rows(self, item_ids: Iterable[str]) -> list[int]:
        """Return the rows of those items that have one."""
        return [self.row_of[item_id] for item_id in item_ids if item_id in self.row_of]

    def change(self, items: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Give items other attributes, or remove them (None); a removed item that gets attributes is back.

        Only `extend` gives rows, so an item may be described before it has one.

        Raises:
            InputError: an attribute has another type than the catalog's column; nothing has changed.
        """
        described = {item_id: attributes for item_id, attributes in items.items() if attributes is not None}
        if described:
            self._describe(described)
        self.removed -= described.keys()
        self.removed |= items.keys() - described.keys()
        self._masks.clear()

    def described(self, item_ids: Sequence[str]) -> "Catalog":
        """Return a catalog of these items alone."""
        if self.attributes is None:
            return Catalog(item_ids)
        chosen = pc.is_in(self.attributes["item_id"], pa.array(item_ids, pa.string()))
        return Catalog(item_ids, self.attributes.filter(chosen))

    def joined(self, other: "Catalog") -> "Catalog":
        """Return the items of this catalog in their rows, then those that only the other has, as that describes them.

        Raises:
            InputError: an attribute has another type in the other catalog.
        """
        missing = [item_id for item_id in other.item_ids[1:] if item_id not in self.row_of]
        described = [self.attributes, other.described(missing).attributes if missing else None]
        tables = [table for table in described if table is not None]
        try:
            attributes = pa.concat_tables(tables, promote_options="permissive") if tables else None
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"catalog: two models describe their items in different types ({error})") from error
        return Catalog([*self.item_ids[1:], *missing], attributes, self.removed | other.removed)

    def likes(self, item_id: str) -> np.ndarray:
        """Return (R,) rows of the items most like an item, by the words of texts and the members of lists."""
        shared = np.zeros(len(self.item_ids))
        for column, value in _attributes_of(self.attributes, item_id).items():
            for part in _words(value):
                mask = self.mask({column: part})
                if 1 < mask.sum() <= len(self) / 2:
                    shared += mask * np.log(len(self) / mask.sum())  # a rare word says more
        shared[self.row_of.get(item_id, 0)] = 0.0
        return np.flatnonzero((shared > 0) & (shared >= shared.max()))

    def check(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse attributes that `change` would not accept.

        Raises:
            InputError: an attribute has another type than the catalog's column; the message says which.
        """
        _table_of(items, self.attributes)

    def _describe(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        new = _table_of(items, self.attributes)
        if self.attributes is not None:
            others = pc.invert(pc.is_in(self.attributes["item_id"], pa.array(list(items), pa.string())))
            new = pa.concat_tables([self.attributes.filter(others), new], promote_options="default")
        self.attributes = new
        for item_id, attributes in items.items():
            title = next((attributes[name] for name in TITLE_COLUMNS if attributes.get(name) is not None), None)
            if title is None:
                self.titles.pop(item_id, None)
            else:
                self.titles[item_id] = str(title)

    def mask(self, conditions: Mapping[str, Any]) -> np.ndarray:
        """Return (len + 1,) bool: the rows whose item meets every condition of a filter.

        A condition is a value, a list of admissible values, or {"min": x, "max": y}. A text matches as a whole or by
        one of its words, so {"genres": "Comedy"} finds "Comedy Drama"; a list matches by one of its members.

        Raises:
            InputError: the catalog has no such attribute, or a condition has another form.
        """
        key = repr(sorted(conditions.items(), key=lambda condition: condition[0]))
        if key not in self._masks:
            if len(self._masks) >= MOST_MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = self._mask(conditions)
        return self._masks[key]

    def _mask(self, conditions: Mapping[str, Any]) -> np.ndarray:
        if self.attributes is None:
            raise InputError("filter: the catalog has no attributes; ingest the dataset with an items table")
        keep = np.ones(len(self.attributes), dtype=bool)
        for column, condition in conditions.items():
            if column not in self.attributes.column_names:
                known = ", ".join(self.attributes.column_names)
                raise InputError(f"filter.{column}: no such attribute; the catalog has {known}")
            keep &= _meets(self.attributes[column], column, condition)
        mask = np.zeros(len(self.item_ids), dtype=bool)
        matching = self.attributes["item_id"].to_numpy()[keep]
        mask[[self.row_of[item_id] for item_id in matching if item_id in self.row_of]] = True
        return mask

    def save(self, path: Path) -> None:
        """Write catalog.parquet: one line for each item in the order of the rows, with its attributes."""
        table = pa.table({"item_id": pa.array(self.item_ids[1:], pa.string())})
        if self.attributes is not None:
            places = pc.index_in(table["item_id"], self.attributes["item_id"].combine_chunks())
            columns = self.attributes.drop_columns(["item_id"]).take(places)
            for name in columns.column_names:
                table = table.append_column(name, columns[name])
        pq.write_table(table.replace_schema_metadata({REMOVED: json.dumps(sorted(self.removed))}), path)

    @classmethod
    def load(cls, path: Path) -> "Catalog":
        """Read catalog.parquet."""
        table = pq.read_table(path)
        removed = json.loads((table.schema.metadata or {}).get(REMOVED, b"[]"))
        return cls(table["item_id"].to_pylist(), table if table.num_columns > 1 else None, removed)


def _table_of(items: Mapping[str, Mapping[str, Any]], known: pa.Table | None) -> pa.Table:
    """Make a table of items described in JSON; columns that are known keep their types."""
    columns: dict[str, pa.Array] = {"item_id": pa.array(list(items), pa.string())}
    for name in dict.fromkeys(name for attributes in items.values() for name in attributes):
        values = [attributes.get(name) for attributes in items.values()]
        kind = known.schema.field(name).type if known is not None and name in known.column_names else None
        columns[name] = _column_of(name, values, kind)
    return pa.table(columns)


def _column_of(name: str, values: list[Any], kind: pa.DataType | None) -> pa.Array:
    if name == "item_id":
        raise InputError("item_id: it is no attribute")
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    try:
        column = pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        expected = "values of one type" if kind is None else f"{kind}, as the catalog has it"
        raise InputError(f"{name}: give {expected} ({error})") from error
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def _attributes_of(attributes: pa.Table | None, item_id: str) -> dict[str, Any]:
    """Return the attributes that a table has of one item, but for its id and its title."""
    if attributes is None:
        return {}
    lines = attributes.filter(pc.equal(attributes["item_id"], item_id)).to_pylist()
    return {name: value for line in lines for name, value in line.items() if name not in ("item_id", *TITLE_COLUMNS)}


def _words(value: Any) -> list[str]:
    """Return the words of a text, or the members of a list of texts."""
    if isinstance(value, str):
        return [word for word in SEPARATORS.split(value) if word]
    return [member for member in value if isinstance(member, str)] if isinstance(value, list) else []


def _titles(attributes: pa.Table | None) -> dict[str, str]:
    if attributes is None:
        return {}
    for column in TITLE_COLUMNS:
        if column in attributes.column_names:
            pairs = zip(attributes["item_id"].to_pylist(), attributes[column].to_pylist(), strict=True)
            return {item_id: str(title) for item_id, title in pairs if title is not None}
    return {}


def _meets(values: pa.ChunkedArray, column: str, condition: Any) -> np.ndarray:
    """Return (items,) bool: which values meet a condition."""
    if isinstance(condition, Mapping):
        if not condition or not set(condition) <= {"min", "max"}:
            raise InputError(f'filter.{column}: a range is written {{"min": x, "max": y}}')
        numbers = _numbers(values, column)
        low, high = condition.get("min", -np.inf), condition.get("max", np.inf)
        if not all(isinstance(bound, int | float) for bound in (low, high)):
            raise InputError(f"filter.{column}: min and max are numbers")
        return (numbers >= low) & (numbers <= high)
    wanted = condition if isinstance(condition, list) else [condition]
    if not wanted or not all(isinstance(value, str | int | float | bool) for value in wanted):
        raise InputError(f"filter.{column}: give a value, a list of values, or a range with min and max")
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        texts = {_text(value) for value in wanted}
        return np.array([bool(texts & {_text(member) for member in members or ()}) for members in values.to_pylist()])
    try:
        text = pc.cast(values, pa.string())
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"filter.{column}: an attribute of type {values.type} cannot be filtered by") from error
    keep = np.zeros(len(values), dtype=bool)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):  # 20 is 20.0
        keep |= np.isin(_numbers(values, column), [value for value in wanted if type(value) in (int, float)])
    for value in wanted:
        word = rf"(^|{SEPARATORS.pattern}){re.escape(_text(value))}($|{SEPARATORS.pattern})"
        keep |= pc.fill_null(pc.match_substring_regex(text, word), False).to_numpy(zero_copy_only=False)
    return keep


def _text(value: Any) -> str:
    """Write a value as Arrow does."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(values: pa.ChunkedArray, column: str) -> np.ndarray:
    try:
        return pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"filter.{column}: a range needs numbers, and this attribute is {values.type}") from error
