"""An arrow only ever points down: jobs -> serving -> lib, and within lib from each room to those below it.

Imports count wherever they stand: within functions, and those for type checkers alone.
"""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "serving", "lib", "cluster")
IMPORTERS = ("import_module", "__import__")
# what a package must not import
FORBIDDEN: dict[str, set[str]] = {
    "lib": {"ray", "fastapi", "starlette", "uvicorn", "serving", "jobs", "cluster", "tests"},
    "serving": {"jobs", "cluster", "tests"},
    "cluster": {"jobs", "serving", "tests"},
    "jobs": {"tests"},
}
# the rooms of lib from the top down; a room imports only itself and rooms of lines below its own
LINES: tuple[set[str], ...] = (
    {"live"},
    {"ranking"},
    {"versions", "evaluation"},
    {"model"},
    {"log", "experiments"},
    {"data"},
    {"settings", "sqlite"},
    {"durable"},
    {"retrieval", "errors"},
)
LINE_OF = {room: number for number, rooms in enumerate(LINES) for room in rooms}


def module_of(file: Path) -> str:
    """The dotted name of a file: lib/model/encoder.py -> lib.model.encoder, a package by its own name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def imported(source: str, module: str) -> Iterator[str]:
    """Names of all modules, or of what is in them, that a source imports; `module` is its own name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=0) if name:
                yield from (f"{name}.{alias.name}" for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level) if level:
                base = ".".join([*module.split(".")[:-level], *([name] if name else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[first, *_]) if name in IMPORTERS:
                if isinstance(first, ast.JoinedStr):  # f"jobs.{name}"
                    first = first.values[0]
                assert isinstance(first, ast.Constant), "a package that is chosen at run time cannot be checked"
                yield str(first.value)


def violations(source: str, package: str) -> set[str]:
    return FORBIDDEN[package] & {name.split(".")[0] for name in imported(source, f"{package}.module")}


def upward(source: str, module: str) -> set[str]:
    """Imports of rooms that are not below a module's own."""
    own = module.split(".")[1]
    rooms = {name.split(".")[1] for name in imported(source, module) if name.startswith("lib.")}
    return {room for room in rooms if room != own and LINE_OF[room] <= LINE_OF[own]}


def arrows(files: list[Path]) -> dict[str, set[str]]:
    """Module -> the modules of the same files that it imports."""
    known = {module_of(file) for file in files}
    found = {}
    for file in files:
        module = module_of(file)
        names = imported(file.read_text(), module)
        nearest = (name if name in known else name.rpartition(".")[0] for name in names)
        found[module] = {name for name in nearest if name in known and name != module}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one found; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_points_up(package):
    files = files_of(package)
    assert files
    found = {str(file.relative_to(ROOT)): violations(file.read_text(), package) for file in files}
    assert {name: names for name, names in found.items() if names} == {}


def test_every_room_of_lib_has_its_line():
    rooms = {path.stem for path in (ROOT / "lib").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(LINE_OF)


@pytest.mark.parametrize("room", sorted(LINE_OF))
def test_a_room_imports_only_rooms_below_it(room):
    files = [file for file in files_of("lib") if module_of(file).split(".")[1:2] == [room]]
    assert files
    found = {str(file.relative_to(ROOT)): upward(file.read_text(), module_of(file)) for file in files}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


def test_no_modules_import_each_other():
    assert circle(arrows(files_of(*PACKAGES))) == []


def test_test_modules_import_no_test_module():
    names = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files_of("tests")
        for name in imported(file.read_text(), module_of(file))
        if any(part.startswith("test_") or part == "conftest" for part in name.split(".")[:-1])
    }
    assert names == set()


@pytest.mark.parametrize(
    "source",
    [
        "import ray",
        "import numpy, ray.serve as serve",
        "from ray.serve import deployment",
        "def f():\n    import ray\n",
        "if TYPE_CHECKING:\n    from fastapi import FastAPI\n",
        "import importlib\nimportlib.import_module('ray.data')",
        "from importlib import import_module\nimport_module(f'ray.{name}')",
        "from serving.http import http_application",
        "from jobs import demo",
        "try:\n    import cluster\nexcept ImportError:\n    pass",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert violations(source, "lib")


def test_what_looks_like_an_import_is_none():
    source = '"""import ray"""\nimport raylib\nfrom lib.rays import ray\nimport numpy\n# import fastapi\n'
    assert violations(source, "lib") == set()


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from lib.live.gate import Gate", {"live"}),
        ("def f():\n    from lib.versions.registry import Registry", {"versions"}),
        ("if TYPE_CHECKING:\n    import lib.evaluation.metrics", {"evaluation"}),
        ("from lib import live", {"live"}),
        ("from ..live import gate", {"live"}),
        ("from lib.model.encoder import BehaviourEncoder\nfrom lib.errors import InputError", set()),
    ],
)
def test_an_import_of_a_room_that_is_not_below_is_seen(source, rooms):
    assert upward(source, "lib.model.batches") == rooms


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["lib*", "serving*", "jobs*", "cluster*"]
    folders = {file.parent for file in files_of(*PACKAGES)}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
