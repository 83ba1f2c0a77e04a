"""Errors that a person can mend, and pydantic's objections to settings as one line of such an error."""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes a while to import, and most who raise an InputError have no settings
    from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Input that a person can mend; the message is one line that names the field and the remedy."""


class SettingsError(InputError):
    """Settings that break a rule; the message begins with the dotted name of the setting."""


class EventRejected(InputError):
    """An event that breaks a rule: `reason` is a stable code to count by, `field` the field at fault."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.message = message


def origin_of(error: BaseException) -> BaseException:
    """Return the error that another one carries: Ray wraps what an actor raises, with its traceback as text."""
    return getattr(error, "cause", None) or error


def refuse_uri(name: str, location: str) -> None:
    """Refuse a URI where a folder or a file is needed.

    Raises:
        InputError: it names what was given the URI.
    """
    # a Path has joined the slashes; a single letter is a drive
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", location):
        raise InputError(
            f"{name}: {location} is a URI, and only a path on this machine (or one that is mounted) will do"
        )


def objection(error: "ValidationError", *models: "type[BaseModel]", whole: str = "settings") -> str:
    """Return the first thing that is wrong, in one line that begins with the field.

    Args:
        error: what validation raised.
        models: the model whose setting is unknown, and last the one of the settings inside of it.
        whole: what to call the settings where no field is at fault.
    """
    first = error.errors()[0]
    places = [str(part) for part in first["loc"] if part != "[key]"]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, SettingsError):  # of settings inside of these
        return ".".join([*places, str(own)])
    if isinstance(own, InputError):  # raised by a check of ours; it begins with the last part of the place
        return ".".join([*places[:-1], str(own)])
    name = ".".join(places) or whole
    if first["type"] == "extra_forbidden" and models:
        known = models[0] if len(places) == 1 else models[-1]
        return f"{name}: no such setting{_remedy(places[-1], known)}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return f"{name}: {message}; add it"
    if first["type"] in ("list_type", "tuple_type"):
        return f"{name}: {first['input']!r} is no list; write one as [a, b]"
    return f"{name}: {message}, got {first['input']!r}"


def _remedy(name: str, model: "type[BaseModel]") -> str:
    """Say what an unknown setting may have been meant to be: one inside of another, or one of a similar name."""
    for group, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        if name in inner:
            return f"; it is {group}.{name}"
        if name.removeprefix(f"{group}_") in inner:
            return f"; it is {group}.{name.removeprefix(f'{group}_')}"
    close = get_close_matches(name, model.model_fields, n=1)
    return f"{f', did you mean {close[0]}?' if close else ';'} there are {', '.join(model.model_fields)}"
