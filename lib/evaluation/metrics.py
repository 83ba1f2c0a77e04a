"""Ranking metrics from the rank of the target (0 is the top), and how sure one may be of their means."""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95  # of the intervals
DRAWS_AT_ONCE = 1 << 22  # users drawn in memory


def recall_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return (U,) 1 where the target is among the first k (with one target, recall is the hit rate)."""
    return (ranks < k).astype(np.float64)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return (U,) normalised discounted cumulative gain of one target in the first k (Jarvelin & Kekalainen 2002)."""
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """Return (U,) one over the target's place."""
    return 1.0 / (ranks + 1.0)


def coverage_at(recommended: np.ndarray, items: int) -> float:
    """Return the share of the catalog that is recommended to anybody; recommended is (U, k) rows, 0 for none."""
    rows = np.unique(recommended)
    return float((rows > 0).sum() / max(items, 1))


def self_information(counts: np.ndarray) -> np.ndarray:
    """Return (N + 1,) bits of surprise of each item, -log2 of its share of all events (Zhou et al. 2010).

    An item that never occurred counts as if it had once, so that its surprise is finite: the largest there is.
    """
    return np.log2(max(counts.sum(), 1)) - np.log2(np.maximum(counts, 1))


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return (resamples, M) means of resampled users, each with all of their cases (the cluster bootstrap).

    Args:
        sums: (U, M) sum of each quantity over each user's cases; columns are resampled together, so that they pair.
        counts: (U, M) what each sum is divided by: the number of cases that have the quantity.
        resamples: how often as many users as there are are drawn with replacement.
        seed: equal seeds draw equal users.

    Returns:
        NaN where a resample has no case.
    """
    means = np.full((resamples, sums.shape[1]), np.nan)
    start = 0
    for times in _draws(len(sums), resamples, seed):
        total, cases = times @ sums, times @ counts
        np.divide(total, cases, out=means[start : start + len(times)], where=cases > 0)
        start += len(times)
    return means


def _draws(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each user is drawn, (R, U), for some resamples at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // max(users, 1))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = generator.integers(0, users, (size, users)) + users * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users).astype(np.float64)


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the middle `level` of the resampled means, NaN left out (the percentile interval, Efron 1979)."""
    present = means[~np.isnan(means)]
    if len(present) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(present, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
