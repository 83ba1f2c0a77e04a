"""The sequential test: few false alarms though it looks after every answer, and power where there is a difference."""

import numpy as np
import pytest

from lib.experiments.sequential_test import ArmTotals, difference, evidence, interval, verdict

ALPHA, EFFECT = 0.05, 0.02


def looks(users: np.ndarray, rewarded: np.ndarray) -> ArmTotals:
    """Totals after each of the answers (E,) of one arm, whose users are given."""
    order = np.argsort(users, kind="stable")
    first = np.r_[True, np.diff(users[order]) != 0]
    starts = np.flatnonzero(first)[np.cumsum(first) - 1]
    answers, rewards = np.empty(len(users)), np.empty(len(users))
    answers[order] = np.arange(len(users)) - starts  # of the same user before
    before = np.cumsum(rewarded[order]) - rewarded[order]
    rewards[order] = before - before[starts]
    a, r = answers + 1, rewards + rewarded
    sums = (
        answers == 0,
        np.ones(len(users)),
        rewarded,
        a**2 - answers**2,
        r**2 - rewards**2,
        a * r - answers * rewards,
    )
    return ArmTotals(*(np.cumsum(value) for value in sums))


def arm(generator: np.random.Generator, rate: float, answers: int, users: int | None = None) -> ArmTotals:
    """Answers of so many people, each with a rate of their own; without a number each is somebody else's."""
    if users is None:
        return looks(np.arange(answers), generator.random(answers) < rate)
    own = generator.beta(2 * rate, 2 * (1 - rate), users)
    asking = (users * generator.random(answers) ** 2).astype(int)  # some ask often
    return looks(asking, generator.random(answers) < own[asking])


def share_of_alarms(runs: int, rates: tuple[float, float], answers: int, users: int | None) -> float:
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(runs):
        live, challenger = (arm(generator, rate, answers, users) for rate in rates)
        alarms += bool((evidence(live, challenger, EFFECT) >= 1 / ALPHA).any())
    return alarms / runs


@pytest.mark.parametrize("users", [None, 400], ids=["a user an answer", "users who return"])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_a_look_at_every_answer_raises_few_false_alarms(rate, users):
    assert share_of_alarms(400, (rate, rate), 4000, users) <= ALPHA


def test_a_plain_test_would_raise_many():
    """What the sequential one is for: the 1.96 of a single look, at every answer."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        distance, information = difference(arm(generator, 0.3, 4000), arm(generator, 0.3, 4000))
        alarms += bool((np.abs(distance) * np.sqrt(information) > 1.96).any())
    assert alarms > 25


def test_answers_of_one_user_are_not_taken_for_independent():
    """With a variance of answers the false alarms of users who return would be many."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        totals = [arm(generator, 0.3, 4000, 200) for _ in range(2)]
        live, challenger = (
            ArmTotals(t.answers, t.answers, t.rewarded, t.answers, t.rewarded, t.rewarded) for t in totals
        )
        alarms += bool((evidence(live, challenger, EFFECT) >= 1 / ALPHA).any())
    assert alarms > 2 * 100 * ALPHA


def test_a_difference_is_found():
    assert share_of_alarms(40, (0.10, 0.14), 8000, None) > 0.9
    assert share_of_alarms(40, (0.14, 0.10), 8000, None) > 0.9


def test_the_verdict_says_who_is_better():
    generator = np.random.default_rng(1)

    def total(rate: float) -> ArmTotals:
        rewarded = int((generator.random(20_000) < rate).sum())
        return ArmTotals(20_000, 20_000, rewarded, 20_000, rewarded, rewarded)

    worse, better = total(0.10), total(0.15)
    assert verdict(worse, better, ALPHA, EFFECT) == "promote"
    assert verdict(better, worse, ALPHA, EFFECT) == "rollback"
    assert verdict(better, better, ALPHA, EFFECT) is None


def test_the_interval_leaves_out_zero_when_the_evidence_suffices():
    generator = np.random.default_rng(2)
    live, challenger = arm(generator, 0.1, 6000), arm(generator, 0.14, 6000)
    distances, information = difference(live, challenger)
    found = evidence(live, challenger, EFFECT) >= 1 / ALPHA
    assert found.any()
    assert not found.all()
    for place in range(0, 6000, 50):
        low, high = interval(distances[place], information[place], ALPHA, EFFECT)
        assert bool(low > 0 or high < 0) == bool(found[place])


def test_few_answers_say_nothing():
    few = ArmTotals(99, 1000, 500, 20_000, 8000, 10_000)
    none = ArmTotals(1000, 1000, 0, 1000, 0, 0)
    assert evidence(few, none, EFFECT) == 1
    assert verdict(few, none, ALPHA, EFFECT) is None
    assert interval(0.5, difference(few, none)[1], ALPHA, EFFECT) == (-np.inf, np.inf)
    assert verdict(ArmTotals(), ArmTotals(), ALPHA, EFFECT) is None


def test_totals_follow_users_one_by_one():
    generator = np.random.default_rng(3)
    users, rewarded = generator.integers(0, 20, 200), generator.random(200) < 0.4
    totals, counts = ArmTotals(), {}
    for user, reward in zip(users.tolist(), rewarded.tolist(), strict=True):
        a, r = counts.get(user, (0, 0))
        totals = totals.plus(a, r, 1, int(reward))
        counts[user] = (a + 1, r + reward)
    whole = looks(users, rewarded)
    for name, value in vars(totals).items():
        assert value == getattr(whole, name)[-1], name
