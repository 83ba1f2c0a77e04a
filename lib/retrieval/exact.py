"""Exact search: one matrix product, excluded rows set to minus infinity, then the top k.

The same on the CPU and on a GPU. On a GPU a matrix product and topk are the limit that an index is measured against.
"""

from collections.abc import Sequence

import numpy as np
import torch

SCORES_AT_ONCE = 1 << 24  # 64 MB: 16 queries a product for a million rows; more gain little
SCORES_AT_ONCE_ON_GPU = 1 << 28
GATHERED_SHARE = 8  # rows that pass a mask are gathered when they are fewer than an eighth
SINGLE_ROWS = 64  # up to so many excluded rows are set one by one; more are a bias of the product


def exact_search(
    vectors: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    mask: np.ndarray | None = None,
    seen: Sequence[np.ndarray] | None = None,
    weights: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores (B, k) and rows (B, k) of the largest inner products, best first.

    Where fewer than k rows may be found, the rest is minus infinity and -1.

    Args:
        vectors: (N, C) float32.
        queries: (B, C) float32 on the same device.
        k: how many.
        mask: (N,) bool, the rows that may be found; None for all.
        seen: for each query the rows that it must not find, each once; None for none.
        weights: (N,) float64, added to the inner products to find and order the rows; the scores are without it.
    """
    passing = len(vectors) if mask is None else int(np.count_nonzero(mask))
    if mask is not None and are_gathered(passing, len(vectors)):
        return _search_gathered(vectors, queries, k, np.flatnonzero(mask), seen, weights)
    step = max((SCORES_AT_ONCE_ON_GPU if vectors.is_cuda else SCORES_AT_ONCE) // max(len(vectors), 1), 1)
    found = []
    for start in range(0, max(len(queries), 1), step):
        part = slice(start, start + step)
        scores = _scores(vectors, queries[part], mask, len(vectors) - passing)
        if seen is not None:
            exclude(scores, seen[part])
        found.append(_top_k_weighted(scores, k, weights) if weights is not None and len(weights) else top_k(scores, k))
    if len(found) == 1:
        return found[0]
    scores, rows = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(rows)


def are_gathered(passing: int, rows: int) -> bool:
    """Return whether so few of all rows pass a mask that they are gathered, and their products alone are worked out."""
    return passing * GATHERED_SHARE < rows


def _search_gathered(
    vectors: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    chosen: np.ndarray,
    seen: Sequence[np.ndarray] | None,
    weights: np.ndarray | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather a few rows and search among them."""
    if seen is not None:
        place = np.full(len(vectors), -1, dtype=np.int32)
        place[chosen] = np.arange(len(chosen))
        places = [place[rows] for rows in seen]
        seen = [one[one >= 0] for one in places]
    rows = torch.from_numpy(np.append(chosen, -1)).to(vectors.device)  # the place -1 stands for the row -1
    weights = None if weights is None else weights[chosen]
    scores, found = exact_search(vectors[rows[:-1]], queries, k, None, seen, weights)
    return scores, rows[found]


def _scores(vectors: torch.Tensor, queries: torch.Tensor, mask: np.ndarray | None, excluded: int) -> torch.Tensor:
    """Return (B, N) inner products, minus infinity outside the mask."""
    if mask is None or excluded == 0:
        return queries @ vectors.T
    if excluded > SINGLE_ROWS:
        bias = np.where(mask, np.float32(0), np.float32(-np.inf))
        return torch.addmm(torch.from_numpy(bias).to(vectors.device), queries, vectors.T)
    scores = queries @ vectors.T
    for row in np.flatnonzero(~mask).tolist():
        scores[:, row] = -torch.inf
    return scores


def exclude(scores: torch.Tensor, columns: Sequence[np.ndarray]) -> None:
    """Set some columns of each line of scores (B, N) to minus infinity, in one flat assignment."""
    count, width = scores.shape
    flat = np.concatenate(columns).astype(np.int64, copy=False)
    if count > 1:
        flat += np.repeat(np.arange(count) * width, [len(line) for line in columns])
    if scores.is_cuda:
        scores.view(-1).index_fill_(0, torch.from_numpy(flat).to(scores.device), -torch.inf)
    else:  # numpy starts sooner than torch
        scores.numpy().reshape(-1)[flat] = -np.inf


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each line and their columns, best first; minus infinity and -1 where fewer are finite."""
    if k < scores.shape[1] and not scores.is_cuda:
        columns = torch.from_numpy(largest(scores.numpy(), k))
        found = scores.gather(1, columns)
    else:
        found, columns = torch.topk(scores, min(k, scores.shape[1]))
    if k > scores.shape[1]:
        missing = (0, k - scores.shape[1])
        found = torch.nn.functional.pad(found, missing, value=-torch.inf)
        columns = torch.nn.functional.pad(columns, missing, value=-1)
    columns[found == -torch.inf] = -1
    return found, columns


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return (B, k) the columns of the k largest of each line of scores (B, N), best first; k is at most N.

    On scores that it has not met before numpy's partition and a sort take half the time of torch's topk.
    """
    lines = np.arange(len(scores))[:, None]
    best = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:] if k else np.zeros((len(scores), 0), np.int64)
    return best[lines, np.argsort(-scores[lines, best], axis=1)]


def among_largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lines (P,) and columns (P,), both ascending, of the k largest finite of each line of scores (B, N).

    Those that equal the k-th come, too: it takes half the time of `largest`.
    """
    width = scores.shape[1]
    if k < width:
        least = np.partition(scores, width - k, axis=1)[:, width - k, None]
        least = np.maximum(least, np.finfo(np.float32).min)
    else:
        least = np.finfo(np.float32).min
    return np.divmod(np.flatnonzero(scores >= least), max(width, 1))


def _top_k_weighted(scores: torch.Tensor, k: int, weights: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `top_k` does of scores (B, N) with weights (N,) added, in the scores without them.

    In 64 bits, in which a weight of a million leaves the differences of scores as they are.
    """
    found, columns = top_k(scores.double() + torch.from_numpy(weights).to(scores.device), k)
    own = scores.gather(1, columns.clamp(min=0))
    return torch.where(found > -torch.inf, own, -torch.inf), columns
