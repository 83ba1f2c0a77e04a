"""Encoder, catalog and index as one value of one version: histories in, ranked items out."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.catalog import Catalog
from lib.data.history import EncodedHistory, History, Opinions, to_histories
from lib.errors import InputError
from lib.model.batches import SequenceBatches, group_by_length
from lib.model.delta import ATTRIBUTE_TABLE, Delta, DeltaMismatch, apply_delta, state_of
from lib.model.dislikes import candidate_count, push_down, without_dislikes
from lib.model.encoder import PADDING_ROW, BehaviourEncoder
from lib.model.fingerprint import Fingerprint
from lib.model.folder import load_model
from lib.model.inference import InferenceEncoder
from lib.ranking.cold_start import most_popular
from lib.ranking.explain import reasons
from lib.ranking.filters import ItemFilter
from lib.ranking.rerank import rerank
from lib.ranking.rules import BoundRules, RankingRules
from lib.retrieval.faiss_lists import search_device
from lib.retrieval.index import ItemIndex

EVENTS_PER_BATCH = 8192  # padding counted; bounds the memory of one pass of the encoder
MASK_BYTES = 64 * 2**20  # of the masks of filters that were asked for lately, a byte an item each
NUMBERS = itertools.count()
NOTHING_SEEN = np.zeros(0, dtype=np.int32)


class RankedItem(NamedTuple):
    """One recommended item."""

    item_id: str
    score: float
    reason: str | None = None  # "popular", or the events of the history that raised the score most
    propensity: float | None = None  # with exploration: the probability of this item here, given those above it


# the rows that may be found (R,), how many, the rows that are seen, and what is added to each score -> rows, scores
Candidates = Callable[[np.ndarray, int, np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


class Question(NamedTuple):
    """One person's request: their history, how many items, and which."""

    history: History
    k: int
    filter: ItemFilter | None = None
    exclude_seen: bool = True
    explain: bool = False


class Recommender:
    """One version of the model, ready to answer; `apply` moves it to the next version."""

    def __init__(
        self,
        encoder: BehaviourEncoder,
        catalog: Catalog,
        version: int,
        log_offset: int = 0,
        rules: RankingRules | None = None,
    ):
        self.encoder = encoder.eval().requires_grad_(False)
        nn.Module.to(self.encoder, search_device())
        self.catalog = catalog
        self.version = version
        self.log_offset = log_offset
        self.kind_codes = encoder.config.kind_codes
        self.index = ItemIndex(self._vectors(np.arange(encoder.config.item_rows)))
        self.reader = InferenceEncoder(encoder)
        self.fingerprint = Fingerprint(encoder)
        self._masks: dict[ItemFilter | None, np.ndarray] = {}
        self._mask_bytes = 0  # of all of them, with the filters
        self.rules = rules or RankingRules()
        self._bound: BoundRules | None = None
        self._unbound: set[str] = set()  # items that were changed, or got a row, since then
        self.generator = np.random.default_rng()  # of exploration
        self.number = next(NUMBERS)  # of this one among all recommenders of the process

    @classmethod
    def load(cls, folder: str | Path) -> "Recommender":
        """Load a model folder.

        Raises:
            InputError: the folder is missing, incomplete or damaged.
        """
        encoder, catalog, manifest = load_model(folder)
        return cls(encoder, catalog, manifest.version, manifest.log_offset)

    @property
    def checksum(self) -> str:
        """Fingerprint of the whole state."""
        return self.fingerprint.checksum

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return (R, C) item vectors; the padding row and spare rows are zero and are never found."""
        with torch.inference_mode():
            return self.encoder.item_vectors(torch.from_numpy(rows).to(self.encoder.device)).cpu().numpy()

    # -------------------------------------------------------------------------------------------- versions and catalog

    def apply(self, delta: Delta) -> None:
        """Move to the delta's version: weights, catalog and index together.

        Raises:
            DeltaMismatch: the delta has another parent, or the result is not what its maker had; the recommender must
                be loaded anew in the second case.
        """
        if delta.parent != self.version:
            raise DeltaMismatch(f"delta {delta.version} follows version {delta.parent}, this is {self.version}")
        apply_delta(self.encoder, delta)
        self._unbound.update(self.catalog.extend(delta.new_items))
        self.reader = InferenceEncoder(self.encoder)
        rows = np.union1d(delta.rows, np.arange(len(self.index), delta.item_rows))
        if ATTRIBUTE_TABLE in delta.tensors:  # every item's vector has moved
            rows = np.arange(delta.item_rows)
        self.index.update(rows, self._vectors(rows))
        self._bind_rules()
        if delta.new_items or any(len(mask) != len(self.index) for mask in self._masks.values()):
            self._forget_masks()
        if delta.popularity_scale != 1.0:
            self.fingerprint.forget("item_popularity")
        checksum = self.fingerprint.update(state_of(self.encoder), delta.rows, set(delta.tensors))
        if checksum != delta.checksum:
            raise DeltaMismatch(f"version {delta.version} came out as {checksum}, its maker had {delta.checksum}")
        self.version = delta.version
        self.log_offset = delta.log_offset

    def change_items(self, items: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Give items other attributes, or remove them (None), from the next answer on, whatever version it is of."""
        if items:
            self.catalog.change(items)
            self._unbound.update(items)
            self._bind_rules()
            self._forget_masks()

    # --------------------------------------------------------------------------- the answer: encode, retrieve and rank

    def recommend(self, questions: Sequence[Question]) -> list[list[RankedItem]]:
        """Answer many people in one pass."""
        histories = [self.encode(question.history) for question in questions]
        known = [place for place, history in enumerate(histories) if history.codes.size]
        queries = self._queries([histories[place].codes for place in known])
        answers: list[list[RankedItem]] = [[] for _ in questions]
        for filter in {questions[place].filter for place in known}:
            chosen = [number for number, place in enumerate(known) if questions[place].filter == filter]
            places = [known[number] for number in chosen]
            counts = [questions[place].k for place in places]
            seen = [histories[place].seen if questions[place].exclude_seen else NOTHING_SEEN for place in places]
            opinions = [histories[place].opinions for place in places]
            ranked = self._rank(queries[chosen], counts, filter, seen, opinions)
            for place, items in zip(places, ranked, strict=True):
                answers[place] = self._explain(questions[place], items)
        for place, history in enumerate(histories):
            if not history.codes.size:
                k, filter = questions[place].k, questions[place].filter
                seen = history.seen if questions[place].exclude_seen else NOTHING_SEEN
                answers[place] = self.popular(k, filter, seen, history.opinions)
        return answers

    def encode(self, history: History) -> EncodedHistory:
        """Read a history as the encoder does; kept with it, and made anew when the catalog may know more of it."""
        kept, known = history.encoded, len(self.catalog)
        if kept is not None and kept.reader == self.number and (kept.complete or kept.catalog_items == known):
            return kept
        flat = to_histories([history], self.catalog, self.kind_codes)
        liked, (opinions,) = without_dislikes(flat, self.encoder.config)
        codes = SequenceBatches(liked, self.encoder.config).codes()[:, -self.encoder.config.max_length :].copy()
        complete = len(flat.rows) == len(history)
        history.encoded = EncodedHistory(codes, np.unique(flat.rows), opinions, self.number, known, complete)
        return history.encoded

    def _queries(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return (B, C) float32 uT A of histories given as (4, T) codes, with little work on padding."""
        lengths = np.array([codes.shape[1] for codes in histories], dtype=np.int64)
        queries = torch.empty(len(histories), self.encoder.config.hidden_size, device=self.encoder.device)
        for group in group_by_length(lengths, EVENTS_PER_BATCH):
            queries[torch.from_numpy(group)] = self.reader.queries([histories[place] for place in group])
        return queries

    def _rank(
        self,
        queries: Tensor,
        counts: Sequence[int],
        filter: ItemFilter | None,
        seen: Sequence[np.ndarray],
        opinions: Sequence[Opinions | None],
    ) -> list[list[RankedItem]]:
        """Find for each query (B, C) so many items that pass the filter and are not seen, the best first."""
        if self.rules.active:
            return [
                self._rerank(k, filter, own, self._search(query, opinion))
                for query, k, own, opinion in zip(queries.unbind(), counts, seen, opinions, strict=True)
            ]
        wanted = max(self._wanted(k, opinion) for k, opinion in zip(counts, opinions, strict=True))
        scores, rows = self.index.search(queries, wanted, self.mask(filter), seen)
        scores, rows = self._push_down(scores, rows, opinions)
        found = np.minimum((rows >= 0).sum(axis=1), counts).tolist()
        return [
            self._items(own_scores[:count], own_rows[:count])
            for own_scores, own_rows, count in zip(scores, rows, found, strict=True)
        ]

    def _wanted(self, count: int, opinion: Opinions | None) -> int:
        """Return how many items are found for an answer of `count`: more where some of them will fall."""
        return candidate_count(count) if opinion is not None and self.rules.dislike_weight else count

    def _push_down(
        self, scores: np.ndarray, rows: np.ndarray, opinions: Sequence[Opinions | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        return push_down(scores, rows, opinions, self.index.vectors, self.rules.dislike_weight)

    def _best(
        self, scores: np.ndarray, rows: np.ndarray, opinion: Opinions | None, count: int, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the best `count` of one person's candidates, by their scores and weights (R,)."""
        (scores,), (rows,) = self._push_down(scores[None], rows[None], [opinion])
        best = np.argsort(-scores if weights is None else -scores - weights[rows], kind="stable")[:count]
        return rows[best], scores[best]

    def _search(self, query: Tensor, opinion: Opinions | None) -> Candidates:
        """Return how candidates for one query (C,) are found."""

        def nearest(
            mask: np.ndarray, count: int, seen: np.ndarray, weights: np.ndarray | None
        ) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = self.index.search(query[None], self._wanted(count, opinion), mask, [seen], weights)
            real = rows[0] >= 0
            return self._best(scores[0][real], rows[0][real], opinion, count, weights)

        return nearest

    def _rerank(self, k: int, filter: ItemFilter | None, seen: np.ndarray, candidates: Candidates) -> list[RankedItem]:
        """Answer one person by the ranking rules."""
        rules, mask = self._bound_rules(), self.mask(filter)
        count = rules.candidates(k)
        rows, scores = rules.find(mask, lambda among, weights: candidates(among, count, seen, weights))
        if len(pins := rules.pinned(mask, seen)):
            pinned = np.zeros(len(mask), dtype=bool)
            pinned[pins] = True
            found = candidates(pinned, len(pins), seen, None)
            rows, scores = np.concatenate([rows, found[0]]), np.concatenate([scores, found[1]])
        ranked = rerank(
            rows,
            scores,
            k,
            rules,
            self.index.vectors,
            self.generator,
            lambda among, weights: candidates(mask & among, count, seen, weights),
        )
        items = self._items(ranked.scores, ranked.rows)
        if ranked.propensities is None:
            return items
        propensities = ranked.propensities.tolist()
        return [item._replace(propensity=own) for item, own in zip(items, propensities, strict=True)]

    def _bind_rules(self) -> None:
        """Bind the rules where the catalog changes, which a service does on a thread, so that no answer has to."""
        if self.rules.active:
            self._bound_rules()

    def _bound_rules(self) -> BoundRules:
        if not self._bound or not self._bound.fits(self.catalog, len(self.index)):
            self._bound = BoundRules.of(self.rules, self.catalog, len(self.index), self._bound, self._unbound)
            self._unbound.clear()
        return self._bound

    def prepare(self, before: "Recommender | None") -> None:
        """Make what takes seconds in a large catalog: the indexes that the one before has, and those of the rules."""
        if before is not None:
            self.catalog.table.prepare_like(before.catalog.table)
        self._bind_rules()

    def idle_rules(self) -> list[str]:
        """Name the ranking rules that have no effect on the catalog as it is now, each with the reason."""
        if not self.rules.active:
            return []
        rules = self._bound_rules()
        return [*rules.faults, *rules.idle]

    def _explain(self, question: Question, items: list[RankedItem]) -> list[RankedItem]:
        """Give items the events that raised their scores most as reasons, if that was asked for."""
        if not question.explain or not items:
            return items
        vectors = self.index.vectors[self.catalog.rows(item.item_id for item in items)]
        named = reasons(
            question.history,
            self.catalog,
            self.encoder.config,
            lambda codes: self._queries(codes).cpu().numpy(),
            vectors,
        )
        return [item._replace(reason=reason) for item, reason in zip(items, named, strict=True)]

    def is_checked(self, filter: ItemFilter) -> bool:
        """Return whether the mask of a filter is known."""
        return filter in self._masks

    def check(self, filter: ItemFilter) -> list[str]:
        """Return what is to be noted of a filter; its mask is kept for the answer.

        Raises:
            InputError: a condition does not go with the values of its attribute; the message names it.
        """
        if filter not in self._masks:
            self._keep(filter, self._mask(filter))
        return filter.notes(self.catalog)

    def mask(self, filter: ItemFilter | None) -> np.ndarray:
        """Return (rows of the index,) bool: rows of known items that pass the filter.

        One that no longer goes with the catalog, which changes after filters are checked, is passed by nothing.
        """
        if filter not in self._masks:
            try:
                mask = self._mask(filter)
            except InputError:
                mask = np.zeros(len(self.index), dtype=bool)
            self._keep(filter, mask)
        return self._masks[filter]

    def _mask(self, filter: ItemFilter | None) -> np.ndarray:
        mask = np.zeros(len(self.index), dtype=bool)
        mask[PADDING_ROW + 1 : len(self.catalog) + 1] = True
        if filter is not None:
            mask[: len(self.catalog) + 1] &= filter.mask(self.catalog)
        mask[self.catalog.rows(self.catalog.removed)] = False
        return mask

    def _keep(self, filter: ItemFilter | None, mask: np.ndarray) -> None:
        """Keep a mask, and forget the oldest ones beyond MASK_BYTES."""
        self._masks[filter] = mask
        self._mask_bytes += _bytes_of(filter, mask)
        while self._mask_bytes > MASK_BYTES and len(self._masks) > 1:
            oldest = next(iter(self._masks))
            self._mask_bytes -= _bytes_of(oldest, self._masks.pop(oldest))

    def _forget_masks(self) -> None:
        self._masks.clear()
        self._mask_bytes = 0

    def _items(self, scores: np.ndarray, rows: np.ndarray) -> list[RankedItem]:
        ids = self.catalog.item_ids
        return [RankedItem(ids[row], score) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]

    # ---------------------------------------------------------------------------------------------- without a history

    def popular(
        self,
        k: int,
        filter: ItemFilter | None = None,
        seen: np.ndarray = NOTHING_SEEN,
        opinion: Opinions | None = None,
    ) -> list[RankedItem]:
        """Return the most popular items of late, for people of whom nothing is known but what they turned down."""
        popularity = self.encoder.item_popularity.cpu().numpy()

        def most(
            mask: np.ndarray, count: int, seen: np.ndarray, weights: np.ndarray | None
        ) -> tuple[np.ndarray, np.ndarray]:
            unseen = mask.copy()
            unseen[seen] = False
            wanted, added = self._wanted(count, opinion), None if weights is None else top * weights
            scores, rows = most_popular(popularity, unseen, wanted, added)
            return self._best(scores / top, rows, opinion, count, weights)

        top = float(popularity[self.mask(filter)].max(initial=0.0)) or 1.0
        if self.rules.active:
            items = self._rerank(k, filter, seen, most)
        else:
            rows, scores = most(self.mask(filter), k, seen, None)
            items = self._items(scores, rows)
        return [item._replace(reason="popular") for item in items]

    def similar(self, item_id: str, k: int, filter: ItemFilter | None = None) -> list[RankedItem]:
        """Return the items whose vectors are nearest to an item's, itself left out.

        Raises:
            KeyError: the item is not in the catalog.
        """
        if item_id in self.catalog.removed:
            raise KeyError(item_id)
        row = self.catalog.row_of[item_id]
        scores, rows = self.index.search(self.index.vectors[[row]], k, self.mask(filter), [np.array([row])])
        return self._items(scores[0][rows[0] >= 0], rows[0][rows[0] >= 0])


def _bytes_of(filter: ItemFilter | None, mask: np.ndarray) -> int:
    """Return about how much memory a filter and its mask take."""
    return mask.nbytes + (0 if filter is None else 4 * len(filter.key))
