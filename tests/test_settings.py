"""Every setting that a person can reach is in a table of jobs/README.md, with its default, range and meaning."""

import pkgutil
from typing import get_origin

import pytest
from pydantic import BaseModel

import jobs
import lib
import serving
from lib.settings import Settings
from tests.helpers.settings_table import README, REQUEST, model_in, name_of, settings_class, with_tables

PACKAGES = (lib, serving, jobs)
TEXT = README.read_text()
WITH_TABLES = {match[2] for match in REQUEST.finditer(TEXT) if match[1] == "settings"}
NOT_REACHED = {
    "serving.aggregator.AggregatorConfig": "put together from the settings of the service",
    "serving.status.ExperimentStatus": "what the status says",
    "serving.status.ShadowStatus": "what the status says",
}


def all_settings() -> set[type[Settings]]:
    """Return every class of settings that the packages have."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                pkgutil.resolve_name(module.name)
    found: set[type[Settings]] = set()
    waiting = [Settings]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        found.update(kind for kind in kinds if kind.__module__.partition(".")[0] != "tests")
        waiting += kinds
    return found


def parts_of(kind: type[BaseModel]) -> set[str]:
    """Return the names of the classes that a table of this class has rows of."""
    inner = [model_in(field.annotation) for field in kind.model_fields.values()]
    bases = {name_of(base) for base in kind.__mro__ if issubclass(base, BaseModel)}
    return bases.union(*(parts_of(each) for each in inner if each is not None))


def test_the_tables_are_what_the_code_says():
    assert with_tables(TEXT) == TEXT, "run: python -m tests.helpers.settings_table"


def test_every_class_of_settings_has_a_table():
    shown = set().union(*(parts_of(settings_class(name)) for name in WITH_TABLES))
    known = {name_of(kind) for kind in all_settings()}
    assert known - shown == NOT_REACHED.keys()


@pytest.mark.parametrize("name", sorted(WITH_TABLES))
def test_every_setting_says_what_it_does(name):
    for setting, field in settings_class(name).model_fields.items():
        assert field.description or model_in(field.annotation), f"{name}.{setting} has no description"


def test_one_value_of_a_setting_that_is_a_list_is_a_list_of_one():
    weighted = {"filter": {"genres": "Comedy"}, "weight": 0.5}
    single = {"inputs": "kind", "without_sources": "trending", "boost": weighted, "bury": weighted}
    met = set()
    for kind in all_settings():
        for name, field in kind.model_fields.items():
            if get_origin(field.annotation) in (list, tuple):
                assert getattr(kind(**{name: single[name]}), name) == getattr(kind(**{name: [single[name]]}), name)
                met.add(name)
    assert met == single.keys()
