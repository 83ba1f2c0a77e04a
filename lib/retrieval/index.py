"""Retrieval: the items whose vectors have the largest inner product with a query.

The rows of the index are the rows of the item table, so a pushed row is overwritten in place and is found by the very
next search. Exact for catalogs up to EXACT_ROWS, approximate above; on a GPU where FAISS sees one.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import torch

from lib.retrieval.approximate import ApproximateIndex
from lib.retrieval.exact import SCORES_AT_ONCE, are_gathered, exact_search
from lib.retrieval.faiss_lists import search_device

# measured on a CPU: beyond it inverted lists are faster; up to as many filtered rows are searched exactly
EXACT_ROWS = 50_000
SPARE_SHARE = 8  # room for an eighth more rows before all are copied


def use_threads(count: int) -> None:
    """Set the threads of this process's searches; more than one pays only for large catalogs and idle cores."""
    faiss.omp_set_num_threads(count)
    torch.set_num_threads(count)


class ItemIndex:
    """Maximum inner product search over (N, C) float32 item vectors.

    Args:
        vectors: (N, C) float32; zero where a row is padding or not in use.
        exact_rows: the largest catalog, rows of zeros not counted, that is searched exactly; 256 or more.
    """

    def __init__(self, vectors: np.ndarray, exact_rows: int = EXACT_ROWS):
        self._device = search_device()
        self._exact_rows = exact_rows
        self._count = 0
        self._storage = np.empty((0, vectors.shape[1]), dtype=np.float32)
        self._reserve(len(vectors))
        self._write(np.arange(len(vectors)), vectors)
        self._count = len(vectors)
        self._approximate = ApproximateIndex(self.vectors, self._device) if self._is_large() else None

    def __len__(self) -> int:
        return self._count

    @property
    def vectors(self) -> np.ndarray:
        """The (N, C) vectors in the index's own memory; do not write to them."""
        return self._storage[: self._count]

    @property
    def merging(self) -> bool:
        """Whether another thread is moving changed rows into the inverted lists."""
        return self._approximate is not None and self._approximate.merging

    @torch.inference_mode()
    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Overwrite rows, each given once; rows beyond the end extend the index and must leave no gap.

        Raises:
            ValueError: new rows leave a gap.
        """
        added = rows[rows >= self._count]
        if not np.array_equal(added, np.arange(self._count, self._count + len(added))):
            raise ValueError(f"rows {added[:5]}... do not follow the index's {self._count} rows")
        self._reserve(self._count + len(added))
        changed = self._write(rows, vectors)
        self._count += len(added)
        if self._approximate is not None:
            self._approximate.update(rows, changed, self.vectors)
        elif self._is_large():  # searches are exact until another thread has built the lists
            self._approximate = ApproximateIndex(self.vectors, self._device, wait=False)

    def _is_large(self) -> bool:
        if self._count <= self._exact_rows:
            return False
        return int(np.count_nonzero(self.vectors.any(axis=1))) > self._exact_rows

    def _write(self, rows: np.ndarray, vectors: np.ndarray) -> torch.Tensor:
        """Write rows to this memory and to the GPU's where there is one; return the vectors (R, C) on the device."""
        self._storage[rows] = vectors
        changed = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).to(self._device)
        if self._device.type == "cuda":
            self._tensor[torch.from_numpy(rows).to(self._device)] = changed
        return changed

    def _reserve(self, count: int) -> None:
        if count <= len(self._storage):
            return
        grown = np.empty((count + count // SPARE_SHARE, self._storage.shape[1]), dtype=np.float32)
        grown[: self._count] = self.vectors
        self._storage = grown
        self._tensor = torch.from_numpy(grown).to(self._device)  # on the CPU the same memory

    @torch.inference_mode()
    def search(
        self,
        queries: np.ndarray | torch.Tensor,
        k: int,
        mask: np.ndarray | None = None,
        seen: Sequence[np.ndarray] | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (B, k) and rows (B, k) of the best items, best first; minus infinity and -1 where fewer exist.

        Args:
            queries: (B, C) float32; a tensor on the index's device is not copied.
            k: how many; so many are found whenever so many pass `mask` and `seen`.
            mask: (N,) bool, the rows that may be found; None for all.
            seen: for each query the rows that it must not find, ascending, such as a person's history; None for none.
            weights: (N,) float64, added to each row's score to find and order the rows, all of them searched exactly;
                the scores are without it.
        """
        given = torch.from_numpy(queries) if isinstance(queries, np.ndarray) else queries
        vectors = self._tensor[: self._count]
        given = given.to(self._device, torch.float32).contiguous()
        if self._approximate is None or weights is not None or self._are_few(mask):
            scores, rows = exact_search(vectors, given, k, mask, seen, weights)
        else:
            scores, rows = self._approximate.search(vectors, given, k, mask, seen)
        return scores.cpu().numpy(), rows.cpu().numpy()

    def products(self, queries: torch.Tensor, mask: np.ndarray | None = None) -> np.ndarray | None:
        """Return (B, N) float32 all inner products, where a search would work them out at once; None where not.

        Args:
            queries: (B, C) float32.
            mask: (N,) bool, the rows that are to be found.
        """
        large = self._approximate is not None or len(queries) * self._count > SCORES_AT_ONCE
        passing = self._count if mask is None else int(np.count_nonzero(mask))
        if large or self._device.type == "cuda" or are_gathered(passing, self._count):
            return None
        return (queries @ self._tensor[: self._count].T).numpy()

    def scores(self, queries: torch.Tensor, lines: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (P,) float32 the inner products of pairs.

        Args:
            queries: (B, C) float32.
            lines: (P,) place of each pair's query, ascending.
            rows: (P,) row of its item.
        """
        given = queries.to(self._device, torch.float32)
        if given.is_cuda:
            places, own = (torch.from_numpy(each).to(self._device) for each in (lines, rows))
            return torch.linalg.vecdot(given[places], self._tensor[own]).cpu().numpy()
        return _products(given.numpy(), self.vectors, lines, rows)

    def _are_few(self, mask: np.ndarray | None) -> bool:
        return mask is not None and int(np.count_nonzero(mask)) <= self._exact_rows


class SomeRows(ItemIndex):
    """An index of a few rows of the item table, which it names by their numbers there.

    Args:
        rows: (K,) int64, ascending.
        vectors: (K, C) float32, theirs.
    """

    def __init__(self, rows: np.ndarray, vectors: np.ndarray):
        super().__init__(vectors)
        self._rows = np.append(rows, -1)  # the place -1 stands for the row -1

    def search(
        self,
        queries: np.ndarray | torch.Tensor,
        k: int,
        mask: np.ndarray | None = None,
        seen: Sequence[np.ndarray] | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search as any index does; what is given by row of the table may name rows that are not among these."""
        own = self._rows[:-1]
        places = None if seen is None else [np.flatnonzero(np.isin(own, rows)) for rows in seen]
        found = super().search(
            queries,
            k,
            None if mask is None else mask[own],
            places,
            None if weights is None else weights[own],
        )
        return found[0], self._rows[found[1]]

    def products(self, queries: torch.Tensor, mask: np.ndarray | None = None) -> None:
        """Return None: those of the rows that are not among these are not known."""

    def scores(self, queries: torch.Tensor, lines: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (P,) float32 the inner products of pairs, all of rows that are among these."""
        return super().scores(queries, lines, np.searchsorted(self._rows[:-1], rows))


def _products(queries: np.ndarray, vectors: np.ndarray, lines: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return (P,) the products of queries (B, C) at `lines` (P,), ascending, and vectors (N, C) at `rows` (P,).

    A query at a time: what is gathered stays in the cache.
    """
    found = np.empty(len(rows), dtype=np.float32)
    stops = np.searchsorted(lines, np.arange(len(queries)), side="right").tolist()
    for query, start, stop in zip(queries, [0, *stops], stops, strict=False):
        np.dot(vectors[rows[start:stop]], query, out=found[start:stop])
    return found
