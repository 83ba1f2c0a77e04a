"""An arrow only ever points down: jobs, serving, lib; and cluster is imported by jobs alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "lib": {"ray", "fastapi", "serving", "jobs", "cluster", "tests"},
    "serving": {"jobs", "cluster", "tests"},
    "jobs": {"tests"},
    "cluster": {"jobs", "serving", "tests"},
}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_down(folder):
    files = list((ROOT / folder).glob("*.py"))
    assert files
    wrong = {path.name: sorted(imported_packages(path) & FORBIDDEN[folder]) for path in files}
    assert {name: packages for name, packages in wrong.items() if packages} == {}
