"""What the encoder finds: the items of the largest s = uT A v, from FAISS; of who has no history, what is popular."""

import numpy as np
import torch

from lib.ranking.candidates.asked import Asked, Found

LEAST = 100  # candidates, for an answer of however few


def find(asked: Asked) -> Found:
    """Return everybody's best items by the encoder; all who have no history get the same ones, by popularity."""
    count = max(LEAST, 2 * asked.count)
    known, queries, excluded = np.arange(len(asked.people)), asked.queries, asked.excluded
    newcomers = np.array([line for line, person in enumerate(asked.people) if not person.length], dtype=np.int64)
    if len(newcomers):
        known = np.setdiff1d(known, newcomers)
        queries, excluded = queries[torch.from_numpy(known)], [excluded[line] for line in known]
    lines, rows = [], []
    if len(known):
        _, found = asked.index.search(queries, count, asked.mask, excluded, asked.weights)
        lines.append(np.repeat(known, found.shape[1]))
        rows.append(np.maximum(found, 0).ravel())
    if len(newcomers):
        wanted = count + max(len(asked.excluded[line]) for line in newcomers)  # what they turned down
        popular = asked.popularity.best(wanted, asked.mask, asked.weights)
        lines.append(np.repeat(newcomers, len(popular)))
        rows.append(np.tile(popular, len(newcomers)))
    return Found(np.concatenate(lines), np.concatenate(rows))
