"""The whole answer as a contender of an evaluation: every row of a model scored for many people."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.evaluation.protocols import Contender, Scored, mapped_contender, model_scores, pushed_down
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoder
from lib.model.item_counts import people_of
from lib.model.presets import DISLIKE_WEIGHT
from lib.ranking.candidates import SOURCES
from lib.ranking.stage import RankingStage, queries_of
from lib.retrieval.index import ItemIndex

LARGEST_ANSWER = 100  # candidates are found for
BEHIND = 10.0  # how far what is no candidate lies behind: its order is the encoder's
PEOPLE_AT_ONCE = 256


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

    stage = None if encoder.counts is None else RankingStage(encoder, index, sources)

    def score(histories: Histories) -> Iterator[Scored]:
        if stage is None:
            return model_scores(encoder, torch.from_numpy(index.vectors), histories, dislike_weight)
        return answer_scores(stage, histories, dislike_weight)

    return mapped_contender(name, catalog, items, score)


@torch.inference_mode()
def answer_scores(
    stage: RankingStage, histories: Histories, dislike_weight: float = DISLIKE_WEIGHT, repeats: bool = False
) -> Iterator[Scored]:
    """Yield places of histories, and their scores (B, R) of all rows of the stage's index.

    Args:
        stage: of a model.
        histories: in its rows.
        dislike_weight: of what is like dislikes.
        repeats: whether what people have seen competes.
    """
    for start in range(0, len(histories), PEOPLE_AT_ONCE):
        part = histories.take(np.arange(start, min(start + PEOPLE_AT_ONCE, len(histories))))
        liked, opinions = without_dislikes(part, stage.encoder.config)
        people, queries = people_of(part, liked), queries_of(stage.encoder, liked)
        again = np.full(len(people), repeats)
        found = stage.candidates(people, queries, LARGEST_ANSWER, repeats=again)
        vectors = torch.from_numpy(stage.index.vectors)
        scores = queries.cpu() @ vectors.T - BEHIND
        scores[torch.from_numpy(found.lines), torch.from_numpy(found.rows)] = torch.from_numpy(stage.scores(found))
        yield np.arange(start, start + len(part)), pushed_down(scores, opinions, vectors, dislike_weight)
