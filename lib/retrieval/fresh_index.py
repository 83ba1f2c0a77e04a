"""Rows that changed since the lists were packed: few, searched exactly, so that a change is found at once."""

from collections.abc import Sequence

import numpy as np
import torch

from lib.retrieval.exact import exact_search

FIRST_ROOM = 1024


class FreshRows:
    """Changed rows and their vectors, in the order in which they first changed."""

    def __init__(self, width: int, device: torch.device):
        self._count = 0
        self._rows = np.empty(FIRST_ROOM, dtype=np.int64)
        self._current = np.empty(FIRST_ROOM, dtype=bool)  # False where a later change is kept elsewhere
        self._vectors = torch.empty((FIRST_ROOM, width), device=device)
        self._place = np.zeros(0, dtype=np.int32)  # (N,) where a row stands here, -1 for nowhere

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> np.ndarray:
        """(F,) the rows that changed."""
        return self._rows[: self._count]

    def put(self, rows: np.ndarray, vectors: torch.Tensor, catalog: int) -> None:
        """Keep the rows' vectors (R, C); catalog is how many rows there are in all."""
        self._reserve(catalog, len(rows))
        new = np.unique(rows[self._place[rows] < 0])
        self._place[new] = np.arange(self._count, self._count + len(new))
        self._rows[self._count : self._count + len(new)] = new
        self._count += len(new)
        places = self._place[rows]
        self._current[places] = True
        self._vectors[torch.from_numpy(places).to(self._vectors.device).long()] = vectors

    def _reserve(self, catalog: int, added: int) -> None:
        if catalog > len(self._place):
            room = catalog if not len(self._place) else catalog + catalog // 8
            self._place = np.concatenate([self._place, np.full(room - len(self._place), -1, dtype=np.int32)])
        room = self._count + added
        if room > len(self._rows):
            more = room  # twice what is needed: copies stay rare
            self._rows = np.concatenate([self._rows, np.empty(more, dtype=np.int64)])
            self._current = np.concatenate([self._current, np.empty(more, dtype=bool)])
            grown = torch.empty((len(self._rows), self._vectors.shape[1]), device=self._vectors.device)
            grown[: self._count] = self._vectors[: self._count]
            self._vectors = grown

    def retire(self, rows: np.ndarray) -> None:
        """Never find these rows here again: a later change of them is kept elsewhere."""
        self._current[self._places(rows)] = False

    def search(
        self, queries: torch.Tensor, k: int, mask: np.ndarray | None, seen: Sequence[np.ndarray] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B, k) and rows (B, k) as exact_search gives them."""
        allowed = self._current[: self._count]
        if mask is not None:
            allowed = allowed & mask[self.rows]
        if seen is not None:
            seen = [self._places(rows) for rows in seen]
        scores, places = exact_search(self._vectors[: self._count], queries, k, allowed, seen)
        rows = torch.from_numpy(np.append(self.rows, -1)).to(places.device)
        return scores, rows[places]

    def _places(self, rows: np.ndarray) -> np.ndarray:
        places = self._place[rows[rows < len(self._place)]]
        return places[places >= 0]
