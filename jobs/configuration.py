"""What a command takes and leaves beside its data: settings (YAML file, --set key=value) and results (--json)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from lib.errors import InputError
from lib.settings import Settings

Kind = TypeVar("Kind", bound=Settings)


def settings_from(kind: type[Kind], config: Path | None, assignments: Sequence[str]) -> Kind:
    """Make settings; assignments win over the file, what neither names keeps its default.

    A dotted key is a setting inside of another: gate.deviations=2.

    Raises:
        InputError: a file that is no mapping, an unknown key, or a value of another type or out of its range.
    """
    values = yaml_of(config) if config is not None else {}
    for name, value in values_of(assignments).items():
        _assign(values, name, value)
    return kind(**values)


def values_of(assignments: Sequence[str]) -> dict[str, Any]:
    """Return what key=value assignments say, the last of a key; each value is read as YAML.

    Raises:
        InputError: one is no assignment.
    """
    return dict(_assigned(assignment) for assignment in assignments)


def yaml_of(path: Path, option: str = "config") -> dict[str, Any]:
    """Read the mapping in a YAML file; empty for an empty file.

    Raises:
        InputError: it cannot be read, or is no mapping; the message begins with the option that named it.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be read ({error.strerror}); name a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{option}: {path} must be a mapping of settings, such as `epochs: 20`")
    return values


def write_json(path: Path, value: Any) -> None:
    """Write a result where --json says, as indented JSON; folders on the way are made.

    Raises:
        InputError: it cannot be written there.
    """
    text = value.model_dump_json(indent=2) if isinstance(value, BaseModel) else json.dumps(value, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    except OSError as error:
        raise InputError(f"json: {path} cannot be written ({error.strerror}); name another file") from error


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one value, of which a dotted name says in which group it is."""
    *groups, last = name.split(".")
    for group in groups:
        inner = values.get(group)
        values[group] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[group]
    values[last] = value


def _assigned(assignment: str) -> tuple[str, Any]:
    name, separator, text = assignment.partition("=")
    if not separator or not name.strip():
        raise InputError(f"--set {assignment}: write key=value")
    try:
        return name.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment}: the value is not valid YAML; put it in quotes") from error
