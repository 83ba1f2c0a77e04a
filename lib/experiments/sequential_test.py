"""A test of two proportions that may be looked at after every answer: the mixture sequential probability ratio test.

Each arm counts answers and how many of them were rewarded. A person's answers are not independent, and people, not
answers, are divided among the arms; so the variance of an arm's rate is that of its people (the linearised ratio), and
never less than p (1 - p) / answers with the rate p of both arms together: an arm without a reward shows no variance of
its own. What is known of the difference D of the rates is the inverse, I = 1 / (variance + variance). Where there is no
difference, D I moves like a Brownian motion with clock I, and

    evidence = sqrt(1 / (1 + I e^2)) exp(e^2 (D I)^2 / (2 (1 + I e^2)))

(e: the size of effect that is expected) starts at 1 and exceeds 1 / alpha at any time at all with a probability of at
most alpha (Ville 1939). Where the answers of one person are alike, D I is smoother than a Brownian motion of its
variance, and the bound holds all the more (Slepian 1962).

Sources: Robbins 1970, "Statistical methods related to the law of the iterated logarithm"; Johari, Koomen, Pekelis and
Walsh 2022, "Always valid inference"; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences" (the normal mixture bound, of which the intervals here are the asymptotic form).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_USERS = 100  # of an arm, before its variance is believed
LEAST_OUTCOMES = 30  # answers of each kind, rewarded or not, that an arm should have had, for the same reason

# A float, or a numpy array of one value for each look.
Number = Any


@dataclass(frozen=True)
class ArmTotals:
    """What an arm has seen: sums over its users of their answers a, their rewarded answers r, and the products."""

    users: Number = 0
    answers: Number = 0
    rewarded: Number = 0
    answers_squared: Number = 0
    rewarded_squared: Number = 0
    both: Number = 0  # a r

    def plus(self, answers: int, rewarded: int, more_answers: int, more_rewarded: int) -> "ArmTotals":
        """Return the totals after a user who had so many answers and rewards had more of them."""
        a, r = answers + more_answers, rewarded + more_rewarded
        return ArmTotals(
            self.users + (answers == 0 and more_answers > 0),
            self.answers + more_answers,
            self.rewarded + more_rewarded,
            self.answers_squared + a * a - answers * answers,
            self.rewarded_squared + r * r - rewarded * rewarded,
            self.both + a * r - answers * rewarded,
        )

    @property
    def rate(self) -> Number:
        """Share of the answers that were rewarded."""
        return self.rewarded / np.maximum(self.answers, 1)

    @property
    def variance(self) -> Number:
        """Of the rate, between users: the linearised ratio of two sums."""
        residual = self.rewarded_squared - 2 * self.rate * self.both + self.rate**2 * self.answers_squared
        unbiased = self.users / np.maximum(self.users - 1, 1)
        return unbiased * np.maximum(residual, 0) / np.maximum(self.answers, 1) ** 2

    def is_enough(self, rate: Number) -> Number:
        """Return whether so many answers would tell a rate."""
        outcomes = self.answers * np.minimum(rate, 1 - rate)
        return (self.users >= LEAST_USERS) & (outcomes >= LEAST_OUTCOMES)

    def lacking(self, rate: float) -> str | None:
        """Say what would have to come before anything is known of a rate; None where enough has."""
        if self.users < LEAST_USERS:
            return f"{int(self.users)} users so far; it takes {LEAST_USERS}"
        outcomes = self.answers * min(rate, 1 - rate)
        if outcomes < LEAST_OUTCOMES:
            return f"too few answers with a reward, or without one: {outcomes:.0f} so far; it takes {LEAST_OUTCOMES}"
        return None


def difference(live: ArmTotals, challenger: ArmTotals) -> tuple[Number, Number]:
    """Return the challenger's rate less the live one, and how much is known of it (the inverse of its variance)."""
    rate = (live.rewarded + challenger.rewarded) / np.maximum(live.answers + challenger.answers, 1)
    variance = sum(
        np.maximum(arm.variance, rate * (1 - rate) / np.maximum(arm.answers, 1)) for arm in (live, challenger)
    )
    known = live.is_enough(rate) & challenger.is_enough(rate)
    return challenger.rate - live.rate, np.where(known, 1 / np.where(known, variance, 1.0), 0.0)


def evidence(live: ArmTotals, challenger: ArmTotals, effect: float) -> Number:
    """Return how many times likelier the data are with a difference of about `effect` than without; 1 at the start."""
    distance, information = difference(live, challenger)
    scaled = information * effect**2
    exponent = (distance * information * effect) ** 2 / (2 * (1 + scaled))
    return np.exp(np.minimum(exponent, 700.0)) / np.sqrt(1 + scaled)


def interval(rate: float, information: float, alpha: float, effect: float) -> tuple[float, float]:
    """Return bounds that hold at every look at once with probability 1 - alpha; infinite while too little is known."""
    if information <= 0:
        return -np.inf, np.inf
    scaled = information * effect**2
    width = np.sqrt(2 * (1 + scaled) * np.log(np.sqrt(1 + scaled) / alpha)) / (information * effect)
    return float(rate - width), float(rate + width)


def verdict(live: ArmTotals, challenger: ArmTotals, alpha: float, effect: float) -> str | None:
    """Return "promote" or "rollback" for a challenger to be promoted or given up; None while nobody knows."""
    if evidence(live, challenger, effect) < 1 / alpha:
        return None
    return "promote" if challenger.rate > live.rate else "rollback"
