"""How the ranker is fitted: on events that neither the encoder nor the counts have seen.

What ranks well what it was trained on says nothing of what comes next: a ranker that is fitted on events that the
encoder has learned trusts it far too much. So pretraining keeps some events back (`held_back`), trains the encoder on
the others, fits the ranker on them as a stream or all at once, and only then learns them, too.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.data.histories import Histories, Person
from lib.data.holdout import LEAVE_ONE_OUT
from lib.model.batches import target_weights
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.item_counts import WINDOW, people_of
from lib.ranking.features import FEATURES, padded
from lib.ranking.stage import RankingStage, queries_of
from lib.retrieval.index import ItemIndex

MOST_EVENTS = 6_000  # that the ranker is fitted on
NEWEST_SHARE = 0.15  # of the events in the order of time, from which they are kept back where they come as a stream
REPEATED_SHARE = 0.01  # of the events, with an item that its user had before: above it people come back to items
FORGOTTEN_SHARE = 0.05  # of the examples, which are seen without their history: the ranker meets newcomers, too
EPOCHS, LEAST_STEPS, EXAMPLES_PER_STEP, LEARNING_RATE = 6, 100, 128, 0.02
EVENTS_AT_ONCE = 256
LEAST_EVENTS = 200  # kept back: with fewer there is no ranker, and answers are the encoder's
# what a deviation of a feature weighs before anything is learned: about what it comes to on films, shops and music
PRIOR = {"interest": 1.3, "follows": 0.25, "together": 0.35, "together_long": 0.35, "age": -0.2}
LEAST_NEIGHBOURS, MOST_NEIGHBOURS = 32, 256  # of an item
LISTS_BYTES, NEIGHBOUR_BYTES = 64 << 20, 16  # of all lists, unless each is of the least length; of both lists' entries
EXTRA_EPOCHS = 0.2  # of the epochs: after the ranker is fitted, with what was kept back
EXTRA_RATE = 0.3  # of the learning rate, at the beginning of these


class Examples(NamedTuple):
    """B people with K candidates each, of which one is what they took."""

    features: Tensor  # (B, K, F), -inf in the first feature where there is no candidate
    kinds: Tensor  # (B,) int64
    targets: Tensor  # (B,) int64, places
    found: np.ndarray  # (A,) bool, of all who were asked for: those whose item is among the candidates are here


def neighbours_for(histories: Histories) -> int:
    """Return how many neighbours of each kind an item keeps: more where items have many events, and there is room."""
    items = max(len(np.unique(histories.rows)), 1)
    wanted = math.ceil(math.log2(max(4 * len(histories.rows) / items, 1)))
    room = math.floor(math.log2(LISTS_BYTES / (NEIGHBOUR_BYTES * items)))
    return min(max(2 ** min(wanted, room), LEAST_NEIGHBOURS), MOST_NEIGHBOURS)


def people_come_back(histories: Histories) -> bool:
    """Return whether people come back to items, so that what they have seen belongs into their answers."""
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    pairs = owners * (int(histories.rows.max(initial=0)) + 1) + histories.rows
    return len(pairs) - len(np.unique(pairs)) > REPEATED_SHARE * len(pairs)


def order_of(histories: Histories) -> np.ndarray:
    """Return (E,) int64 the place of each event in the order of time, from 1."""
    places = np.empty(len(histories.rows), dtype=np.int64)
    places[np.argsort(histories.timestamps, kind="stable")] = np.arange(1, len(places) + 1)
    return places


def likes(histories: Histories, config: BehaviourEncoderConfig) -> np.ndarray:
    """Return (E,) float64 1 where an event is no dislike, else 0."""
    return (target_weights(histories.kinds, histories.values, config.event_kinds or (), config.ratings) > 0) * 1.0


def held_back(histories: Histories, config: BehaviourEncoderConfig, holdout: str, seed: int) -> np.ndarray:
    """Return (E,) bool, the events that the ranker is to be fitted on.

    Where leave-one-out is how the model will be tested, they are the newest event of each user. Else the model will
    meet a stream: they are the newest part of it. Of many some are drawn.
    """
    if holdout == LEAVE_ONE_OUT:
        held = np.zeros(len(histories.rows), dtype=bool)
        held[histories.offsets[1:][histories.lengths >= 3] - 1] = True
    else:
        held = order_of(histories) > len(histories.rows) * (1 - NEWEST_SHARE)
    held &= likes(histories, config) > 0
    places = np.flatnonzero(held)
    if len(places) > MOST_EVENTS:
        generator = np.random.default_rng(seed)
        held[generator.choice(places, len(places) - MOST_EVENTS, replace=False)] = False
    return held


def examples_of(stage: RankingStage, people: list[Person], queries: Tensor, targets: np.ndarray) -> Examples:
    """Return the candidates of people who then took an item each; `targets` (A,) are its rows."""
    found = stage.candidates(people, queries, 10)
    features, rows = padded(found, len(people))
    hits = torch.from_numpy(rows == targets[:, None])  # (A, K)
    kept = hits.any(dim=1)
    kinds = torch.tensor([person.kind for person in people], dtype=torch.int64)
    return Examples(features[kept], kinds[kept], hits[kept].int().argmax(dim=1), kept.numpy())


def fit_ranker(encoder: BehaviourEncoder, histories: Histories, held: np.ndarray, holdout: str, seed: int) -> int:
    """Fit the encoder's ranker on events that were held back; its counts are what was counted then.

    Args:
        encoder: trained on the other events, with empty counts.
        histories: all training events.
        held: (E,) bool, from `held_back`.
        holdout: as there.
        seed: of the order of the examples and of the first weights.

    Returns:
        The number of examples.
    """
    assert encoder.ranker is not None
    examples = list(_examples(encoder, histories, held, holdout, np.random.default_rng(seed)))
    count = sum(len(each.targets) for each in examples)
    if count == 0:
        return 0
    width = max(each.features.shape[1] for each in examples)
    features = torch.full((count, width, encoder.config.ranker_features), 0.0, dtype=torch.float16)
    features[..., 0] = -torch.inf
    start = 0
    for each in examples:
        features[start : start + len(each.targets), : each.features.shape[1]] = each.features
        start += len(each.targets)
    kinds, targets = (torch.cat([getattr(each, name) for each in examples]) for name in ("kinds", "targets"))
    _fit(encoder, features, kinds, targets, seed)
    return count


def _fit(encoder: BehaviourEncoder, features: Tensor, kinds: Tensor, targets: Tensor, seed: int) -> None:
    ranker = encoder.ranker
    assert ranker is not None
    sample = features[:1000].float().flatten(0, 1)
    sample = sample[~torch.isneginf(sample[:, 0])]
    line = torch.tensor([PRIOR.get(name, 0.0) for name in FEATURES])
    ranker.start(sample.mean(dim=0), sample.std(dim=0) + 1e-3, line, seed)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(targets) // EXAMPLES_PER_STEP)
    epochs = max(EPOCHS, -(-LEAST_STEPS // steps_per_epoch))
    steps, step = epochs * steps_per_epoch, 0
    for _ in range(epochs):
        for part in torch.randperm(len(targets), generator=generator).split(EXAMPLES_PER_STEP):
            some = features[part].float()
            ranker.step(some, kinds[part], targets[part], torch.ones(len(part)), LEARNING_RATE * (1 - step / steps))
            step += 1
    for moment in (ranker.first, ranker.second, ranker.steps):
        moment.zero_()


def _examples(
    encoder: BehaviourEncoder, histories: Histories, held: np.ndarray, holdout: str, generator: np.random.Generator
) -> Iterator[Examples]:
    """Yield the examples, as a stream that is counted as it goes, or all against what else there is."""
    counts = encoder.counts
    assert counts is not None
    times, weights = order_of(histories), likes(histories, encoder.config)
    with torch.inference_mode():
        index = ItemIndex(encoder.item_vectors().cpu().numpy())
    if holdout == LEAVE_ONE_OUT:
        counts.count_histories(histories, weights * ~held, times)
        parts = np.array_split(np.flatnonzero(held), max(int(held.sum()) // EVENTS_AT_ONCE, 1))
        stage = RankingStage(encoder, index)
        for part in parts:
            if len(part):
                yield examples_at(stage, histories, part, generator)
        return
    order = np.argsort(times)
    first = int(held[order].argmax())
    counts.count_histories(histories, weights * (times <= first), times)
    counted, place_of = histories.select(weights > 0), np.cumsum(weights > 0) - 1
    stage = RankingStage(encoder, index)
    for start in range(first, len(order), EVENTS_AT_ONCE):
        part = order[start : start + EVENTS_AT_ONCE]
        if held[part].any():
            yield examples_at(stage, histories, np.sort(part[held[part]]), generator)
        liked = part[weights[part] > 0]
        stage.follow(counts.count_events(counted, place_of[liked], weights[liked], times[liked]))


def examples_at(
    stage: RankingStage, histories: Histories, events: np.ndarray, forgetting: np.random.Generator | None = None
) -> Examples:
    """Return the examples of events, each with what its user had done before.

    Args:
        stage: that finds the candidates.
        histories: that the events are in.
        events: (A,) their places.
        forgetting: draws the people who are seen without their history; None: nobody is.
    """
    users = histories.owners(events)
    contexts = histories.oldest(users, events - histories.offsets[users])
    liked, _ = without_dislikes(contexts, stage.encoder.config)
    people, queries = people_of(contexts, liked), queries_of(stage.encoder, liked)
    if forgetting is not None:
        for place in np.flatnonzero(forgetting.random(len(people)) < FORGOTTEN_SHARE).tolist():
            people[place] = nobody()
            queries[place] = 0
    return examples_of(stage, people, queries, histories.rows[events].astype(np.int64))


def nobody() -> Person:
    """Return a person of whom nothing is known."""
    nothing = np.zeros(0, dtype=np.float32)
    return Person(np.zeros(WINDOW, dtype=np.int64), np.zeros(0, dtype=np.int32), nothing, nothing, 0, 0)


def count_all(encoder: BehaviourEncoder, histories: Histories) -> None:
    """Count all events of histories anew."""
    counts = encoder.counts
    assert counts is not None
    counts.clear()
    counts.count_histories(histories, likes(histories, encoder.config), order_of(histories))
