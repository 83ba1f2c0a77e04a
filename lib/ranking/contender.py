"""The whole answer as a contender of an evaluation: every row of a model scored for many people."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.evaluation.protocols import Contender, Scored, mapped_contender, model_scores, pushed_down
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoder
from lib.model.item_counts import people_of
from lib.model.presets import DISLIKE_WEIGHT
from lib.ranking.candidates import SOURCES
from lib.ranking.features import FEATURES, TRENDS, Candidates
from lib.ranking.stage import RankingStage, queries_of
from lib.retrieval.index import ItemIndex

# by which feature the candidates are ranked where a source speaks alone; the oldest item is the last of what is new
ALONE = {
    "nearest": ("interest",),
    "following": ("follows",),
    "together": ("together", "together_long"),
    "seen": ("seen", "seen_recently"),
    "trending": TRENDS,
    "new": ("age",),
}
LARGEST_ANSWER = 100  # candidates are found for
BEHIND = 10.0  # how far what is no candidate lies behind: its order is the encoder's
PEOPLE_AT_ONCE = 256
Answer = tuple[np.ndarray, Tensor, Candidates]  # places of B histories, scores (B, R) of all rows, candidates


def answer_contender(
    name: str,
    encoder: BehaviourEncoder,
    catalog: Catalog,
    items: Catalog,
    dislike_weight: float = DISLIKE_WEIGHT,
    sources: Sequence[str] = tuple(SOURCES),
) -> Contender:
    """Make a contender of a model's answers; `items` has every item of its catalog."""
    encoder.eval()
    with torch.inference_mode():
        index = ItemIndex(encoder.item_vectors(torch.arange(len(catalog) + 1)).cpu().numpy())

    stage = None if encoder.counts is None else RankingStage(encoder, index)

    def score(histories: Histories) -> Iterator[Scored]:
        if stage is None:
            yield from model_scores(encoder, torch.from_numpy(index.vectors), histories, dislike_weight)
            return
        for places, scores, _ in answers(stage, histories, dislike_weight, sources=sources):
            yield places, scores

    return mapped_contender(name, catalog, items, score)


@torch.inference_mode()
def answers(
    stage: RankingStage,
    histories: Histories,
    dislike_weight: float = DISLIKE_WEIGHT,
    repeats: bool = False,
    sources: Sequence[str] = tuple(SOURCES),
) -> Iterator[Answer]:
    """Yield places of histories, their scores (B, R) of all rows of the stage's index, and their candidates.

    Args:
        stage: of a model.
        histories: in its rows.
        dislike_weight: of what is like dislikes.
        repeats: whether what people have seen competes.
        sources: of the candidates.
    """
    for start in range(0, len(histories), PEOPLE_AT_ONCE):
        part = histories.take(np.arange(start, min(start + PEOPLE_AT_ONCE, len(histories))))
        liked, opinions = without_dislikes(part, stage.encoder.config)
        people, queries = people_of(part, liked), queries_of(stage.encoder, liked)
        again = np.full(len(people), repeats)
        found = stage.candidates(people, queries, LARGEST_ANSWER, repeats=again, sources=sources)
        vectors = torch.from_numpy(stage.index.vectors)
        scores = queries.cpu() @ vectors.T - BEHIND
        scores[torch.from_numpy(found.lines), torch.from_numpy(found.rows)] = torch.from_numpy(stage.scores(found))
        yield np.arange(start, start + len(part)), pushed_down(scores, opinions, vectors, dislike_weight), found


def alone(found: Candidates, sources: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each source, with that of the feature if it has several, and its scores (P,) of candidates."""
    for source in sources:
        for name in ALONE[source]:
            values = found.features[:, FEATURES.index(name)]
            yield f"{source} {name}" if len(ALONE[source]) > 1 else source, -values if source == "new" else values


def ranks_alone(found: Candidates, targets: np.ndarray, sources: Sequence[str], missed: int) -> dict[str, np.ndarray]:
    """Return by source (B,) int64 the place of each person's target (B,) by it alone; `missed` where it is not found.

    Ties count against the target, as in the ranks of whole answers.
    """
    hits = found.rows == targets[found.lines]
    ranks = {}
    for name, values in alone(found, sources):
        own = np.full(len(targets), np.inf, dtype=np.float32)
        own[found.lines[hits]] = values[hits]
        ahead = np.bincount(found.lines[values >= own[found.lines]], minlength=len(targets)) - 1
        ranks[name] = np.where(np.isfinite(own), ahead, missed)
    return ranks
