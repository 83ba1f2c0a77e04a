"""The ranker: its order before and after it is fitted, and its gradient."""

import pytest
import torch

from lib.model.ranker import BETAS, EPSILON, TEMPERATURE, Ranker

FEATURES, KINDS = 5, 3


def started(seed: int = 0) -> Ranker:
    """Return a ranker whose every weight matters, in doubles."""
    ranker = Ranker(FEATURES, KINDS)
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(FEATURES, generator=generator) for _ in range(3)]
    ranker.start(draw[0], draw[1].abs() + 0.5, draw[2], seed)
    ranker.weights += torch.randn(len(ranker.weights), generator=generator) * 0.3
    return ranker


def question(people: int = 6, candidates: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features, kinds and targets; the last candidate of the first person is absent."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(people, candidates, FEATURES, generator=generator)
    features[0, -1, 0] = -torch.inf
    kinds = torch.randint(0, KINDS + 1, (people,), generator=generator)
    return features, kinds, torch.randint(0, candidates - 1, (people,), generator=generator)


def loss_of(ranker: Ranker, weights: torch.Tensor, *asked: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the cross-entropy, person by person."""
    features, kinds, targets, counts = asked
    losses = []
    for own, kind, target in zip(features, kinds, targets, strict=True):
        there = own[torch.isfinite(own[:, 0])]
        logits = ranker.logits(there, kind.expand(len(there)), weights)
        losses.append(torch.logsumexp(logits, 0) - logits[target])
    return (torch.stack(losses) * counts).sum() / counts.sum()


def test_before_it_is_fitted_scores_are_the_encoders():
    ranker = Ranker(FEATURES, KINDS)
    features = torch.randn(7, FEATURES)
    scores = ranker.scorer().scores(features, torch.arange(7) % (KINDS + 1))
    assert torch.allclose(scores, features[:, 0], atol=1e-6)


def test_scores_are_the_logits_in_the_units_of_the_encoders_score():
    ranker, (features, kinds, _) = started(), question()
    logits = ranker.logits(features[1], kinds[1].expand(4))
    scorer = ranker.scorer()
    assert torch.allclose(scorer.scores(features[1], kinds[1].expand(4)), logits * TEMPERATURE, atol=1e-6)
    mixed = torch.tensor([0, 2, 1, 2])
    assert torch.allclose(scorer.scores(features[1], mixed), ranker.logits(features[1], mixed) * TEMPERATURE, atol=1e-6)
    x = (features[1, 2] - ranker.mean) / ranker.deviation
    line, hidden, bias, output = ranker.weights.split(ranker.parts)
    inner = hidden.view(FEATURES, -1).T @ x + bias.view(KINDS + 1, -1)[kinds[1]]
    assert torch.allclose(logits[2], line @ x + output @ (inner * torch.sigmoid(inner)), atol=1e-5)


def test_the_kind_of_the_newest_event_matters():
    ranker, (features, _, _) = started(), question()
    scores = ranker.scorer().scores(features[1, [0, 0]], torch.tensor([0, 2]))
    assert scores[0] != scores[1]


def test_it_begins_with_the_line_it_is_given():
    ranker, line = Ranker(2, KINDS), torch.tensor([1.5, -1.0])
    ranker.step(torch.randn(2, 3, 2), torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]), torch.ones(2), 0.1)
    ranker.start(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), line, seed=3)
    assert not any(tensor.any() for tensor in (ranker.first, ranker.second, ranker.steps))
    mean = torch.tensor([[1.0, 2.0]])
    middle = float(ranker.logits(mean, torch.tensor([0])))
    assert middle == 0  # at the mean all is 0
    moved = float(ranker.logits(mean + torch.tensor([[2.0, 0.0]]), torch.tensor([0])))
    assert moved == pytest.approx(1.5, abs=0.5)  # a deviation of the first feature, and the little of the hidden layer


def test_a_step_returns_the_loss_and_follows_its_gradient():
    ranker, asked = started(), (*question(), torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0]))
    before = ranker.weights.clone()
    # in doubles, where differences are exact enough
    exact = started()
    for name in ("mean", "deviation"):
        setattr(exact, name, getattr(ranker, name).double())
    doubles = (asked[0].double(), asked[1], asked[2], asked[3].double())
    differences = torch.zeros(len(before), dtype=torch.float64)
    for place in range(len(before)):
        moved = torch.zeros(len(before), dtype=torch.float64)
        moved[place] = 1e-5
        above, below = (loss_of(exact, before.double() + sign * moved, *doubles) for sign in (1, -1))
        differences[place] = (above - below) / 2e-5
    loss = ranker.step(*asked, learning_rate=0.01)
    assert loss == pytest.approx(float(loss_of(exact, before.double(), *doubles)), rel=1e-4)
    gradient = ranker.first / (1 - BETAS[0])
    assert torch.allclose(gradient.double(), differences, atol=1e-5)
    assert torch.allclose(ranker.second, gradient**2 * (1 - BETAS[1]), atol=1e-8)
    first_step = 0.01 * gradient / (gradient.abs() + EPSILON)  # of Adam: its moments are unbiased
    assert torch.allclose(ranker.weights, before - first_step, atol=1e-4)
    assert int(ranker.steps) == 1


def test_steps_lower_the_loss():
    ranker, asked = started(), (*question(64, 8), torch.ones(64))
    losses = [ranker.step(*asked, learning_rate=0.02) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.isfinite(tensor).all() for tensor in (ranker.weights, ranker.first, ranker.second))


def test_what_weighs_nothing_teaches_nothing():
    one, other = started(), started()
    features, kinds, targets = question()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    changed = features.clone()
    changed[4] += 3
    one.step(features, kinds, targets, weights, 0.01)
    other.step(changed, kinds, targets, weights, 0.01)
    assert torch.equal(one.weights, other.weights)


def test_it_stays_on_the_cpu_where_the_features_are():
    ranker = started()
    torch.nn.Sequential(ranker).to("meta")
    assert all(tensor.device.type == "cpu" for tensor in ranker.buffers())
