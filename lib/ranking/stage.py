"""The ranking stage: people in, their ranked items out. Candidates of all sources, one ranker over them.

A model without counts (one that was pretrained before there were any) has no ranker: its answers are the encoder's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lib.data.histories import Histories, Person
from lib.model.batches import SequenceBatches
from lib.model.encoder import BehaviourEncoder
from lib.ranking.candidates import SOURCES, Asked
from lib.ranking.cold_start import Popularity
from lib.ranking.features import Candidates, find_candidates
from lib.ranking.standing import Standing
from lib.retrieval.exact import largest
from lib.retrieval.index import ItemIndex

CHANCE_PAIRS = 5.0  # that two items were met together by chance, as it were, before any that are counted


class RankingStage:
    """Ranks by one version of an encoder with counts; `follow` moves it on to the next."""

    def __init__(self, encoder: BehaviourEncoder, index: ItemIndex):
        assert encoder.counts is not None
        assert encoder.ranker is not None
        self.encoder, self.counts, self.ranker = encoder, encoder.counts, encoder.ranker
        self.repeats = encoder.config.repeats
        self.index = index
        self._counted = self.counts.arrays()
        self.standing = Standing(self._counted)
        self.popularity = _popularity(encoder)
        self.scorer = self.ranker.scorer()

    def follow(self, rows: np.ndarray) -> None:
        """Take over the encoder's next version, which has changed these rows (R,) of the counts."""
        self._counted = self.counts.arrays()  # which may have grown
        self.standing.update(self._counted, rows)
        self.popularity = _popularity(self.encoder)
        self.scorer = self.ranker.scorer()

    def candidates(
        self,
        people: Sequence[Person],
        queries: Tensor,
        count: int,
        mask: np.ndarray | None = None,
        repeats: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        sources: Sequence[str] = tuple(SOURCES),
    ) -> Candidates:
        """Find the candidates of B people.

        Args:
            people: who asks.
            queries: (B, C) uT A; zero for who has no history.
            count: items of the largest answer.
            mask: (R,) bool, the rows that may be found.
            repeats: (B,) bool, whether items that the person has seen may be found; default: as the model says.
            weights: (R,) what ranking rules add to the score of a row.
            sources: names in lib/ranking/candidates; the others are switched off.
        """
        again = np.full(len(people), self.repeats) if repeats is None else repeats
        asked = Asked(
            people=people,
            repeats=again,
            queries=queries,
            count=count,
            mask=mask,
            weights=weights,
            index=self.index,
            popularity=self.popularity,
            counts=self._counted,
            standing=self.standing,
        )
        return find_candidates(asked, sources)

    @torch.inference_mode()
    def scores(self, found: Candidates) -> np.ndarray:
        """Return (P,) float32 the scores of candidates."""
        features, kinds = torch.from_numpy(found.features), torch.from_numpy(found.kinds)
        return self.scorer.scores(features, kinds).numpy()

    def rank(
        self, found: Candidates, people: int, count: int, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (B, count) and rows (B, count), the best first; minus infinity and -1 where fewer are found.

        Args:
            found: the candidates of B people.
            people: B.
            count: items of the largest answer.
            weights: (R,) what ranking rules add to the score of a row to order them; the scores are without.
        """
        scores = self.scores(found)
        places = found.places
        width = max(int(places.max(initial=-1)) + 1, count)
        table = np.full((people, width), -np.inf, dtype=np.float32)
        rows = np.full((people, width), -1, dtype=np.int64)
        table[found.lines, places] = scores
        rows[found.lines, places] = found.rows
        best = largest(table if weights is None else table + weights[rows], count)
        everybody = np.arange(people)[:, None]
        return table[everybody, best], rows[everybody, best]

    def together(self, row: int, count: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows, `count` at most, of what goes together with an item most, the best first.

        The score is the cosine n_ij / sqrt(n_i n_j), shrunk by n_ij / (n_ij + CHANCE_PAIRS): two items that were met
        once, together, have a cosine of 1 by chance.

        Args:
            row: of the item.
            count: how many are wanted.
            mask: (R,) bool, the rows that may be found.
        """
        own = self._counted
        rows, pairs = own["together_rows"][row].astype(np.int64), own["together_counts"][row]
        kept = mask[rows] & (pairs > 0)
        rows, pairs = rows[kept], pairs[kept]
        cosines = pairs / np.sqrt(np.maximum(own["events"][row] * own["events"][rows], 1))
        scores = cosines * pairs / (pairs + CHANCE_PAIRS)
        best = np.argsort(-scores, kind="stable")[:count]
        return scores[best], rows[best]


def stage_of(encoder: BehaviourEncoder) -> RankingStage | None:
    """Return the ranking stage of a version, with an index of all its rows; None where it has no ranker."""
    if encoder.counts is None:
        return None
    with torch.inference_mode():
        return RankingStage(encoder, ItemIndex(encoder.item_vectors().cpu().numpy()))


def _popularity(encoder: BehaviourEncoder) -> Popularity:
    popularity = encoder.item_popularity.cpu().numpy()
    return Popularity(popularity / max(float(popularity.max(initial=0.0)), 1e-9))


@torch.no_grad()
def queries_of(encoder: BehaviourEncoder, liked: Histories) -> Tensor:
    """Return (B, C) uT A of histories without what was turned down; 0 of empty ones."""
    encoder.eval()
    queries = torch.zeros(len(liked), encoder.config.hidden_size, device=encoder.device)
    for places, part in SequenceBatches(liked, encoder.config).inference():
        part = part.to(encoder.device)
        interests = encoder.interests(part.kinds, part.gaps, part.values, part.lengths, part.rows)
        queries[torch.from_numpy(places)] = encoder.queries(interests)
    return queries
