"""Encoder, catalog and index as one value of one version: histories in, ranked items out."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.catalog import Catalog
from lib.data.history import EncodedHistory, History, to_histories
from lib.errors import InputError
from lib.model.batches import SequenceBatches, group_by_length
from lib.model.delta import (
    ATTRIBUTE_TABLE,
    Delta,
    DeltaMismatch,
    apply_delta,
    make_room,
    state_of,
    with_new_rows,
)
from lib.model.dislikes import candidate_count, push_down, without_dislikes
from lib.model.encoder import PADDING_ROW, BehaviourEncoder
from lib.model.fingerprint import Fingerprint
from lib.model.folder import load_model
from lib.model.inference import InferenceEncoder
from lib.model.item_counts import people_of
from lib.ranking.cold_start import most_popular
from lib.ranking.explain import ranker_reasons, reasons, strongest_events
from lib.ranking.filters import ItemFilter
from lib.ranking.rerank import rerank
from lib.ranking.rules import BoundRules, RankingRules
from lib.ranking.stage import RankingStage
from lib.retrieval.faiss_lists import search_device
from lib.retrieval.index import ItemIndex

EVENTS_PER_BATCH = 8192  # padding counted; bounds the memory of one pass of the encoder
MASK_BYTES = 64 * 2**20  # of the masks of filters that were asked for lately, a byte an item each
NUMBERS = itertools.count()
Relation = Literal["similar", "together"]
NOTHING_SEEN = np.zeros(0, dtype=np.int32)


class RankedItem(NamedTuple):
    """One recommended item."""

    item_id: str
    score: float
    reason: str | None = None  # "popular", or the events of the history that raised the score most
    propensity: float | None = None  # with exploration: the probability of this item here, given those above it


class Question(NamedTuple):
    """One person's request: their history, how many items, and which."""

    history: History
    k: int
    filter: ItemFilter | None = None
    exclude_seen: bool | None = None  # None: as the model has learned of its people
    explain: bool = False


class Asking(NamedTuple):
    """One person who is to be answered."""

    history: EncodedHistory
    query: Tensor  # (C,) uT A; 0 for an empty history
    k: int
    again: bool  # whether items that they have seen may be in the answer
    found: dict[int, np.ndarray] | None = None  # row -> (F,) features of a candidate; None: nobody asks why

    @property
    def seen(self) -> np.ndarray:
        """(S,) rows that must not be in the answer."""
        return NOTHING_SEEN if self.again else self.history.person.seen


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
        make_room(self.encoder)
        self.catalog = catalog
        self.version = version
        self.log_offset = log_offset
        self.kind_codes = encoder.config.kind_codes
        self.index = ItemIndex(self._vectors(np.arange(encoder.config.item_rows)))
        self.stage = None if encoder.counts is None else RankingStage(encoder, self.index)
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
        rows = with_new_rows(delta.rows, len(self.index), delta.item_rows)
        if ATTRIBUTE_TABLE in delta.tensors:  # every item's vector has moved
            rows = np.arange(delta.item_rows)
        self.index.update(rows, self._vectors(rows))
        self._bind_rules()
        if delta.new_items or any(len(mask) != len(self.index) for mask in self._masks.values()):
            self._forget_masks()
        if delta.popularity_scale != 1.0:
            self.fingerprint.forget("item_popularity")
        if self.stage is not None:
            self.stage.follow(delta.count_rows)
        checksum = self.fingerprint.update(state_of(self.encoder), delta.rows, set(delta.tensors), delta.count_rows)
        if checksum != delta.checksum:
            raise DeltaMismatch(f"version {delta.version} came out as {checksum}, its maker had {delta.checksum}")
        self.version = delta.version
        self.log_offset = delta.log_offset

    def change_items(self, items: Mapping[str, Mapping[str, Any] | None], texts_later: bool = False) -> None:
        """Give items other attributes, or remove them (None), from the next answer on, whatever version it is of.

        `texts_later` leaves what takes long: texts of megabytes find their items once `catalog.table.catch_up`, on any
        thread, and then `caught_up` were called.
        """
        if items:
            self.catalog.change(items, texts_later)
            self._unbound.update(items)
            self._bind_rules()
            self._forget_masks()

    def caught_up(self) -> None:
        """Answer by texts that were left for later, from the next answer on."""
        self.catalog.caught_up()
        self._bind_rules()
        self._forget_masks()

    # --------------------------------------------------------------------------- the answer: encode, retrieve and rank

    def recommend(self, questions: Sequence[Question]) -> list[list[RankedItem]]:
        """Answer many people in one pass."""
        histories = [self.encode(question.history) for question in questions]
        queries = self._queries([history.codes for history in histories])
        asking = [
            Asking(history, query, question.k, self._again(question), {} if question.explain else None)
            for history, query, question in zip(histories, queries.unbind(), questions, strict=True)
        ]
        answers: list[list[RankedItem]] = [[] for _ in questions]
        for filter in {question.filter for question in questions}:
            places = [place for place, question in enumerate(questions) if question.filter == filter]
            ranked = self._rank([asking[place] for place in places], filter)
            for place, items in zip(places, ranked, strict=True):
                answers[place] = self._explain(questions[place], asking[place], items)
        return answers

    def _again(self, question: Question) -> bool:
        """Return whether items that the person has seen may be in the answer."""
        return self.encoder.config.repeats if question.exclude_seen is None else not question.exclude_seen

    def encode(self, history: History) -> EncodedHistory:
        """Read a history as the encoder does; kept with it, and made anew when the catalog may know more of it."""
        kept, known = history.encoded, len(self.catalog)
        if kept is not None and kept.reader == self.number and (kept.complete or kept.catalog_items == known):
            return kept
        flat = to_histories([history], self.catalog, self.kind_codes)
        liked, (opinions,) = without_dislikes(flat, self.encoder.config)
        codes = SequenceBatches(liked, self.encoder.config).codes()[:, -self.encoder.config.max_length :].copy()
        complete = len(flat.rows) == len(history)
        (person,) = people_of(flat, liked)
        history.encoded = EncodedHistory(codes, person, opinions, self.number, known, complete)
        return history.encoded

    def _queries(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return (B, C) float32 uT A of histories given as (4, T) codes; 0 of empty ones."""
        lengths = np.array([codes.shape[1] for codes in histories], dtype=np.int64)
        queries = torch.zeros(len(histories), self.encoder.config.hidden_size, device=self.encoder.device)
        known = np.flatnonzero(lengths)
        for group in group_by_length(lengths[known], EVENTS_PER_BATCH):
            places = known[group]
            queries[torch.from_numpy(places)] = self.reader.queries([histories[place] for place in places])
        return queries

    def _rank(self, asking: Sequence[Asking], filter: ItemFilter | None) -> list[list[RankedItem]]:
        """Find for each person so many items that pass the filter, the best first."""
        if self.rules.active:
            return [self._rerank(person, filter) for person in asking]
        scores, rows = self._find(asking, max(person.k for person in asking), self.mask(filter))
        scores, rows = self._push_down(scores, rows, asking)
        counts = [person.k for person in asking]
        found = np.minimum((rows >= 0).sum(axis=1), counts).tolist()
        return [
            self._items(own_scores[:count], own_rows[:count], person)
            for own_scores, own_rows, count, person in zip(scores, rows, found, asking, strict=True)
        ]

    def _find(
        self, asking: Sequence[Asking], count: int, mask: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (B, K) and rows (B, K) of everybody's best; minus infinity and -1 for none.

        K is `count`, or more where some of them will fall (lib/model/dislikes.py).

        Args:
            asking: B people.
            count: how many an answer has.
            mask: (R,) bool, the rows that may be found.
            weights: (R,) added to the score of a row to find and order them; the scores are without.
        """
        queries = torch.stack([person.query for person in asking])
        falling = self.rules.dislike_weight and any(person.history.opinions is not None for person in asking)
        wanted = candidate_count(count) if falling else count
        if self.stage is not None:
            repeats = np.array([person.again for person in asking])
            people = [person.history.person for person in asking]
            found = self.stage.candidates(people, queries, count, mask, repeats, weights, self.rules.sources)
            for line, person in enumerate(asking):
                if person.found is not None:
                    own = slice(*np.searchsorted(found.lines, [line, line + 1]))
                    person.found.update(zip(found.rows[own].tolist(), found.features[own], strict=True))
            return self.stage.rank(found, len(people), wanted, weights)
        known = np.array([person.history.codes.size > 0 for person in asking])
        if known.all():
            return self.index.search(queries, wanted, mask, [person.seen for person in asking], weights)
        scores = np.full((len(asking), wanted), -np.inf, dtype=np.float32)
        rows = np.full((len(asking), wanted), -1, dtype=np.int64)
        if known.any():
            seen = [person.seen for person in asking if person.history.codes.size]
            scores[known], rows[known] = self.index.search(
                queries[torch.from_numpy(known)], wanted, mask, seen, weights
            )
        for line in np.flatnonzero(~known).tolist():
            found, best = self._most_popular(mask, wanted, asking[line].seen, weights)
            scores[line, : len(best)], rows[line, : len(best)] = found, best
        return scores, rows

    def _most_popular(
        self, mask: np.ndarray, count: int, seen: np.ndarray, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return shares of the highest popularity, and rows, of the most popular items of late."""
        popularity = self.encoder.item_popularity.cpu().numpy()
        top = float(popularity[mask].max(initial=0.0)) or 1.0
        unseen = mask.copy()
        unseen[seen] = False
        scores, rows = most_popular(popularity, unseen, count, None if weights is None else top * weights)
        return scores / top, rows

    def _push_down(
        self, scores: np.ndarray, rows: np.ndarray, asking: Sequence[Asking]
    ) -> tuple[np.ndarray, np.ndarray]:
        opinions = [person.history.opinions for person in asking]
        return push_down(scores, rows, opinions, self.index.vectors, self.rules.dislike_weight)

    def _best(
        self, person: Asking, count: int, mask: np.ndarray, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the best `count` items of one person, by their scores and weights (R,)."""
        scores, rows = self._find([person], count, mask, weights)
        real = rows >= 0
        (scores,), (rows,) = self._push_down(scores[real][None], rows[real][None], [person])
        best = np.argsort(-scores if weights is None else -scores - weights[rows], kind="stable")[:count]
        return rows[best], scores[best]

    def _rerank(self, person: Asking, filter: ItemFilter | None) -> list[RankedItem]:
        """Answer one person by the ranking rules."""
        rules, mask = self._bound_rules(), self.mask(filter)
        count, k = rules.candidates(person.k), person.k
        rows, scores = rules.find(mask, lambda among, weights: self._best(person, count, among, weights))
        if len(pins := rules.pinned(mask, person.seen)):
            pinned = np.zeros(len(mask), dtype=bool)
            pinned[pins] = True
            found = self._best(person, len(pins), pinned, None)
            rows, scores = np.concatenate([rows, found[0]]), np.concatenate([scores, found[1]])
        ranked = rerank(
            rows,
            scores,
            k,
            rules,
            self.index.vectors,
            self.generator,
            lambda among, weights: self._best(person, count, mask & among, weights),
        )
        items = self._items(ranked.scores, ranked.rows, person)
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
        idle = []
        if self.rules.without_sources and self.stage is None:
            idle.append("without_sources: this model has no ranker, and its answers are the encoder's alone")
        if self.rules.active:
            rules = self._bound_rules()
            idle += [*rules.faults, *rules.idle]
        return idle

    def _explain(self, question: Question, person: Asking, items: list[RankedItem]) -> list[RankedItem]:
        """Give items what raised their scores most as reasons, if that was asked for."""
        known = person.history.codes.size > 0
        if not question.explain or not items or not (known or self.stage):
            return items
        rows = np.array(self.catalog.rows(item.item_id for item in items), dtype=np.int64)

        def queries(codes: Sequence[np.ndarray]) -> np.ndarray:
            return self._queries(codes).cpu().numpy()

        told = question.history, self.catalog, self.encoder.config, queries, self.index.vectors[rows]
        if self.stage is None or person.found is None:
            named = reasons(*told)
        else:
            events = [next(iter(own), None) for own in strongest_events(*told)] if known else [None] * len(rows)
            features = np.stack([person.found[row] for row in rows.tolist()])
            named = ranker_reasons(self.stage, self.catalog, person.history.person, rows, features, events)
        return [item._replace(reason=reason or item.reason) for item, reason in zip(items, named, strict=True)]

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

    def _items(self, scores: np.ndarray, rows: np.ndarray, person: Asking | None = None) -> list[RankedItem]:
        ids = self.catalog.item_ids
        reason = "popular" if person is not None and not person.history.codes.size else None
        return [RankedItem(ids[row], score, reason) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]

    def similar(
        self, item_id: str, k: int, filter: ItemFilter | None = None, relation: Relation = "similar"
    ) -> list[RankedItem]:
        """Return the items that have a relation to an item, itself left out.

        Args:
            item_id: of the item.
            k: how many, at most.
            filter: which of them.
            relation: "similar" for what may take its place, the items of the nearest vectors; "together" for what is
                taken with it, by the counts of what people took together.

        Raises:
            KeyError: the item is not in the catalog.
            InputError: the model has no such counts.
        """
        if item_id in self.catalog.removed:
            raise KeyError(item_id)
        row = self.catalog.row_of[item_id]
        if relation == "together":
            if self.stage is None:
                raise InputError(
                    'relation: "together" needs counts, and this model was pretrained without them, by an earlier'
                    ' release or on too few events; pretrain it again, or ask for "similar"'
                )
            return self._items(*self.stage.together(row, k, self.mask(filter)))
        scores, rows = self.index.search(self.index.vectors[[row]], k, self.mask(filter), [np.array([row])])
        return self._items(scores[0][rows[0] >= 0], rows[0][rows[0] >= 0])


def _bytes_of(filter: ItemFilter | None, mask: np.ndarray) -> int:
    """Return about how much memory a filter and its mask take."""
    return mask.nbytes + (0 if filter is None else 4 * len(filter.key))
