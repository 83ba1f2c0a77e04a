"""Ranking rules: what a shop, a channel or a newsroom wants of every answer beside what suits the person.

`RankingRules` are the settings, each rule off by default; `BoundRules` are the same for one catalog: which rows are
pinned, boosted, buried or limited. lib/ranking/rerank.py applies them to one person's candidates.

Weights and temperature are in units of the score s = uT A v, about a cosine: from -1 to 1, the best items of an answer
some hundredths apart. 0.05 moves an item by a few places, 0.3 past most others, 2 past all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, field_validator

from lib.data.attribute_kinds import TEXT, kind_of_type
from lib.data.catalog import Catalog
from lib.data.text_splits import WHOLE, parts_of
from lib.errors import InputError
from lib.ranking.filters import ItemFilter
from lib.settings import Settings

LAST = 1e6  # far more than scores and weights can make up for
MOST_GROUPS = 16  # of rows with equal weights, each of which is one search


def _readable(filter: dict[str, Any]) -> dict[str, Any]:
    if ItemFilter.of(filter) is None:
        raise InputError('filter: it is empty; say which items are meant, e.g. {"genres": "Comedy"}')
    return filter


Weight = Annotated[float, Field(gt=0, le=100, strict=True)]
ItemId = Annotated[str, Field(min_length=1, strict=True)]
Filter = Annotated[dict[str, Any], AfterValidator(_readable)]  # as in a request, see ItemFilter


class Boost(Settings):
    """Items that pass a filter gain `weight` in score."""

    filter: Filter = Field(description="which items, as in a request")
    weight: Weight = Field(description="added to their score")


class Bury(Settings):
    """Items that pass a filter lose `weight` in score, or come behind all others."""

    filter: Filter = Field(description="which items, as in a request")
    weight: Weight | None = Field(default=None, description="taken from their score; without it they come last")


class RankingRules(Settings):
    """The rules of every answer; `active` is False where none is set."""

    pin: dict[Annotated[int, Field(ge=1)], ItemId] = Field(
        default={},
        max_length=100,
        description="place (from 1) -> item id. It stands there if it passes the request's filter and is not seen; "
        "else, and until the catalog has it, the place goes to another. A place beyond the answer's last is not shown",
    )
    boost: tuple[Boost, ...] = Field(default=(), description="items that gain in score, found however far they are")
    bury: tuple[Bury, ...] = Field(default=(), description="items that lose in score, or come last")
    at_most: dict[str, Annotated[int, Field(ge=1, strict=True)]] = Field(
        default={},
        description="attribute -> how many items of one answer may share a value of it: a hard limit, so where nothing "
        "else is left the answer is shorter. Pinned items are counted, and shown even where they alone exceed it",
    )
    diversity_lambda: float = Field(
        default=1.0,
        ge=0.01,
        le=1,
        strict=True,
        description="lambda of maximal marginal relevance, off at 1; the lower, the less similar are the items",
    )
    exploration_temperature: float = Field(
        default=0.0,
        ge=0,
        le=1,
        strict=True,
        description="of the softmax from which each place is drawn, off at 0; 0.05 is what the encoder is trained "
        "with, 0.01 trades little but neighbouring places",
    )
    candidates: int = Field(
        default=200,
        ge=1,
        le=10_000,
        strict=True,
        description="how many of the best items limits, diversity and exploration choose from; at least 2 k",
    )

    @field_validator("pin")
    @classmethod
    def _pinned_once(cls, pin: dict[int, str]) -> dict[int, str]:
        twice = [item_id for item_id in pin.values() if list(pin.values()).count(item_id) > 1]
        if twice:
            raise InputError(f"pin: item {twice[0]!r} has more than one place; keep one")
        return pin

    @property
    def active(self) -> bool:
        """Whether any rule is set; if not, the nearest items are the answer and nothing here needs to be called."""
        return bool(self.pin or self.boost or self.bury or self.chooses)

    @property
    def chooses(self) -> bool:
        """Whether an item's place depends on the items above it, so that more than k candidates are needed."""
        return bool(self.at_most) or self.diversity_lambda < 1 or self.exploration_temperature > 0


@dataclass(frozen=True)
class Categories:
    """The values of a limited attribute that each row has; code 0 is none.

    The values of an item are the members of a list; of a text its parts, as the encoder sees them
    (lib/data/attributes.py: between | , ; or words that many texts share, "Comedy Drama", but "The North Face" whole);
    else the value itself.
    """

    limit: int  # items of one answer with the same code
    entry_of_row: np.ndarray  # (R,) int32, the line of `codes`
    codes: np.ndarray  # (D, F) int32, one line for each distinct set of values, the last of them empty

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return (n, F) codes of rows (n,)."""
        return self.codes[self.entry_of_row[rows]]

    def without(self, full: Sequence[int]) -> np.ndarray:
        """Return (R,) bool: the rows that have none of these codes."""
        admitted = ~np.logical_or.reduce(np.isin(self.codes, full), axis=1)  # (D,)
        return admitted[self.entry_of_row]


@dataclass(frozen=True)
class BoundRules:
    """Ranking rules for one catalog, bound once (`BoundRules.of`), and again when they no longer fit it (`fits`).

    The candidates of one person are: for each of `searches` the `candidates(k)` best rows that pass it and the
    request's mask and are not seen; and `pinned(mask, seen)`. With boost and bury alone that gives exactly the k items
    of the whole catalog whose score with its weight is highest, as each search covers the rows of one weight.
    """

    rules: RankingRules
    changes: int  # of the catalog that it was made for
    pins: Mapping[int, int]  # row -> place, from 0
    weights: np.ndarray  # (R,) float64, added to a row's score
    searches: tuple[np.ndarray | None, ...]  # (R,) bool each, no row in two; None is all rows
    categories: tuple[Categories, ...]

    @classmethod
    def of(cls, rules: RankingRules, catalog: Catalog, rows: int | None = None) -> "BoundRules":
        """Bind rules to a catalog whose item vectors have so many rows; by default one more than it has items.

        Raises:
            InputError: a rule names an attribute that the catalog does not have, or a condition has another form.
        """
        rows = len(catalog) + 1 if rows is None else rows
        pins = {catalog.row_of[item]: place - 1 for place, item in rules.pin.items() if item in catalog.row_of}
        weights, groups = _weighted(rules, catalog, rows)
        for group in groups:
            group[list(pins)] = False
        whole = len(groups) == 1 and not pins
        return cls(
            rules=rules,
            changes=catalog.changes,
            pins=pins,
            weights=weights,
            searches=(None,) if whole else tuple(groups),
            categories=_limited(rules.at_most, catalog, rows),
        )

    def fits(self, catalog: Catalog, rows: int) -> bool:
        """Return whether the catalog and the number of rows are those that the rules were bound to."""
        return self.changes == catalog.changes and len(self.weights) == rows

    def candidates(self, k: int) -> int:
        """Return how many rows each search has to find for an answer of k."""
        return max(2 * k, self.rules.candidates) if self.rules.chooses else k

    def pinned(self, mask: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return the pinned rows that pass the request's mask (R,) and are not among the rows seen."""
        return np.array([row for row in self.pins if mask[row] and row not in seen], dtype=np.int64)


def _weighted(rules: RankingRules, catalog: Catalog, rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return (R,) the weight of each row, and the rows of each weight as masks (R,)."""
    weights = np.zeros(rows)
    groups: list[np.ndarray] = [np.ones(rows, dtype=bool)]
    signed = [(f"boost.{place}", rule.filter, rule.weight) for place, rule in enumerate(rules.boost)]
    signed += [
        (f"bury.{place}", rule.filter, -LAST if rule.weight is None else -rule.weight)
        for place, rule in enumerate(rules.bury)
    ]
    for name, filter, weight in signed:
        mask = np.zeros(rows, dtype=bool)
        mask[: len(catalog) + 1] = _mask(name, filter, catalog)
        weights[mask] += weight
        parts: list[np.ndarray] = [part for group in groups for part in (group & mask, group & ~mask)]
        groups = [part for part in parts if part.any()]
        if len(groups) > MOST_GROUPS:
            raise InputError(f"{name}: the rules make more than {MOST_GROUPS} sums of weights; let fewer rules overlap")
    return weights, groups


def _mask(name: str, filter: dict[str, Any], catalog: Catalog) -> np.ndarray:
    readable = ItemFilter.of(filter)
    assert readable is not None
    try:
        return readable.mask(catalog)
    except InputError as error:
        raise InputError(f"{name}.{error}") from error


def _limited(at_most: Mapping[str, int], catalog: Catalog, rows: int) -> tuple[Categories, ...]:
    if not at_most:
        return ()
    attributes = catalog.attributes
    if attributes is None:
        name = next(iter(at_most))
        raise InputError(f"at_most.{name}: the catalog has no attributes; ingest the dataset with an items table")
    known = [column for column in attributes.column_names if column != "item_id"]
    for name in at_most:
        if name not in known:
            raise InputError(f"at_most.{name}: no such attribute; the catalog has {', '.join(known)}")
    row_of = catalog.row_of  # an item that is described need not have a row yet
    described = np.array([row_of.get(item_id, 0) for item_id in attributes["item_id"].to_pylist()], dtype=np.int64)
    return tuple(_categories(catalog, name, limit, described, rows) for name, limit in at_most.items())


def _categories(catalog: Catalog, name: str, limit: int, described: np.ndarray, rows: int) -> Categories:
    entries, values = _distinct(catalog, name)
    code_of: dict[str, int] = {}
    own = [sorted({code_of.setdefault(value, len(code_of) + 1) for value in line if value}) for line in values]
    codes = np.zeros((len(own) + 1, max(map(len, own), default=0)), dtype=np.int32)
    for entry, line in enumerate(own):
        codes[entry, : len(line)] = line
    entry_of_row = np.full(rows, len(own), dtype=np.int32)
    entry_of_row[described] = entries
    entry_of_row[0] = len(own)
    return Categories(limit, entry_of_row, codes)


def _distinct(catalog: Catalog, name: str) -> tuple[np.ndarray, list[list[str]]]:
    """Return (items,) each item's place among the distinct values, or their number for none; and their parts."""
    assert catalog.attributes is not None
    column = catalog.attributes[name]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        places: dict[tuple[str, ...], int] = {}
        members = (tuple(str(member) for member in line or () if member is not None) for line in column.to_pylist())
        entries = np.array([places.setdefault(line, len(places)) for line in members], dtype=np.int32)
        return entries, [list(line) for line in places]
    try:
        texts = pc.cast(column, pa.string())
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"at_most.{name}: type {column.type} has no values to count; use another attribute") from error
    encoded = texts.combine_chunks().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    split = catalog.split(name) if kind_of_type(column.type) == TEXT else WHOLE
    entries = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    return entries, [parts_of(value, split) for value in distinct]
