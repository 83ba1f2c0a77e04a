"""The rules for events, in their three forms: one event, whole tables, and floods as they happen."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.events import EARLIEST_TIMESTAMP, EVENT_SCHEMA, HISTORY_FIELDS, Event, validate_event
from lib.data.guard import CleaningRules
from lib.data.tables import clean, events_of, order_events
from lib.errors import EventRejected, InputError

NOW = 1_700_000_000_000
RULES = CleaningRules()
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

GOOD: dict[str, object] = {"user_id": "u", "item_id": "i", "event": "click", "timestamp": NOW}


def test_the_schema_of_tables_follows_from_the_fields_of_an_event():
    """Files were written with it: another name, order, type or null would make them unreadable."""
    assert pa.schema(
        [
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("event", pa.string(), nullable=False),
            pa.field("value", pa.float32()),
            pa.field("timestamp", pa.int64(), nullable=False),
            pa.field("event_id", pa.string()),
            pa.field("request_id", pa.string()),
        ]
    ).equals(EVENT_SCHEMA)
    assert HISTORY_FIELDS == ["user_id", "item_id", "event", "value", "timestamp"]


# What only JSON can hold: a table's columns have types.
ONLY_JSON = [
    ({"extra": 1}, "unknown_field", "extra"),
    ({"user_id": 7}, "wrong_type", "user_id"),
    ({"user_id": True}, "wrong_type", "user_id"),
    ({"user_id": ["u"]}, "wrong_type", "user_id"),
    ({"user_id": "\ud800"}, "malformed_text", "user_id"),
    ({"item_id": 7}, "wrong_type", "item_id"),
    ({"item_id": 1.5}, "wrong_type", "item_id"),
    ({"event": 3}, "wrong_type", "event"),
    ({"event": ["click"]}, "wrong_type", "event"),
    ({"value": "4"}, "wrong_type", "value"),
    ({"value": True}, "wrong_type", "value"),
    ({"value": 10**400}, "value_not_finite", "value"),
    ({"timestamp": "now"}, "wrong_type", "timestamp"),
    ({"timestamp": 1.7e12}, "wrong_type", "timestamp"),
    ({"timestamp": True}, "wrong_type", "timestamp"),
    ({"timestamp": 10**5000}, "time_in_future", "timestamp"),
    ({"timestamp": -(10**5000)}, "time_too_old", "timestamp"),
    ({"event_id": 5}, "wrong_type", "event_id"),
    ({"request_id": 5}, "wrong_type", "request_id"),
]
BOTH_FORMS = [
    ({"user_id": None}, "missing_field", "user_id"),
    ({"user_id": ""}, "empty_id", "user_id"),
    ({"user_id": " \t"}, "empty_id", "user_id"),
    ({"user_id": "\u2003"}, "empty_id", "user_id"),
    ({"user_id": "x" * 257}, "long_id", "user_id"),
    ({"user_id": "é" * 257}, "long_id", "user_id"),
    ({"item_id": None}, "missing_field", "item_id"),
    ({"item_id": ""}, "empty_id", "item_id"),
    ({"item_id": "x" * 257}, "long_id", "item_id"),
    ({"user_id": "u\x00"}, "control_character", "user_id"),
    ({"user_id": "a\nb"}, "control_character", "user_id"),
    ({"user_id": "é\x85"}, "control_character", "user_id"),
    ({"item_id": "\x7fi"}, "control_character", "item_id"),
    ({"event_id": "e\r"}, "control_character", "event_id"),
    ({"request_id": "r\x9f"}, "control_character", "request_id"),
    ({"event": None}, "missing_field", "event"),
    ({"event": "Click"}, "unknown_event", "event"),
    ({"event": ""}, "unknown_event", "event"),
    ({"value": float("nan")}, "value_not_finite", "value"),
    ({"value": float("inf")}, "value_not_finite", "value"),
    ({"value": -float("inf")}, "value_not_finite", "value"),
    ({"value": 1e300}, "value_not_finite", "value"),
    ({"timestamp": EARLIEST_TIMESTAMP - 1}, "time_too_old", "timestamp"),
    ({"timestamp": NOW // 1000}, "time_too_old", "timestamp"),
    ({"timestamp": -1}, "time_too_old", "timestamp"),
    ({"timestamp": NOW + RULES.future_tolerance_ms + 1}, "time_in_future", "timestamp"),
    ({"timestamp": NOW * 1000}, "time_in_future", "timestamp"),
    ({"event_id": ""}, "empty_id", "event_id"),
    ({"event_id": "x" * 257}, "long_id", "event_id"),
    ({"request_id": "  "}, "empty_id", "request_id"),
    ({"request_id": "x" * 257}, "long_id", "request_id"),
]
ACCEPTED = [
    {"user_id": "x" * 256},
    {"user_id": "名前"},
    {"user_id": " u "},
    {"user_id": "\u200d👩\u200d🚀\u2028"},
    {"value": None},
    {"value": 4},
    {"value": -3.4028234663852886e38},
    {"timestamp": None},
    {"timestamp": EARLIEST_TIMESTAMP},
    {"timestamp": NOW + RULES.future_tolerance_ms},
    {"event_id": "e", "request_id": "r"},
]


def table_of(*events: dict[str, object]) -> pa.Table:
    # Looser than EVENT_SCHEMA where a bad event needs it: nullable, and a value may be beyond float32.
    types = {field.name: pa.float64() if field.name == "value" else field.type for field in EVENT_SCHEMA}
    return pa.table({name: pa.array([event.get(name) for event in events], kind) for name, kind in types.items()})


def reason_of(fields: dict[str, object]) -> str | None:
    try:
        validate_event(fields, NOW, RULES.future_tolerance_ms)
    except EventRejected as rejected:
        return rejected.reason
    return None


def click(user: str = "u", item: str = "i", timestamp: int = NOW, **others: object) -> dict[str, object]:
    return {"user_id": user, "item_id": item, "event": "click", "timestamp": timestamp, **others}


@pytest.mark.parametrize(("change", "reason", "field"), ONLY_JSON + BOTH_FORMS)
def test_one_bad_event_is_rejected_with_reason_and_field(change, reason, field):
    with pytest.raises(EventRejected) as caught:
        validate_event(GOOD | change, NOW, RULES.future_tolerance_ms)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert field in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("field", ["user_id", "item_id", "event"])
def test_an_absent_required_field_is_missing(field):
    fields = {name: value for name, value in GOOD.items() if name != field}
    assert reason_of(fields) == "missing_field"


@pytest.mark.parametrize("fields", [None, 3, "click", ["u", "i"]])
def test_an_event_that_is_no_object_is_rejected(fields):
    assert reason_of(fields) == "wrong_type"


@pytest.mark.parametrize(("change", "reason", "field"), BOTH_FORMS)
def test_one_bad_row_is_rejected_with_the_same_reason(change, reason, field):
    kept, counts = clean(table_of(GOOD, GOOD | {"item_id": "other"} | change), NOW, RULES)
    assert counts == Counter({reason: 1})
    assert kept["item_id"].to_pylist() == ["i"]


@pytest.mark.parametrize("change", ACCEPTED)
def test_good_events_pass_both_forms_unchanged(change):
    fields = GOOD | change
    event = validate_event(fields, NOW, RULES.future_tolerance_ms)
    kept, counts = clean(table_of(fields), NOW, RULES)
    assert not counts
    assert Event(**kept.to_pylist()[0]) == event
    assert event.timestamp == (fields["timestamp"] or NOW)
    assert kept.schema == EVENT_SCHEMA


def test_a_missing_timestamp_becomes_now():
    assert (
        validate_event({"user_id": "u", "item_id": "i", "event": "view"}, NOW, RULES.future_tolerance_ms).timestamp
        == NOW
    )


def test_messages_give_the_remedy():
    with pytest.raises(EventRejected, match="view, click, play, cart, purchase, rating, like, dislike, skip"):
        validate_event(GOOD | {"event": "zap"}, NOW, RULES.future_tolerance_ms)
    with pytest.raises(EventRejected, match="milliseconds since 1970, not seconds"):
        validate_event(GOOD | {"timestamp": NOW // 1000}, NOW, RULES.future_tolerance_ms)
    with pytest.raises(EventRejected, match=r"U\+000A; leave it out, or encode the id"):
        validate_event(GOOD | {"user_id": "a\nb"}, NOW, RULES.future_tolerance_ms)
    with pytest.raises(EventRejected, match="put it in quotes"):
        validate_event(GOOD | {"user_id": 5}, NOW, RULES.future_tolerance_ms)


def test_the_two_forms_agree_on_random_events():
    random_ = random.Random(5)
    changes = [change for change, _, _ in BOTH_FORMS] + [change for change in ACCEPTED if "user_id" not in change]
    events = []
    for place in range(3000):
        # Users of their own, so that no good event is a duplicate of another.
        event = GOOD | {"user_id": str(place)}
        for change in random_.sample(changes, random_.choice([0, 0, 1, 1, 2, 3])):
            event |= change
        events.append(event)
    reasons = [reason_of(event) for event in events]
    kept, counts = clean(table_of(*events), NOW, RULES)
    assert counts == Counter(reason for reason in reasons if reason)
    assert len(counts) == 8
    expected = [event["user_id"] for event, reason in zip(events, reasons, strict=True) if reason is None]
    assert sorted(kept["user_id"].to_pylist()) == sorted(expected)
    # Row by row, too: the totals alone could agree by chance.
    for event, reason in zip(events[:200], reasons, strict=False):
        assert clean(table_of(event), NOW, RULES)[1] == Counter([reason] if reason else [])


def test_duplicates_go_and_the_first_stays():
    table = table_of(
        click(value=1.0),
        click(value=2.0),  # the same user, item, event and time
        click(timestamp=NOW - 1),
        click(item="j"),
        click(event="view"),
        click(user="v"),
        click(item="a", event_id="e", value=1.0),
        click(item="b", event_id="e", value=2.0),  # the same event_id of the same user, whatever else differs
        click(user="v", item="b", event_id="e"),  # of another user
        click(event_id="f"),  # an event_id of its own: no duplicate of the first
    )
    kept, counts = clean(table, NOW, RULES)
    assert counts == Counter(duplicate=2)
    assert kept.num_rows == 8
    rows = kept.to_pylist()
    assert [row["value"] for row in rows if row["value"] is not None] == [1.0, 1.0]


def test_order_is_by_user_and_time_and_stable():
    random_ = random.Random(3)
    events = [click(random_.choice("abc"), str(place), NOW - random_.randrange(5)) for place in range(200)]
    kept, _ = clean(table_of(*events), NOW, RULES)
    expected = sorted(events, key=lambda event: (event["user_id"], event["timestamp"]))
    assert kept["item_id"].to_pylist() == [event["item_id"] for event in expected]
    assert order_events(kept) is kept


def test_floods_are_cut_to_the_limit():
    rules = CleaningRules(flood_events=3, flood_window_ms=1000)
    times = [0, 1, 2, 3, 999, 1000, 1998, 1999, 5000]
    # Three pass; 3 and 999 see three within the window before them, and so does 1000, which no longer sees time 0, for
    # a rejected event counts; 1998 sees 999 and 1000; 1999 sees 1000 and 1998 only, as 999 is a full window away.
    expected = [0, 1, 2, 1998, 1999, 5000]
    events = [click(item=str(time), timestamp=NOW - 10_000 + time) for time in times]
    events += [click(user="quiet", item=str(time), timestamp=NOW - 10_000 + time) for time in times[:3]]
    kept, counts = clean(table_of(*events), NOW, rules)
    assert counts == Counter(flood=3)
    assert [int(row["item_id"]) for row in kept.to_pylist() if row["user_id"] == "u"] == expected


@pytest.mark.parametrize("name", ["ml-100k", "yoochoose-100k"])
def test_default_rules_find_no_flood_in_real_data(name):
    path = SHARED / name / "events.parquet"
    if not path.exists():
        pytest.skip("shared/data is absent")
    table = pq.read_table(path)
    kept, counts = clean(table, NOW, RULES)
    # Yoochoose has one click twice.
    assert counts == (Counter(duplicate=1) if name == "yoochoose-100k" else Counter())
    assert kept.num_rows == table.num_rows - counts.total()


def test_an_empty_table_stays_one():
    kept, counts = clean(EVENT_SCHEMA.empty_table(), NOW, RULES)
    assert (kept.schema, kept.num_rows, counts) == (EVENT_SCHEMA, 0, Counter())
    kept, counts = clean(table_of(GOOD | {"user_id": None}), NOW, RULES)
    assert (kept.schema, kept.num_rows) == (EVENT_SCHEMA, 0)


def test_values_of_a_table_come_back_in_the_digits_that_they_had():
    values = [71.95, 0.1, 5.0, None, -3.4e38, 1e-7, 123456.7, 0.0, 1e20]
    events = [Event("u", f"i{place}", "click", value, NOW + place) for place, value in enumerate(values)]
    table, _ = clean(table_of(*(event._asdict() for event in events)), NOW + 100, RULES)
    assert table.schema.field("value").type == pa.float32()
    assert events_of(table) == events


def test_tables_of_other_shapes():
    table = pa.table(
        {
            "timestamp": pa.array([NOW], pa.int64()),
            "event": pa.array(["click"]).dictionary_encode(),
            "user_id": pa.array(["u"], pa.large_string()),
            "item_id": ["i"],
            "value": pa.array([3], pa.int16()),
        }
    )
    kept, _ = clean(table, NOW, RULES)
    assert kept.to_pylist() == [Event("u", "i", "click", 3.0, NOW)._asdict()]
    with pytest.raises(InputError, match="unknown column 'price'"):
        clean(table.append_column("price", pa.array([1.0])), NOW, RULES)
    with pytest.raises(InputError, match="'item_id' is missing"):
        clean(table.drop_columns(["item_id"]), NOW, RULES)
    with pytest.raises(InputError, match="'user_id' has type int64"):
        clean(table.drop_columns(["user_id"]).append_column("user_id", pa.array([1])), NOW, RULES)


@pytest.mark.parametrize("field", ["future_tolerance_ms", "flood_events", "flood_window_ms"])
def test_impossible_rules_are_refused(field):
    values: dict[str, Any] = {field: -1}
    with pytest.raises(InputError, match=field):
        CleaningRules(**values)
