"""The event: what a person did with an item, and when.

An event table is a pyarrow table of `EVENT_SCHEMA`; a single event that arrives over HTTP is an `Event`. Both go
through the same rules, and whatever breaks a rule is counted by its reason, never dropped in silence.
"""

from typing import NamedTuple

import pyarrow as pa

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

# What a reaction is worth as a training target. The order is the order of the encoder's kind embedding (code 0 is
# padding, so a kind's code is its place here plus one): append, never reorder.
EVENT_WEIGHTS = {
    "view": 1.0,
    "click": 1.0,
    "play": 1.0,
    "cart": 1.0,
    "purchase": 1.0,
    "rating": 1.0,
    "like": 1.0,
    "dislike": 0.0,
    "skip": 0.0,
}
EVENT_KINDS = tuple(EVENT_WEIGHTS)
NEGATIVE_RATING = 2.0  # a rating at or below this is a dislike


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
