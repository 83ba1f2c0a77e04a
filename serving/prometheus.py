"""The status in the Prometheus text format: one scrape shows every replica, the aggregators and the learner."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel

from serving.status import (
    ExperimentStatus,
    FeedbackStatus,
    LearnerStatus,
    ReplicaStatus,
    Status,
    StoredVersionsStatus,
    UnknownItemsStatus,
)

REPLICA_COUNTERS = ("answers", "batches", "events", "deltas", "catch_ups", "mismatches")
LEARNER_COUNTERS = ("pushes", "rejected_updates", "set_aside_updates", "events_trained", "events_rejected")


class StatusCollector(Collector):
    """Metric families of one status."""

    def __init__(self, status: Status):
        self.status = status

    def collect(self) -> Iterator[Metric]:
        """Return the families of replicas, learner, aggregators and experiment."""
        yield GaugeMetricFamily("afterclick_model_version", _text(Status, "model_version"), self.status.model_version)
        yield from _replicas(self.status.replicas)
        yield from self._learner()
        yield from self._aggregator()
        if isinstance(self.status.experiment, ExperimentStatus):
            yield from _experiment(self.status.experiment)

    def _learner(self) -> Iterator[Metric]:
        learner = self.status.learner
        up = isinstance(learner, LearnerStatus)
        yield GaugeMetricFamily("afterclick_learner_up", "1 while the learner answers.", float(up))
        if not up:
            return
        for name in LEARNER_COUNTERS:
            yield CounterMetricFamily(f"afterclick_{name}", _text(LearnerStatus, name), getattr(learner, name))
        yield GaugeMetricFamily(
            "afterclick_unreached_replicas", _text(LearnerStatus, "unreached_replicas"), learner.unreached_replicas
        )
        text = _text(StoredVersionsStatus, "bytes")
        yield GaugeMetricFamily("afterclick_stored_versions_bytes", text, learner.stored.bytes)
        text = _text(UnknownItemsStatus, "refused")
        yield CounterMetricFamily("afterclick_new_items_refused", text, learner.unknown_items.refused)
        if learner.freshness is not None:
            text = "From an event's acknowledgement to its version live on all replicas, of late, in milliseconds."
            yield GaugeMetricFamily("afterclick_freshness_p50_ms", text, learner.freshness.p50_ms)
            yield GaugeMetricFamily("afterclick_freshness_p99_ms", text, learner.freshness.p99_ms)

    def _aggregator(self) -> Iterator[Metric]:
        aggregator = self.status.aggregator
        up = isinstance(aggregator, FeedbackStatus)
        yield GaugeMetricFamily("afterclick_aggregator_up", "1 while every aggregator answers.", float(up))
        if not up:
            return
        for name, field in (("events_accepted", "events"), ("events_duplicate", "duplicates")):
            yield CounterMetricFamily(f"afterclick_{name}", _text(FeedbackStatus, field), getattr(aggregator, field))
        for name, field in (("log_offset", "log_offset"), ("events_pending", "pending")):
            yield GaugeMetricFamily(f"afterclick_{name}", _text(FeedbackStatus, field), getattr(aggregator, field))
        for name, field in (("events_refused", "rejected"), ("events_noticed", "noticed")):
            family = CounterMetricFamily(f"afterclick_{name}", _text(FeedbackStatus, field), labels=["reason"])
            for reason, count in getattr(aggregator, field).items():
                family.add_metric([reason], count)
            yield family


def _replicas(replicas: list[ReplicaStatus]) -> Iterator[Metric]:
    version, cached = (
        GaugeMetricFamily(f"afterclick_replica_{name}", _text(ReplicaStatus, name), labels=["replica"])
        for name in ("version", "users_cached")
    )
    latency = HistogramMetricFamily(
        "afterclick_answer_seconds", "from a request's arrival to its answer", labels=["replica"]
    )
    for replica in replicas:
        version.add_metric([replica.replica_id], replica.version)
        cached.add_metric([replica.replica_id], replica.users_cached)
        latency.add_metric([replica.replica_id], _cumulated(replica.latency_buckets), replica.latency_sum)
    yield from (version, cached, latency)
    for name in REPLICA_COUNTERS:
        family = CounterMetricFamily(f"afterclick_replica_{name}", _text(ReplicaStatus, name), labels=["replica"])
        for replica in replicas:
            family.add_metric([replica.replica_id], getattr(replica, name))
        yield family


def _cumulated(buckets: list[tuple[str, int]]) -> list[tuple[str, float]]:
    """Return the upper bound of each bucket with the count of all up to it."""
    total, cumulated = 0, []
    for bound, count in buckets:
        total += count
        cumulated.append((bound, total))
    return cumulated


def _experiment(experiment: ExperimentStatus) -> Iterator[Metric]:
    """Return the families of two models side by side, where both are shown."""
    answers = CounterMetricFamily("afterclick_arm_answers", "answers of an arm", labels=["arm"])
    rewards = CounterMetricFamily("afterclick_arm_rewards", "answers with such an event", labels=["arm", "kind"])
    rates = GaugeMetricFamily("afterclick_arm_rate", "share of rewarded answers", labels=["arm", "reward"])
    for name, arm in experiment.arms.items():
        answers.add_metric([name], arm.answers)
        for kind, count in arm.rewards.items():
            rewards.add_metric([name, kind], count)
        rates.add_metric([name, "click_through"], arm.click_through.rate)
        rates.add_metric([name, "conversion"], arm.conversion.rate)
    evidence = GaugeMetricFamily(
        "afterclick_experiment_evidence", "of a difference; 1 / alpha decides", labels=["reward"]
    )
    for reward, difference in experiment.difference.items():
        evidence.add_metric([reward], difference.evidence)
    yield from (answers, rewards, rates, evidence)


def _text(model: type[BaseModel], field: str) -> str:
    """Return what a field of the status is as a sentence, for the help of its metric."""
    text = model.model_fields[field].description or field
    return f"{text[:1].upper()}{text[1:]}."


def render(status: Status) -> bytes:
    """Return the exposition of a status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    return generate_latest(registry)
