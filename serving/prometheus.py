"""The status in the Prometheus text format: one scrape shows every replica, the aggregator and the learner."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

REPLICA_COUNTERS = {
    "answers": "Recommendation requests answered.",
    "batches": "Batches that answered them.",
    "events": "Events received.",
    "deltas": "Pushed deltas applied.",
    "catch_ups": "Times that this replica caught up from the registry.",
    "mismatches": "Deltas that came out wrong here, so that the version was loaded whole.",
}
LEARNER_COUNTERS = {
    "pushes": "Versions pushed to the replicas.",
    "rejected_updates": "Updates that failed their gate.",
    "events_trained": "Events that the weights have learned from.",
    "events_rejected": "Events whose update failed its gate.",
}


class StatusCollector(Collector):
    """Metric families of one status document."""

    def __init__(self, status: dict[str, Any]):
        self.status = status

    def collect(self) -> Iterator[Metric]:
        """Families of replicas, learner and aggregator."""
        yield GaugeMetricFamily("afterclick_model_version", "Newest version.", self.status["model_version"])
        yield from self._replicas()
        yield from self._learner()
        yield from self._aggregator()
        yield from self._experiment()

    def _replicas(self) -> Iterator[Metric]:
        replicas = self.status["replicas"]
        version = GaugeMetricFamily(
            "afterclick_replica_version", "Version that a replica answers with.", labels=["replica"]
        )
        cached = GaugeMetricFamily(
            "afterclick_replica_users_cached", "Users whose histories a replica keeps a copy of.", labels=["replica"]
        )
        latency = HistogramMetricFamily(
            "afterclick_answer_seconds", "From a request's arrival to its answer.", labels=["replica"]
        )
        for replica in replicas:
            version.add_metric([replica["replica_id"]], replica["version"])
            cached.add_metric([replica["replica_id"]], replica["users_cached"])
            total, buckets = 0, []
            for bound, count in replica["latency_buckets"]:
                total += count
                buckets.append((bound, total))
            latency.add_metric([replica["replica_id"]], buckets, replica["latency_sum"])
        yield from (version, cached, latency)
        for name, text in REPLICA_COUNTERS.items():
            family = CounterMetricFamily(f"afterclick_replica_{name}", text, labels=["replica"])
            for replica in replicas:
                family.add_metric([replica["replica_id"]], replica[name])
            yield family

    def _learner(self) -> Iterator[Metric]:
        learner = self.status["learner"]
        yield GaugeMetricFamily("afterclick_learner_up", "1 while the learner answers.", float("version" in learner))
        for name, text in LEARNER_COUNTERS.items():
            if name in learner:
                yield CounterMetricFamily(f"afterclick_{name}", text, learner[name])
        if "unreached_replicas" in learner:
            yield GaugeMetricFamily(
                "afterclick_unreached_replicas",
                "Replicas that the newest push did not reach.",
                learner["unreached_replicas"],
            )
        freshness = self.status.get("freshness") or {}
        for name in ("p50_ms", "p99_ms"):
            if freshness.get(name) is not None:
                yield GaugeMetricFamily(
                    f"afterclick_freshness_{name}",
                    "From an event's acknowledgement to its version live on all replicas, of late, in milliseconds.",
                    freshness[name],
                )

    def _aggregator(self) -> Iterator[Metric]:
        aggregator = self.status["aggregator"]
        yield GaugeMetricFamily(
            "afterclick_aggregator_up", "1 while the aggregator answers.", float("events" in aggregator)
        )
        if "events" not in aggregator:
            return
        yield CounterMetricFamily("afterclick_events_accepted", "Events made durable.", aggregator["events"])
        yield CounterMetricFamily("afterclick_events_duplicate", "Events known already.", aggregator["duplicates"])
        yield GaugeMetricFamily("afterclick_log_offset", "Newest offset of the feedback log.", aggregator["log_offset"])
        yield GaugeMetricFamily("afterclick_events_pending", "Events that wait for the learner.", aggregator["pending"])
        refused = CounterMetricFamily("afterclick_events_refused", "Events rejected, by reason.", labels=["reason"])
        for reason, count in aggregator["rejected"].items():
            refused.add_metric([reason], count)
        yield refused
        noticed = CounterMetricFamily(
            "afterclick_events_noticed", "Events that were taken although they look odd, by reason.", labels=["reason"]
        )
        for reason, count in aggregator["noticed"].items():
            noticed.add_metric([reason], count)
        yield noticed

    def _experiment(self) -> Iterator[Metric]:
        """Of two models side by side, where both are shown."""
        experiment = self.status.get("experiment", {})
        if "difference" not in experiment:
            return
        answers = CounterMetricFamily("afterclick_arm_answers", "Answers of an arm.", labels=["arm"])
        rewards = CounterMetricFamily("afterclick_arm_rewards", "Answers with such an event.", labels=["arm", "kind"])
        rates = GaugeMetricFamily("afterclick_arm_rate", "Share of rewarded answers.", labels=["arm", "reward"])
        for arm, results in experiment["arms"].items():
            answers.add_metric([arm], results["answers"])
            for kind, count in results["rewards"].items():
                rewards.add_metric([arm, kind], count)
            for reward in experiment["difference"]:
                rates.add_metric([arm, reward], results[reward]["rate"])
        evidence = GaugeMetricFamily(
            "afterclick_experiment_evidence", "Of a difference; 1 / alpha decides.", labels=["reward"]
        )
        for reward, compared in experiment["difference"].items():
            evidence.add_metric([reward], compared["evidence"])
        yield from (answers, rewards, rates, evidence)


def render(status: dict[str, Any]) -> bytes:
    """The exposition of a status document."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    return generate_latest(registry)
