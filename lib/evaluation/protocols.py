"""The two offline protocols, and where a contender ranks the target of each of their cases.

leave-one-out: per user the newest event is the target and everything before it the input.
temporal: the newest 20% of the time span is the test; every test event is a target, its user's history so far the input
(histories advance with time, weights stay).

What a person turned down is no target: a dislike, a skip, a low rating. A user whose newest event is one is no case of
leave-one-out, and as input these events stay.

Both rank all items with the user's seen items removed.

The cases are those of the dataset, whatever the contenders know, so that all answer the same questions: an item has one
row for all of them, each contender maps it to its own, leaves what it does not know out of the input, and misses a
target that it does not know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories, spans
from lib.data.history import Opinions
from lib.data.holdout import LEAVE_ONE_OUT, cutoff_time
from lib.data.ratings import STARS, RatingScale
from lib.model.batches import SequenceBatches, target_weights
from lib.model.dislikes import MOST_CANDIDATES, push_down, without_dislikes
from lib.model.encoder import PADDING_ROW, BehaviourEncoder
from lib.model.presets import DISLIKE_WEIGHT

MOST_SCORES = 1 << 23  # in memory at once


@dataclass(frozen=True)
class Cases:
    """What is to be predicted: for case i, the event after `inputs[i]` events of user `users[i]`."""

    histories: Histories
    users: np.ndarray  # (cases,)
    inputs: np.ndarray  # (cases,) number of the user's events that come before the target

    @property
    def targets(self) -> np.ndarray:
        """(cases,) int32 rows of the items to be predicted."""
        return self.histories.rows[self.histories.offsets[self.users] + self.inputs]


def cases_of(histories: Histories, protocol: str, ratings: RatingScale = STARS) -> Cases:
    """Return the cases of a protocol; every case has at least one event of input, and a target that was not disliked.

    Args:
        histories: of kinds by their places in EVENT_KINDS.
        protocol: one of PROTOCOLS.
        ratings: their scale.
    """
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    places = np.arange(len(histories.rows)) - histories.offsets[owners]
    if protocol == LEAVE_ONE_OUT:
        tested = places == histories.lengths[owners] - 1
    else:
        tested = histories.timestamps >= cutoff_time(histories.timestamps)
    tested &= (places > 0) & (target_weights(histories.kinds, histories.values, EVENT_KINDS, ratings) > 0)
    return Cases(histories, owners[tested], places[tested])


def case_inputs(cases: Cases, part: slice) -> Histories:
    """Return the input histories of some cases."""
    return cases.histories.oldest(cases.users[part], cases.inputs[part])


# ---------------------------------------------------------------------------------------------------------------------
# Contenders

Scored = tuple[np.ndarray, Tensor]  # places of some histories, (B,), and their scores of all own rows, (B, R)
NamedScores = tuple[str, np.ndarray, Tensor]  # the same, after the name of what scored them


@dataclass(frozen=True)
class Contender:
    """Something that scores all of its items for a history; R rows of its own, row 0 for none."""

    name: str
    own_rows: np.ndarray  # (N + 1,) int32, the contender's row of each of the dataset's items, 0 where it has none
    dataset_rows: np.ndarray  # (R,) int32, the other way round
    score: Callable[[Histories], Iterator[Scored]]  # of histories in own rows; -inf for what is never recommended


def model_contender(
    name: str, encoder: BehaviourEncoder, catalog: Catalog, items: Catalog, dislike_weight: float = DISLIKE_WEIGHT
) -> Contender:
    """Make a contender of a model's encoder alone; `items` has every item of its catalog."""
    encoder.eval()
    with torch.inference_mode():
        vectors = encoder.item_vectors(torch.arange(len(catalog) + 1))  # (R, C)

    def score(histories: Histories) -> Iterator[Scored]:
        return model_scores(encoder, vectors, histories, dislike_weight)

    return mapped_contender(name, catalog, items, score)


def mapped_contender(
    name: str, catalog: Catalog, items: Catalog, score: Callable[[Histories], Iterator[Scored]]
) -> Contender:
    """Make a contender whose rows are those of a catalog; `items` has every item of it."""
    return Contender(name, *mapped_rows(catalog, items), score)


def mapped_rows(catalog: Catalog, items: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Return a catalog's rows of all items (N + 1,), 0 where it has none, and the rows of items (R,) that it has."""
    dataset_rows = np.array([PADDING_ROW] + [items.row_of[item_id] for item_id in catalog.item_ids[1:]], dtype=np.int32)
    own_rows = np.zeros(len(items) + 1, dtype=np.int32)
    own_rows[dataset_rows] = np.arange(len(dataset_rows))
    return own_rows, dataset_rows


def model_scores(
    encoder: BehaviourEncoder, vectors: Tensor, histories: Histories, dislike_weight: float = DISLIKE_WEIGHT
) -> Iterator[Scored]:
    """Return scores s = uT A v of rows whose vectors (R, C) are given; of whom nothing is known, what is popular.

    As in an answer, what people turned down is not read, and what is like it falls.
    """
    liked, opinions = without_dislikes(histories, encoder.config)
    for places, b in SequenceBatches(liked, encoder.config).inference():
        interests = encoder.interests(b.kinds, b.gaps, b.values, b.lengths, b.rows)
        scores = encoder.queries(interests) @ vectors.T
        yield places, pushed_down(scores, [opinions[place] for place in places], vectors, dislike_weight)
    unknown = np.flatnonzero(liked.lengths == 0)
    popularity = encoder.item_popularity[: len(vectors)]
    scores = (popularity / popularity.max().clamp(min=1e-9)).where(popularity > 0, float("-inf"))
    scores = scores.repeat(len(unknown), 1)
    yield unknown, pushed_down(scores, [opinions[place] for place in unknown], vectors, dislike_weight)


def pushed_down(scores: Tensor, opinions: Sequence[Opinions | None], vectors: Tensor, weight: float) -> Tensor:
    """Lower the scores (B, R) of what is like dislikes, among as many candidates as an answer has at most."""
    lines = torch.tensor([line for line, own in enumerate(opinions) if own is not None], dtype=torch.int64)
    if len(lines):
        top = scores[lines].topk(min(MOST_CANDIDATES, scores.shape[1]), dim=1)
        own = [own for own in opinions if own is not None]
        lowered, rows = push_down(top.values.numpy(), top.indices.numpy(), own, vectors.numpy(), weight)
        scores[lines[:, None], torch.from_numpy(rows)] = torch.from_numpy(lowered)
    return scores


def baseline_contender(name: str, scores: Callable[[Histories], np.ndarray], items: Catalog) -> Contender:
    """Make a contender of a recommender of lib/evaluation/baselines.py, which has the dataset's rows."""
    same = np.arange(len(items) + 1, dtype=np.int32)

    def score(histories: Histories) -> Iterator[Scored]:
        yield np.arange(len(histories)), torch.from_numpy(scores(histories))

    return Contender(name, same, same, score)


@dataclass(frozen=True)
class Ranking:
    """What a contender made of the cases."""

    ranks: np.ndarray  # (cases,) int64, place of the target, 0 is the top
    recommended: np.ndarray  # (cases, k) int32, the dataset's rows, 0 for none
    unknown_targets: int  # cases whose target the contender does not know: misses
    unknown_inputs: int  # cases of whose input it knows nothing


def rank(contender: Contender, cases: Cases, k: int = 10, batch: int = 256) -> Ranking:
    """Rank all of a contender's items for each case, and find the target."""

    def score(histories: Histories) -> Iterator[NamedScores]:
        for places, scores in contender.score(histories):
            yield contender.name, places, scores

    return rank_each(contender.own_rows, contender.dataset_rows, score, cases, k, batch)[contender.name]


@torch.inference_mode()
def rank_each(
    own_rows: np.ndarray,
    dataset_rows: np.ndarray,
    score: Callable[[Histories], Iterator[NamedScores]],
    cases: Cases,
    k: int = 10,
    batch: int = 256,
) -> dict[str, Ranking]:
    """Rank all of a contender's items for each case by several scores, and find the target; return it by their names.

    Args:
        own_rows: as of a Contender.
        dataset_rows: as of a Contender.
        score: yields places of histories, and scores, each under the name of what scored them.
        cases: what is to be predicted.
        k: items that are recommended.
        batch: cases at once, at most.
    """
    items = len(own_rows) - 1
    batch = max(1, min(batch, MOST_SCORES // len(dataset_rows)))
    own_targets = own_rows[cases.targets].astype(np.int64)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # ranks and recommended rows
    unknown_inputs = 0
    for start in range(0, len(cases.users), batch):
        inputs = case_inputs(cases, slice(start, start + batch))
        inputs = replace(inputs, rows=own_rows[inputs.rows])
        inputs = inputs.select(inputs.rows > 0)
        unknown_inputs += int((inputs.lengths == 0).sum())
        for name, places, scores in score(inputs):
            if name not in found:
                found[name] = np.zeros(len(own_targets), np.int64), np.zeros((len(own_targets), k), np.int32)
            ranks, recommended = found[name]
            remove_seen(scores, inputs, places)
            # a miss is one however few items are left
            ranks[start + places] = target_ranks(scores, own_targets[start + places], missed=max(items, k))
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            left = torch.where(torch.isneginf(top.values), 0, top.indices).numpy()
            recommended[start + places, : left.shape[1]] = dataset_rows[left]
    unknown_targets = int((own_targets == 0).sum())
    return {name: Ranking(*both, unknown_targets, unknown_inputs) for name, both in found.items()}


def target_ranks(scores: Tensor, targets: np.ndarray, missed: int) -> np.ndarray:
    """Return (B,) int64 places of targets (B,) among scores (B, R), 0 is the top; `missed` where a score is -inf.

    Ties count against the target: a model to which all items are alike finds none. -inf has a target that is unknown,
    or that the user has had before and is removed with the seen items.
    """
    own = scores[torch.arange(len(targets)), torch.from_numpy(targets)]
    found = (scores >= own[:, None]).sum(dim=1) - 1
    return found.where(torch.isfinite(own), missed).numpy()


def remove_seen(scores: Tensor, inputs: Histories, places: np.ndarray) -> None:
    """Make -inf of the items in each history, and of row 0."""
    lengths = inputs.lengths[places]
    seen = inputs.rows[spans(inputs.offsets[places], lengths)]
    lines = np.repeat(np.arange(len(places)), lengths)
    scores[torch.from_numpy(lines), torch.from_numpy(seen).long()] = float("-inf")
    scores[:, PADDING_ROW] = float("-inf")
