"""Where candidates come from: one small file a source, each a function from what is asked to what it found.

A source names candidates by line (person) and row (item). Where it also knows how strongly, it gives values by the name
of a feature (lib/ranking/features.py); the values of one candidate are added up. The ranker decides what they are
worth, so a source only has to find what may be good.
"""

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

__all__ = ["SOURCES", "Asked", "Found", "Source"]
