"""Arrangement: one person's candidates to the places of an answer, by the ranking rules.

Pinned items have their places. The others are filled from the top: at each of them those candidates are open whose
categories are not full, and the one of the highest merit gets it. The merit is the score with the weights of boost and
bury, less the likeness to what has a place already:

    lambda * (s + weight) - (1 - lambda) * max cos(v, v')        over v' in the answer

(maximal marginal relevance, Carbonell & Goldstein 1998). With exploration the place is drawn instead, from the softmax
of merit / temperature over what is open (Plackett-Luce where no other rule is set). Whatever the rules, the probability
of that choice given the items above is therefore known exactly: it is the propensity that is logged.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.ranking.rules import BoundRules

Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # rows that may be found (R,) bool -> rows, scores


@dataclass(frozen=True)
class Arrangement:
    """The items of an answer from the top, k or, where no more are allowed, fewer."""

    rows: np.ndarray  # (P,) int64
    scores: np.ndarray  # (P,) s = uT A v as it was retrieved, without weights
    propensities: np.ndarray | None  # (P,) of each item at its place given those above; None without exploration


def arrange(
    rows: np.ndarray,
    scores: np.ndarray,
    k: int,
    rules: BoundRules,
    vectors: np.ndarray,
    generator: np.random.Generator,
    search: Search | None = None,
) -> Arrangement:
    """Arrange one person's candidates.

    Args:
        rows: (n,) candidates as BoundRules tells how to find them, each once, in any order; all real (above 0).
        scores: (n,) their s.
        k: how many places there are.
        rules: the rules, bound to the catalog.
        vectors: (R, C) item vectors of unit length of all rows; read for diversity alone.
        generator: draws the places, where exploration is on.
        search: finds this person's best `rules.candidates(k)` among given rows; called where limits leave no candidate
            open while places are empty. Without it the answer is shorter then.
    """
    if not rules.rules.chooses:
        order = _by_weighted_score(rows, scores, k, rules)
        return Arrangement(rows[order], scores[order], None)
    answer = _Answer(k, rules, vectors)
    answer.add(rows, scores)
    temperature = rules.rules.exploration_temperature
    while not answer.full:
        if answer.open:
            answer.put(*_drawn(answer.merits(), temperature, generator))
        elif search is None or not answer.search_more(search):
            break
    return answer.arrangement()


def propensities_of(
    shown: np.ndarray, rows: np.ndarray, scores: np.ndarray, rules: BoundRules, vectors: np.ndarray
) -> np.ndarray:
    """(P,) the propensities that rules give the rows (P,) of an answer of P places, whoever made it.

    Candidates and scores are those that these rules would choose from, and may be of another model; nothing is searched
    anew. 0 from the first item on that cannot stand at its place.
    """
    answer = _Answer(len(shown), rules, vectors)
    answer.add(rows, scores)
    temperature = rules.rules.exploration_temperature
    propensities = np.zeros(len(shown))
    for number, row in enumerate(shown):
        fixed = answer.pinned_at(number)
        if fixed is not None:
            propensities[number] = float(fixed == row)
        else:
            merits = answer.merits()
            places = np.flatnonzero((answer.rows == row) & np.isfinite(merits))
            if len(places):
                propensities[number] = _propensity(merits, int(places[0]), temperature)
                answer.put(int(places[0]), propensities[number])
        if propensities[number] == 0:
            break
    return propensities


def estimated_value(rewards: np.ndarray, logged: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """What the answers of another policy would have earned on average, and the standard error of that.

    Inverse propensity scoring: the reward at a place is weighted with the product of target / logged propensities of
    it and all places above. Unbiased where a reward depends on the item and on those above it (a cascade) and the
    logging policy can show what the target shows: McInerney et al. 2020, "Counterfactual evaluation of slate
    recommendations with sequential reward interactions".

    Args:
        rewards: (N, P) such as clicks; 0 where an answer had fewer items.
        logged: (N, P) propensities as they were logged; 1 where an answer had fewer items.
        target: (N, P) what `propensities_of` gives for the same items; 1 where an answer had fewer.
    """
    values = (np.cumprod(target / logged, axis=1) * rewards).sum(axis=1)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _by_weighted_score(rows: np.ndarray, scores: np.ndarray, k: int, rules: BoundRules) -> list[int]:
    """The candidates of an answer where no place depends on another."""
    order = (-scores - rules.weights[rows]).argsort(kind="stable").tolist()
    if not rules.pins:
        return order[:k]
    place_of = {candidate: rules.pins[row] for candidate, row in enumerate(rows.tolist()) if row in rules.pins}
    pinned = sorted((place, candidate) for candidate, place in place_of.items() if place < k)
    order = [candidate for candidate in order if candidate not in place_of][: k - len(pinned)]
    for place, candidate in pinned:
        order.insert(place, candidate)
    return order


def _drawn(merits: np.ndarray, temperature: float, generator: np.random.Generator) -> tuple[int, float]:
    """A place drawn from the softmax, and its probability; without a temperature the best."""
    if temperature == 0:
        return int(merits.argmax()), 1.0
    weights = _softmax_weights(merits, temperature)
    sums = weights.cumsum()
    # what is sought is above 0 and at most the sum, so that a place of no weight is never found
    place = int(sums.searchsorted((1.0 - generator.random()) * sums[-1]))
    return place, float(weights[place] / sums[-1])


def _propensity(merits: np.ndarray, place: int, temperature: float) -> float:
    """The probability with which a place is drawn."""
    if temperature == 0:
        return float(place == merits.argmax())
    weights = _softmax_weights(merits, temperature)
    return float(weights[place] / weights.sum())


def _softmax_weights(merits: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp((merits - merits[merits.argmax()]) / temperature)


class _Answer:
    """An answer as its places fill up, and the candidates for the rest of them."""

    def __init__(self, k: int, rules: BoundRules, vectors: np.ndarray):
        self.rules = rules
        self.trade = rules.rules.diversity_lambda
        self.table = vectors
        self.most = rules.candidates(k) + len(rules.pins)  # candidates that are kept of those that are added
        self.rows = np.zeros(0, dtype=np.int64)  # (n,) candidates
        self.scores = np.zeros(0)
        self.relevance = np.zeros(0)  # (n,) lambda (s + weight), minus infinity where no longer open
        self.likeness = np.zeros(0)  # (n,) to the nearest item of the answer
        self.vectors = vectors[:0]  # (n, C)
        self.codes: list[np.ndarray] = []  # (F, n) of each limited attribute
        self.counts: list[Counter[int]] = [Counter() for _ in rules.categories]
        self.taken: list[int | None] = [None] * k  # the candidate at each place
        self.propensities = np.ones(k)
        self.next = 0  # the first place that is not taken
        self.empty = True

    @property
    def full(self) -> bool:
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
        """More candidates, of which the best are kept; those that are pinned get their places."""
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
        self.codes = [np.ascontiguousarray(limited.of(self.rows).T) for limited in self.rules.categories]
        if self.trade < 1:
            self.vectors = self.table[self.rows]
            chosen = self.chosen
            self.likeness = (self.vectors @ self.vectors[chosen].T).max(axis=1) if chosen else np.zeros(len(self.rows))
        for row, place in self.rules.pins.items():
            for candidate in first + np.flatnonzero(rows == row):
                self._take(int(candidate), place)
        self._skip()

    def merits(self) -> np.ndarray:
        """(n,) the merit of each candidate for the next place; minus infinity where it is not open."""
        return self.relevance - (1 - self.trade) * self.likeness if self.trade < 1 else self.relevance

    def put(self, candidate: int, propensity: float) -> None:
        """Give the next place to a candidate."""
        self.propensities[self.next] = propensity
        self._take(candidate, self.next)
        self._skip()

    def _take(self, candidate: int, place: int) -> None:
        self.relevance[candidate] = -np.inf
        if place >= len(self.taken):
            return
        if self.trade < 1:
            cosines = self.vectors @ self.vectors[candidate]
            self.likeness = cosines if self.empty else np.maximum(self.likeness, cosines)
        self.taken[place] = candidate
        self.empty = False
        for limited, counts, codes in zip(self.rules.categories, self.counts, self.codes, strict=True):
            for code in codes[:, candidate].tolist():
                counts[code] += 1
                if code and counts[code] >= limited.limit:
                    self.relevance[(codes == code).any(axis=0)] = -np.inf

    def _skip(self) -> None:
        while self.next < len(self.taken) and self.taken[self.next] is not None:
            self.next += 1

    def pinned_at(self, place: int) -> int | None:
        """The row that is pinned to a place."""
        candidate = self.taken[place]
        row = None if candidate is None else int(self.rows[candidate])
        return row if row in self.rules.pins else None

    def search_more(self, search: Search) -> bool:
        """Look for candidates that the limits still admit; whether there were any."""
        allowed = np.ones(len(self.rules.weights), dtype=bool)
        allowed[self.rows] = False
        for limited, counts in zip(self.rules.categories, self.counts, strict=True):
            allowed &= limited.without([code for code, count in counts.items() if code and count >= limited.limit])
        found = [search(allowed if group is None else allowed & group) for group in self.rules.searches]
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self.add(rows, scores)
        return len(rows) > 0

    def arrangement(self) -> Arrangement:
        places = [place for place, candidate in enumerate(self.taken) if candidate is not None]
        explored = self.rules.rules.exploration_temperature > 0
        return Arrangement(
            self.rows[self.chosen], self.scores[self.chosen], self.propensities[places] if explored else None
        )
