"""The event: what a person did with an item, and when.

An event table is a pyarrow table of `EVENT_SCHEMA`; a single event that arrives over HTTP is an `Event`. Both go
through the same rules, and whatever breaks a rule is counted by its reason, never dropped in silence.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("value", pa.float32()),
        pa.field("timestamp", pa.int64(), nullable=False),  # milliseconds since 1970, UTC
        pa.field("event_id", pa.string()),
        pa.field("request_id", pa.string()),
    ]
)

# What a reaction is worth as a training target, relative to a view; below zero it is pushed away from, never aimed at.
# The order is the order of the encoder's kind embedding (code 0 is padding, so a kind's code is its place here plus
# one): append, never reorder.
EVENT_WEIGHTS = {
    "view": 1.0,
    "click": 1.0,
    "play": 1.0,
    "cart": 2.0,
    "purchase": 3.0,
    "rating": 1.0,
    "like": 2.0,
    "dislike": -1.0,
    "skip": -1.0,
}
EVENT_KINDS = tuple(EVENT_WEIGHTS)
NEGATIVE_RATING = 2.0  # a rating at or below this is a dislike

MAX_ID_LENGTH = 256  # characters
EARLIEST_TIMESTAMP = 631_152_000_000  # 1990-01-01; today's time in seconds, taken for milliseconds, lies in 1970

_FIELDS = frozenset(EVENT_SCHEMA.names)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# The reasons that both forms of validation know, after 0 for none.
_REASONS = (
    "",
    "missing_field",
    "empty_id",
    "long_id",
    "unknown_event",
    "value_not_finite",
    "time_too_old",
    "time_in_future",
)


class Event(NamedTuple):
    """One reaction of one user to one item; the timestamp is in milliseconds since 1970, UTC."""

    user_id: str
    item_id: str
    event: str
    value: float | None
    timestamp: int
    event_id: str | None = None
    request_id: str | None = None


class InputError(ValueError):
    """Input that a person can mend; the message is one line that names the field and the remedy."""


class EventRejected(InputError):
    """An event that breaks a rule: `reason` is a stable code to count by, `field` the field at fault."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.message = message


@dataclass(frozen=True)
class CleaningRules:
    """What is impossible or abusive; an event beyond these is rejected and counted. 0 turns one of the last four off.

    A user's event is a flood when `flood_events` earlier ones came less than `flood_window_ms` before it. Measured, the
    most that one user did within a minute: 30 ratings in MovieLens 100K (people rate a page of films at once; 90 within
    5 minutes), 18 clicks in Yoochoose (43 within 5 minutes). Ten times that leaves both untouched, and also data whose
    times are whole days, where a day's events share one time, while of a bot's thousands a minute 300 pass.

    The others judge feedback as it arrives (lib/data/guard.py), not tables. Measured likewise: 10 events of one user
    within a second (MovieLens, whose times are whole seconds), 13 clicks of one user on one item within a minute
    (Yoochoose), and 13 events of one item within a minute.
    """

    future_tolerance_ms: int = 5 * 60 * 1000  # clocks of phones and browsers run ahead by a little
    flood_events: int = 300
    flood_window_ms: int = 60 * 1000
    rate_events: int = 30  # of one user whose own times lie within one second
    repeat_events: int = 20  # of one user, one item and one kind within the window
    opinion_changes: int = 3  # of one user on one item within the window; until then the last opinion counts
    crowd_users: int = 50  # newcomers who act on one item within the window: counted, and rejected nowhere
    quarantine: bool = False  # what a crowd does is in the histories, but not learned as it comes

    def __post_init__(self) -> None:
        if self.flood_events < 1:
            raise InputError(f"flood_events is {self.flood_events}; it must be at least 1")
        if self.flood_window_ms < 1:
            raise InputError(f"flood_window_ms is {self.flood_window_ms}; it must be at least 1 millisecond")
        if self.future_tolerance_ms < 0:
            raise InputError(f"future_tolerance_ms is {self.future_tolerance_ms}; it must be 0 or more milliseconds")
        for name in ("rate_events", "repeat_events", "opinion_changes", "crowd_users"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")


# ---------------------------------------------------------------------------------------------------------------------
# One event, from JSON. The fields are checked in the order of EVENT_SCHEMA, so an event with several faults is rejected
# for the same one here and in `clean`.


def validate_event(fields: Mapping[str, object], now: int, rules: CleaningRules) -> Event:
    """The event that a decoded JSON object describes; `now` (milliseconds) stands in for a missing timestamp.

    Raises EventRejected with reason wrong_type, unknown_field, missing_field, empty_id, long_id, malformed_text,
    unknown_event, value_not_finite, time_too_old or time_in_future.
    """
    if not isinstance(fields, dict) and not isinstance(fields, Mapping):
        raise EventRejected("wrong_type", "event", f"an event must be an object, not {_json_type(fields)}")
    if not _FIELDS.issuperset(fields):
        unknown = next(name for name in fields if name not in _FIELDS)
        message = f"unknown field {str(unknown)[:40]!r}; the fields of an event are {', '.join(EVENT_SCHEMA.names)}"
        raise EventRejected("unknown_field", str(unknown), message)
    get = fields.get
    user_id = _required_id("user_id", get("user_id"))
    item_id = _required_id("item_id", get("item_id"))
    event = _event_kind(get("event"))
    value = _value(get("value"))
    timestamp = get("timestamp")
    timestamp = now if timestamp is None else _timestamp(timestamp, now, rules)
    event_id = get("event_id")
    if event_id is not None:
        event_id = _required_id("event_id", event_id)
    request_id = get("request_id")
    if request_id is not None:
        request_id = _required_id("request_id", request_id)
    return Event(user_id, item_id, event, value, timestamp, event_id, request_id)


def _required_id(field: str, value: object) -> str:
    # The common case in one line; the rest is for saying what is wrong.
    if type(value) is str and 0 < len(value) <= MAX_ID_LENGTH and value.isascii() and not value.isspace():
        return value
    if value is None:
        raise EventRejected("missing_field", field, f"{field} is missing; every event needs one")
    if not isinstance(value, str):
        message = f"{field} must be a string, not {_json_type(value)}; put it in quotes"
        raise EventRejected("wrong_type", field, message)
    if not value or value.isspace():
        raise EventRejected("empty_id", field, f"{field} is empty or blank; give an id or leave the event out")
    if len(value) > MAX_ID_LENGTH:
        message = f"{field} has {len(value)} characters; at most {MAX_ID_LENGTH} are allowed: hash longer ids"
        raise EventRejected("long_id", field, message)
    try:
        value.encode()
    except UnicodeEncodeError:
        # json.loads lets half of a surrogate pair through, which neither Arrow nor a log can store.
        message = f"{field} holds half of a surrogate pair; send valid Unicode text"
        raise EventRejected("malformed_text", field, message) from None
    return value


def _event_kind(kind: object) -> str:
    if kind is None:
        message = f"event is missing; it must be one of {', '.join(EVENT_KINDS)}"
        raise EventRejected("missing_field", "event", message)
    if not isinstance(kind, str):
        message = f"event must be a string, not {_json_type(kind)}; one of {', '.join(EVENT_KINDS)}"
        raise EventRejected("wrong_type", "event", message)
    if kind not in EVENT_WEIGHTS:
        message = f"unknown event {kind[:40]!r}; it must be one of {', '.join(EVENT_KINDS)}"
        raise EventRejected("unknown_event", "event", message)
    return kind


def _value(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"value must be a number or null, not {_json_type(value)}"
        raise EventRejected("wrong_type", "value", message)
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # also false for NaN, and for an int that no float can hold
        message = "value is NaN, infinite or beyond a 32-bit float; send a finite number or leave it out"
        raise EventRejected("value_not_finite", "value", message)
    return float(value)


def _timestamp(timestamp: object, now: int, rules: CleaningRules) -> int:
    if isinstance(timestamp, bool) or not isinstance(timestamp, int):
        message = f"timestamp must be an integer of milliseconds since 1970 UTC, not {_json_type(timestamp)}"
        raise EventRejected("wrong_type", "timestamp", message)
    if timestamp < EARLIEST_TIMESTAMP:
        message = f"timestamp {_shortened(timestamp)} is before 1990-01-01; send milliseconds since 1970, not seconds"
        raise EventRejected("time_too_old", "timestamp", message)
    if timestamp > now + rules.future_tolerance_ms:
        message = (
            f"timestamp {_shortened(timestamp)} is more than {rules.future_tolerance_ms} ms in the future; "
            "send milliseconds since 1970 UTC and set the sender's clock, or leave timestamp out"
        )
        raise EventRejected("time_in_future", "timestamp", message)
    return timestamp


def _shortened(number: int) -> str:
    # A hostile integer can have more digits than str() accepts.
    return str(number) if -(10**30) < number < 10**30 else "with more than 30 digits"


def _json_type(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Whole tables


def clean(table: pa.Table, now: int, rules: CleaningRules) -> tuple[pa.Table, Counter[str]]:
    """The events that obey the rules, ordered by user and time, and of the others how many broke which rule.

    The table must hold all events of each of its users, for the two reasons that `validate_event` cannot see: duplicate
    (the same user and event_id, or without an event_id the same user, item, event and timestamp; the first row stays)
    and flood (see CleaningRules). Events of equal time keep the order of the input. A null timestamp becomes `now`.
    Raises InputError for an unknown or missing column, or one of another type than EVENT_SCHEMA has.
    """
    table = conform(table)
    reasons = _broken_rules(table, now, rules)
    counts = Counter({_REASONS[code]: int(count) for code, count in enumerate(np.bincount(reasons)) if code and count})
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
    """The table with exactly the columns of EVENT_SCHEMA, absent optional ones as nulls; nulls are not checked.

    Accepts large_string and dictionary columns for strings, and any integer or floating type for integers or values;
    raises InputError that names the column otherwise.
    """
    unknown = [name for name in table.column_names if name not in _FIELDS]
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
    """The same events with users contiguous (by id) and each user's in time order; equal times keep their order."""
    users, timestamps = _codes(table["user_id"]), table["timestamp"].to_numpy()
    later = (users[1:] > users[:-1]) | ((users[1:] == users[:-1]) & (timestamps[1:] >= timestamps[:-1]))
    if later.all():
        return table
    return table.take(pa.array(np.lexsort((timestamps, users))))


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
    # The code (place in _REASONS) of the first rule that each row breaks, 0 for none.
    reasons = np.zeros(table.num_rows, dtype=np.int8)

    def mark(reason: str, broken: pa.ChunkedArray | pa.Array) -> None:
        rows = pc.fill_null(broken, False).to_numpy(zero_copy_only=False).astype(bool)
        reasons[rows & (reasons == 0)] = _REASONS.index(reason)

    def mark_ids(field: str) -> None:
        ids = table[field]
        mark("empty_id", pc.or_(pc.equal(pc.utf8_length(ids), 0), pc.utf8_is_space(ids)))
        mark("long_id", pc.greater(pc.utf8_length(ids), MAX_ID_LENGTH))

    for field in ("user_id", "item_id"):
        mark("missing_field", pc.is_null(table[field]))
        mark_ids(field)
    mark("missing_field", pc.is_null(table["event"]))
    mark("unknown_event", pc.invert(pc.is_in(table["event"], value_set=pa.array(EVENT_KINDS))))
    value = table["value"]
    mark("value_not_finite", pc.or_(pc.is_nan(value), pc.greater(pc.abs(value), _FLOAT32_MAX)))
    mark("time_too_old", pc.less(table["timestamp"], EARLIEST_TIMESTAMP))
    mark("time_in_future", pc.greater(table["timestamp"], now + rules.future_tolerance_ms))
    mark_ids("event_id")
    mark_ids("request_id")
    return reasons


def _duplicates(table: pa.Table) -> np.ndarray:
    users, event_ids = _codes(table["user_id"]), _codes(table["event_id"])
    named = event_ids >= 0
    repeated = np.zeros(table.num_rows, dtype=bool)
    repeated[named] = _repeats([users[named], event_ids[named]])
    keys = [users, _codes(table["item_id"]), _codes(table["event"]), table["timestamp"].to_numpy()]
    repeated[~named] = _repeats([key[~named] for key in keys])
    return repeated


def _repeats(keys: list[np.ndarray]) -> np.ndarray:
    # Rows whose keys an earlier row has: a stable sort brings equal rows together, the earliest in front.
    repeated = np.zeros(len(keys[0]), dtype=bool)
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    repeated[order[1:]] = same
    return repeated


def _floods(users: np.ndarray, timestamps: np.ndarray, rules: CleaningRules) -> np.ndarray:
    # In order of user and time, `flood_events` lie within the window before a row exactly if the row that many places
    # before it is of the same user and less than the window older. Rejected events count, so a bot that does not slow
    # down stays out.
    flooding = np.zeros(len(users), dtype=bool)
    back = rules.flood_events
    if len(users) > back:
        close = timestamps[back:] - timestamps[:-back] < rules.flood_window_ms
        flooding[back:] = close & (users[back:] == users[:-back])
    return flooding


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    # Strings as integers that sort as the strings do; null is -1.
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # what combine_chunks makes of no chunks
        return np.zeros(0, dtype=np.int64)
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    indices = pc.fill_null(encoded.indices, -1).to_numpy()
    return np.where(indices >= 0, places[indices], -1) if len(places) else indices.astype(np.int64)
