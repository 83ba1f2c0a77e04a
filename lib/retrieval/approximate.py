"""Approximate search of a large catalog: candidates from inverted lists, scored exactly, beside fresh rows.

Candidates are scored with the current vectors, so a score is never out of date. Fresh rows, changed since the lists
were packed, are searched exactly until another thread has packed lists that hold them; these take the place of the old
lists between two calls. A query that finds too few rows, because of its mask and seen rows, is searched again in more
lists, and at last exactly.
"""

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import torch

from lib.retrieval.exact import exact_search, top_k
from lib.retrieval.faiss_lists import inverted_lists

logger = logging.getLogger(__name__)
MOST_CANDIDATES = 2048  # the most that a GPU's kernels return
MERGED_SHARE, LEAST_MERGED = 64, 2048  # a merge starts when a 64th of the rows is fresh, but not below 2,048
SELECTED_SHARE = 8  # a mask is applied within the lists when it excludes an eighth of the rows; else only afterwards
MOST_PROBE_FACTOR = 4  # times the usual lists, for a query that found too few, and at most for one with a mask
FIRST_ROOM = 1024  # fresh rows


class ApproximateIndex:
    """Inverted lists, fresh rows and their merges; the vectors themselves are the caller's, given with each call.

    Args:
        vectors: (N, C) float32, zero where a row is not in use.
        device: where the searches run.
        wait: whether to build the lists now, or on the other thread; until they are there, searches are exact.
    """

    def __init__(self, vectors: np.ndarray, device: torch.device, wait: bool = True):
        self._vectors, self._width, self._device = vectors, vectors.shape[1], device
        self._lists = inverted_lists(self._width, device)
        self._packed: Any = None
        self._fresh = FreshRows(self._width, device)
        self._in_merge: FreshRows | None = None  # the rows that the running merge moves into the lists
        # (N,) whose code in the lists is old
        self._outdated = torch.zeros(len(vectors), dtype=torch.bool, device=device)
        self._thread = ThreadPoolExecutor(1, "index merge", initializer=_lower_priority)
        self._merge: Future[Any] | None = None
        self._failed = 0  # fresh rows at which a merge failed: with twice as many the next one is tried
        rows = np.arange(len(vectors))
        if wait:
            self._packed = self._lists.merge(vectors, rows)
        else:
            self._merge = self._thread.submit(self._lists.merge, vectors, rows)

    @property
    def merging(self) -> bool:
        """Whether another thread is packing lists."""
        return self._merge is not None and not self._merge.done()

    def update(self, rows: np.ndarray, changed: torch.Tensor, vectors: np.ndarray) -> None:
        """Let the next search find changed rows (R, C); vectors (N, C) holds them already."""
        self._take_merged()
        self._vectors, count = vectors, len(vectors)
        if count > len(self._outdated):
            grown = torch.zeros(count + count // 8, dtype=torch.bool, device=self._device)
            grown[: len(self._outdated)] = self._outdated
            self._outdated = grown
        self._fresh.put(rows, changed, count)
        self._outdated[torch.from_numpy(rows).to(self._device)] = True
        if self._in_merge is not None:
            self._in_merge.retire(rows)
        self._start_merge()

    def _start_merge(self) -> None:
        least = max(len(self._vectors) // MERGED_SHARE, LEAST_MERGED, 2 * self._failed)
        if self._merge is None and len(self._fresh) >= least:
            self._in_merge, self._fresh = self._fresh, FreshRows(self._width, self._device)
            rows = np.arange(len(self._vectors)) if self._packed is None else self._in_merge.rows
            # a row that changes while the other thread reads it is fresh again, so its code does not count
            self._merge = self._thread.submit(self._lists.merge, self._vectors, rows)

    def _take_merged(self) -> None:
        if self._merge is None or not self._merge.done():
            return
        merge, self._merge = self._merge, None
        try:
            self._packed = merge.result()
        except Exception:
            logger.exception("an index was not packed anew; the rows that changed are searched beside the old one")
            self._give_up_merge()
            return
        self._failed = 0
        if self._in_merge is not None:
            self._outdated[torch.from_numpy(self._in_merge.rows).to(self._device)] = False
            self._outdated[torch.from_numpy(self._fresh.rows).to(self._device)] = True
        self._in_merge = None
        self._start_merge()  # of what changed meanwhile

    def _give_up_merge(self) -> None:
        """Search the rows of a merge that failed, for want of memory for one, as fresh ones again."""
        if self._in_merge is not None:
            rows, vectors = self._in_merge.current()
            self._fresh.put(rows, vectors, len(self._vectors))
        self._in_merge = None
        self._failed = len(self._fresh)

    def search(
        self,
        vectors: torch.Tensor,
        queries: torch.Tensor,
        k: int,
        mask: np.ndarray | None,
        seen: Sequence[np.ndarray] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (B, k) and rows (B, k) as exact_search does, but for what the lists miss."""
        self._take_merged()
        if self._packed is None or 2 * k > MOST_CANDIDATES:
            return exact_search(vectors, queries, k, mask, seen)
        listed, passing = self._packed.ntotal, len(vectors) if mask is None else max(int(np.count_nonzero(mask)), 1)
        selective = SELECTED_SHARE * (listed - passing) > listed
        if selective and vectors.is_cuda:  # lists on a GPU cannot apply a mask
            return exact_search(vectors, queries, k, mask, seen)
        # the nearest rows that pass a selective mask lie farther away, in more lists
        probe_factor = min(-(-listed // passing), MOST_PROBE_FACTOR) if selective else 1
        count = min(2 * k + 64, MOST_CANDIDATES)
        scores, rows, usable = self._search(vectors, queries, k, count, probe_factor, mask, selective, seen)
        for exact in (False, True):
            short = torch.nonzero(usable < k + k // 4 + 8)[:, 0]  # too few, given the error of the codes
            if not len(short):
                break
            unwanted = None if seen is None else [seen[line] for line in short.tolist()]
            if exact:
                found = exact_search(vectors, queries[short], k, mask, unwanted)
            else:
                found = self._search(
                    vectors, queries[short], k, MOST_CANDIDATES, MOST_PROBE_FACTOR, mask, selective, unwanted
                )
                usable[short] = found[2]
            scores[short], rows[short] = found[:2]
        return scores, rows

    def _search(
        self,
        vectors: torch.Tensor,
        queries: torch.Tensor,
        k: int,
        count: int,
        probe_factor: int,
        mask: np.ndarray | None,
        selective: bool,
        seen: Sequence[np.ndarray] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scores, rows and, for each query, the number of candidates that it might find."""
        rows = self._lists.search(self._packed, queries, count, probe_factor, mask if selective else None)  # (B, count)
        scores = inner_products(vectors, queries, rows)
        scores[self._outdated[rows]] = -torch.inf
        if mask is not None:
            scores[~torch.from_numpy(mask).to(self._device)[rows]] = -torch.inf
        if seen is not None:
            scores[is_seen(rows, seen, len(vectors))] = -torch.inf
        for fresh in (self._fresh, self._in_merge):
            if fresh is not None and len(fresh):
                found = fresh.search(queries, k, mask, seen)
                scores, rows = torch.cat([scores, found[0]], dim=1), torch.cat([rows, found[1]], dim=1)
        usable = (scores > -torch.inf).sum(dim=1)
        scores, places = top_k(scores, k)
        rows = torch.where(places < 0, places, rows.gather(1, places.clamp(min=0)))
        return scores, rows, usable


def inner_products(vectors: torch.Tensor, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return (B, R) inner products of each query (B, C) with its rows (B, R) of vectors; minus infinity for row -1."""
    if vectors.is_cuda:
        products = torch.bmm(vectors[rows], queries[:, :, None])[:, :, 0]
        return products.masked_fill_(rows < 0, -torch.inf)
    products = torch.empty(rows.shape)  # FAISS reads the rows where they are: nothing is copied
    arrays = (products.numpy(), queries.numpy(), vectors.numpy(), rows.numpy())
    library: Any = faiss  # pyright knows only a part of it
    library.fvec_inner_products_by_idx(*map(faiss.swig_ptr, arrays), vectors.shape[1], *rows.shape)
    return products


def is_seen(rows: torch.Tensor, seen: Sequence[np.ndarray], catalog: int) -> torch.Tensor:
    """Return (B, R) whether each query's rows are among its seen rows, which ascend; catalog is the number of rows."""
    offsets = np.arange(0, len(seen) * catalog, catalog)
    flat = np.concatenate(seen).astype(np.int64) + np.repeat(offsets, [len(line) for line in seen])
    if not len(flat):
        return torch.zeros_like(rows, dtype=torch.bool)
    keys = torch.from_numpy(flat).to(rows.device)
    asked = rows + torch.from_numpy(offsets).to(rows.device)[:, None]
    return keys[torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)] == asked


def _lower_priority() -> None:
    """Give the merging thread one core and a low priority: searches come first."""
    faiss.omp_set_num_threads(1)
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # of this thread alone, on Linux


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

    def current(self) -> tuple[np.ndarray, torch.Tensor]:
        """Return the rows of which no later change is kept elsewhere, and their vectors."""
        places = np.flatnonzero(self._current[: self._count])
        return self._rows[places], self._vectors[torch.from_numpy(places).to(self._vectors.device)]

    def put(self, rows: np.ndarray, vectors: torch.Tensor, catalog: int) -> None:
        """Keep the rows' vectors (R, C); catalog is the number of all rows."""
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
        """Leave these rows out of every search from now on: a later change of them is kept elsewhere."""
        self._current[self._places(rows)] = False

    def search(
        self, queries: torch.Tensor, k: int, mask: np.ndarray | None, seen: Sequence[np.ndarray] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (B, k) and rows (B, k) as exact_search does."""
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
