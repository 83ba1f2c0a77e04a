"""Encoder, catalog and index as one value of one version: histories in, ranked items out."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.catalog import Catalog
from lib.data.user_histories import EncodedHistory, History, to_histories
from lib.model.batches import SequenceBatches, group_by_length
from lib.model.delta import ATTRIBUTE_TABLE, Delta, DeltaMismatch, apply_delta, state_of
from lib.model.encoder import PADDING_ROW, BehaviourEncoder
from lib.model.fingerprint import Fingerprint
from lib.model.folder import load_model
from lib.model.inference import InferenceEncoder
from lib.ranking.explain import influences, most_influential
from lib.ranking.filters import ItemFilter, most_popular
from lib.ranking.rerank import arrange
from lib.ranking.rules import BoundRules, RankingRules
from lib.retrieval.index import ItemIndex, search_device

EVENTS_PER_BATCH = 8192  # padding counted; bounds the memory of one pass of the encoder
MOST_MASKS = 256  # of filters that were asked for lately, a byte an item each
NUMBERS = itertools.count()
NOTHING_SEEN = np.zeros(0, dtype=np.int32)


class RankedItem(NamedTuple):
    """One recommended item."""

    item_id: str
    score: float
    reason: str | None = None  # "popular", or the events of the history that raised the score most
    propensity: float | None = None  # with exploration: the probability of this item here, given those above it


# the rows that may be found (R,), how many, and the rows that are seen -> rows, scores
Search = Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Question(NamedTuple):
    """What one person asks: their history, how many items, and which."""

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
        self.rules = rules or RankingRules()
        self._bound: BoundRules | None = None
        self.generator = np.random.default_rng()  # of exploration
        self.number = next(NUMBERS)  # of this one among all recommenders of the process

    @classmethod
    def load(cls, folder: str | Path, rules: RankingRules | None = None) -> "Recommender":
        """Load a model folder.

        Raises:
            InputError: the folder is missing, incomplete or damaged.
        """
        encoder, catalog, manifest = load_model(folder)
        return cls(encoder, catalog, manifest.version, manifest.log_offset, rules)

    @property
    def checksum(self) -> str:
        """Fingerprint of the whole state."""
        return self.fingerprint.checksum

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """(R, C) item vectors; the padding row and spare rows are zero and are never found."""
        with torch.inference_mode():
            return self.encoder.item_vectors(torch.from_numpy(rows).to(self.encoder.device)).cpu().numpy()

    def apply(self, delta: Delta) -> None:
        """Move to the delta's version: weights, catalog and index together.

        Raises:
            DeltaMismatch: the delta has another parent, or the result is not what its maker had; the recommender must
                be loaded anew in the second case.
        """
        if delta.parent != self.version:
            raise DeltaMismatch(f"delta {delta.version} follows version {delta.parent}, this is {self.version}")
        apply_delta(self.encoder, delta)
        self.catalog.extend(delta.new_items)
        self._masks.clear()
        self.reader = InferenceEncoder(self.encoder)
        rows = np.union1d(delta.rows, np.arange(len(self.index), delta.item_rows))
        if ATTRIBUTE_TABLE in delta.tensors:  # every item's vector has moved
            rows = np.arange(delta.item_rows)
        self.index.update(rows, self._vectors(rows))
        checksum = self.fingerprint.update(state_of(self.encoder), delta.rows, set(delta.tensors))
        if checksum != delta.checksum:
            raise DeltaMismatch(f"version {delta.version} came out as {checksum}, its maker had {delta.checksum}")
        self.version = delta.version
        self.log_offset = delta.log_offset

    def catalog_changed(self, items: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Items have other attributes, or are removed (None): true of the next answer, whatever version it is of."""
        if items:
            self.catalog.change(items)
            self._masks.clear()

    def recommend(self, questions: Sequence[Question]) -> list[list[RankedItem]]:
        """Answer many people in one pass: encode, retrieve, rank."""
        encoded = [self.encoded(question.history) for question in questions]
        answers: list[list[RankedItem]] = [[] for _ in questions]
        known = [place for place, history in enumerate(encoded) if history.codes.size]
        queries = self.queries([encoded[place].codes for place in known])
        for filter in {questions[place].filter for place in known}:
            chosen = [number for number, place in enumerate(known) if questions[place].filter == filter]
            places = [known[number] for number in chosen]
            seen = [encoded[place].seen if questions[place].exclude_seen else NOTHING_SEEN for place in places]
            if self.rules.active:
                ranked = [
                    self._arranged(questions[place].k, filter, own, self._search(query))
                    for place, query, own in zip(places, queries[chosen].unbind(), seen, strict=True)
                ]
            else:
                ranked = self._nearest([questions[place].k for place in places], queries[chosen], filter, seen)
            for place, items in zip(places, ranked, strict=True):
                answers[place] = self._explained(questions[place], items)
        for place, history in enumerate(encoded):
            if not history.codes.size:
                answers[place] = self.popular(questions[place].k, questions[place].filter)
        return answers

    def _nearest(
        self, counts: Sequence[int], queries: Tensor, filter: ItemFilter | None, seen: Sequence[np.ndarray]
    ) -> list[list[RankedItem]]:
        """For each query (B, C) so many of the items whose vectors are nearest."""
        scores, rows = self.index.search(queries, max(counts), self.mask(filter), seen)
        found = np.minimum((rows >= 0).sum(axis=1), counts).tolist()
        return [
            self._items(own_scores[:count], own_rows[:count])
            for own_scores, own_rows, count in zip(scores, rows, found, strict=True)
        ]

    def _search(self, query: Tensor) -> Search:
        """How candidates for one query (C,) are found: rows that may be, how many, rows that are seen."""

        def nearest(mask: np.ndarray, count: int, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = self.index.search(query[None], count, mask, [seen])
            real = rows[0] >= 0
            return rows[0][real], scores[0][real]

        return nearest

    def _arranged(self, k: int, filter: ItemFilter | None, seen: np.ndarray, search: Search) -> list[RankedItem]:
        """One person's answer by the ranking rules (lib/ranking/rerank.py)."""
        bound, mask = self._bound_rules(), self.mask(filter)
        count = bound.candidates(k)
        masks = [mask if group is None else mask & group for group in bound.searches]
        found = [search(own, count, seen) for own in masks]
        if len(pins := bound.pinned(mask, seen)):
            pinned = np.zeros(len(mask), dtype=bool)
            pinned[pins] = True
            found.append(search(pinned, len(pins), seen))
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        arranged = arrange(
            rows, scores, k, bound, self.index.vectors, self.generator, lambda open: search(mask & open, count, seen)
        )
        items = self._items(arranged.scores, arranged.rows)
        if arranged.propensities is None:
            return items
        propensities = arranged.propensities.tolist()
        return [item._replace(propensity=own) for item, own in zip(items, propensities, strict=True)]

    def _bound_rules(self) -> BoundRules:
        if not self._bound or not self._bound.fits(self.catalog, len(self.index)):
            self._bound = BoundRules.of(self.rules, self.catalog, len(self.index))
        return self._bound

    def encoded(self, history: History) -> EncodedHistory:
        """What the encoder reads of a history; kept with it, and made anew when the catalog may know more of it."""
        found = history.encoded
        own = found is not None and found.reader == self.number
        if found is not None and own and (found.complete or found.catalog_items == len(self.catalog)):
            return found
        flat = to_histories([history], self.catalog, self.kind_codes)
        codes = SequenceBatches(flat, self.encoder.config).codes()[:, -self.encoder.config.max_length :]
        complete = len(flat.rows) == len(history)
        history.encoded = EncodedHistory(codes, np.unique(flat.rows), self.number, len(self.catalog), complete)
        return history.encoded

    def queries(self, histories: Sequence[np.ndarray]) -> Tensor:
        """(B, C) float32 uT A of histories given as (4, T) codes, with little work on padding."""
        lengths = np.array([codes.shape[1] for codes in histories], dtype=np.int64)
        queries = torch.empty(len(histories), self.encoder.config.hidden_size, device=self.encoder.device)
        for group in group_by_length(lengths, EVENTS_PER_BATCH):
            queries[torch.from_numpy(group)] = self.reader.queries([histories[place] for place in group])
        return queries

    def mask(self, filter: ItemFilter | None) -> np.ndarray:
        """(rows of the index,) bool: rows of known items that pass the filter."""
        if filter not in self._masks:
            if len(self._masks) >= MOST_MASKS:
                self._masks.clear()
            self._masks[filter] = self._mask(filter)
        return self._masks[filter]

    def _mask(self, filter: ItemFilter | None) -> np.ndarray:
        mask = np.zeros(len(self.index), dtype=bool)
        mask[PADDING_ROW + 1 : len(self.catalog) + 1] = True
        if filter is not None:
            mask[: len(self.catalog) + 1] &= filter.mask(self.catalog)
        mask[self.catalog.rows(self.catalog.removed)] = False
        return mask

    def popular(self, k: int, filter: ItemFilter | None = None) -> list[RankedItem]:
        """The most popular items of late, for people of whom nothing is known."""
        popularity = self.encoder.item_popularity.cpu().numpy()

        def most(mask: np.ndarray, count: int, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = most_popular(popularity, mask, count)
            return rows, scores / top

        top = float(popularity[self.mask(filter)].max(initial=0.0)) or 1.0
        if self.rules.active:
            items = self._arranged(k, filter, NOTHING_SEEN, most)
        else:
            rows, scores = most(self.mask(filter), k, NOTHING_SEEN)
            items = self._items(scores, rows)
        return [item._replace(reason="popular") for item in items]

    def similar(self, item_id: str, k: int, filter: ItemFilter | None = None) -> list[RankedItem]:
        """The items whose vectors are nearest to an item's, itself left out.

        Raises:
            KeyError: the item is not in the catalog.
        """
        if item_id in self.catalog.removed:
            raise KeyError(item_id)
        row = self.catalog.row_of[item_id]
        scores, rows = self.index.search(self.index.vectors[[row]], k, self.mask(filter), [np.array([row])])
        return self._items(scores[0][rows[0] >= 0], rows[0][rows[0] >= 0])

    def _items(self, scores: np.ndarray, rows: np.ndarray) -> list[RankedItem]:
        ids = self.catalog.item_ids
        return [RankedItem(ids[row], score) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]

    def _explained(self, question: Question, items: list[RankedItem]) -> list[RankedItem]:
        """Items with the events that raised their scores most as reasons, if that was asked for."""
        if not question.explain or not items:
            return items
        config, history = self.encoder.config, question.history
        flat = to_histories([history], self.catalog, self.kind_codes)
        vectors = self.index.vectors[self.catalog.rows(item.item_id for item in items)]
        moved = most_influential(influences(flat, config, lambda codes: self.queries(codes).cpu().numpy(), vectors))
        names = [
            f"{event} {item_id}"
            for item_id, event in zip(history.item_ids, history.events, strict=True)
            if item_id in self.catalog.row_of and event in self.kind_codes
        ][-config.max_length :]
        reasons = [", ".join(dict.fromkeys(names[event] for event, _ in own)) or None for own in moved]
        return [item._replace(reason=reason) for item, reason in zip(items, reasons, strict=True)]
