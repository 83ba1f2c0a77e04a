"""The training objective: sampled softmax over the next item, with negatives shared by the whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform_negatives(count: int, items: int, generator: torch.Generator) -> Tensor:
    """(N,) rows drawn uniformly from the catalog's rows 1..items, with replacement."""
    return torch.randint(1, items + 1, (count,), generator=generator)


def sampled_softmax(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor,
    temperature: float,
) -> Tensor:
    """(M,) cross entropy of each target among itself and the shared negatives.

    Sampled softmax with shared negatives (Jean et al. 2015); a negative that is the target itself, an accidental hit,
    is masked. The memory is M x N, whatever the size of the catalog.

    Args:
        queries: (M, C) uT A of each position that has a target.
        positives: (M, C) item vector of each target.
        negatives: (N, C) item vectors of the negatives.
        target_rows: (M,) the targets' rows.
        negative_rows: (N,) the negatives' rows.
        temperature: what scores are divided by.
    """
    positive = (queries * positives).sum(-1, keepdim=True) / temperature  # (M, 1)
    negative = queries @ negatives.T / temperature  # (M, N)
    negative = negative.masked_fill(target_rows[:, None] == negative_rows[None, :], float("-inf"))
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device), reduction="none")
