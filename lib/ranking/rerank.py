"""Re-ranking: one person's candidates to the places of an answer, by the ranking rules.

Pinned items have their places. The others are filled from the top: at each of them those candidates are open whose
categories are not full, and the one of the highest marginal relevance gets it. That is the score with the weights of
boost and bury, less the similarity to what has a place already:

    lambda * (s + weight) - (1 - lambda) * max cos(v, v')        over v' in the answer

(maximal marginal relevance, Carbonell & Goldstein 1998). With exploration the place is drawn instead, from the softmax
of marginal relevance / temperature over what is open (Plackett-Luce where no other rule is set). Whatever the rules,
the probability of that choice given the items above is therefore known exactly: it is the propensity that is logged,
and lib/ranking/off_policy.py reads.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lib.ranking.rules import BoundRules, Search


@dataclass(frozen=True)
class RankedRows:
    """The items of an answer from the top: k, or fewer where no more are allowed."""

    rows: np.ndarray  # (P,) int64
    scores: np.ndarray  # (P,) s = uT A v as it was retrieved, without weights
    propensities: np.ndarray | None  # (P,) of each item at its place given those above; None without exploration


def rerank(
    rows: np.ndarray,
    scores: np.ndarray,
    k: int,
    rules: BoundRules,
    vectors: np.ndarray,
    generator: np.random.Generator,
    search: Search | None = None,
) -> RankedRows:
    """Choose and order the items of one person's answer.

    Args:
        rows: (n,) candidates, found as BoundRules says, each once, in any order; none is padding (row 0).
        scores: (n,) their s.
        k: the number of places.
        rules: the rules, bound to the catalog.
        vectors: (R, C) unit item vectors of all rows; read for diversity alone.
        generator: draws the places, where exploration is on.
        search: finds this person's best `rules.candidates(k)` among given rows. It is called where the limits leave no
            candidate open while places are empty; without it such an answer is shorter.
    """
    if not rules.rules.chooses:
        order = _by_weighted_score(rows, scores, k, rules)
        return RankedRows(rows[order], scores[order], None)
    slate = Slate(k, rules, vectors)
    slate.add(rows, scores)
    temperature = rules.rules.exploration_temperature
    while not slate.full:
        if slate.open:
            candidate, propensity = _draw(slate.marginal_relevance(), temperature, generator)
            slate.put(candidate, propensity)
        elif search is None or not slate.search_more(search):
            break
    return slate.ranked_rows()


def softmax_weights(relevance: np.ndarray, temperature: float) -> np.ndarray:
    """Return (n,) weights in proportion to the softmax of relevance / temperature; the best has 1."""
    return np.exp((relevance - relevance[relevance.argmax()]) / temperature)


def _by_weighted_score(rows: np.ndarray, scores: np.ndarray, k: int, rules: BoundRules) -> list[int]:
    """Order the candidates of an answer where no place depends on another."""
    order = (-scores - rules.weights[rows]).argsort(kind="stable").tolist()
    if not rules.pins:
        return order[:k]
    place_of = {candidate: rules.pins[row] for candidate, row in enumerate(rows.tolist()) if row in rules.pins}
    pinned = sorted((place, candidate) for candidate, place in place_of.items() if place < k)
    order = [candidate for candidate in order if candidate not in place_of][: k - len(pinned)]
    for place, candidate in pinned:
        order.insert(place, candidate)
    return order


def _draw(relevance: np.ndarray, temperature: float, generator: np.random.Generator) -> tuple[int, float]:
    """Draw a candidate from the softmax; returns it and its probability. Without a temperature it is the best."""
    if temperature == 0:
        return int(relevance.argmax()), 1.0
    weights = softmax_weights(relevance, temperature)
    sums = weights.cumsum()
    # what is sought is above 0 and at most the sum, so that a candidate of no weight is never found
    candidate = int(sums.searchsorted((1.0 - generator.random()) * sums[-1]))
    return candidate, float(weights[candidate] / sums[-1])


class Slate:
    """An answer as its places fill up, and the candidates for the rest of them."""

    def __init__(self, k: int, rules: BoundRules, vectors: np.ndarray):
        self.rules = rules
        self.trade = rules.rules.diversity_lambda
        self.table = vectors
        self.most = rules.candidates(k) + len(rules.pins)  # candidates that are kept of those that are added
        self.rows = np.zeros(0, dtype=np.int64)  # (n,) candidates
        self.scores = np.zeros(0)
        self.relevance = np.zeros(0)  # (n,) lambda (s + weight), minus infinity where no longer open
        self.similarity = np.zeros(0)  # (n,) to the nearest item of the answer
        self.vectors = vectors[:0]  # (n, C)
        self.codes: list[np.ndarray] = []  # (F, n) of each limited attribute
        self.counts: list[Counter[int]] = [Counter() for _ in rules.categories]
        self.taken: list[int | None] = [None] * k  # the candidate at each place
        self.propensities = np.ones(k)
        self.next = 0  # the first place that is not taken
        self.empty = True

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return self.next == len(self.taken)

    @property
    def open(self) -> bool:
        """Whether any candidate may have the next place."""
        return len(self.rows) > 0 and bool(self.relevance[self.relevance.argmax()] > -np.inf)

    @property
    def chosen(self) -> list[int]:
        """The candidates that have a place, from the top."""
        return [candidate for candidate in self.taken if candidate is not None]

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Add candidates, of which the best are kept; those that are pinned get their places."""
        weighted = self.trade * (scores + self.rules.weights[rows])
        if len(rows) > self.most:
            order = weighted.copy()
            for row in self.rules.pins:
                order[rows == row] = np.inf
            best = order.argpartition(-self.most)[-self.most :]
            rows, scores, weighted = rows[best], scores[best], weighted[best]
        first = len(self.rows)
        self.rows = np.concatenate([self.rows, rows])
        self.scores = np.concatenate([self.scores, scores])
        self.relevance = np.concatenate([self.relevance, weighted])
        self.codes = [np.ascontiguousarray(limited.of_rows(self.rows).T) for limited in self.rules.categories]
        if self.trade < 1:
            self.vectors = self.table[self.rows]
            chosen = self.vectors[self.chosen]
            self.similarity = (self.vectors @ chosen.T).max(axis=1) if len(chosen) else np.zeros(len(self.rows))
        for row, place in self.rules.pins.items():
            for candidate in first + np.flatnonzero(rows == row):
                self._take(int(candidate), place)
        self._skip_taken()

    def marginal_relevance(self) -> np.ndarray:
        """Return (n,) that of each candidate for the next place; minus infinity where it is not open."""
        return self.relevance - (1 - self.trade) * self.similarity if self.trade < 1 else self.relevance

    def put(self, candidate: int, propensity: float) -> None:
        """Give the next place to a candidate."""
        self.propensities[self.next] = propensity
        self._take(candidate, self.next)
        self._skip_taken()

    def _take(self, candidate: int, place: int) -> None:
        self.relevance[candidate] = -np.inf
        if place >= len(self.taken):
            return
        if self.trade < 1:
            cosines = self.vectors @ self.vectors[candidate]
            self.similarity = cosines if self.empty else np.maximum(self.similarity, cosines)
        self.taken[place] = candidate
        self.empty = False
        for limited, counts, codes in zip(self.rules.categories, self.counts, self.codes, strict=True):
            for code in codes[:, candidate].tolist():
                counts[code] += 1
                if code and counts[code] >= limited.limit:
                    self.relevance[(codes == code).any(axis=0)] = -np.inf

    def _skip_taken(self) -> None:
        while self.next < len(self.taken) and self.taken[self.next] is not None:
            self.next += 1

    def pinned_at(self, place: int) -> int | None:
        """Return the row that is pinned to a place."""
        candidate = self.taken[place]
        row = None if candidate is None else int(self.rows[candidate])
        return row if row in self.rules.pins else None

    def search_more(self, search: Search) -> bool:
        """Look for candidates that the limits still admit; returns whether there were any."""
        allowed = np.ones(len(self.rules.weights), dtype=bool)
        allowed[self.rows] = False
        for limited, counts in zip(self.rules.categories, self.counts, strict=True):
            allowed &= limited.without([code for code, count in counts.items() if code and count >= limited.limit])
        rows, scores = self.rules.find(allowed, search)
        self.add(rows, scores)
        return len(rows) > 0

    def ranked_rows(self) -> RankedRows:
        """Return what has a place, from the top."""
        places = [place for place, candidate in enumerate(self.taken) if candidate is not None]
        explores = self.rules.rules.exploration_temperature > 0
        propensities = self.propensities[places] if explores else None
        return RankedRows(self.rows[self.chosen], self.scores[self.chosen], propensities)
