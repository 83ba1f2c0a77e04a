"""What the encoder finds: the items of the largest s = uT A v; of who has no history, what is popular."""

import numpy as np
import torch

from lib.ranking.candidates.asked import Asked, Found
from lib.retrieval.exact import among_largest, exclude

LEAST = 100  # candidates, for an answer of however few


def find(asked: Asked) -> Found:
    """Return everybody's best items by the encoder; all who have no history get the same ones, by popularity."""
    count = max(LEAST, 2 * asked.count)
    lengths = np.array([person.length for person in asked.people])
    known, newcomers = np.flatnonzero(lengths), np.flatnonzero(lengths == 0)
    found = [_by_interest(asked, known, count)] if len(known) else []
    if len(newcomers):
        wanted = count + max(len(asked.excluded[line]) for line in newcomers)  # what they turned down
        popular = asked.popularity.best(wanted, asked.mask, asked.weights)
        found.append((np.repeat(newcomers, len(popular)), np.tile(popular, len(newcomers))))
    lines, rows = zip(*found, strict=True)
    return Found(np.concatenate(lines), np.concatenate(rows))


def _by_interest(asked: Asked, known: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lines (P,) and rows (P,) of the best items of the people at `known`, by one product or by FAISS."""
    excluded = [asked.excluded[line] for line in known.tolist()]
    if asked.products is None or asked.weights is not None:
        queries = asked.queries[torch.from_numpy(known)]
        _, rows = asked.index.search(queries, count, asked.mask, excluded, asked.weights)
        return np.repeat(known, rows.shape[1]), np.maximum(rows, 0).ravel()
    scores = asked.products[known]
    if asked.mask is not None:
        scores = np.where(asked.mask, scores, np.float32(-np.inf))
    exclude(torch.from_numpy(scores), excluded)
    lines, rows = among_largest(scores, count)
    return known[lines], rows
