"""The ranker: one hidden layer over what is known of a person and a candidate; its logit is the score of an answer.

    logit = a . x + o . silu(W x + b[kind of the newest event]),   x = (features - mean) / deviation

The line beside the hidden layer is what most of the order comes of; the layer lets what a feature weighs depend on the
others (length of the history, age of the item). The weights are buffers and no parameters: pretraining fits them after
the encoder, on events that neither encoder nor counts have seen, and the learner moves them with every micro-batch by
Adam, whose state is part of them. As dense tensors of the weights they are pushed, undone and rolled back with all
others.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 16
BETAS, EPSILON = (0.9, 0.99), 1e-8
TEMPERATURE = 0.05  # what logits are multiplied with, so that scores stay in the units of s = uT A v
RANKER_PREFIX = "ranker."


class Ranker(nn.Module):
    """Scores candidates by F features and the kind of the person's newest event (0: none)."""

    mean: Tensor  # (F,)
    deviation: Tensor  # (F,)
    weights: Tensor  # (P,) line, hidden layer, its bias of each kind, output
    first: Tensor  # (P,) Adam's moments
    second: Tensor
    steps: Tensor  # (1,) int64

    def __init__(self, features: int, kinds: int):
        super().__init__()
        self.features, self.kinds = features, kinds
        parts = [features, features * HIDDEN, (kinds + 1) * HIDDEN, HIDDEN]
        self.parts = parts
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        for name in ("weights", "first", "second"):
            self.register_buffer(name, torch.zeros(sum(parts)))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.weights[0] = 1 / TEMPERATURE  # not fitted yet: the encoder's order

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Stay on the CPU, where the features are, wherever the encoder goes."""
        return self

    @torch.no_grad()
    def start(self, mean: Tensor, deviation: Tensor, line: Tensor, seed: int) -> None:
        """Begin to be fitted to features of this mean and deviation (F,), from a line a (F,)."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        generator = torch.Generator().manual_seed(seed)
        own, hidden, kinds, output = self.weights.split(self.parts)
        own.copy_(line)
        hidden.copy_(torch.randn(len(hidden), generator=generator) / self.features**0.5)
        kinds.zero_()
        output.copy_(torch.randn(HIDDEN, generator=generator) * 0.1 / HIDDEN**0.5)
        for tensor in (self.first, self.second, self.steps):
            tensor.zero_()

    def logits(self, features: Tensor, kinds: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return (...) of candidates with features (..., F) and kinds (...); `weights` (P,) instead of its own."""
        line, hidden, kind, output = (self.weights if weights is None else weights).split(self.parts)
        x = (features - self.mean) / self.deviation
        inner = x @ hidden.view(self.features, HIDDEN) + F.embedding(kinds, kind.view(self.kinds + 1, HIDDEN))
        return x @ line + F.silu(inner) @ output

    @torch.no_grad()
    def scorer(self) -> "Scorer":
        """Return what scores candidates as of now, soonest: mean, deviation and temperature are within its weights."""
        line, hidden, kind, output = self.weights.split(self.parts)
        matrix = (
            torch.cat([hidden.view(self.features, HIDDEN), line[:, None] * TEMPERATURE], dim=1)
            / self.deviation[:, None]
        )
        bias = F.pad(kind.view(self.kinds + 1, HIDDEN), (0, 1)) - self.mean @ matrix
        return Scorer(matrix.T.contiguous(), bias.T.contiguous(), output * TEMPERATURE)

    def step(self, features: Tensor, kinds: Tensor, targets: Tensor, weights: Tensor, learning_rate: float) -> float:
        """Take a step of Adam (Kingma & Ba 2015) on the cross-entropy of targets among their candidates.

        Args:
            features: (B, K, F); -inf in the first feature where there is no candidate.
            kinds: (B,) int64.
            targets: (B,) int64 place of each target.
            weights: (B,) what each counts.
            learning_rate: of the step.

        Returns:
            The loss before it.
        """
        own = self.weights.clone().requires_grad_()
        absent = torch.isneginf(features[..., 0])
        kept = features.masked_fill(absent[..., None], 0.0)
        logits = self.logits(kept, kinds[:, None].expand(absent.shape), own).masked_fill(absent, -1e9)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum().clamp(min=1e-9)
        (gradient,) = torch.autograd.grad(loss, own)
        with torch.no_grad():
            self.steps += 1
            self.first.lerp_(gradient, 1 - BETAS[0])
            self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            steps = int(self.steps)
            first, second = self.first / (1 - BETAS[0] ** steps), self.second / (1 - BETAS[1] ** steps)
            self.weights.sub_(learning_rate * first / (second.sqrt() + EPSILON))
        return float(loss.detach())


class Scorer(NamedTuple):
    """A ranker that is not trained; its scores are the logits in the units of s = uT A v."""

    matrix: Tensor  # (HIDDEN + 1, F), the line's last
    bias: Tensor  # (HIDDEN + 1, kinds + 1)
    output: Tensor  # (HIDDEN,)

    def scores(self, features: Tensor, kinds: Tensor) -> Tensor:
        """Return (P,) of features (P, F), soonest where each feature lies in one piece, and kinds (P,)."""
        inner = self.matrix @ features.T
        if len(kinds) and bool((kinds == kinds[0]).all()):
            inner += self.bias[:, kinds[:1]]
        else:
            inner += self.bias[:, kinds]
        return torch.addmv(inner[HIDDEN], F.silu(inner[:HIDDEN], inplace=True).T, self.output)
