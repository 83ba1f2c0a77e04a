"""Kinds of attributes: what the values of one column are, so that they can be compared, stored and learned from.

Whole numbers widen to numbers when a fraction comes; nothing else goes together. Null and an empty list are of no kind:
a column has one once a value has.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from lib.errors import InputError

TEXT, FLAG, WHOLE, NUMBER, TEXTS = "text", "true or false", "whole numbers", "numbers", "lists of texts"
TYPES = {
    TEXT: pa.string(),
    FLAG: pa.bool_(),
    WHOLE: pa.int64(),
    NUMBER: pa.float64(),
    TEXTS: pa.list_(pa.string()),
}
EXACT = 2**53  # whole numbers up to it are exact among numbers
LONGEST_SHOWN = 60  # characters of a value that an error message repeats


def kind_of(value: Any) -> str | None:
    """Return the kind of a value as JSON has it, None for null and an empty list.

    Raises:
        InputError: it is no attribute, or cannot be stored as it is.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return FLAG
    if isinstance(value, str):
        _require_unicode(value)
        return TEXT
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"{_shown(value)} is too large for a whole number; send a text")
        return WHOLE
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{value} is no number; leave it out")
        return NUMBER
    if isinstance(value, list) and all(isinstance(member, str) for member in value):
        for member in value:
            _require_unicode(member)
        return TEXTS if value else None
    raise InputError(f"{_shown(value)} is no attribute; send a text, a number, true, false or a list of texts")


def kind_of_type(kind: pa.DataType) -> str | None:
    """Return the kind of a column of Arrow's; None for one that has no values, the type's name for one of no kind."""
    if pa.types.is_dictionary(kind):
        return kind_of_type(kind.value_type)
    if pa.types.is_null(kind):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return TEXT
    if pa.types.is_boolean(kind):
        return FLAG
    if pa.types.is_integer(kind):
        return WHOLE
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return NUMBER
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        members = kind_of_type(kind.value_type)
        return None if members is None else TEXTS if members == TEXT else str(kind)
    return str(kind)


def widened(known: str | None, kind: str | None) -> str | None:
    """Return the kind of a column that holds values of two kinds, None where they do not go together."""
    if known is None or kind is None or known == kind:
        return known or kind
    return NUMBER if {known, kind} == {WHOLE, NUMBER} else None


def wider_kinds(item_id: str, attributes: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, str]:
    """Return the kinds of the columns that an item's attributes fix or widen, given those of the columns known.

    Raises:
        InputError: an attribute is not of its column's kind; the message names column, value and remedy.
    """
    changed = {}
    for column, value in attributes.items():
        kind = fitting(item_id, column, value, kinds.get(column))
        if kind is not None and kind != kinds.get(column):
            changed[column] = kind
    return changed


def fitting(item_id: str, column: str, value: Any, known: str | None) -> str | None:
    """Return the kind of a column with one more value; None where there is none yet.

    Raises:
        InputError: the value is not of the column's kind; the message names column, value and remedy.
    """
    if column == "item_id":
        raise InputError("item_id: it is no attribute")
    try:
        _require_unicode(column)
        kind = kind_of(value)
    except InputError as error:
        raise InputError(f"{column}: {error} (item {item_id!r})") from error
    together = widened(known, kind)
    if kind is not None and together is None:
        raise InputError(
            f"{column}: {_shown(value)} of item {item_id!r} does not go with the {known} that the catalog has there;"
            f" send {known}, or give the attribute another name"
        )
    if together == NUMBER and kind == WHOLE and abs(value) > EXACT:
        raise InputError(f"{column}: {value} of item {item_id!r} is not exact among numbers; send fewer digits")
    return together


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{_shown(text)} is no valid Unicode; send it without lone surrogates") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
