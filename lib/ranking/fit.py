"""How the ranker is fitted: on events that neither the encoder nor the counts have seen.

What ranks well what it was trained on says nothing of what comes next: a ranker that is fitted on events that the
encoder has learned trusts it far too much. So pretraining keeps some events back (`HeldBack`), trains the encoder on
the others, fits the ranker on them as a stream or all at once, and only then learns them, too. Of data that is larger
than memory all of this is done part by part; what is in memory at once are the histories of those whose events are
fitted on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lib.data.histories import Histories, Person, joined, spans
from lib.data.holdout import LEAVE_ONE_OUT
from lib.model.batches import target_weights
from lib.model.buckets import Figures
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.item_counts import WINDOW, people_of
from lib.ranking.features import FEATURES, padded
from lib.ranking.stage import RankingStage, queries_of
from lib.retrieval.index import ItemIndex

MOST_EVENTS = 6_000  # that the ranker is fitted on, about
MOST_NEWEST = 500_000  # events that these are drawn from, where they come as a stream
NEWEST_SHARE = 0.15  # of the events in the order of time, from which they are kept back where they come as a stream
REPEATED_SHARE = 0.01  # of the events, with an item that its user had before: above it people come back to items
FORGOTTEN_SHARE = 0.05  # of the examples, which are seen without their history: the ranker meets newcomers, too
EPOCHS, LEAST_STEPS, EXAMPLES_PER_STEP, LEARNING_RATE = 6, 100, 128, 0.02
EVENTS_AT_ONCE = 256
LEAST_EVENTS = 200  # kept back: with fewer there is no ranker, and answers are the encoder's
# what a deviation of a feature weighs before anything is learned: about what it comes to on films, shops and music
PRIOR = {"interest": 1.3, "follows": 0.25, "together": 0.35, "together_long": 0.35, "age": -0.2}
LEAST_NEIGHBOURS, MOST_NEIGHBOURS = 32, 256  # of an item
MANY_EVENTS = 16  # of an item: with fewer half of the most neighbours do
LISTS_BYTES, NEIGHBOUR_BYTES = 64 << 20, 16  # of all lists, unless each is of the least length; of both lists' entries
EXTRA_EPOCHS = 0.2  # of the epochs: after the ranker is fitted, with what was kept back
EXTRA_RATE = 0.3  # of the learning rate, at the beginning of these


class Examples(NamedTuple):
    """B people with K candidates each, of which one is what they took."""

    features: Tensor  # (B, K, F), -inf in the first feature where there is no candidate
    kinds: Tensor  # (B,) int64
    targets: Tensor  # (B,) int64, places
    found: np.ndarray  # (A,) bool, of all who were asked for: those whose item is among the candidates are here


class Events(Protocol):
    """Histories that come in parts, each of whole users."""

    def parts(self) -> Iterator[Histories]:
        """Yield all of them."""
        ...

    def order(self, histories: Histories) -> np.ndarray:
        """Return (E,) int64 where the events of a part stand in the order of time of all, from 1."""
        ...


@dataclass(frozen=True)
class Whole:
    """Histories that are one part."""

    histories: Histories

    def parts(self) -> Iterator[Histories]:
        """Yield them."""
        yield self.histories

    def order(self, histories: Histories) -> np.ndarray:
        """Return (E,) int64 the place of each event in the order of time."""
        return order_of(histories)


def neighbours_for(events: int, items: int) -> int:
    """Return how many neighbours of each kind an item keeps: more where items have many events, and there is room."""
    items = max(items, 1)
    wanted = MOST_NEIGHBOURS if events > MANY_EVENTS * items else MOST_NEIGHBOURS // 2
    room = 2 ** math.floor(math.log2(LISTS_BYTES / (NEIGHBOUR_BYTES * items)))
    return max(min(wanted, room), LEAST_NEIGHBOURS)


def people_come_back(figures: Figures) -> bool:
    """Return whether people come back to items, so that what they have seen belongs into their answers."""
    return figures.repeated > REPEATED_SHARE * figures.events


def order_of(histories: Histories) -> np.ndarray:
    """Return (E,) int64 the place of each event in the order of time, from 1."""
    places = np.empty(len(histories.rows), dtype=np.int64)
    places[np.argsort(histories.timestamps, kind="stable")] = np.arange(1, len(places) + 1)
    return places


def likes(histories: Histories, config: BehaviourEncoderConfig) -> np.ndarray:
    """Return (E,) float64 1 where an event is no dislike, else 0."""
    return (target_weights(histories.kinds, histories.values, config.event_kinds or (), config.ratings) > 0) * 1.0


@dataclass(frozen=True)
class HeldBack:
    """Chooses the events that the ranker is to be fitted on, the same ones in every process.

    Where leave-one-out is how the model will be tested, they are the newest event of each user. Else the model will
    meet a stream: they are the newest part of it. Of many some are drawn.
    """

    data: Events
    figures: Figures  # of all of it
    config: BehaviourEncoderConfig
    holdout: str
    seed: int

    @property
    def begin(self) -> float:
        """The place in the order of all events behind which the newest part begins."""
        events = self.figures.events
        return max(events * (1 - NEWEST_SHARE), events - MOST_NEWEST)

    @property
    def expected(self) -> float:
        """How many there are to draw from; of a stream about."""
        if self.holdout == LEAVE_ONE_OUT:
            return self.figures.newest_liked
        return (self.figures.events - self.begin) * self.figures.liked / max(self.figures.events, 1)

    def __call__(self, histories: Histories) -> np.ndarray:
        """Return (E,) bool, which events of a part are kept back."""
        if self.holdout == LEAVE_ONE_OUT:
            held = np.zeros(len(histories.rows), dtype=bool)
            held[histories.offsets[1:][histories.lengths >= 3] - 1] = True
        else:
            held = self.data.order(histories) > self.begin
        held &= likes(histories, self.config) > 0
        if self.expected > MOST_EVENTS:
            held &= _drawn(histories, self.seed) < MOST_EVENTS / self.expected
        return held


def _drawn(histories: Histories, seed: int) -> np.ndarray:
    """Return (E,) a number from 0 to below 1 for each event, by the finalizer of SplitMix64 (Steele et al. 2014)."""
    mixed = histories.timestamps.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.arange(seed, seed + len(mixed), dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    mixed += histories.rows.astype(np.uint64) * np.uint64(0xA0761D6478BD642F)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / 2**53


def examples_of(stage: RankingStage, people: list[Person], queries: Tensor, targets: np.ndarray) -> Examples:
    """Return the candidates of people who then took an item each; `targets` (A,) are its rows."""
    found = stage.candidates(people, queries, 10)
    features, rows = padded(found, len(people))
    hits = torch.from_numpy(rows == targets[:, None])  # (A, K)
    kept = hits.any(dim=1)
    kinds = torch.tensor([person.kind for person in people], dtype=torch.int64)
    return Examples(features[kept], kinds[kept], hits[kept].int().argmax(dim=1), kept.numpy())


Held = Callable[[Histories], np.ndarray]  # part -> (E,) bool, the events that are kept back


def fit_ranker(encoder: BehaviourEncoder, data: Events, held: Held, holdout: str, seed: int) -> int:
    """Fit the encoder's ranker on events that were held back; its counts are what was counted then.

    Args:
        encoder: trained on the other events, with empty counts.
        data: all training events.
        held: such as `HeldBack`.
        holdout: as there.
        seed: of the order of the examples and of the first weights.

    Returns:
        The number of examples.
    """
    assert encoder.ranker is not None
    examples = list(_examples(encoder, data, held, holdout, np.random.default_rng(seed)))
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
    encoder: BehaviourEncoder, data: Events, held: Held, holdout: str, generator: np.random.Generator
) -> Iterator[Examples]:
    """Yield the examples, as a stream that is counted as it goes, or all against what else there is."""
    counts = encoder.counts
    assert counts is not None
    begin = None if holdout == LEAVE_ONE_OUT else _first_held(data, held)
    histories, places, kept_back = _count_others(encoder, data, held, begin)
    with torch.inference_mode():
        stage = RankingStage(encoder, ItemIndex(encoder.item_vectors().cpu().numpy()))
    if begin is None:
        for part in np.array_split(np.flatnonzero(kept_back), max(int(kept_back.sum()) // EVENTS_AT_ONCE, 1)):
            if len(part):
                yield examples_at(stage, histories, part, generator)
        return
    weights = likes(histories, encoder.config)
    counted, place_of = histories.select(weights > 0), np.cumsum(weights > 0) - 1
    newest = np.flatnonzero(places >= begin)
    newest = newest[np.argsort(places[newest], kind="stable")]
    for start in range(0, len(newest), EVENTS_AT_ONCE):
        part = newest[start : start + EVENTS_AT_ONCE]
        if kept_back[part].any():
            yield examples_at(stage, histories, np.sort(part[kept_back[part]]), generator)
        liked = part[weights[part] > 0]
        stage.follow(counts.count_events(counted, place_of[liked], weights[liked], places[liked]))


def _first_held(data: Events, held: Held) -> int:
    """Return the place, in the order of all events, of the first that is kept back."""
    firsts = [int(data.order(part)[mask].min()) for part in data.parts() if (mask := held(part)).any()]
    return min(firsts, default=0)


def _count_others(
    encoder: BehaviourEncoder, data: Events, held: Held, begin: int | None
) -> tuple[Histories, np.ndarray, np.ndarray]:
    """Count what is not kept back, or what was before the place `begin`; return the histories of the others' users.

    With them (E,) the places of their events in the order of all, and (E,) bool, which are kept back.
    """
    counts = encoder.counts
    assert counts is not None
    found: list[tuple[Histories, np.ndarray, np.ndarray]] = []
    for part in data.parts():
        places, mask = data.order(part), held(part)
        others = mask if begin is None else places >= begin
        counts.count_histories(part, likes(part, encoder.config) * ~others, places)
        users = np.unique(part.owners(np.flatnonzero(others)))
        theirs = spans(part.offsets[users], part.lengths[users])
        found.append((part.take(users), places[theirs], mask[theirs]))
    histories, places, masks = zip(*found, strict=True)
    return joined(histories), np.concatenate(places), np.concatenate(masks)


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


def count_all(encoder: BehaviourEncoder, data: Events) -> None:
    """Count all events anew, part by part."""
    counts = encoder.counts
    assert counts is not None
    counts.clear()
    for part in data.parts():
        counts.count_histories(part, likes(part, encoder.config), data.order(part))
