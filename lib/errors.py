"""Errors that a person can mend, and pydantic's objections to settings as one line of such an error."""

from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Input that a person can mend; the message is one line that names the field and the remedy."""


class EventRejected(InputError):
    """An event that breaks a rule: `reason` is a stable code to count by, `field` the field at fault."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.message = message


def objection(error: ValidationError, *models: type[BaseModel], whole: str = "settings") -> str:
    """The first thing that is wrong, in one line that begins with the field.

    Args:
        error: what validation raised.
        models: the model whose setting is unknown, and last the one of the settings inside of it.
        whole: what to call the settings where no field is at fault.
    """
    first = error.errors()[0]
    places = [str(part) for part in first["loc"] if part != "[key]"]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, InputError):  # raised by a check of ours; it begins with the last part of the place
        return ".".join([*places[:-1], str(own)])
    name = ".".join(places) or whole
    if first["type"] == "extra_forbidden" and models:
        known = models[0] if len(places) == 1 else models[-1]
        return f"{name}: no such setting; there are {', '.join(known.model_fields)}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return f"{name}: {message}; add it"
    return f"{name}: {message}, got {first['input']!r}"
