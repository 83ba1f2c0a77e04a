"""What the arms of a replay achieved: over all events, for new users and new items, over time, side by side."""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.evaluation.comparison import WHOLE, Estimate
from lib.evaluation.metrics import RESAMPLES, bootstrap_means, interval, ndcg_at, recall_at, reciprocal_rank

if TYPE_CHECKING:  # torch comes with it, and who only shows a comparison need not wait for that
    from lib.live.prequential import Outcome, Stream

K = 10
DEEPEST = 100  # an answer is a list of so many at most: beyond it the reciprocal rank counts 0
PARTS = 20  # of the stream, for what changes over time
METRICS = (f"hr@{K}", f"ndcg@{K}", "mrr")
BASE = "history"  # what the others' lift is measured from


@dataclass(frozen=True)
class SourceResult:
    """What a source of candidates says alone, over all events."""

    metrics: dict[str, Estimate]
    difference: dict[str, Estimate]  # from the whole answer of the same arm


@dataclass(frozen=True)
class ArmResult:
    """One arm."""

    name: str
    metrics: dict[str, dict[str, Estimate]]  # of each group of events
    lift: dict[str, Estimate]  # of each metric over all events, relative to the base; none for the base itself
    over_time: dict[str, list[float]]  # each metric of consecutive parts of the stream, an equal number of events each
    facts: dict[str, Any]
    sources: dict[str, SourceResult]  # none where the arm's model has no ranker


@dataclass(frozen=True)
class ReplayComparison:
    """All arms on the same targets: events that chose an item."""

    events: int  # that are targets
    users: int
    groups: dict[str, int]  # events of each
    times: list[int]  # milliseconds, the last event of each part
    arms: list[ArmResult]

    def as_json(self) -> dict[str, Any]:
        """Return what --json writes."""
        return {
            "events": self.events,
            "users": self.users,
            "groups": self.groups,
            "resamples": RESAMPLES,
            "times": self.times,
            "arms": [
                {
                    "name": arm.name,
                    **{group: _written(metrics) for group, metrics in arm.metrics.items()},
                    f"lift_over_{BASE}": _written(arm.lift),
                    "over_time": arm.over_time,
                    "sources": {
                        name: _written(source.metrics) | {f"difference_from_{WHOLE}": _written(source.difference)}
                        for name, source in arm.sources.items()
                    },
                    **arm.facts,
                }
                for arm in self.arms
            ],
        }


def _written(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: {"value": each.value, "interval": [each.low, each.high]} for name, each in estimates.items()}


def compare_arms(stream: "Stream", outcomes: "Mapping[str, Outcome]", seed: int = 0) -> ReplayComparison:
    """Return every number with the interval that holds it in 95% of resamples of users, whose events go together."""
    targets = stream.newest.filter(pa.array(stream.targets))
    groups = dict(_groups(stream.oldest, targets))
    _, users = np.unique(targets["user_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    columns = [
        np.where(members, metric, 0.0)
        for outcome in outcomes.values()
        for members in groups.values()
        for metric in _metrics(outcome.ranks)
    ]
    sums = np.stack([np.bincount(users, column) for column in columns], axis=1)
    sizes = [np.bincount(users, members) for members in groups.values()]
    counts = np.stack([size for _ in outcomes for size in sizes for _ in METRICS], axis=1)
    shape = (len(outcomes), len(groups), len(METRICS))
    values = (sums.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)).reshape(shape)
    resampled = bootstrap_means(sums, counts, RESAMPLES, seed).reshape(-1, *shape)
    parts = np.array_split(np.arange(len(targets)), min(PARTS, len(targets)))
    base = list(outcomes).index(BASE) if BASE in outcomes else None
    arms = []
    for place, (name, outcome) in enumerate(outcomes.items()):
        metrics = {
            group: _estimates(values[place, number], resampled[:, place, number]) for number, group in enumerate(groups)
        }
        lift = {}
        if base is not None and place != base:
            ratios = resampled[:, place, 0] / np.maximum(resampled[:, base, 0], 1e-12) - 1
            lift = _estimates(values[place, 0] / np.maximum(values[base, 0], 1e-12) - 1, ratios)
        over_time = {
            metric: [float(values[part].mean()) for part in parts]
            for metric, values in zip(METRICS, _metrics(outcome.ranks), strict=True)
        }
        arms.append(ArmResult(name, metrics, lift, over_time, outcome.facts, _sources(outcome, users, seed)))
    times = targets["timestamp"].to_numpy()
    return ReplayComparison(
        len(targets),
        len(sums),
        {name: int(members.sum()) for name, members in groups.items()},
        [int(times[part[-1]]) for part in parts],
        arms,
    )


def _sources(outcome: "Outcome", users: np.ndarray, seed: int) -> dict[str, SourceResult]:
    """Return what each source of candidates achieved alone, and the paired difference from the whole answer."""
    ranks = [outcome.ranks, *outcome.alone.values()]
    sums = np.stack([np.bincount(users, metric) for own in ranks for metric in _metrics(own)], axis=1)
    counts = np.repeat(np.bincount(users)[:, None], sums.shape[1], axis=1)
    shape = (len(ranks), len(METRICS))
    values = (sums.sum(axis=0) / len(users)).reshape(shape)
    resampled = bootstrap_means(sums, counts, RESAMPLES, seed).reshape(-1, *shape)
    return {
        name: SourceResult(
            _estimates(values[place], resampled[:, place]),
            _estimates(values[place] - values[0], resampled[:, place] - resampled[:, 0]),
        )
        for place, name in enumerate(outcome.alone, start=1)
    }


def _groups(oldest: pa.Table, targets: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Return (N,) which targets belong to each group."""
    yield "all", np.ones(len(targets), dtype=bool)
    for name, column in (("new users", "user_id"), ("new items", "item_id")):
        known = pc.is_in(targets[column], value_set=oldest[column].unique())
        yield name, ~known.to_numpy(zero_copy_only=False)


def _metrics(ranks: np.ndarray) -> Iterator[np.ndarray]:
    """Return (N,) each of METRICS."""
    yield recall_at(ranks, K)
    yield ndcg_at(ranks, K)
    yield np.where(ranks < DEEPEST, reciprocal_rank(ranks), 0.0)


def _estimates(values: np.ndarray, resampled: np.ndarray) -> dict[str, Estimate]:
    """Return one for each of METRICS: values (3,), resampled (R, 3)."""
    return {
        name: Estimate(float(value), *interval(column))
        for name, value, column in zip(METRICS, values, resampled.T, strict=True)
    }
