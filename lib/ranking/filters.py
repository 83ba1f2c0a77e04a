"""Ranking: from retrieved candidates to the answer.

The score is s = uT A v. Seen items are taken out, filters are met before retrieval (so that k items come back whenever
k exist), and whoever has no history gets what is popular of late, marked as such.
"""

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
        """(len(catalog) + 1,) bool: the rows that pass."""
        mask = catalog.mask(self.conditions).copy() if self.conditions else np.ones(len(catalog) + 1, dtype=bool)
        if self.allow is not None:
            allowed = np.zeros_like(mask)
            allowed[catalog.rows(self.allow)] = True
            mask &= allowed
        mask[catalog.rows(self.deny)] = False
        mask[0] = False
        return mask


def most_popular(popularity: np.ndarray, mask: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the k most popular items, best first; row 0 and masked rows never come."""
    allowed = np.ones(len(popularity), dtype=bool) if mask is None else mask.copy()
    allowed[0] = False
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        rows = rows[np.argpartition(-popularity[rows], k - 1)[:k]]
    rows = rows[np.argsort(-popularity[rows], kind="stable")]
    return popularity[rows], rows
