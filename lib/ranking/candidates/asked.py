"""What the sources of candidates are asked, and what they answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lib.data.histories import Person
from lib.ranking.cold_start import Popularity
from lib.ranking.standing import Standing
from lib.retrieval.index import ItemIndex

RECENT = 8  # newest distinct items of a person whose neighbours are looked up
STRONGEST = 96  # neighbours of an item that are looked up


class Found(NamedTuple):
    """P candidates; one may be named more than once. Row 0 is none."""

    lines: np.ndarray  # (P,) int64, number of the person
    rows: np.ndarray  # (P,) int, row of the item
    values: Mapping[str, np.ndarray] = {}  # feature -> (P,) what this adds to it


@dataclass(frozen=True)
class Asked:
    """B people who are to be answered, and what the model knows of the items."""

    people: Sequence[Person]
    repeats: np.ndarray  # (B,) bool, whether items that the person has seen may be found
    queries: Tensor  # (B, C) uT A; zero for who has no history
    count: int  # items of the largest answer
    mask: np.ndarray | None  # (R,) bool, the rows that may be found; None for all
    weights: np.ndarray | None  # (R,) what ranking rules add to the score of a row
    index: ItemIndex
    popularity: Popularity  # of late and with newcomers: what interests who has no history
    counts: Mapping[str, np.ndarray]  # of lib/model/item_counts.py
    standing: Standing

    @cached_property
    def products(self) -> np.ndarray | None:
        """(B, R) s = uT A v of everybody and all items, where all are worked out at once; else None."""
        return self.index.products(self.queries, self.mask)

    def interests(self, lines: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (P,) float32 s = uT A v of people at `lines` (P,), ascending, and items at `rows` (P,)."""
        if self.products is None:
            return self.index.scores(self.queries, lines, rows)
        return self.products[lines, rows]

    @cached_property
    def recent(self) -> "Recent":
        """What the people had last."""
        recent = np.array([person.recent[:RECENT] for person in self.people])  # (B, RECENT)
        lines, places = recent.nonzero()
        return Recent(lines, places, recent[lines, places])

    @cached_property
    def excluded(self) -> list[np.ndarray]:
        """Rows that each person must not get, ascending."""
        nothing = np.zeros(0, dtype=np.int32)
        return [nothing if again else own.seen for own, again in zip(self.people, self.repeats, strict=True)]


class Recent(NamedTuple):
    """The newest distinct items of several people, E in all."""

    lines: np.ndarray  # (E,) int64, number of the person
    places: np.ndarray  # (E,) int64, 0 is the person's newest
    rows: np.ndarray  # (E,) int64, of the item


Source = Callable[[Asked], Found]


def shared(asked: Asked, rows: np.ndarray) -> Found:
    """Return the same rows (M,) as candidates of everybody."""
    table = np.broadcast_to(rows, (len(asked.people), len(rows)))
    return Found(np.repeat(np.arange(len(asked.people)), len(rows)), table.ravel())


def neighbours(asked: Asked, name: str, shares: Mapping[str, np.ndarray]) -> Found:
    """Return the strongest listed neighbours of everybody's recent items.

    Args:
        asked: who, and what is known.
        name: of the lists.
        shares: feature -> (E,) what its value is of the count of each recent item's neighbours.
    """
    recent = asked.recent
    rows = asked.counts[f"{name}_rows"][:, :STRONGEST][recent.rows]  # (E, M)
    counts = asked.counts[f"{name}_counts"][:, :STRONGEST][recent.rows]
    values = {feature: (counts * share[:, None]).ravel() for feature, share in shares.items()}
    return Found(np.repeat(recent.lines, rows.shape[1]), rows.ravel(), values)
