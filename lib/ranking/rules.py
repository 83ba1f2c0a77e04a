"""Ranking rules: what a shop, a channel or a newsroom wants of every answer beside what suits the person.

`RankingRules` are the settings, each rule but `dislike_weight` off by default; `BoundRules` are the same for one
catalog: which rows are pinned, boosted, buried or limited. lib/ranking/rerank.py applies them to one person's
candidates.

Weights and temperature are in units of the score s = uT A v, about a cosine: from -1 to 1, the best items of an answer
some hundredths apart. 0.05 moves an item by a few places, 0.3 past most others, 2 past all.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, field_validator

from lib.data.attribute_kinds import NUMBER, TEXT, kind_of_type
from lib.data.attribute_kinds import WHOLE as WHOLE_NUMBERS
from lib.data.catalog import Catalog
from lib.data.column_index import as_numbers
from lib.data.text_splits import SEPARATED, WHOLE, parts_of
from lib.errors import InputError
from lib.model.encoder import PADDING_ROW
from lib.model.presets import DISLIKE_WEIGHT
from lib.ranking.candidates import SOURCES, WithoutSources, sources_without
from lib.ranking.filters import ItemFilter
from lib.settings import Settings

LAST = 1e6  # far more than scores and weights can make up for
MOST_RULES = 100  # of a kind: each costs a filter whenever the catalog changes
MOST_CATEGORIES = 256  # of one item that a limit counts
LONGEST_PARTED = 1000  # characters; a longer text names no categories and is one value: answers wait while it is read
MOST_GROUPS = 16  # of rows with equal weights, each of which is one search; with more, one search weighs every row


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
        max_length=MOST_RULES,
        description="place (from 1) -> item id. It stands there if it passes the request's filter and is not seen; "
        "else, and until the catalog has it, the place goes to another. A place beyond the answer's last is not shown",
    )
    boost: tuple[Boost, ...] = Field(
        default=(), max_length=MOST_RULES, description="items that gain in score, found however far they are"
    )
    bury: tuple[Bury, ...] = Field(
        default=(), max_length=MOST_RULES, description="items that lose in score, or come last"
    )
    at_most: dict[str, Annotated[int, Field(ge=1, strict=True)]] = Field(
        default={},
        max_length=MOST_RULES,
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
    dislike_weight: float = Field(
        default=DISLIKE_WEIGHT,
        ge=0,
        le=100,
        strict=True,
        description="taken from the score of what is like a person's dislikes where all of late are dislikes, and by "
        "the square of their share where some are; off at 0",
    )
    without_sources: WithoutSources = Field(
        default=(),
        description=f"sources of candidates that are switched off, of {', '.join(SOURCES)}; what a switched-off source "
        "alone knows of an item counts no more, and the ranker goes on learning of all",
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
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of candidates that are not switched off."""
        return sources_without(self.without_sources)

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
    (lib/data/attributes.py: between | , ; or words that many texts share, "Comedy Drama", but "The North Face" whole;
    of a column that the model was not trained with between | , ; alone); else the value itself. An item that changes
    costs the same however many others there are.
    """

    name: str  # of the attribute
    limit: int  # items of one answer with the same code
    entry_of_row: np.ndarray  # (R,) int32, which of the distinct sets of values each row has; the first one is empty
    codes: np.ndarray  # (V,) int32 of all sets, one after another
    starts: np.ndarray  # (D + 1,) int64, where each of the D sets starts in `codes`, and the last one ends
    code_of: dict[Any, int]  # of each value; only grows
    put_entries: Mapping[tuple[int, ...], int]  # sets of values that items were put with, and which they are

    @classmethod
    def of(cls, catalog: Catalog, name: str, limit: int, rows: int) -> "Categories":
        """Read the values of all items.

        Raises:
            InputError: the attribute's type has no values to count.
        """
        code_of: dict[Any, int] = {}
        entries, values = _distinct(catalog, name)
        sets = [(), *(_codes(line, code_of) for line in values)]
        entry_of_row = np.zeros(rows, dtype=np.int32)
        entry_of_row[catalog.rows_of_loaded()] = entries + 1
        entry_of_row[PADDING_ROW] = 0
        codes, starts = _laid_out(sets)
        loaded = cls(name, limit, entry_of_row, codes, starts, code_of, put_entries={})
        return loaded.changed(catalog, catalog.table.put_ids(), rows)

    def changed(self, catalog: Catalog, item_ids: Iterable[str], rows: int) -> "Categories":
        """Return them as they are once these items have changed, or got a row."""
        entry_of_row = np.zeros(rows, dtype=np.int32)
        entry_of_row[: len(self.entry_of_row)] = self.entry_of_row
        split, put_entries, sets = _split(catalog, self.name), dict(self.put_entries), []
        for item_id in item_ids:
            if (row := catalog.row_of.get(item_id)) is None:
                continue
            values = _values_of(catalog.table.attributes_of(item_id).get(self.name), split)
            own = _codes(values, self.code_of)
            if own and own not in put_entries:
                put_entries[own] = len(self.starts) - 1 + len(sets)
                sets.append(own)
            entry_of_row[row] = put_entries[own] if own else 0
        codes, starts = _laid_out(sets)
        return replace(
            self,
            entry_of_row=entry_of_row,
            codes=np.concatenate([self.codes, codes]),
            starts=np.concatenate([self.starts, starts[1:] + self.starts[-1]]),
            put_entries=put_entries,
        )

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return (n, F) codes of rows (n,), F as many as one of them has."""
        entries = self.entry_of_row[rows]
        starts, counts = self.starts[entries], self.starts[entries + 1] - self.starts[entries]
        place = np.arange(counts.max(initial=0))
        found = np.zeros((len(rows), len(place)), dtype=np.int32)
        own = place < counts[:, None]
        found[own] = self.codes[(starts[:, None] + place)[own]]
        return found

    def without(self, full: Sequence[int]) -> np.ndarray:
        """Return (R,) bool: the rows that have none of these codes."""
        sums = np.concatenate([[0], np.isin(self.codes, full).cumsum()])
        admitted = sums[self.starts[1:]] == sums[self.starts[:-1]]  # (D,)
        return admitted[self.entry_of_row]


# the rows that may be found (R,) bool, and what is added to the score of each (R,) -> the best rows, their own scores
Search = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class BoundRules:
    """Ranking rules for one catalog, bound once (`BoundRules.of`), and again when they no longer fit it (`fits`).

    The candidates of one person are the `candidates(k)` best rows that `find` finds by their score with its weight, and
    `pinned(mask, seen)`. With boost and bury alone that gives exactly the k items of the whole catalog whose score with
    its weight is highest.
    """

    rules: RankingRules
    changes: int  # of the catalog that it was made for
    pins: Mapping[int, int]  # row -> place, from 0
    weights: np.ndarray  # (R,) float64, added to a row's score
    groups: tuple[np.ndarray | None, ...]  # (R,) bool each: rows of a weight, without pins; None: all; none: too many
    categories: tuple[Categories, ...]
    idle: tuple[str, ...]  # rules without effect until items are put, and why
    faults: tuple[str, ...]  # rules without effect as they do not suit the catalog's attributes, and why

    @classmethod
    def of(
        cls,
        rules: RankingRules,
        catalog: Catalog,
        rows: int | None = None,
        before: "BoundRules | None" = None,
        changed: Collection[str] = (),
    ) -> "BoundRules":
        """Bind rules to a catalog whose item vectors have so many rows; by default one more than it has items.

        Args:
            rules: what is wanted of every answer.
            catalog: the items.
            rows: of the item vectors.
            before: the same rules as they were bound to this catalog before.
            changed: the items that were put, or got a row, since `before`: limits are read of these alone.

        A catalog changes while it is live, so nothing is raised: a rule that does not suit it now has no effect, and
        is listed.
        """
        rows = len(catalog) + 1 if rows is None else rows
        idle, faults = _idle(rules, catalog), []
        pins = {catalog.row_of[item]: place - 1 for place, item in rules.pin.items() if item in catalog.row_of}
        weights = _weights(rules, catalog, rows, faults)
        known = {limited.name: limited for limited in before.categories} if before is not None else {}
        return cls(
            rules=rules,
            changes=catalog.changes,
            pins=pins,
            weights=weights,
            groups=_groups(weights, pins),
            categories=_limited(rules.at_most, catalog, rows, faults, known, changed),
            idle=idle,
            faults=tuple(faults),
        )

    def check(self) -> None:
        """Refuse rules that do not suit the catalog.

        Raises:
            InputError: the first of them.
        """
        if self.faults:
            raise InputError(self.faults[0])

    def fits(self, catalog: Catalog, rows: int) -> bool:
        """Return whether the catalog and the number of rows are those that the rules were bound to."""
        return self.changes == catalog.changes and len(self.weights) == rows

    def candidates(self, k: int) -> int:
        """Return how many rows each search has to find for an answer of k."""
        return max(2 * k, self.rules.candidates) if self.rules.chooses else k

    def find(self, mask: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of a mask (R,), pins left out, that include the best by score and weight, and their scores.

        Rows of few weights take a search of each; of many, one search that weighs every row.
        """
        if not self.groups:
            mask = mask.copy()
            mask[list(self.pins)] = False
            return search(mask, self.weights)
        found = [search(mask if group is None else mask & group, None) for group in self.groups]
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows, scores

    def pinned(self, mask: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return the pinned rows that pass the request's mask (R,) and are not among the rows seen."""
        return np.array([row for row in self.pins if mask[row] and row not in seen], dtype=np.int64)


def _idle(rules: RankingRules, catalog: Catalog) -> tuple[str, ...]:
    """Name what no item has: pinned items, and attributes of filters and limits."""
    idle = [
        f"pin.{place}: there is no item {item!r}; until it is put, another one has its place"
        for place, item in rules.pin.items()
        if item not in catalog.row_of or item in catalog.removed
    ]
    for kind, filtered in (("boost", rules.boost), ("bury", rules.bury)):
        for place, rule in enumerate(filtered):
            readable = ItemFilter.of(rule.filter)
            idle += [f"{kind}.{place}.{note}" for note in ([] if readable is None else readable.notes(catalog))]
    unknown = [name for name in rules.at_most if not _has(catalog, name)]
    return (*idle, *(f"at_most.{name}: no item has this attribute, so nothing is limited" for name in unknown))


def _has(catalog: Catalog, attribute: str) -> bool:
    """Return whether any item has had an attribute, also one of values that cannot be filtered by."""
    loaded = [] if catalog.table.loaded is None else catalog.table.loaded.column_names
    return attribute != "item_id" and (attribute in catalog.table.kinds or attribute in loaded)


def _weights(rules: RankingRules, catalog: Catalog, rows: int, faults: list[str]) -> np.ndarray:
    """Return (R,) the weight of each row."""
    weights = np.zeros(rows)
    signed = [(f"boost.{place}", rule.filter, rule.weight) for place, rule in enumerate(rules.boost)]
    signed += [
        (f"bury.{place}", rule.filter, -LAST if rule.weight is None else -rule.weight)
        for place, rule in enumerate(rules.bury)
    ]
    for name, filter, weight in signed:
        readable = ItemFilter.of(filter)
        assert readable is not None
        try:
            weights[: len(catalog) + 1][readable.mask(catalog)] += weight
        except InputError as error:
            faults.append(f"{name}.{error}")
    return weights


def _groups(weights: np.ndarray, pins: Mapping[int, int]) -> tuple[np.ndarray | None, ...]:
    """Return the rows of each weight but for those that are pinned, as masks (R,); nothing where there are too many."""
    sums = np.unique(weights[np.flatnonzero(weights)])
    if len(sums) >= MOST_GROUPS:
        return ()
    if not len(sums) and not pins:
        return (None,)
    groups = [weights == value for value in (0.0, *sums)]
    for group in groups:
        group[list(pins)] = False
    return tuple(groups)


def _limited(
    at_most: Mapping[str, int],
    catalog: Catalog,
    rows: int,
    faults: list[str],
    known: Mapping[str, Categories],
    changed: Collection[str],
) -> tuple[Categories, ...]:
    """Return the categories of each limited attribute; of those that are known, only what changed is read."""
    found = []
    for name, limit in at_most.items():
        if name in known:
            found.append(known[name].changed(catalog, changed, rows))
        elif _has(catalog, name):
            try:
                found.append(Categories.of(catalog, name, limit, rows))
            except InputError as error:
                faults.append(str(error))
    return tuple(found)


def _distinct(catalog: Catalog, name: str) -> tuple[np.ndarray, list[list[Any]]]:
    """Return which of the distinct values each loaded line has, the last of them for none; and their parts."""
    loaded = catalog.table.loaded
    if loaded is None or name not in loaded.column_names:
        return np.zeros(0 if loaded is None else len(loaded), dtype=np.int32), [[]]
    column = loaded[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        places: dict[tuple[str, ...], int] = {}
        members = (tuple(_values_of(line, WHOLE)) for line in column.to_pylist())
        entries = np.array([places.setdefault(line, len(places)) for line in members], dtype=np.int32)
        return entries, [*(list(line) for line in places), []]
    try:
        counted = _countable(column)
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"at_most.{name}: type {column.type} has no values to count; use another attribute") from error
    encoded = counted.combine_chunks().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    split = _split(catalog, name) if kind_of_type(column.type) == TEXT else WHOLE
    entries = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    return entries, [*(_values_of(value, split) for value in distinct), []]


def _countable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return numbers as numbers, so that 3 and 3.0 are one value where a column widens, and all else as text."""
    kind = kind_of_type(column.type)
    if kind == WHOLE_NUMBERS:
        return column
    return as_numbers(column) if kind == NUMBER else pc.cast(column, pa.string())


def _split(catalog: Catalog, name: str) -> str:
    """Return how texts of a column are split into parts, whatever other items there are."""
    return catalog.all_splits().get(name, SEPARATED)


def _values_of(value: Any, split: str) -> list[Any]:
    """Return the values of one cell that are counted."""
    if value is None:
        return []
    if isinstance(value, list):
        return [str(member) for member in value if member is not None]
    if isinstance(value, bool):
        return [str(value).lower()]  # as Arrow writes it
    return parts_of(value, split) if isinstance(value, str) and len(value) <= LONGEST_PARTED else [value]


def _codes(values: Iterable[Any], code_of: dict[Any, int]) -> tuple[int, ...]:
    """Return the codes of the first MOST_CATEGORIES values of an item; a new value gets one."""
    counted = islice(dict.fromkeys(value for value in values if value != ""), MOST_CATEGORIES)
    return tuple(code_of.setdefault(value, len(code_of) + 1) for value in counted)


def _laid_out(sets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of sets one after another, and where each starts and the last one ends."""
    codes = np.array([code for own in sets for code in own], dtype=np.int32)
    return codes, np.cumsum([0, *map(len, sets)])
