"""Conditions on attributes as requests and rules write them: a value, a list of admissible values, or a range."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lib.errors import InputError

BOUNDS = {"min", "max"}


def check_condition(column: str, condition: Any) -> int:
    """Return the number of values of a condition; a range has two.

    Raises:
        InputError: it has another form; the message names the column.
    """
    if isinstance(condition, Mapping):
        if not condition or not set(condition) <= BOUNDS:
            raise InputError(f'filter.{column}: a range is written {{"min": x, "max": y}}')
        if not all(isinstance(bound, int | float) for bound in condition.values()):
            raise InputError(f"filter.{column}: min and max are numbers")
        return len(BOUNDS)
    wanted = values_of(condition)
    if not wanted or not all(isinstance(value, str | int | float | bool) for value in wanted):
        raise InputError(f"filter.{column}: give a value, a list of values, or a range with min and max")
    return len(wanted)


def values_of(condition: Any) -> list[Any]:
    """Return the values of a condition that is no range."""
    return condition if isinstance(condition, list) else [condition]


def bounds_of(condition: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bounds of a range."""
    return _float(condition.get("min", -math.inf)), _float(condition.get("max", math.inf))


def texts_of(value: Any) -> list[str]:
    """Return how a value may be written where it is compared with text: 20 is 20.0."""
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, float) and value.is_integer():
        return [str(value), str(int(value))]
    return [str(value)]


def numbers_of(value: Any) -> Iterator[float]:
    """Yield the number that a value is, if it is one."""
    if isinstance(value, bool):
        return
    try:
        yield _float(value)
    except ValueError:
        return


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf if value > 0 else -math.inf
