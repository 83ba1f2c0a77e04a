"""Filters: which items an answer may hold, by their attributes and ids.

What a filter may cost is bounded when it is read. What it means is known by the live catalog alone: an attribute that
no item has had yet matches nothing, and the answer says so in a note.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.data.catalog import Catalog
from lib.data.conditions import check_condition
from lib.errors import InputError

FILTER_LISTS = ("allow", "deny")
MOST_CONDITIONS = 50  # attributes of a filter
MOST_VALUES = 1000  # of all its conditions together
MOST_IDS = 10_000  # allowed or denied
MOST_NAMED = 20  # attributes that a note lists


@dataclass(frozen=True)
class ItemFilter:
    """Which items may be recommended: attribute conditions, and item ids allowed or denied."""

    key: str  # the JSON form, by which equal filters are known as equal
    conditions: Mapping[str, Any] = field(default_factory=dict, compare=False)
    allow: tuple[str, ...] | None = field(default=None, compare=False)
    deny: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, filter: Mapping[str, Any] | None) -> "ItemFilter | None":
        """Read the JSON form: {"genres": "Comedy", "price": {"max": 20}, "allow": [...], "deny": [...]}.

        Raises:
            InputError: it is no object, a part of it has another form, or it is larger than the caps above.
        """
        if filter is not None and not isinstance(filter, Mapping):
            raise InputError('filter: give an object such as {"genres": "Comedy", "deny": ["id"]}')
        if not filter:
            return None
        for name in FILTER_LISTS:
            ids = filter.get(name, [])
            if not isinstance(ids, list) or not all(isinstance(item_id, str) for item_id in ids):
                raise InputError(f"filter.{name}: give a list of item ids")
            if len(ids) > MOST_IDS:
                raise InputError(f"filter.{name}: {len(ids)} ids are more than {MOST_IDS}; filter by an attribute")
        conditions = {name: value for name, value in filter.items() if name not in FILTER_LISTS}
        if len(conditions) > MOST_CONDITIONS:
            raise InputError(f"filter: {len(conditions)} attributes are more than {MOST_CONDITIONS}; ask for fewer")
        values = 0
        for name, condition in conditions.items():
            values += check_condition(name, condition)
            if values > MOST_VALUES:
                raise InputError(
                    f"filter.{name}: more than {MOST_VALUES} values in one filter; put an attribute for them"
                )
        allow = tuple(filter["allow"]) if "allow" in filter else None
        try:
            key = json.dumps(filter, sort_keys=True, ensure_ascii=False)
            key.encode()
        except ValueError as error:
            raise InputError(
                f"filter: a part of it is no valid Unicode, or a number of thousands of digits ({error})"
            ) from error
        return cls(key, conditions, allow, tuple(filter.get("deny", ())))

    def notes(self, catalog: Catalog) -> list[str]:
        """Name the attributes that no item of the catalog has had."""
        known = [name for name in catalog.table.columns if name != "item_id"]
        there_are = f"there are {', '.join(known[:MOST_NAMED])}" if known else "there are no attributes yet"
        more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
        unknown = [name for name in self.conditions if name not in catalog.table.kinds]
        return [f"filter.{name}: no item has this attribute, so none matches; {there_are}{more}" for name in unknown]

    def mask(self, catalog: Catalog) -> np.ndarray:
        """Return (len(catalog) + 1,) bool: the rows that pass.

        Raises:
            InputError: a condition does not go with the values of its attribute.
        """
        mask = catalog.mask(self.conditions).copy() if self.conditions else np.ones(len(catalog) + 1, dtype=bool)
        if self.allow is not None:
            allowed = np.zeros_like(mask)
            allowed[catalog.rows(self.allow)] = True
            mask &= allowed
        mask[catalog.rows(self.deny)] = False
        mask[0] = False
        return mask
