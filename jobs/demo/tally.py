"""What a run of the visitors counts: requests, events, delays, and the hits of the live and of the frozen model."""

import math
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from lib.data.events import Event

WINDOW = 1000  # trials in the sliding hit rate
DIFFERENCE_EVERY = 25  # trials between two points of the sparkline


@dataclass
class Tally:
    """What has been sent, answered and compared so far; its size does not grow with the run.

    A trial is one own choice of one user that both models were asked for under the same history.
    """

    k: int = 10  # how many items both models recommend
    requests: int = 0
    failed_requests: int = 0
    last_error: str | None = None
    answers: int = 0  # recommendation requests answered with 200
    events_sent: int = 0
    events_acknowledged: int = 0
    events_refused: int = 0  # answered with 200, but as a duplicate or rejected
    last_refusal: str | None = None
    reactions: int = 0  # answers that were followed by a click
    trials: int = 0
    hits_live: int = 0
    hits_frozen: int = 0
    only_live: int = 0  # trials that only the live answer hit
    only_frozen: int = 0
    users_unsure: int = 0  # left out of the trials: a failed request leaves open whether their event was kept
    version: int | None = None  # the newest that an answer has named
    version_changes: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=200)
    )  # (unix seconds, version)
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=5000))  # of recommendation requests
    window: deque[tuple[bool, bool]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # (live hit, frozen hit)
    differences: deque[float] = field(default_factory=lambda: deque(maxlen=60))  # of the window's rates, over time
    latest: deque[tuple[Event, bool | None]] = field(default_factory=lambda: deque(maxlen=12))  # acknowledged; live hit

    def count_failure(self, error: str) -> None:
        """Count a request that did not end in a 200."""
        self.failed_requests += 1
        self.last_error = error

    def count_version(self, version: int) -> None:
        """Note a version that an answer names; answers of replicas that are a push behind change nothing."""
        if self.version is None or version > self.version:
            self.version = version
            self.version_changes.append((time.time(), version))

    def count_trial(self, live: bool, frozen: bool) -> None:
        """Count one comparison: whether each of the two answers contained the user's next choice."""
        self.trials += 1
        self.hits_live += live
        self.hits_frozen += frozen
        self.only_live += live and not frozen
        self.only_frozen += frozen and not live
        self.window.append((live, frozen))
        if self.trials % DIFFERENCE_EVERY == 0:
            window_live, window_frozen, _ = self.window_rates()
            self.differences.append(window_live - window_frozen)

    def rates(self) -> tuple[float, float]:
        """Return the hit rates of the live and of the frozen model over all trials; nan before the first."""
        if not self.trials:
            return math.nan, math.nan
        return self.hits_live / self.trials, self.hits_frozen / self.trials

    def window_rates(self) -> tuple[float, float, int]:
        """Return both hit rates over the newest trials, and how many these are."""
        count = len(self.window)
        if not count:
            return math.nan, math.nan, 0
        return sum(live for live, _ in self.window) / count, sum(frozen for _, frozen in self.window) / count, count

    def difference(self) -> tuple[float, float, float]:
        """Return live minus frozen hit rate over all trials, and its 95% interval (paired, normal approximation)."""
        if not self.trials:
            return math.nan, math.nan, math.nan
        mean = (self.only_live - self.only_frozen) / self.trials
        variance = (self.only_live + self.only_frozen) / self.trials - mean**2
        half = 1.96 * math.sqrt(variance / self.trials)
        return mean, mean - half, mean + half

    def latency_ms(self, percentile: float) -> float:
        """Return a percentile (0 to 100) of the newest answers' delays in milliseconds; nan before the first."""
        return float(np.percentile(self.latencies_ms, percentile)) if self.latencies_ms else math.nan
