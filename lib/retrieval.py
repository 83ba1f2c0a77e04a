"""Retrieval: the items whose vectors have the largest inner product with a query.

The rows of the index are the rows of the item table, so a pushed row is overwritten in place and is found by the very
next search.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import torch

from lib.exact_index import exact_search


def use_threads(count: int) -> None:
    """How many threads a search of this process takes; more than one pays for large catalogs and idle cores only."""
    faiss.omp_set_num_threads(count)
    torch.set_num_threads(count)


class ItemIndex:
    """Maximum inner product search over (N, C) float32 item vectors."""

    def __init__(self, vectors: np.ndarray):
        self._count = len(vectors)
        self._storage = np.array(vectors, dtype=np.float32, order="C")

    def __len__(self) -> int:
        return self._count

    @property
    def vectors(self) -> np.ndarray:
        """(N, C) the index's own memory, to be read only."""
        return self._storage[: self._count]

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Overwrite rows; rows beyond the end extend the index (they must follow each other).

        Raises:
            ValueError: new rows leave a gap.
        """
        added = rows[rows >= self._count]
        if not np.array_equal(added, np.arange(self._count, self._count + len(added))):
            raise ValueError(f"rows {added[:5]}... do not follow the index's {self._count} rows")
        self._reserve(self._count + len(added))
        self._storage[rows] = vectors
        self._count += len(added)

    def _reserve(self, count: int) -> None:
        if count <= len(self._storage):
            return
        grown = np.empty((count + count // 2, self._storage.shape[1]), dtype=np.float32)
        grown[: self._count] = self.vectors
        self._storage = grown

    def search(
        self,
        queries: np.ndarray,
        k: int,
        mask: np.ndarray | None = None,
        seen: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, k) and rows (B, k) of the best items, best first; minus infinity and -1 where fewer exist.

        Args:
            queries: (B, C) float32.
            k: how many.
            mask: (N,) bool, the rows that may be found; None for all.
            seen: for each query the rows that it must not find, such as a person's history; None for none.
        """
        vectors, asked = torch.from_numpy(self.vectors), torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        with torch.inference_mode():
            scores, rows = exact_search(vectors, asked, k, mask, seen)
        return scores.numpy(), rows.numpy()
