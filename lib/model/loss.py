"""The training objective: sampled softmax over the next item, with negatives shared by the whole batch.

Both functions have their gradient written out, because on a CPU a step's time goes into passes over memory: autograd's
own took half again as long for the logits and twice as long for the unit vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.batches import Batch
from lib.model.encoder import BehaviourEncoder, unit_length


def uniform_negatives(count: int, items: int, generator: torch.Generator) -> Tensor:
    """Return (N,) rows drawn uniformly from the catalog's rows 1..items, with replacement."""
    return torch.randint(1, items + 1, (count,), generator=generator)


def next_item_losses(margins: Tensor, signs: Tensor) -> Tensor:
    """Return (M,) loss of each target from its `sampled_margins`.

    Where the sign is positive it is the cross entropy of the sampled softmax, -log p = softplus(-margin); where it is
    negative it is the unlikelihood loss -log(1 - p) = softplus(margin) (Welleck et al. 2020), which pushes what the
    person disliked below the negatives.
    """
    return F.softplus(-signs * margins)


def sampled_margins(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor,
    temperature: float,
) -> Tensor:
    """Return (M,) logit of each target less the log-sum-exp of the logits of the shared negatives.

    Sampled softmax with shared negatives (Jean et al. 2015); a negative that is the target itself, an accidental hit,
    is left out. The memory is M x N, whatever the size of the catalog.

    Args:
        queries: (M, C) uT A of each position that has a target.
        positives: (M, C) item vector of each target.
        negatives: (N, C) item vectors of the negatives.
        target_rows: (M,) the targets' rows.
        negative_rows: (N,) the negatives' rows.
        temperature: what scores are divided by.
    """
    margins = _SampledMargins.apply(queries / temperature, positives, negatives, target_rows, negative_rows)
    assert isinstance(margins, Tensor)
    return margins


class _SampledMargins(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, positives: Tensor, negatives: Tensor, target_rows: Tensor, negative_rows: Tensor
    ) -> Tensor:
        logits = queries @ negatives.T  # (M, N)
        hits = torch.isin(target_rows, negative_rows).nonzero().flatten()  # few: the (M, N) comparison is spared
        lines, places = (target_rows[hits, None] == negative_rows).nonzero(as_tuple=True)
        logits[hits[lines], places] = float("-inf")
        largest = logits.amax(dim=1).clamp_(min=-1e4)  # finite where every negative is a hit
        weights = logits.sub_(largest[:, None]).exp_()
        total = weights.sum(dim=1).clamp_(min=1e-30)
        ctx.save_for_backward(queries, positives, negatives, weights, 1 / total)
        return (queries * positives).sum(dim=-1) - largest - total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, positives, negatives, weights, inverse_total = ctx.saved_tensors
        gradient = gradients[0][:, None]  # (M, 1)
        share = gradient * inverse_total[:, None]
        of_queries = (weights @ negatives).mul_(-share).addcmul_(positives, gradient)
        return of_queries, queries * gradient, weights.T @ (queries * -share), None, None


class SequenceLoss(nn.Module):
    """Weighted sum of the losses of a part of a batch; a module, so that sharded weights are whole while it runs."""

    def __init__(self, encoder: BehaviourEncoder, precision: str):
        super().__init__()
        self.encoder = encoder
        self.in_half_precision = precision == "bfloat16"

    def forward(
        self,
        batch: Batch,
        rows: Tensor,
        table: Tensor,
        inputs: Tensor,
        positives: Tensor,
        negatives: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            batch: the part, B sequences of at most T events.
            rows: (R,) distinct rows that the whole batch needs.
            table: (R, C) their embeddings.
            inputs: (B, T) places in `rows` of the events' items.
            positives: (B, T) places in `rows` of the targets.
            negatives: (N,) places in `rows` of the shared negatives.
            weights: (B, T) what each target counts, below zero where it was disliked.
        """
        vectors = self.encoder.described(table, rows)
        item_vectors = vectors.index_select(0, inputs.flatten()).view(*inputs.shape, -1)
        if not any(parameter.requires_grad for parameter in self.encoder.blocks[0].parameters()):
            item_vectors = item_vectors.detach()  # no way back through frozen blocks: a step costs a third
        with torch.autocast(table.device.type, dtype=torch.bfloat16, enabled=self.in_half_precision):
            hidden = self.encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, item_vectors=item_vectors)
        has_target = weights.flatten().nonzero().flatten()  # (M,)
        weights = weights.flatten().index_select(0, has_target)
        positives = positives.flatten().index_select(0, has_target)
        unit = unit_length(vectors)
        margins = sampled_margins(
            self.encoder.queries(hidden.flatten(0, 1).index_select(0, has_target)),
            unit.index_select(0, positives),
            unit.index_select(0, negatives),
            rows.index_select(0, positives),
            rows.index_select(0, negatives),
            self.encoder.config.temperature,
        )
        return (next_item_losses(margins, weights.sign()) * weights.abs()).sum()
