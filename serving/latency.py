"""How long answers took: a histogram with the buckets of Prometheus."""

from bisect import bisect_left

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds


class LatencyHistogram:
    """Counts answers by how long they took."""

    def __init__(self):
        self.counts = [0] * (len(BOUNDS) + 1)  # up to each bound and above the one before; the last beyond all
        self.sum = 0.0  # seconds

    def observe(self, seconds: float) -> None:
        """Count one answer."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """Return the upper bound of each bucket and its count, not cumulated."""
        return list(zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True))
