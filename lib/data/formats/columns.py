"""The columns of a source file as fields of events: which column is which field, and what its values mean.

- Names are recognised in any case and punctuation (userId, USER_ID, user id); an explicit mapping wins.
- Ids may be numbers, times ISO-8601 or numbers in any unit, and kinds of event have their usual synonyms.
- A row with a value that cannot be converted is rejected, and counted by the reason.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.events import EVENT_KINDS, EVENT_SCHEMA
from lib.errors import InputError

# in order of preference: where a file has both a user and a session, the user is meant
ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": (
        *("userid", "user", "visitorid", "visitor", "customerid", "customer", "memberid", "reviewerid", "uid"),
        *("sessionid", "session", "usersession"),
    ),
    "item_id": (
        *("itemid", "item", "movieid", "productid", "product", "articleid", "trackid", "songid", "videoid", "newsid"),
        *("bookid", "parentasin", "asin", "sku", "contentid"),
    ),
    "event": ("event", "eventtype", "eventname", "eventkind", "kind", "action", "behavior", "behaviortype", "type"),
    "value": ("value", "rating", "score", "stars", "overall"),
    "timestamp": ("timestamp", "time", "eventtime", "eventtimestamp", "datetime", "date", "ts", "unixreviewtime"),
    "event_id": ("eventid",),
    "request_id": ("requestid",),
}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "view": ("pv", "pageview", "viewitem", "detailview", "productview"),
    "click": ("clk", "clicks"),
    "play": ("listen", "watch", "stream"),
    "cart": ("addtocart", "addcart", "addtobasket", "basket"),
    "purchase": ("transaction", "buy", "order", "bought", "checkout"),
    "rating": ("rate",),
    "like": ("fav", "favorite", "favourite", "upvote", "thumbsup"),
    "dislike": ("downvote", "thumbsdown"),
    "skip": ("skipped",),
}
_KINDS = {word: kind for kind, words in SYNONYMS.items() for word in (kind, *words)}

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# (unit, its milliseconds, the largest median that is taken for it) of numeric times
_TIME_UNITS = (("s", 1000.0, 1e11), ("ms", 1.0, 1e14), ("us", 1e-3, 1e17), ("ns", 1e-6, float("inf")))
_LATEST = 9e15  # milliseconds, beyond any time: absurd numbers fit int64 until they are rejected as future


def match_columns(names: Sequence[str], explicit: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the column of each field of an event that the file has.

    Args:
        names: the file's columns.
        explicit: field -> column, which wins.
        where: the file, for messages.

    Raises:
        InputError: no column matches a required field, or the mapping names an unknown field or column.
    """
    found = ", ".join(names) or "none"
    for field, name in explicit.items():
        if field not in EVENT_SCHEMA.names:
            raise InputError(f"--column {field}={name}: unknown field; the fields are {', '.join(EVENT_SCHEMA.names)}")
        if name not in names:
            raise InputError(f"--column {field}={name}: {where} has no column {name!r}; found {found}")
    columns = dict(explicit)
    taken = set(explicit.values())
    for field in EVENT_SCHEMA:
        if field.name in columns:
            continue
        name = find_column([name for name in names if name not in taken], ALIASES[field.name])
        if name is not None:
            columns[field.name] = name
            taken.add(name)
        elif not field.nullable and field.name != "event":
            raise InputError(
                f"{where}: no column for {field.name!r} found among {found}; name it with --column {field.name}=NAME"
            )
    return columns


def find_column(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """Return the column with the first of the aliases that any has, ignoring case and punctuation."""
    known = {plain(name): name for name in reversed(names)}
    return next((known[alias] for alias in aliases if alias in known), None)


def plain(name: str) -> str:
    """Write a name in lower case without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Converter:
    """A converter of tables whose columns are named by field to the types of EVENT_SCHEMA.

    The first table with numeric times settles their unit. `unknown_kinds` counts the kinds that no rule maps.
    """

    def __init__(self, kinds: Mapping[str, str] | None = None, default_kind: str | None = None) -> None:
        """Map the file's words for an event to ours by `kinds`; rows without one get `default_kind`.

        Raises:
            InputError: a kind that is none of ours.
        """
        self.kinds = dict(kinds or {})
        for theirs, ours in self.kinds.items():
            if ours not in EVENT_KINDS:
                raise InputError(f"--event-kind {theirs}={ours}: the kind must be one of {', '.join(EVENT_KINDS)}")
        if default_kind is not None and default_kind not in EVENT_KINDS:
            raise InputError(f"--default-kind {default_kind}: it must be one of {', '.join(EVENT_KINDS)}")
        self.default_kind = default_kind
        self.time_unit: str | None = None
        self.unknown_kinds: Counter[str] = Counter()

    def convert(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """Return the rows whose values could be converted, and the number of the others by reason."""
        table = table.combine_chunks()
        reasons = np.zeros(table.num_rows, dtype=np.int8)
        columns: dict[str, pa.Array] = {}
        for field in ("user_id", "item_id"):
            columns[field], wrong = _ids(_column(table, field), field)
            reasons[wrong & (reasons == 0)] = 1
        columns["event"] = self._kinds(table)
        if "value" in table.column_names:
            columns["value"], wrong = _numbers(_column(table, "value"))
            reasons[wrong & (reasons == 0)] = 1
        columns["timestamp"], wrong = self._times(_column(table, "timestamp"))
        reasons[wrong & (reasons == 0)] = 1
        # unlike an event over HTTP, one of old data without a time must not get the time of now
        absent = ~wrong & columns["timestamp"].is_null().to_numpy(zero_copy_only=False)
        reasons[absent & (reasons == 0)] = 2
        for field in ("event_id", "request_id"):
            if field in table.column_names:
                ids, wrong = _ids(_column(table, field), field)
                columns[field] = pc.if_else(pc.equal(ids, ""), None, ids)
                reasons[wrong & (reasons == 0)] = 1
        converted = pa.table(columns)
        counts = Counter(
            {name: n for name, code in (("wrong_type", 1), ("missing_field", 2)) if (n := int((reasons == code).sum()))}
        )
        return (converted.filter(pa.array(reasons == 0)) if counts else converted), counts

    def _kinds(self, table: pa.Table) -> pa.Array:
        default = self.default_kind or ("rating" if "value" in table.column_names else "click")
        if "event" not in table.column_names:
            return pa.array([default], pa.string()).take(pa.array(np.zeros(table.num_rows, dtype=np.int64)))
        encoded = _texts(_column(table, "event"), "event").dictionary_encode()
        words = encoded.dictionary.to_pylist()
        kinds = [self._kind(word) for word in words]
        rows = np.bincount(encoded.indices.drop_null().to_numpy(), minlength=len(words))
        for word, kind, count in zip(words, kinds, rows, strict=True):
            if kind is not None and kind not in EVENT_KINDS:
                self.unknown_kinds[word[:40]] += int(count)
        mapped = pa.array(kinds, pa.string()).take(encoded.indices)
        return pc.fill_null(mapped, self.default_kind) if self.default_kind else mapped

    def _kind(self, word: str) -> str | None:
        if word in self.kinds:
            return self.kinds[word]
        return _KINDS.get(plain(word), word.strip() or None)

    def _times(self, column: pa.Array) -> tuple[pa.Array, np.ndarray]:
        kind = column.type
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            moments = column.cast(pa.timestamp("ms", tz=kind.tz if pa.types.is_timestamp(kind) else None), safe=False)
            return moments.cast(pa.int64()), np.zeros(len(column), dtype=bool)
        if not _is_text(kind):
            numbers, wrong = _numbers(column, "timestamp")
            return self._milliseconds(numbers, wrong)
        texts = _trimmed(column)
        for parse in (_cast_numbers, _cast_moments):
            try:
                parsed = parse(texts)
            except pa.ArrowInvalid:
                continue
            if pa.types.is_floating(parsed.type):
                return self._milliseconds(parsed, np.zeros(len(texts), dtype=bool))
            return parsed, np.zeros(len(texts), dtype=bool)
        return self._mixed_times(texts)

    def _mixed_times(self, texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
        values = texts.to_pylist()
        numbers = pa.array([None if text is None else _number(text) for text in values], pa.float64())
        from_numbers, wrong = self._milliseconds(numbers, np.zeros(len(values), dtype=bool))
        moments = [
            None if text is None or number is not None else _moment(text)
            for text, number in zip(values, numbers.to_pylist(), strict=True)
        ]
        times = pc.coalesce(from_numbers, pa.array(moments, pa.int64()))
        unparsed = pc.and_(pc.is_null(times), pc.is_valid(texts))
        return times, wrong | unparsed.to_numpy(zero_copy_only=False)

    def _milliseconds(self, numbers: pa.Array, wrong: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        absent = numbers.is_null().to_numpy(zero_copy_only=False)
        values = numbers.to_numpy(zero_copy_only=False).astype(np.float64)
        wrong = wrong | (~absent & ~np.isfinite(values))
        usable = ~absent & ~wrong
        if self.time_unit is None and usable.any():
            magnitude = float(np.median(np.abs(values[usable])))
            self.time_unit = next(unit for unit, _, limit in _TIME_UNITS if magnitude < limit)
        factor = next((factor for unit, factor, _ in _TIME_UNITS if unit == self.time_unit), 1.0)
        milliseconds = np.clip(np.where(usable, values, 0.0) * factor, -_LATEST, _LATEST)
        return pa.array(np.rint(milliseconds).astype(np.int64), mask=~usable), wrong


def _column(table: pa.Table, field: str) -> pa.Array:
    column = table[field]
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.nulls(0, column.type)])
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _texts(column: pa.Array, field: str) -> pa.Array:
    kind = column.type
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    raise InputError(f"column for {field!r} has type {kind}; it must hold text or whole numbers: convert it first")


def _ids(column: pa.Array, field: str) -> tuple[pa.Array, np.ndarray]:
    """Return ids as text, and which values are none. Whole numbers stored as floats are ids: gaps make them so."""
    wrong = np.zeros(len(column), dtype=bool)
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        absent = column.is_null().to_numpy(zero_copy_only=False) | np.isnan(values)
        whole = np.equal(np.mod(values, 1), 0, where=~absent, out=np.zeros(len(values), dtype=bool))
        whole &= np.abs(np.where(absent, 0, values)) < 2**53
        wrong = ~absent & ~whole
        column = pa.array(np.where(whole, values, 0).astype(np.int64), mask=~whole)
    return _texts(column, field), wrong


def _numbers(column: pa.Array, field: str = "value") -> tuple[pa.Array, np.ndarray]:
    kind = column.type
    wrong = np.zeros(len(column), dtype=bool)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False), wrong
    if not _is_text(kind):
        raise InputError(f"column for {field!r} has type {kind}; it must hold numbers: convert it first")
    texts = _trimmed(column)
    try:
        return _cast_numbers(texts), wrong
    except pa.ArrowInvalid:
        values = [None if text is None else _number(text) for text in texts.to_pylist()]
        numbers = pa.array(values, pa.float64())
        return numbers, pc.and_(pc.is_null(numbers), pc.is_valid(texts)).to_numpy(zero_copy_only=False)


def _trimmed(column: pa.Array) -> pa.Array:
    """Trim blanks; an empty text is an absent value."""
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _cast_numbers(texts: pa.Array) -> pa.Array:
    return texts.cast(pa.float64())


def _cast_moments(texts: pa.Array) -> pa.Array:
    first = next((text.as_py() for text in texts if text.is_valid), "")
    texts = pc.replace_substring_regex(texts, pattern=r"\s*(UTC|GMT)$", replacement="Z")
    zone = "UTC" if re.search(r"(UTC|GMT|Z|[+-]\d\d:?\d\d)$", first[10:]) else None
    return texts.cast(pa.timestamp("ns", tz=zone)).cast(pa.timestamp("ms", tz=zone), safe=False).cast(pa.int64())


def _number(text: str) -> float | None:
    special = text.lower() in ("nan", "inf", "-inf", "infinity", "-infinity")
    return float(text) if special or _NUMBER.fullmatch(text) else None


def _moment(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(re.sub(r"\s*(UTC|GMT)$", "+00:00", text))
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
