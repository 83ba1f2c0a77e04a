"""Ranking metrics from the rank of the target (0 is the top)."""

import numpy as np


def recall_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(U,) 1 where the target is among the first k (with one target, recall is the hit rate)."""
    return (ranks < k).astype(np.float64)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(U,) normalised discounted cumulative gain of one target among the first k (Jarvelin & Kekalainen 2002)."""
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """(U,) one over the target's place."""
    return 1.0 / (ranks + 1.0)


def coverage_at(recommended: np.ndarray, items: int) -> float:
    """Share of the catalog that is recommended to anybody; recommended is (U, k) rows, 0 for none."""
    rows = np.unique(recommended)
    return float((rows > 0).sum() / max(items, 1))
