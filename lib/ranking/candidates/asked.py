"""What the sources of candidates are asked, and what they answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lib.data.histories import Person
from lib.ranking.standing import Standing
from lib.retrieval.index import ItemIndex


class Found(NamedTuple):
    """P candidates; one may be named more than once."""

    lines: np.ndarray  # (P,) int64, number of the person
    rows: np.ndarray  # (P,) int64, row of the item
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
    popularity: np.ndarray  # (R,) of late and with newcomers, 1 at most; what interests who has no history
    counts: Mapping[str, np.ndarray]  # of lib/model/item_counts.py
    standing: Standing

    @cached_property
    def recent(self) -> np.ndarray:
        """(B, W) rows of each person's newest distinct items, the newest first; 0 where there are fewer."""
        return np.stack([person.recent for person in self.people])

    @cached_property
    def excluded(self) -> list[np.ndarray]:
        """Rows that each person must not get, ascending."""
        nothing = np.zeros(0, dtype=np.int32)
        return [nothing if again else own.seen for own, again in zip(self.people, self.repeats, strict=True)]


Source = Callable[[Asked], Found]


def shared(asked: Asked, rows: np.ndarray) -> Found:
    """Return the same rows (M,) as candidates of everybody."""
    lines = np.repeat(np.arange(len(asked.people)), len(rows))
    return Found(lines, np.tile(rows.astype(np.int64), len(asked.people)))


def neighbours(asked: Asked, name: str, strength: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Found:
    """Return the listed neighbours of everybody's recent items.

    Args:
        asked: who, and what is known.
        name: of the lists.
        strength: from counts (B, W, K) to the values of features of that shape.
    """
    rows = asked.counts[f"{name}_rows"][asked.recent]  # (B, W, K)
    there = rows > 0
    lines = np.broadcast_to(np.arange(len(rows))[:, None, None], rows.shape)[there]
    values = strength(asked.counts[f"{name}_counts"][asked.recent])
    return Found(lines, rows[there].astype(np.int64), {name: own[there] for name, own in values.items()})
