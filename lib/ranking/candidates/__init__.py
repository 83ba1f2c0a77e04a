"""Where candidates come from: one small file a source, each a function from what is asked to what it found.

A source names candidates by line (person) and row (item). Where it also knows how strongly, it gives values by the name
of a feature (lib/ranking/features.py); the values of one candidate are added up. The ranker decides what they are
worth, so a source only has to find what may be good.
"""

from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator

from lib.errors import InputError
from lib.ranking.candidates import following, nearest, new, seen, together, trending
from lib.ranking.candidates.asked import Asked, Found, Source

SOURCES: dict[str, Source] = {
    "nearest": nearest.find,
    "following": following.find,
    "together": together.find,
    "trending": trending.find,
    "new": new.find,
    "seen": seen.find,
}


def sources_without(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of the sources that are left where these are switched off.

    Raises:
        InputError: there is no such source, or none is left.
    """
    for name in names:
        if name not in SOURCES:
            raise InputError(f"without_sources: there is no source {name!r}; there are {', '.join(SOURCES)}")
    left = tuple(name for name in SOURCES if name not in names)
    if not left:
        raise InputError("without_sources: none is left; keep one")
    return left


def _checked(names: tuple[str, ...]) -> tuple[str, ...]:
    sources_without(names)
    return names


WithoutSources = Annotated[tuple[str, ...], AfterValidator(_checked)]  # names of what is switched off

__all__ = ["SOURCES", "Asked", "Found", "Source", "WithoutSources", "sources_without"]
