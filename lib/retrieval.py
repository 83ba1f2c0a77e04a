"""Retrieval: the items whose vectors have the largest inner product with a query, found by FAISS.

The index is exact and its rows are the rows of the item table, so a pushed row is overwritten in place and is found by
the very next search.
"""

import faiss
import numpy as np


def use_threads(count: int) -> None:
    """How many threads a search of this process takes; more than one pays for large catalogs and idle cores only."""
    faiss.omp_set_num_threads(count)


class ItemIndex:
    """Exact maximum inner product search over (N, C) float32 item vectors."""

    def __init__(self, vectors: np.ndarray):
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def vectors(self) -> np.ndarray:
        """(N, C) the index's own memory; writing to it changes what is found."""
        count, width = self._index.ntotal, self._index.d
        return faiss.rev_swig_ptr(self._index.get_xb(), count * width).reshape(count, width)

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Overwrite rows in place; rows beyond the end extend the index (they must follow each other)."""
        known = rows < len(self)
        self.vectors[rows[known]] = vectors[known]
        if not known.all():
            added = rows[~known]
            if not np.array_equal(added, np.arange(len(self), len(self) + len(added))):
                raise ValueError(f"rows {added[:5]}... do not follow the index's {len(self)} rows")
            self._index.add(np.ascontiguousarray(vectors[~known], dtype=np.float32))

    def search(self, queries: np.ndarray, k: int, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, k) and rows (B, k) of the best items, best first; -1 where fewer exist.

        Args:
            queries: (B, C) float32.
            k: how many.
            mask: (N,) bool, the rows that may be found; None for all.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if mask is None:
            return self._index.search(queries, min(k, len(self)))
        bits = np.packbits(mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        # faiss makes its keyword arguments at run time
        parameters = faiss.SearchParameters(sel=selector)  # pyright: ignore[reportCallIssue]
        return self._index.search(queries, min(k, len(self)), params=parameters)
