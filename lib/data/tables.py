"""Tables of events: the rules that single events obey, and those that only a table can be checked for."""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.events import (
    CONTROL_CHARACTERS,
    EARLIEST_TIMESTAMP,
    EVENT_KINDS,
    EVENT_SCHEMA,
    FIELDS,
    FLOAT32_MAX,
    HISTORY_FIELDS,
    MAX_ID_LENGTH,
    Event,
)
from lib.data.guard import CleaningRules
from lib.data.user_hash import part_of
from lib.errors import InputError

# The reasons that `validate_event` has, too; a row's code is its reason's place, 0 for none.
REASONS = (
    "",
    "missing_field",
    "empty_id",
    "long_id",
    "control_character",
    "unknown_event",
    "value_not_finite",
    "time_too_old",
    "time_in_future",
)


def clean(table: pa.Table, now: int, rules: CleaningRules) -> tuple[pa.Table, Counter[str]]:
    """Return the events that obey the rules, ordered by user and time, and the number of the others by reason.

    There are two reasons that `validate_event` cannot see: duplicate (the same user and event_id, or without an
    event_id the same user, item, event and timestamp; the first row stays) and flood (see CleaningRules).

    Args:
        table: all events of each of its users; those of equal time keep their order.
        now: milliseconds since 1970, which a null timestamp becomes.
        rules: the limits.

    Raises:
        InputError: a column is unknown, missing, or of another type than EVENT_SCHEMA has.
    """
    table = conform(table)
    reasons = _broken_rules(table, now, rules)
    counts = Counter({REASONS[code]: int(count) for code, count in enumerate(np.bincount(reasons)) if code and count})
    if counts:
        table = table.filter(pa.array(reasons == 0))
    timestamps = pc.fill_null(table["timestamp"], now)
    table = table.set_column(EVENT_SCHEMA.get_field_index("timestamp"), EVENT_SCHEMA.field("timestamp"), timestamps)

    repeated = _duplicates(table)
    if repeated.any():
        counts["duplicate"] = int(repeated.sum())
        table = table.filter(pa.array(~repeated))

    table = order_events(table)
    flooding = _floods(_codes(table["user_id"]), table["timestamp"].to_numpy(), rules)
    if flooding.any():
        counts["flood"] = int(flooding.sum())
        table = table.filter(pa.array(~flooding))
    return table.cast(EVENT_SCHEMA), counts


def conform(table: pa.Table) -> pa.Table:
    """Return the table with exactly the columns of EVENT_SCHEMA, absent optional ones as nulls; keep null values.

    A string may be a large_string or a dictionary's, an integer or a value of any integer or floating type.

    Raises:
        InputError: a column is unknown, missing or of another type; the message names it.
    """
    unknown = [name for name in table.column_names if name not in FIELDS]
    if unknown:
        names = ", ".join(EVENT_SCHEMA.names)
        raise InputError(f"unknown column {unknown[0]!r}; the columns of an event table are {names}")
    columns = []
    for field in EVENT_SCHEMA:
        if field.name not in table.column_names:
            if not field.nullable:
                found = ", ".join(table.column_names) or "none"
                raise InputError(f"column {field.name!r} is missing; found {found}: ingest the data first")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        # A value is narrowed to float32 only once it is known to fit.
        target = pa.float64() if field.name == "value" else field.type
        if not _convertible(column.type, target):
            message = f"column {field.name!r} has type {column.type}; it must be {field.type}: ingest the data first"
            raise InputError(message)
        columns.append(column.cast(target))
    return pa.table(columns, names=EVENT_SCHEMA.names)


def order_events(table: pa.Table) -> pa.Table:
    """Return the events with users contiguous (by id) and each user's in time order; equal times keep their order."""
    users, timestamps = _codes(table["user_id"]), table["timestamp"].to_numpy()
    later = (users[1:] > users[:-1]) | ((users[1:] == users[:-1]) & (timestamps[1:] >= timestamps[:-1]))
    if later.all():
        return table
    return table.take(pa.array(np.lexsort((timestamps, users))))


def events_of(table: pa.Table) -> list[Event]:
    """Return the rows of an event table as events, without event_id and request_id.

    A value is the shortest number that has its 32 bits: 71.95, as it was given, not 71.94999694824219.
    """
    shortest = table["value"].cast(pa.float32()).cast(pa.string()).cast(pa.float64())
    columns = (shortest if name == "value" else table[name] for name in HISTORY_FIELDS)
    return [Event(*values) for values in zip(*(column.to_pylist() for column in columns), strict=True)]


def partition_of(users: pa.ChunkedArray, count: int) -> np.ndarray:
    """Return (E,) which of `count` partitions each event is in: all of a user's in one, the same in every process."""
    encoded = pc.dictionary_encode(pc.fill_null(users, "")).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # what combine_chunks makes of no chunks
        return np.zeros(0, dtype=np.int64)
    partition = np.array([part_of(user, count) for user in encoded.dictionary.to_pylist()], dtype=np.int64)
    return partition[encoded.indices.to_numpy()]


def broken_ids(ids: pa.ChunkedArray) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield each rule of lib.data.events.checked_id with (E,) which of the ids break it; null breaks none."""
    yield "empty_id", pc.or_(pc.equal(pc.utf8_length(ids), 0), pc.utf8_is_space(ids))
    yield "long_id", pc.greater(pc.utf8_length(ids), MAX_ID_LENGTH)
    yield "control_character", pc.match_substring_regex(ids, CONTROL_CHARACTERS)


def _convertible(source: pa.DataType, target: pa.DataType) -> bool:
    if pa.types.is_dictionary(source):
        source = source.value_type
    if pa.types.is_null(source):
        return True
    if pa.types.is_string(target):
        return pa.types.is_string(source) or pa.types.is_large_string(source) or pa.types.is_string_view(source)
    if pa.types.is_integer(target):
        return pa.types.is_integer(source) and source != pa.uint64()
    return pa.types.is_floating(source) or pa.types.is_integer(source)


def _broken_rules(table: pa.Table, now: int, rules: CleaningRules) -> np.ndarray:
    """Return (E,) the code, its place in REASONS, of the first rule that each row breaks, 0 for none."""
    reasons = np.zeros(table.num_rows, dtype=np.int8)

    def mark(reason: str, broken: pa.ChunkedArray | pa.Array) -> None:
        rows = pc.fill_null(broken, False).to_numpy(zero_copy_only=False).astype(bool)
        reasons[rows & (reasons == 0)] = REASONS.index(reason)

    def mark_ids(field: str) -> None:
        for reason, broken in broken_ids(table[field]):
            mark(reason, broken)

    for field in ("user_id", "item_id"):
        mark("missing_field", pc.is_null(table[field]))
        mark_ids(field)
    mark("missing_field", pc.is_null(table["event"]))
    mark("unknown_event", pc.invert(pc.is_in(table["event"], value_set=pa.array(EVENT_KINDS))))
    value = table["value"]
    mark("value_not_finite", pc.or_(pc.is_nan(value), pc.greater(pc.abs(value), FLOAT32_MAX)))
    mark("time_too_old", pc.less(table["timestamp"], EARLIEST_TIMESTAMP))
    mark("time_in_future", pc.greater(table["timestamp"], now + rules.future_tolerance_ms))
    mark_ids("event_id")
    mark_ids("request_id")
    return reasons


def _duplicates(table: pa.Table) -> np.ndarray:
    """Return (E,) whether an earlier row is the same event."""
    users, event_ids = _codes(table["user_id"]), _codes(table["event_id"])
    named = event_ids >= 0
    repeated = np.zeros(table.num_rows, dtype=bool)
    repeated[named] = _repeats([users[named], event_ids[named]])
    keys = [users, _codes(table["item_id"]), _codes(table["event"]), table["timestamp"].to_numpy()]
    repeated[~named] = _repeats([key[~named] for key in keys])
    return repeated


def _repeats(keys: list[np.ndarray]) -> np.ndarray:
    """Return (E,) whether an earlier row has the same keys."""
    repeated = np.zeros(len(keys[0]), dtype=bool)
    order = np.lexsort(keys)  # stable: equal rows are together, the earliest in front
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    repeated[order[1:]] = same
    return repeated


def _floods(users: np.ndarray, timestamps: np.ndarray, rules: CleaningRules) -> np.ndarray:
    """Return (E,) whether `flood_events` lie within the window before a row; rows are in order of user and time.

    So they do exactly if the row that many places before it is of the same user and less than the window older.
    Rejected events count, so a bot that does not slow down stays out.
    """
    flooding = np.zeros(len(users), dtype=bool)
    back = rules.flood_events
    if len(users) > back:
        close = timestamps[back:] - timestamps[:-back] < rules.flood_window_ms
        flooding[back:] = close & (users[back:] == users[:-back])
    return flooding


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Return strings as integers (E,) that sort as the strings do; null is -1."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # what combine_chunks makes of no chunks
        return np.zeros(0, dtype=np.int64)
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    indices = pc.fill_null(encoded.indices, -1).to_numpy()
    return np.where(indices >= 0, places[indices], -1) if len(places) else indices.astype(np.int64)
