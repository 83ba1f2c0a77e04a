"""The whole answer as a contender of an evaluation: every row of a model scored for many people."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.histories import Histories, Person
from lib.data.history import Opinions
from lib.evaluation.comparison import WHOLE
from lib.evaluation.protocols import (
    Cases,
    Contender,
    NamedScores,
    Ranking,
    Scored,
    mapped_contender,
    mapped_rows,
    model_contender,
    pushed_down,
    rank_each,
)
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
BEHIND = 10.0  # how far what is no candidate lies behind, in the encoder's order: further on `nearest` would find it
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
    stage = catalog_stage(encoder, catalog)
    if stage is None:
        return model_contender(name, encoder, catalog, items, dislike_weight)

    def score(histories: Histories) -> Iterator[Scored]:
        for places, scores, _ in answers(stage, histories, dislike_weight, sources=sources):
            yield places, scores

    return mapped_contender(name, catalog, items, score)


def catalog_stage(encoder: BehaviourEncoder, catalog: Catalog) -> RankingStage | None:
    """Return a model's ranking stage without the spare rows of its item table; None where it has no ranker."""
    encoder.eval()
    if encoder.counts is None:
        return None
    with torch.inference_mode():
        return RankingStage(encoder, ItemIndex(encoder.item_vectors(torch.arange(len(catalog) + 1)).cpu().numpy()))


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
    for part in _parts(histories, stage):
        yield part.places, *_answer(part, stage, sources, repeats, dislike_weight)


class Part(NamedTuple):
    """Some people of an evaluation."""

    places: np.ndarray  # (B,) of their histories
    people: list[Person]
    queries: Tensor  # (B, C) uT A
    opinions: list[Opinions | None]


def _parts(histories: Histories, stage: RankingStage) -> Iterator[Part]:
    for start in range(0, len(histories), PEOPLE_AT_ONCE):
        own = histories.take(np.arange(start, min(start + PEOPLE_AT_ONCE, len(histories))))
        liked, opinions = without_dislikes(own, stage.encoder.config)
        yield Part(
            np.arange(start, start + len(own)), people_of(own, liked), queries_of(stage.encoder, liked), opinions
        )


@torch.inference_mode()
def _answer(
    part: Part, stage: RankingStage, sources: Sequence[str], repeats: bool, dislike_weight: float
) -> tuple[Tensor, Candidates]:
    again = np.full(len(part.people), repeats)
    found = stage.candidates(part.people, part.queries, LARGEST_ANSWER, repeats=again, sources=sources)
    vectors = torch.from_numpy(stage.index.vectors)
    scores = part.queries.cpu() @ vectors.T - (BEHIND if "nearest" in sources else torch.inf)
    scores[torch.from_numpy(found.lines), torch.from_numpy(found.rows)] = torch.from_numpy(stage.scores(found))
    return pushed_down(scores, part.opinions, vectors, dislike_weight), found


# ------------------------------------------------------------------------------------------------------- each source


def rank_sources(
    stage: RankingStage, catalog: Catalog, items: Catalog, cases: Cases, sources: Sequence[str] = tuple(SOURCES)
) -> dict[str, Ranking]:
    """Rank the cases by the WHOLE answer, by each source of candidates alone, and by the whole without each.

    Without a source what it alone knows of an item is left out, too; the ranker stays as it was fitted with all.

    Args:
        stage: of a model, without spare rows.
        catalog: the model's.
        items: every item of the cases and of the catalog.
        cases: what is to be predicted; seen items are removed, so what is found of these is no source.
        sources: of the candidates.
    """
    speaking = [name for name in sources if name != "seen"]

    def score(histories: Histories) -> Iterator[NamedScores]:
        for part in _parts(histories, stage):
            scores, found = _answer(part, stage, sources, False, DISLIKE_WEIGHT)
            yield WHOLE, part.places, scores
            lines, rows = torch.from_numpy(found.lines), torch.from_numpy(found.rows)
            for name, values in alone(found, speaking):
                scores = torch.full_like(scores, float("-inf"))
                scores[lines, rows] = torch.from_numpy(values)
                yield name, part.places, scores
            for name in speaking if len(speaking) > 1 else ():
                others = [other for other in speaking if other != name]
                yield f"without {name}", part.places, _answer(part, stage, others, False, DISLIKE_WEIGHT)[0]

    return rank_each(*mapped_rows(catalog, items), score, cases)


def alone(found: Candidates, sources: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what the sources alone score candidates by, (P,) each, under their names, or their features' if several."""
    for source in sources:
        for name in ALONE[source]:
            values = found.features[:, FEATURES.index(name)]
            yield name if len(ALONE[source]) > 1 else source, -values if source == "new" else values


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
