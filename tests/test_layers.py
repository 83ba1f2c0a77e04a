"""An arrow only ever points down: jobs -> serving -> lib, and nothing but jobs and the tests needs cluster."""

import ast
import tomllib
from collections.abc import Iterator
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


def imported(source: str, package: str) -> Iterator[str]:
    """Top-level names of all modules that a source imports, wherever in it; those for type checkers count, too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=module, level=0) if module:
                yield module.split(".")[0]
            case ast.ImportFrom(level=level) if level:
                yield package
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[first, *_]) if name in IMPORTERS:
                if isinstance(first, ast.JoinedStr):  # f"jobs.{name}"
                    first = first.values[0]
                assert isinstance(first, ast.Constant), "a package that is chosen at run time cannot be checked"
                yield str(first.value).split(".")[0]


def violations(source: str, package: str) -> set[str]:
    return FORBIDDEN[package] & set(imported(source, package))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_points_up(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): violations(file.read_text(), package) for file in files}
    assert {name: names for name, names in found.items() if names} == {}


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


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["lib*", "serving*", "jobs*", "cluster*"]
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
