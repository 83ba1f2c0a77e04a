"""What the encoder finds: the items of the largest s = uT A v, from FAISS; of who has no history, what is popular."""

import numpy as np
import torch

from lib.ranking.candidates.asked import Asked, Found

LEAST = 100  # candidates, for an answer of however few


def find(asked: Asked) -> Found:
    """Return everybody's best items by the encoder; all who have no history get the same ones, by popularity."""
    count = max(LEAST, 2 * asked.count)
    has_history = np.array([person.length > 0 for person in asked.people])
    known, newcomers = np.flatnonzero(has_history), np.flatnonzero(~has_history)
    lines, rows = [], []
    if len(known):
        queries, excluded = asked.queries[torch.from_numpy(known)], [asked.excluded[line] for line in known]
        _, found = asked.index.search(queries, count, asked.mask, excluded, asked.weights)
        lines.append(np.repeat(known, found.shape[1]))
        rows.append(np.maximum(found, 0).ravel())
    if len(newcomers):
        wanted = count + max(len(asked.excluded[line]) for line in newcomers)  # what they turned down
        popular = asked.popularity.best(wanted, asked.mask, asked.weights)
        lines.append(np.repeat(newcomers, len(popular)))
        rows.append(np.tile(popular, len(newcomers)))
    return Found(np.concatenate(lines), np.concatenate(rows))
