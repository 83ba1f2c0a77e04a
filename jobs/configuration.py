"""Settings of a job from a YAML file and from --set key=value, over the defaults of its dataclass."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from lib.events import InputError

Settings = TypeVar("Settings")


def settings_from(kind: type[Settings], config: Path | None, assignments: Sequence[str]) -> Settings:
    """An instance of a settings dataclass; assignments win over the file.

    Raises:
        InputError: a file that is no mapping, an unknown key, or a value of another type.
    """
    values = _from_file(config) if config is not None else {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: write key=value")
        values[name.strip()] = yaml.safe_load(text)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise InputError(f"{name}: no such setting; there are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error


def _from_file(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text())
    except FileNotFoundError:
        raise InputError(f"config: no file at {config}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {config} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"config: {config} must be a mapping of settings, such as `epochs: 20`")
    return values
