"""Off-policy evaluation: what the answers of other rules, or of another model, would have earned.

It reads answers that were explored and recorded with their propensities (serving/decision_log.py), and what people did
with them.
"""

import numpy as np

from lib.ranking.rerank import Slate, softmax_weights
from lib.ranking.rules import BoundRules


def propensities_of(
    shown: np.ndarray, rows: np.ndarray, scores: np.ndarray, rules: BoundRules, vectors: np.ndarray
) -> np.ndarray:
    """Return (P,) the propensities that rules give the rows (P,) of an answer of P places, whoever made it.

    Candidates and scores are those that these rules would choose from, and may be of another model; nothing is searched
    anew. 0 from the first item on that cannot stand at its place.
    """
    slate = Slate(len(shown), rules, vectors)
    slate.add(rows, scores)
    temperature = rules.rules.exploration_temperature
    propensities = np.zeros(len(shown))
    for place, row in enumerate(shown):
        pinned = slate.pinned_at(place)
        if pinned is not None:
            propensities[place] = float(pinned == row)
        else:
            relevance = slate.marginal_relevance()
            candidates = np.flatnonzero((slate.rows == row) & np.isfinite(relevance))
            if len(candidates):
                propensities[place] = _propensity(relevance, int(candidates[0]), temperature)
                slate.put(int(candidates[0]), propensities[place])
        if propensities[place] == 0:
            break
    return propensities


def _propensity(relevance: np.ndarray, candidate: int, temperature: float) -> float:
    """Return the probability with which a candidate is drawn."""
    if temperature == 0:
        return float(candidate == relevance.argmax())
    weights = softmax_weights(relevance, temperature)
    return float(weights[candidate] / weights.sum())


def estimated_value(rewards: np.ndarray, logged: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Estimate what the answers of another policy would have earned on average; returns it and its standard error.

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
