"""What people turn down: no part of the interest that the encoder reads, and items like it fall in the answer.

The encoder is trained to find the next event, and whoever rates five horror films low goes on to rate others: read as
events, dislikes raise what is like them. So they are left out of what the encoder reads, and beside it each candidate v
is compared with the person's newest events e, weighted by recency r. It falls by

    weight * share^2 * sum over disliked e of r K(v, e) / (K0 + sum over all e of r K(v, e)),   K = exp((cos - 1) / h)

which is the square of the share of dislikes in the weight of the events times the probability that v is disliked, of a
classifier by kernels (Nadaraya 1964; Watson 1964). A square, because people who choose what they then rate low now and
then are to be answered with what they choose: a few dislikes among many likes hardly push, most of the newest events
do. What is as near to what was liked falls by less, and what is near to nothing, by
nothing; K0 is the kernel of a cosine at which items have nothing to do with each other.
tests/benchmarks/results/2026-11-30-dislikes.md has what was measured.
"""

from collections.abc import Sequence

import numpy as np

from lib.data.histories import Histories
from lib.data.history import Opinions
from lib.model.batches import target_weights
from lib.model.encoder import BehaviourEncoderConfig

NEWEST = 20  # events that are compared with
RECENCY_HALF_LIFE = 10.0  # events after which one weighs half
KERNEL_WIDTH = 0.1  # h
MOST_CANDIDATES = 1000  # beyond which no more than asked for are looked at
UNRELATED = float(np.exp((0.3 - 1) / KERNEL_WIDTH))  # K0


def without_dislikes(histories: Histories, config: BehaviourEncoderConfig) -> tuple[Histories, list[Opinions | None]]:
    """Return the histories without what was turned down, and each person's opinions: None where nothing was of late.

    An event is left out with the earlier ones of its user and item: who opens a film and turns it down had no interest.
    """
    weights = target_weights(histories.kinds, histories.values, config.event_kinds or (), config.ratings)
    if not (weights < 0).any():
        return histories, [None] * len(histories)
    out = _turned_down(histories, weights < 0)
    signs = np.where(out, np.where(weights < 0, -1.0, 0.0), 1.0)
    spans = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    opinions = [_opinions(histories.rows[start:stop], signs[start:stop]) for start, stop in spans]
    return histories.select(~out), opinions


def _turned_down(histories: Histories, disliked: np.ndarray) -> np.ndarray:
    """Return (E,) whether an event's user turned its item down then or later; `disliked` (E,) says where one did."""
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    keys = owners * (int(histories.rows.max()) + 1) + histories.rows
    places = np.flatnonzero(disliked)[::-1]
    pairs, newest = np.unique(keys[places], return_index=True)
    found = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
    return (pairs[found] == keys) & (np.arange(len(keys)) <= places[newest][found])


def _opinions(rows: np.ndarray, signs: np.ndarray) -> Opinions | None:
    rows, signs = rows[-NEWEST:], signs[-NEWEST:]
    if not (signs < 0).any():
        return None
    recency = np.exp2(-np.arange(len(rows))[::-1] / RECENCY_HALF_LIFE)
    return Opinions(rows.copy(), (signs * recency).astype(np.float32))


def candidate_count(count: int) -> int:
    """Return how many of the best items are candidates for an answer of `count`, as some of them will fall.

    Of ten items 99.86% are those that twice as many candidates give (ml-100k), at half the cost.
    """
    return max(count, min(3 * count + 40, MOST_CANDIDATES))


def push_down(
    scores: np.ndarray,
    rows: np.ndarray,
    opinions: Sequence[Opinions | None],
    vectors: np.ndarray,
    weight: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Take from the scores of candidates what is like dislikes; return scores and rows, the best first.

    Args:
        scores: (B, K) of the candidates; minus infinity where there is none.
        rows: (B, K) of the item table.
        opinions: of each of the B people.
        vectors: (N, C) float32, the item vectors v.
        weight: of dislikes, in units of the score.
    """
    lines = [line for line, own in enumerate(opinions) if own is not None]
    if not lines or not weight:
        return scores, rows
    events = np.zeros((len(lines), NEWEST), dtype=np.int64)
    signed = np.zeros((len(lines), NEWEST), dtype=np.float32)
    for line, own in enumerate(own for own in opinions if own is not None):
        events[line, : len(own.rows)] = own.rows
        signed[line, : len(own.rows)] = own.weights
    everything = np.abs(signed)
    sides = np.stack([(everything - signed) / 2, everything], axis=2)  # (L, T, 2) what was disliked, and all
    near = vectors[rows[lines]] @ (vectors[events] / KERNEL_WIDTH).swapaxes(1, 2)  # (L, K, T)
    near -= 1 / KERNEL_WIDTH
    near = np.exp(near, out=near) @ sides  # (L, K, 2)
    disliked, total = sides.sum(axis=1).T[..., None]  # (L, 1) each
    left = scores.copy()
    left[lines] -= weight * (disliked / total) ** 2 * near[..., 0] / (UNRELATED + near[..., 1])
    everybody, order = np.arange(len(left))[:, None], np.argsort(-left, axis=1, kind="stable")
    return left[everybody, order], rows[everybody, order]
