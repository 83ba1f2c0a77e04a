"""The event: what a person did with an item, and when.

`Event` names the fields; the schema of event tables, the columns of the log and the messages on Kafka follow from it.
Events in tables and single ones that arrive over HTTP obey the same rules, and whatever breaks a rule is counted by its
reason, never dropped in silence.
"""

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pyarrow as pa

from lib.errors import EventRejected


class Event(NamedTuple):
    """One reaction of one user to one item; None for what it does not say."""

    user_id: str
    item_id: str
    event: str
    value: float | None
    timestamp: int  # milliseconds since 1970, UTC
    event_id: str | None = None
    request_id: str | None = None


class EventField(NamedTuple):
    """One field of an event."""

    name: str
    kind: type  # str, int or float
    optional: bool  # whether it may be None

    @classmethod
    def of(cls, name: str, annotation: Any) -> "EventField":
        """Read a field's annotation: a kind, or a kind or None."""
        kinds = get_args(annotation) or (annotation,)
        return cls(name, kinds[0], NoneType in kinds)


EVENT_FIELDS = tuple(EventField.of(name, annotation) for name, annotation in get_type_hints(Event).items())
ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float32()}
EVENT_SCHEMA = pa.schema(
    [pa.field(field.name, ARROW_TYPES[field.kind], nullable=field.optional) for field in EVENT_FIELDS]
)
# The fields that histories have and training reads; those with a default only say which event it is and what led to it.
HISTORY_FIELDS = [name for name in Event._fields if name not in Event._field_defaults]

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

MAX_ID_LENGTH = 256  # characters
# C0, DEL and C1, for Python and for Arrow: an id stands in paths of URLs, lines of logs and names of files.
CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f]"
EARLIEST_TIMESTAMP = 631_152_000_000  # 1990-01-01; today's time in seconds, taken for milliseconds, lies in 1970

FIELDS = frozenset(Event._fields)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def validate_event(fields: Mapping[str, object], now: int, future_tolerance_ms: int) -> Event:
    """Return the event that a decoded JSON object describes.

    The fields are checked in their order, so an event with several faults is rejected for the same one here and by
    lib.data.tables.clean.

    Args:
        fields: the object.
        now: milliseconds since 1970; the timestamp of an event without one.
        future_tolerance_ms: how far a timestamp may be ahead of `now` (CleaningRules has the setting).

    Raises:
        EventRejected: with reason wrong_type, unknown_field, missing_field, empty_id, long_id, control_character,
            malformed_text, unknown_event, value_not_finite, time_too_old or time_in_future.
    """
    if not isinstance(fields, dict) and not isinstance(fields, Mapping):
        raise EventRejected("wrong_type", "event", f"an event must be an object, not {_json_type(fields)}")
    if not FIELDS.issuperset(fields):
        unknown = next(name for name in fields if name not in FIELDS)
        message = f"unknown field {str(unknown)[:40]!r}; the fields of an event are {', '.join(Event._fields)}"
        raise EventRejected("unknown_field", str(unknown), message)
    get = fields.get
    user_id = checked_id("user_id", get("user_id"))
    item_id = checked_id("item_id", get("item_id"))
    event = _event_kind(get("event"))
    value = _value(get("value"))
    timestamp = get("timestamp")
    timestamp = now if timestamp is None else _timestamp(timestamp, now, future_tolerance_ms)
    event_id = _optional_id("event_id", get("event_id"))
    request_id = _optional_id("request_id", get("request_id"))
    return Event(user_id, item_id, event, value, timestamp, event_id, request_id)


def checked_id(field: str, value: object) -> str:
    """Return an id that obeys the rules for ids, wherever it comes from.

    Raises:
        EventRejected: it does not; the reasons are those of `validate_event`.
    """
    # The common case in one line; the rest says what is wrong.
    if type(value) is str and len(value) <= MAX_ID_LENGTH and value.isascii() and value.isprintable() and value.strip():
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
    if (control := re.search(CONTROL_CHARACTERS, value)) is not None:
        message = f"{field} holds the control character U+{ord(control[0]):04X}; leave it out, or encode the id"
        raise EventRejected("control_character", field, message)
    try:
        value.encode()
    except UnicodeEncodeError:
        # json.loads lets half of a surrogate pair through, which neither Arrow nor a log can store.
        message = f"{field} holds half of a surrogate pair; send valid Unicode text"
        raise EventRejected("malformed_text", field, message) from None
    return value


def _optional_id(field: str, value: object) -> str | None:
    return None if value is None else checked_id(field, value)


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
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:  # also false for NaN, and for an int that no float can hold
        message = "value is NaN, infinite or beyond a 32-bit float; send a finite number or leave it out"
        raise EventRejected("value_not_finite", "value", message)
    return float(value)


def _timestamp(timestamp: object, now: int, future_tolerance_ms: int) -> int:
    if isinstance(timestamp, bool) or not isinstance(timestamp, int):
        message = f"timestamp must be an integer of milliseconds since 1970 UTC, not {_json_type(timestamp)}"
        raise EventRejected("wrong_type", "timestamp", message)
    if timestamp < EARLIEST_TIMESTAMP:
        message = f"timestamp {_shortened(timestamp)} is before 1990-01-01; send milliseconds since 1970, not seconds"
        raise EventRejected("time_too_old", "timestamp", message)
    if timestamp > now + future_tolerance_ms:
        message = (
            f"timestamp {_shortened(timestamp)} is more than {future_tolerance_ms} ms in the future; "
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
