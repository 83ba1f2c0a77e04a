"""What trends: the items with the most events of late, by each half-life of lib/model/item_counts.py."""

from lib.ranking.candidates.asked import Asked, Found, shared


def find(asked: Asked) -> Found:
    """Return the same items for everybody; where some are left out, what trends among the others."""
    return shared(asked, asked.standing.trending(asked.mask, 2 * asked.count))
