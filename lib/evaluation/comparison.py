"""Contenders side by side: how good each is, how sure that is, and for whom.

Every number comes with the interval that holds it in 95% of resamples of the users: a user's cases are drawn together,
because they are not independent. The contenders are resampled with the same draws, so the interval of a difference is
that of paired differences, and is much narrower than their own intervals suggest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lib.evaluation.metrics import (
    RESAMPLES,
    bootstrap_means,
    coverage_at,
    interval,
    ndcg_at,
    recall_at,
    reciprocal_rank,
    self_information,
)

if TYPE_CHECKING:  # what only shows a comparison need not wait for torch
    from lib.evaluation.protocols import Cases, Ranking

WHOLE = "whole"  # the answer of all sources of candidates
HEAD_SHARE, MID_SHARE = 0.5, 0.3  # of the training events; the tail has the rest


@dataclass(frozen=True)
class Estimate:
    """A mean over cases with its 95% interval; NaN where there is no case, and where there can be no interval."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Breakdown:
    """The cases in buckets."""

    by: str  # what the cases are told apart by
    labels: list[str]
    buckets: np.ndarray  # (cases,) place of each case's label
    items: list[int] | None = None  # of each bucket, where the buckets are of items

    @property
    def cases(self) -> list[int]:
        """Cases of each bucket."""
        return np.bincount(self.buckets, minlength=len(self.labels)).tolist()


@dataclass(frozen=True)
class Result:
    """What one contender achieved."""

    name: str
    metrics: dict[str, Estimate]
    breakdowns: list[list[dict[str, Estimate]]]  # for each breakdown and each of its buckets: recall and ndcg
    differences: dict[str, Estimate] = field(default_factory=dict)  # from the first contender, which has none


@dataclass(frozen=True)
class Comparison:
    """What all contenders achieved on the same cases."""

    cases: int
    users: int  # who have these cases
    breakdowns: list[Breakdown]
    results: list[Result]


def activity(cases: "Cases") -> Breakdown:
    """Divide the cases by the number of events in their input, into at most four buckets of about equal size."""
    edges = np.unique(np.quantile(cases.inputs, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))  # the last of each
    buckets = np.searchsorted(edges, cases.inputs)
    firsts = np.concatenate([[cases.inputs.min()], edges[:-1] + 1])
    labels = [
        f"{_span(first, last)} {'event' if last == 1 else 'events'}" for first, last in zip(firsts, edges, strict=True)
    ]
    return Breakdown("activity", labels, buckets)


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def item_popularity(targets: np.ndarray, counts: np.ndarray) -> Breakdown:
    """Divide the cases by how often their target occurs in training: head, mid, tail, or new.

    Head are the most popular items that together make half of the events, mid those that make the next 30%, tail those
    of the last 20%, new the ones that never occur.

    Args:
        targets: (cases,) rows.
        counts: (N + 1,) training events of each row.
    """
    order = np.argsort(-counts, kind="stable")
    more_popular = np.cumsum(counts[order]) - counts[order]
    share = np.empty(len(counts))  # of the events of more popular items
    share[order] = more_popular / max(counts.sum(), 1)
    bucket_of = np.digitize(share, [HEAD_SHARE, HEAD_SHARE + MID_SHARE])
    bucket_of[counts == 0] = 3
    items = np.bincount(bucket_of[1:], minlength=4).tolist()  # row 0 is no item
    return Breakdown("item_popularity", ["head", "mid", "tail", "new"], bucket_of[targets], items)


def compare(
    rankings: Sequence[tuple[str, "Ranking"]],
    cases: "Cases",
    breakdowns: Sequence[Breakdown],
    counts: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare named rankings of the same cases; counts: (N + 1,) training events of each item."""
    _, users = np.unique(cases.users, return_inverse=True)
    surprise = self_information(counts)
    per_user = [
        [_per_user(values, users) for values in _quantities(ranking, breakdowns, surprise)] for _, ranking in rankings
    ]
    sums, sizes = (np.stack([pair[part] for own in per_user for pair in own], axis=1) for part in (0, 1))
    width = len(per_user[0])
    values = _mean(sums.sum(axis=0), sizes.sum(axis=0)).reshape(len(rankings), width)
    resampled = bootstrap_means(sums, sizes, resamples, seed).reshape(resamples, len(rankings), width)
    results = []
    for place, (name, ranking) in enumerate(rankings):
        estimates = iter(_estimates(values[place], resampled[:, place]))
        k = ranking.recommended.shape[1]
        metrics = {metric: next(estimates) for metric in _metric_names(k)}
        metrics[f"coverage@{k}"] = Estimate(coverage_at(ranking.recommended, len(counts) - 1))
        broken = [
            [{metric: next(estimates) for metric in _metric_names(k)[:2]} for _ in breakdown.labels]
            for breakdown in breakdowns
        ]
        less = _estimates(values[place] - values[0], resampled[:, place] - resampled[:, 0])
        differences = dict(zip(_metric_names(k), less, strict=False)) if place else {}
        results.append(Result(name, metrics, broken, differences))
    return Comparison(len(users), len(sums), list(breakdowns), results)


def _metric_names(k: int) -> list[str]:
    """Name the metrics that are means over cases, recall and ndcg first."""
    return [f"recall@{k}", f"ndcg@{k}", "mrr", f"novelty@{k}"]


def _quantities(ranking: "Ranking", breakdowns: Sequence[Breakdown], surprise: np.ndarray) -> Iterator[np.ndarray]:
    """Return (cases,) each of the metrics, then recall and ndcg of each bucket; NaN where a case has none."""
    k = ranking.recommended.shape[1]
    recall, ndcg = recall_at(ranking.ranks, k), ndcg_at(ranking.ranks, k)
    yield recall
    yield ndcg
    yield reciprocal_rank(ranking.ranks)
    listed = ranking.recommended > 0
    bits = np.where(listed, surprise[ranking.recommended], 0.0).sum(axis=1)
    yield _mean(bits, listed.sum(axis=1))
    for breakdown in breakdowns:
        for bucket in range(len(breakdown.labels)):
            yield np.where(breakdown.buckets == bucket, recall, np.nan)
            yield np.where(breakdown.buckets == bucket, ndcg, np.nan)


def _per_user(values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (U,) sums of a quantity over each user's cases, and (U,) how many of them have it."""
    present = ~np.isnan(values)
    return np.bincount(users, np.where(present, values, 0.0)), np.bincount(users, present)


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def _estimates(values: np.ndarray, resampled: np.ndarray) -> list[Estimate]:
    """Return one for each column of resampled (resamples, M)."""
    return [Estimate(float(value), *interval(column)) for value, column in zip(values, resampled.T, strict=True)]
