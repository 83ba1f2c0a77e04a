"""The one training step that pretraining, fine-tuning and near-line learning share.

The step gathers each item row it needs once, lets autograd own that small matrix alone, and updates just those rows
of the table, so its cost follows the batch and not the catalog. With several workers the gradients are summed and
divided by the global number of targets: the result is that of one worker with the whole batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lib.encoder import BehaviourEncoder
from lib.objective import sampled_softmax, uniform_negatives
from lib.sequences import Batch

ITEM_TABLE = "item_embeddings.weight"


@dataclass(frozen=True)
class TrainingConfig:
    """The optimiser and the objective."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    clip_norm: float = 5.0
    negatives: int = 512
    seed: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one step did; `rows` are the item rows that it changed."""

    loss: float
    targets: float
    gradient_norm: float
    rows: Tensor


class RowAdam:
    """Adam on the touched rows of a table: a row without gradient costs nothing and keeps its state.

    Lazy Adam with bias correction by each row's own count of updates.
    """

    def __init__(self, table: Tensor, config: TrainingConfig):
        self.config = config
        self.first = torch.zeros_like(table)
        self.second = torch.zeros_like(table)
        self.steps = torch.zeros(len(table), dtype=torch.float32)

    def grow(self, rows: int) -> None:
        """Make room for a table of `rows` rows; the new rows have no state yet."""
        missing = rows - len(self.steps)
        self.first = F.pad(self.first, (0, 0, 0, missing))
        self.second = F.pad(self.second, (0, 0, 0, missing))
        self.steps = F.pad(self.steps, (0, missing))

    @torch.no_grad()
    def step(self, table: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Update table[rows] in place; rows (R,) distinct, gradient (R, C)."""
        beta1, beta2 = self.config.betas
        steps = self.steps[rows] + 1
        first = torch.lerp(gradient, self.first[rows], beta1)
        second = torch.lerp(gradient.square(), self.second[rows], beta2)
        self.steps[rows], self.first[rows], self.second[rows] = steps, first, second
        first = first / (1 - beta1**steps)[:, None]
        second = second / (1 - beta2**steps)[:, None]
        update = first / (second.sqrt() + self.config.epsilon)
        values = table[rows]
        table[rows] = values - learning_rate * (update + self.config.weight_decay * values)


class Trainer:
    """Owns an encoder and its optimiser state; `step` trains on one batch."""

    def __init__(self, encoder: BehaviourEncoder, items: int, config: TrainingConfig):
        self.encoder = encoder
        self.config = config
        self.items = items  # rows 1..items are in use
        self.steps = 0
        self.learning_rate = config.learning_rate
        self.before_update: Callable[[Tensor], None] | None = None  # sees the rows that a step is about to change
        table = encoder.item_embeddings.weight
        table.requires_grad_(False)
        self.row_optimizer = RowAdam(table, config)
        self.dense = {name: parameter for name, parameter in encoder.named_parameters() if name != ITEM_TABLE}
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=config.learning_rate, betas=config.betas, eps=config.epsilon, foreach=True
        )
        for parameter in self.dense.values():  # what AdamW would make at its first step, so that it can always be saved
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def optimizer_state(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The optimiser's tensors by name; of the row tensors just the given rows (None: all)."""
        row = self.row_optimizer
        every = slice(None) if rows is None else torch.from_numpy(rows)
        state = {
            "steps": torch.tensor([self.steps]),
            "rows.first": row.first[every],
            "rows.second": row.second[every],
            "rows.steps": row.steps[every],
        }
        for name, parameter in self.dense.items():
            for moment, value in self.optimizer.state[parameter].items():
                state[f"{name}:{moment}"] = value
        return {name: value.cpu().numpy() for name, value in state.items()}

    def load_optimizer_state(self, state: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        """Take over tensors that `optimizer_state` gave, of the given rows or of all."""
        row = self.row_optimizer
        row.grow(len(self.encoder.item_embeddings.weight))
        every = slice(0, len(state["rows.steps"])) if rows is None else torch.from_numpy(rows)
        self.steps = int(state["steps"][0])
        for name in ("first", "second", "steps"):
            own = getattr(row, name)
            own[every] = torch.from_numpy(np.array(state[f"rows.{name}"])).to(own.device)
        for name, parameter in self.dense.items():
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}:{moment}" in state:
                    value = torch.from_numpy(np.array(state[f"{name}:{moment}"]))
                    # AdamW keeps its step count on the CPU
                    self.optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter.device)

    def _groups(self) -> list[dict]:
        matrices = [p for p in self.dense.values() if p.ndim >= 2]
        vectors = [p for p in self.dense.values() if p.ndim < 2]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted sum of the losses of a batch, the sum of weights, and the gathered rows with their vectors."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        negative_rows = uniform_negatives(self.config.negatives, self.items, generator).to(batch.rows.device)
        has_target = batch.target_weights > 0  # (B, T)
        target_rows = batch.target_rows[has_target]  # (M,)
        rows, places = torch.unique(torch.cat([batch.rows.flatten(), target_rows, negative_rows]), return_inverse=True)
        table = self.encoder.item_embeddings.weight[rows].requires_grad_()  # (R, C), a leaf of its own
        inputs, positives, negatives = places.split([batch.rows.numel(), len(target_rows), len(negative_rows)])
        hidden = self.encoder(
            batch.kinds, batch.gaps, batch.values, batch.lengths, item_vectors=table[inputs].view(*batch.rows.shape, -1)
        )
        unit = F.normalize(table, dim=-1)
        losses = sampled_softmax(
            self.encoder.queries(hidden[has_target]),
            unit[positives],
            unit[negatives],
            target_rows,
            negative_rows,
            self.encoder.config.temperature,
        )
        weights = batch.target_weights[has_target]
        return (losses * weights).sum(), weights.sum(), rows, table

    def step(self, batch: Batch) -> StepResult:
        """Train on one batch (this worker's part of it)."""
        self.encoder.train()
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=False)
        loss, weight, rows, table = self.loss(batch, self.steps)
        loss.backward()
        assert table.grad is not None
        rows, gradient, totals = gather_gradients(
            rows, table.grad, list(self.dense.values()), torch.stack([loss.detach(), weight])
        )
        total_loss, total_weight = totals.tolist()
        scale = 1.0 / max(total_weight, 1e-9)
        dense_gradients = [p.grad for p in self.dense.values() if p.grad is not None]
        torch._foreach_mul_(dense_gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        gradient.mul_(scale)
        norm = nn.utils.get_total_norm([*dense_gradients, gradient])
        shrink = min(1.0, self.config.clip_norm / (float(norm) + 1e-6))
        if shrink < 1.0:
            torch._foreach_mul_(dense_gradients, shrink)  # pyright: ignore[reportPrivateImportUsage]
            gradient.mul_(shrink)
        rows, gradient = rows[rows > 0], gradient[rows > 0]  # the padding row stays zero
        if self.before_update is not None:
            self.before_update(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.row_optimizer.step(self.encoder.item_embeddings.weight, rows, gradient, self.learning_rate)
        return StepResult(total_loss * scale, total_weight, float(norm), rows)


def gather_gradients(
    rows: Tensor, gradient: Tensor, dense: list[nn.Parameter], totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum dense gradients, totals and item-row gradients over all workers; each worker gets the same result."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows, gradient, totals
    flat = torch.cat([totals] + [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in dense])
    distributed.all_reduce(flat)
    totals, rest = flat[: len(totals)], flat[len(totals) :]
    for parameter, part in zip(dense, rest.split([p.numel() for p in dense]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    world = distributed.get_world_size()
    counts = torch.zeros(world, dtype=torch.long, device=rows.device)
    counts[distributed.get_rank()] = len(rows)
    distributed.all_reduce(counts)
    longest = int(counts.max())
    padded_rows = F.pad(rows, (0, longest - len(rows)))
    padded_gradient = F.pad(gradient, (0, 0, 0, longest - len(gradient)))
    all_rows = [torch.empty_like(padded_rows) for _ in range(world)]
    all_gradients = [torch.empty_like(padded_gradient) for _ in range(world)]
    distributed.all_gather(all_rows, padded_rows)
    distributed.all_gather(all_gradients, padded_gradient)
    rows, places = torch.unique(torch.cat(all_rows), return_inverse=True)
    summed = gradient.new_zeros(len(rows), gradient.shape[1])
    summed.index_add_(0, places, torch.cat(all_gradients))
    return rows, summed, totals
