"""Attributes of items as codes: what of the catalog a model can learn from.

An attribute is a column and one of its values, "genres=Comedy". A list gives one for each member, a text one for each
of its parts (lib/data/text_splits.py), a number that of its quantile bucket (of 16), any other value one. A column
whose values few items share (a title, a description) says no more than the item's id, and is left out. An item that
nobody has met yet is known by its attributes alone.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.catalog import TITLE_COLUMNS, Catalog
from lib.data.text_splits import PROSE, parts_of

MOST_PER_ITEM = 16
LEAST_ITEMS = 5  # an attribute of fewer items is left out
LEAST_SHARED = 0.5  # a column is left out where fewer of the items with a value share one
NUMBER_BUCKETS = 16


def attribute_values(catalog: Catalog) -> list[str]:
    """Return the attributes that enough items share, by column, the most common first."""
    if catalog.attributes is None:
        return []
    values: list[str] = []
    for column in catalog.attributes.column_names:
        if column == "item_id" or column.lower() in TITLE_COLUMNS:
            continue
        items = _values_of(catalog, column)
        counts = Counter(value for members in items for value in members)
        shared = {value for value, count in counts.items() if count >= LEAST_ITEMS}
        described = [members for members in items if members]
        covered = sum(any(value in shared for value in members) for members in described)
        if described and covered / len(described) >= LEAST_SHARED and len(shared) > 1:
            values += sorted(shared, key=lambda value: (-counts[value], value))
    return values


def attribute_codes(catalog: Catalog, values: Sequence[str], width: int | None = None) -> np.ndarray:
    """Return (items + 1, F) int32 codes of each row's attributes: place in `values` + 1, 0 where there are no more.

    F is `width`, or else the most attributes that an item has, between 1 and 16; an item with more keeps those that
    come first in `values`.
    """
    codes: list[list[int]] = [[] for _ in catalog.item_ids]
    if catalog.attributes is not None and values:
        code_of = {value: place + 1 for place, value in enumerate(values)}
        rows = [catalog.row_of.get(item_id) for item_id in catalog.attributes["item_id"].to_pylist()]
        known = defaultdict(list)
        for column, _, value in (value.partition("=") for value in values):
            known[column].append(value)
        for column in known.keys() & catalog.attributes.column_names:
            for row, members in zip(rows, _values_of(catalog, column, known[column]), strict=True):
                if row is not None:
                    codes[row] += [code_of[value] for value in members if value in code_of]
    width = width or min(max(max(map(len, codes)), 1), MOST_PER_ITEM)
    table = np.zeros((len(codes), width), dtype=np.int32)
    for row, own in enumerate(codes):
        kept = sorted(set(own))[:width]
        table[row, : len(kept)] = kept
    return table


def _values_of(catalog: Catalog, name: str, known: Sequence[str] = ()) -> list[list[str]]:
    """Return the attributes that a column gives to each item, without repeats; numbers in the known buckets, if any."""
    assert catalog.attributes is not None
    column = catalog.attributes[name]
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_named(name, [str(member) for member in members or ()]) for members in column.to_pylist()]
    if pa.types.is_boolean(kind):
        return [[] if value is None else _named(name, [str(value).lower()]) for value in column.to_pylist()]
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return _number_values(column, name, [float(value) for value in known])
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or (split := catalog.split(name)) == PROSE:
        return [[] for _ in range(len(column))]
    return [_named(name, parts_of(text or "", split)) for text in column.to_pylist()]


def _number_values(column: pa.ChunkedArray, name: str, known: Sequence[float]) -> list[list[str]]:
    """Replace each number by the least one of its bucket, of the known buckets or of this column's own."""
    numbers = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    starts = np.unique(known) if known else _bucket_starts(numbers[np.isfinite(numbers)])
    places = np.searchsorted(starts, numbers, side="right") - 1
    return [
        _named(name, [_number(starts[max(place, 0)])]) if np.isfinite(number) else []
        for place, number in zip(places, numbers, strict=True)
    ]


def _bucket_starts(present: np.ndarray) -> np.ndarray:
    distinct = np.unique(present)
    if len(distinct) <= NUMBER_BUCKETS:
        return distinct
    return np.unique(np.quantile(present, np.linspace(0, 1, NUMBER_BUCKETS + 1)[:-1], method="lower"))


def _number(value: float) -> str:
    """Write a number in as few digits as it can be read back from."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _named(column: str, values: list[str]) -> list[str]:
    """Write each value that is not empty as "column=value"."""
    return [f"{column}={value}" for value in dict.fromkeys(values) if value]
