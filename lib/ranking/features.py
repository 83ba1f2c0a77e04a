"""What the ranker reads of a person and a candidate, for all candidates of a batch of people at once.

The candidates of all sources are united: what several found is one candidate, with the values of all of them. What does
not depend on the source (interest, trends, age) is looked up for the united ones. Nothing loops over items.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lib.ranking.candidates import SOURCES, Asked

# added up over the sources; a logarithm makes a score of odds of them
SUMMED = ("follows", "together", "together_long", "seen", "seen_recently", "is_newest")
LEAST = {"follows": 1e-3, "together": 1e-3, "together_long": 3e-3}  # what counts as nothing
TRENDS = ("trend_100", "trend_1000", "trend_10000", "popularity")
FEATURES = ("interest", *SUMMED, *TRENDS, "age", "history")
SCRATCH = 1 << 22  # places of (person, row) up to which a table of all of them is faster than sorting


class Candidates(NamedTuple):
    """P candidates of B people, those of one person after those of the one before, rows ascending."""

    lines: np.ndarray  # (P,) int64
    rows: np.ndarray  # (P,) int64
    features: np.ndarray  # (P, F) float32, in the order of FEATURES
    kinds: np.ndarray  # (P,) int64, of the person's newest event

    @property
    def places(self) -> np.ndarray:
        """(P,) the place of each among its person's."""
        first = np.searchsorted(self.lines, np.arange(self.lines[-1] + 1 if len(self.lines) else 0))
        return np.arange(len(self.lines)) - first[self.lines]


def find_candidates(asked: Asked, sources: Sequence[str] = tuple(SOURCES)) -> Candidates:
    """Find the candidates of everybody, with their features.

    Args:
        asked: the people, and what is known of the items.
        sources: names in lib/ranking/candidates.
    """
    found = [SOURCES[name](asked) for name in sources]
    width = len(asked.counts["events"])
    keys = np.concatenate([each.lines for each in found]) * width
    keys += np.concatenate([each.rows for each in found])
    stops = np.cumsum([len(each.lines) for each in found])
    parts = [slice(stop - len(each.lines), stop) for each, stop in zip(found, stops, strict=True)]
    values = {name: (part, own) for each, part in zip(found, parts, strict=True) for name, own in each.values.items()}
    none = np.arange(len(asked.people)) * width  # row 0 of everybody
    excluded = [start + rows for start, rows in zip(none.tolist(), asked.excluded, strict=True)]
    keys, sums = _united(keys, values, np.concatenate([none, *excluded]), len(asked.people) * width)
    lines, rows = np.divmod(keys, width)
    if asked.mask is not None and not (kept := asked.mask[rows]).all():
        lines, rows, sums = lines[kept], rows[kept], {name: own[kept] for name, own in sums.items()}
    kinds = np.array([person.kind for person in asked.people], dtype=np.int64)
    return Candidates(lines, rows, _features(asked, lines, rows, sums), kinds[lines])


def _united(
    keys: np.ndarray, values: Mapping[str, tuple[slice, np.ndarray]], excluded: np.ndarray, size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the distinct keys that are not excluded, ascending, and the sum of each value over equal keys.

    Args:
        keys: (E,) int64 below `size`.
        values: by name, which part of the keys each belongs to.
        excluded: keys.
        size: of the space of keys.
    """
    if size <= SCRATCH:
        there = np.zeros(size, dtype=bool)
        there[keys] = True
        there[excluded] = False
        found = np.flatnonzero(there)
        place_of = np.empty(size, dtype=np.int32)
        place_of[excluded] = len(found)
        place_of[found] = np.arange(len(found))
        places = place_of[keys]
    else:
        every, places = np.unique(keys, return_inverse=True)
        kept = np.isin(every, excluded, invert=True)
        found = every[kept]
        places = np.where(kept, np.cumsum(kept) - 1, len(found))[places]
    sums = {name: np.bincount(places[part], own, len(found) + 1)[:-1] for name, (part, own) in values.items()}
    return found, sums


def _features(asked: Asked, lines: np.ndarray, rows: np.ndarray, sums: dict[str, np.ndarray]) -> np.ndarray:
    """Return (P, F) float32, each feature in a piece of memory of its own."""
    columns = np.zeros((len(FEATURES), len(rows)), dtype=np.float32)
    column: dict[str, np.ndarray] = dict(zip(FEATURES, columns, strict=True))
    lengths = np.array([person.length for person in asked.people], dtype=np.float32)
    interest, known = asked.interests(lines, rows), lengths > 0
    column["interest"][:] = interest if known.all() else np.where(known[lines], interest, asked.popularity.shares[rows])
    own_norm = np.sqrt(asked.counts["events"][rows] + 1)
    for name, values in sums.items():
        own = column[name]
        own[:] = values
        if name.startswith("together"):
            own /= own_norm
        if name in LEAST:  # log(value + least) - log(least)
            own /= np.float32(LEAST[name])
            np.log1p(own, out=own)
        if name == "seen":
            np.log1p(own, out=own)
    columns[FEATURES.index(TRENDS[0]) : FEATURES.index(TRENDS[-1]) + 1] = asked.standing.trends(rows).T
    column["age"][:] = np.log1p(asked.standing.age(rows)) / 10
    column["history"][:] = np.log1p(lengths)[lines]
    return columns.T


def padded(candidates: Candidates, people: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return features (B, K, F), -inf in the first where there is no candidate, and rows (B, K), 0 there."""
    places = candidates.places
    most = int(places.max(initial=0)) + 1  # where nobody has any, one place that is empty
    features = np.zeros((people, most, len(FEATURES)), dtype=np.float32)
    features[..., 0] = -np.inf
    rows = np.zeros((people, most), dtype=np.int64)
    features[candidates.lines, places] = candidates.features
    rows[candidates.lines, places] = candidates.rows
    return torch.from_numpy(features), rows
