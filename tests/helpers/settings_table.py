"""The tables of options and settings in jobs/README.md, with rows made from the code.

    python -m tests.helpers.settings_table     writes the tables of jobs/README.md anew

`<!-- options of pretrain -->` asks for the options of a verb, `<!-- settings of lib.live.settings.LearnerConfig -->`
for the settings of a class, `presets of` for what is used where these are not set. Settings within settings have dotted
names; a class with a table of its own is left to it.
"""

import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from jobs.command_line import VERBS
from lib.model.presets import PRESETS
from lib.model.trainer import TrainingConfig

README = Path(__file__).resolve().parents[2] / "jobs" / "README.md"
REQUEST = re.compile(r"^<!-- (options|settings|presets) of (\S+) -->\n(?:\n(?:\|.*\n)+)?", re.MULTILINE)


def with_tables(text: str) -> str:
    """Return a README with each table that it asks for made anew."""
    own = {settings_class(match[2]) for match in REQUEST.finditer(text) if match[1] == "settings"}

    def table(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "options":
            lines = option_table(name)
        else:
            settings = settings_class(name)
            lines = settings_table(settings, own) if kind == "settings" else preset_table(settings)
        return "\n".join([f"<!-- {kind} of {name} -->", "", *lines, ""])

    return REQUEST.sub(table, text)


def settings_class(name: str) -> type[BaseModel]:
    """Return the class of a dotted name."""
    return pkgutil.resolve_name(name)


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ---------------------------------------------------------------------------------------------------------- settings


def settings_table(kind: type[BaseModel], own: set[type[BaseModel]]) -> list[str]:
    """Return the lines of a table of settings; the classes in `own` have tables of their own."""
    return _table(["setting", "default", "range", ""], _settings(kind, own - {kind}))


def _settings(kind: type[BaseModel], own: set[type[BaseModel]], group: str = "") -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        inner, many = model_in(field.annotation), get_origin(field.annotation) in (tuple, list)
        if inner is not None and any(issubclass(each, inner) for each in own):
            about = f"{field.description}: " if field.description else ""
            yield f"`{group}{name}`", "", "", f"{about}see the table of its own"
            continue
        if inner is None or many:
            yield f"`{group}{name}`", _default(field), _range(field), field.description or ""
        if inner is not None:
            yield from _settings(inner, own, f"{group}{name}[]." if many else f"{group}{name}.")


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the class of settings that a field holds, one or many of, None for a plain value."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value is PydanticUndefined else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value == {} else str(value)


def _range(field: FieldInfo) -> str:
    """Return what values a setting takes: its choices, or the bounds of a number."""
    kinds = list(_kinds(field.annotation))
    choices = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
    if choices:
        return ", ".join(map(str, choices[0]))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    parts = [*field.metadata, *(part for kind in kinds for part in getattr(kind, "__metadata__", ()))]
    parts = [inner for part in parts for inner in (part.metadata if isinstance(part, FieldInfo) else [part])]
    return ", ".join(
        f"{sign} {getattr(part, name)}" for part in parts for name, sign in signs.items() if hasattr(part, name)
    )


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield a type, and those that it is made of; what is in a dict or a tuple has bounds of its own."""
    yield annotation
    if get_origin(annotation) not in (dict, tuple):
        for part in get_args(annotation):
            yield from _kinds(part)


def preset_table(kind: type[BaseModel]) -> list[str]:
    """Return the lines of a table of what is used where settings without a default are not set."""
    unset = [name for name, field in kind.model_fields.items() if field.default is None]
    trainer = TrainingConfig()
    rows = [
        (f"`{name}`", *(_value(getattr(preset, name, getattr(trainer, name, None))) for preset in PRESETS.values()))
        for name in unset
        if hasattr(trainer, name) or hasattr(PRESETS["small"], name)
    ]
    return _table(["setting", *PRESETS], [row for row in rows if row[0] != "`precision`"])


# ----------------------------------------------------------------------------------------------------------- options


def options_of(verb: str) -> Sequence[Any]:
    """Return the options of a verb, as Typer has them."""
    module, function, _ = VERBS[verb]
    application = typer.Typer(add_completion=False)
    application.command()(pkgutil.resolve_name(f"jobs.{module}:{function}"))
    return [option for option in get_command(application).params if option.name != "help"]


def option_table(verb: str) -> list[str]:
    """Return the lines of a table of a verb's options."""
    rows = [(_names(option), _option_default(option), option.help or "") for option in options_of(verb)]
    return _table(["option", "default", ""], rows)


def _names(option: Any) -> str:
    return " / ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or (option.is_flag and option.default is False):
        return ""
    return "on" if option.default is True else str(option.default)


def _table(heads: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
