"""Item vectors like those of a trained model, and how a search among them is judged.

Around 4,096 centres, drawn with a variance that falls as 1/j in the j-th direction (effective dimension 14; the item
vectors of a model trained on MovieLens have 16), sizes that fall as 1/sqrt(rank), stand unit items: a centre plus noise
of 0.6 times the centre's length with the same spectrum, all turned by one random rotation. Queries are drawn in the
same way but apart from the items.

Nothing here needs more than numpy.
"""

import time
from collections.abc import Callable

import numpy as np

WIDTH = 64
CENTRES, NOISE = 4096, 0.6

Search = Callable[[np.ndarray], np.ndarray]  # queries (B, WIDTH) -> the rows found (B, k)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale each line to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def gaussian(count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw (count, WIDTH) directions without any neighbourhoods."""
    return unit(generator.standard_normal((count, WIDTH), dtype=np.float32))


def trained_like(count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw (count, WIDTH) unit vectors around centres that are the same at every call."""
    fixed = np.random.default_rng(0)
    spectrum = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    centres = unit(fixed.standard_normal((CENTRES, WIDTH), dtype=np.float32) * spectrum)
    rotation = np.linalg.qr(fixed.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    sizes = np.arange(1, CENTRES + 1) ** -0.5
    vectors = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, 100_000):
        part = vectors[start : start + 100_000]
        chosen = generator.choice(CENTRES, len(part), p=sizes / sizes.sum())
        noise = NOISE * spectrum * generator.standard_normal(part.shape, dtype=np.float32)
        part[:] = unit(centres[chosen] + noise) @ rotation
    return vectors


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact best rows that was found."""
    return sum(len(np.intersect1d(one, other)) for one, other in zip(found, exact, strict=True)) / exact.size


def in_batches(search: Search, queries: np.ndarray, batch: int) -> np.ndarray:
    """Search for all queries, so many at once."""
    return np.concatenate([search(queries[start : start + batch]) for start in range(0, len(queries), batch)])


def speed(search: Search, queries: np.ndarray, batch: int, repeats: int = 3) -> float:
    """Return queries a second, the best of some rounds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        in_batches(search, queries, batch)
        seconds.append(time.perf_counter() - started)
    return len(queries) / min(seconds)
