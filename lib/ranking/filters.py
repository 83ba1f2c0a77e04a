"""Filters: which items an answer may hold, by their attributes and ids."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.data.catalog import Catalog
from lib.errors import InputError

FILTER_LISTS = ("allow", "deny")


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
            InputError: it is no object, or allow or deny is not a list of item ids.
        """
        if filter is not None and not isinstance(filter, Mapping):
            raise InputError('filter: give an object such as {"genres": "Comedy", "deny": ["id"]}')
        if not filter:
            return None
        for name in FILTER_LISTS:
            ids = filter.get(name, [])
            if not isinstance(ids, list) or not all(isinstance(item_id, str) for item_id in ids):
                raise InputError(f"filter.{name}: give a list of item ids")
        conditions = {name: value for name, value in filter.items() if name not in FILTER_LISTS}
        allow = tuple(filter["allow"]) if "allow" in filter else None
        return cls(json.dumps(filter, sort_keys=True), conditions, allow, tuple(filter.get("deny", ())))

    def mask(self, catalog: Catalog) -> np.ndarray:
        """Return (len(catalog) + 1,) bool: the rows that pass."""
        mask = catalog.mask(self.conditions).copy() if self.conditions else np.ones(len(catalog) + 1, dtype=bool)
        if self.allow is not None:
            allowed = np.zeros_like(mask)
            allowed[catalog.rows(self.allow)] = True
            mask &= allowed
        mask[catalog.rows(self.deny)] = False
        mask[0] = False
        return mask
