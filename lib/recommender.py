"""Encoder, catalog and index as one value of one version: histories in, ranked items out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.catalog import Catalog
from lib.encoder import PADDING_ROW, BehaviourEncoder
from lib.encoder_inference import InferenceEncoder
from lib.model_folder import load_model
from lib.ranking import ItemFilter, most_popular
from lib.retrieval import ItemIndex
from lib.sequences import SequenceBatches, group_by_length
from lib.user_histories import EncodedHistory, History, to_histories
from lib.weights import ATTRIBUTE_TABLE, Delta, DeltaMismatch, Fingerprint, apply_delta, state_of

EVENTS_PER_BATCH = 8192  # padding counted; bounds the memory of one pass of the encoder
MOST_MASKS = 256  # of filters that were asked for lately, a byte an item each
NOTHING_SEEN = np.zeros(0, dtype=np.int32)


class RankedItem(NamedTuple):
    """One recommended item; `reason` is "popular" or names the event of the history that speaks most for it."""

    item_id: str
    score: float
    reason: str | None = None


class Question(NamedTuple):
    """What one person asks: their history, how many items, and which."""

    history: History
    k: int
    filter: ItemFilter | None = None
    exclude_seen: bool = True
    explain: bool = False


class Recommender:
    """One version of the model, ready to answer; `apply` moves it to the next version."""

    def __init__(self, encoder: BehaviourEncoder, catalog: Catalog, version: int, log_offset: int = 0):
        assert encoder.config.event_kinds is not None
        self.encoder = encoder.eval().requires_grad_(False)
        self.catalog = catalog
        self.version = version
        self.log_offset = log_offset
        self.kind_codes = {kind: place + 1 for place, kind in enumerate(encoder.config.event_kinds)}
        self.index = ItemIndex(self._vectors(np.arange(encoder.config.item_rows)))
        self.reader = InferenceEncoder(encoder)
        self.fingerprint = Fingerprint(encoder)
        self._masks: dict[ItemFilter | None, np.ndarray] = {}

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
        """(R, C) item vectors; the padding row and spare rows are zero and are never found."""
        with torch.inference_mode():
            return self.encoder.item_vectors(torch.from_numpy(rows)).numpy()

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
            wanted = max(questions[place].k for place in places)
            seen = [encoded[place].seen if questions[place].exclude_seen else NOTHING_SEEN for place in places]
            scores, rows = self.index.search(queries[chosen], wanted, self.mask(filter), seen)
            counts = (rows >= 0).sum(axis=1).tolist()
            for place, user_scores, user_rows, found in zip(places, scores, rows, counts, strict=True):
                count = min(questions[place].k, found)
                answers[place] = self._ranked(questions[place], user_scores[:count], user_rows[:count])
        for place, history in enumerate(encoded):
            if not history.codes.size:
                answers[place] = self.popular(questions[place].k, questions[place].filter)
        return answers

    def encoded(self, history: History) -> EncodedHistory:
        """What the encoder reads of a history; kept with it, and made anew when the catalog may know more of it."""
        found = history.encoded
        if found is not None and (found.complete or found.catalog_items == len(self.catalog)):
            return found
        flat = to_histories([history], self.catalog, self.kind_codes)
        newest = slice(max(len(flat.rows) - self.encoder.config.max_length, 0), None)
        batches = SequenceBatches(flat, self.encoder.config)
        codes = np.stack([flat.rows, flat.kinds, batches.gaps, batches.values]).astype(np.int64)[:, newest]
        complete = len(flat.rows) == len(history)
        history.encoded = EncodedHistory(codes, np.unique(flat.rows), len(self.catalog), complete)
        return history.encoded

    def queries(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """(B, C) float32 uT A of histories given as (4, T) codes, with little work on padding."""
        lengths = np.array([codes.shape[1] for codes in histories], dtype=np.int64)
        queries = np.empty((len(histories), self.encoder.config.hidden_size), dtype=np.float32)
        for group in group_by_length(lengths, EVENTS_PER_BATCH):
            queries[group] = self.reader.queries([histories[place] for place in group]).numpy()
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
        mask[[self.catalog.row_of[item_id] for item_id in self.catalog.removed if item_id in self.catalog.row_of]] = (
            False
        )
        return mask

    def popular(self, k: int, filter: ItemFilter | None = None) -> list[RankedItem]:
        """The most popular items of late, for people of whom nothing is known."""
        scores, rows = most_popular(self.encoder.item_popularity.numpy(), self.mask(filter), k)
        top = float(scores[0]) if len(scores) and scores[0] > 0 else 1.0
        return [
            RankedItem(self.catalog.item_ids[row], float(score) / top, "popular")
            for score, row in zip(scores, rows, strict=True)
        ]

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

    def _ranked(self, question: Question, scores: np.ndarray, rows: np.ndarray) -> list[RankedItem]:
        items = self._items(scores, rows)
        if not question.explain:
            return items
        reasons = self._reasons(question.history, rows)
        return [item._replace(reason=reason) for item, reason in zip(items, reasons, strict=True)]

    def _items(self, scores: np.ndarray, rows: np.ndarray) -> list[RankedItem]:
        ids = self.catalog.item_ids
        return [RankedItem(ids[row], score) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]

    def _reasons(self, history: History, rows: np.ndarray) -> list[str]:
        """The event of the history whose item is nearest to each recommended item."""
        events = [
            (f"{event} {item_id}", self.catalog.row_of[item_id])
            for item_id, event in zip(history.item_ids, history.events, strict=True)
            if item_id in self.catalog.row_of and event in self.kind_codes
        ][-self.encoder.config.max_length :]
        vectors = self.index.vectors
        nearness = vectors[rows] @ vectors[[row for _, row in events]].T  # (k, H)
        return [events[place][0] for place in nearness.argmax(axis=1)]
