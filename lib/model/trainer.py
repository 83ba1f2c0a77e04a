"""The one training step that pretraining, fine-tuning and near-line learning share.

The step gathers each item row it needs once, lets autograd own that small matrix alone, and updates just those rows
of the table, so its cost follows the batch and not the catalog. With several workers, or a batch that is worked off in
parts, gradients are summed and divided by the weight of all targets: the result is that of one worker with the whole
batch at once. So it is where the workers share the dense weights out among them (FSDP2): each keeps and updates its
shard, and what is saved is whole.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lib.model.batches import Batch
from lib.model.distributed import (
    all_reduce,
    all_reduce_gradients,
    distribute_like,
    full_tensor,
    local_tensor,
    shard,
    world_size,
)
from lib.model.encoder import BehaviourEncoder
from lib.model.loss import SequenceLoss, uniform_negatives
from lib.model.presets import Precision
from lib.model.rows import lengthened, with_room

FADING_UPDATES = 20  # after so many the boost of a new row is half of what it was


@dataclass(frozen=True)
class TrainingConfig:
    """The optimiser and the objective; what users may set of it has its bounds in jobs/pretrain_settings.py."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    clip_norm: float = 5.0
    new_row_boost: float = 0.0  # an item's row moves (1 + boost / (1 + n / 20)) times as fast at its nth update
    negatives: int = 512  # sampled items that all targets of a batch share
    dislike_weight: float = 0.1  # of pushing away what was disliked, relative to drawing near what was liked
    accumulation: int = 1  # parts of a batch, one after another, to save memory
    precision: Precision = "float32"  # of the blocks' activations
    activation_checkpointing: bool = False  # activations of the blocks are computed anew in the backward pass
    compile: bool = False  # the blocks, by torch.compile
    sharded: bool = False  # dense weights and their optimiser state, over the workers
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
        self.steps = torch.zeros(len(table), dtype=torch.float32, device=table.device)

    def grow(self, rows: int) -> None:
        """Make room for a table of `rows` rows; the new rows have no state yet."""
        self.first, self.second, self.steps = (lengthened(each, rows) for each in (self.first, self.second, self.steps))

    def make_room(self) -> None:
        """Move the state to memory in which it can grow by an eighth without a copy."""
        self.first, self.second, self.steps = (with_room(each) for each in (self.first, self.second, self.steps))

    @torch.no_grad()
    def step(self, table: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Update table[rows] in place; rows (R,) distinct, gradient (R, C)."""
        beta1, beta2 = self.config.betas
        steps = self.steps.index_select(0, rows).add_(1)
        first = self.first.index_select(0, rows).lerp_(gradient, 1 - beta1)
        second = self.second.index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for state, value in ((self.steps, steps), (self.first, first), (self.second, second)):
            state.index_copy_(0, rows, value)
        first.div_((1 - beta1**steps)[:, None])
        second.div_((1 - beta2**steps)[:, None])
        update = first.div_(second.sqrt_().add_(self.config.epsilon))
        if self.config.new_row_boost:
            update.mul_((1 + self.config.new_row_boost / (1 + steps / FADING_UPDATES))[:, None])
        values = table.index_select(0, rows).mul_(1 - learning_rate * self.config.weight_decay)
        table.index_copy_(0, rows, values.sub_(update, alpha=learning_rate))


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
        self.sequence_loss = SequenceLoss(encoder, config.precision)
        encoder.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            compile_blocks(encoder)
        self.sharded = config.sharded and world_size() > 1  # one worker has nobody to share with
        if self.sharded:
            shard(self.sequence_loss, encoder.blocks, config.precision)
        self.dense = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
        )
        for parameter in self.dense.values():  # what AdamW would make at its first step, so that it can always be saved
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            # fused kernels read the step count on the parameter's device
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the encoder's tensors by name, whole; where they are sharded every worker must ask at the same time."""
        for name, value in self.encoder.state_dict().items():
            yield name, full_tensor(value)

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take over tensors that `weights` gave."""
        own = self.encoder.state_dict()
        placed = {name: distribute_like(own.get(name, value), value) for name, value in state.items()}
        self.encoder.load_state_dict(placed)

    def unsharded_encoder(self) -> BehaviourEncoder:
        """Return the encoder, or a whole copy of a sharded one, for which every worker must ask at the same time."""
        if not self.sharded:
            return self.encoder
        encoder = BehaviourEncoder(self.encoder.config)
        encoder.load_state_dict({name: value.cpu() for name, value in self.weights()})
        return encoder

    def join_all_gathers(self) -> None:
        """Take part in the all-gathers of rank 0, which reads the weights and then the optimiser's state."""
        if self.sharded:
            for _ in self.weights():
                pass
            for _ in self._dense_state():
                pass

    def optimizer_state(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the optimiser's tensors by name; of the row tensors just the given rows (None: all).

        They are whole; where the weights are sharded every worker must ask at the same time.
        """
        row = self.row_optimizer
        every = slice(None) if rows is None else torch.from_numpy(rows)
        state = {
            "steps": torch.tensor([self.steps]),
            "rows.first": row.first[every],
            "rows.second": row.second[every],
            "rows.steps": row.steps[every],
        }
        arrays = {name: value.cpu().numpy() for name, value in state.items()}
        return arrays | {name: value.cpu().numpy() for name, value in self._dense_state()}

    def _dense_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.dense.items():
            for moment, value in self.optimizer.state[parameter].items():
                yield f"{name}:{moment}", full_tensor(value)

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
                    own = self.optimizer.state[parameter]
                    own[moment] = distribute_like(own[moment], torch.from_numpy(np.array(state[f"{name}:{moment}"])))

    def _groups(self) -> list[dict]:
        matrices = [p for p in self.dense.values() if p.ndim >= 2]
        vectors = [p for p in self.dense.values() if p.ndim < 2]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def step(self, batch: Batch) -> StepResult:
        """Train on one batch (this worker's part of it)."""
        self.encoder.train()
        self.steps += 1
        self.optimizer.zero_grad()
        weights = self._weights(batch)
        targets = batch.target_rows * (weights != 0)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps)
        negatives = uniform_negatives(self.config.negatives, self.items, generator).to(targets.device)
        every = torch.cat([batch.rows.flatten(), targets.flatten(), negatives])
        rows, places = torch.unique(every, return_inverse=True)
        table = self.encoder.item_embeddings.weight.index_select(0, rows).requires_grad_()  # (R, C), a leaf of its own
        inputs, positives, negatives = places.split([targets.numel(), targets.numel(), len(negatives)])
        total_weight = all_reduce(weights.abs().sum())
        loss, accumulation = torch.zeros((), device=table.device), self.config.accumulation
        for first, last in pairwise(len(targets) * n // accumulation for n in range(accumulation + 1)):
            # sharded weights are gathered by all workers in step, so an empty part reads a history that counts nothing
            lines = slice(first, max(last, first + 1))
            partial = self.sequence_loss(
                batch[lines],
                rows,
                table,
                inputs.view_as(targets)[lines],
                positives.view_as(targets)[lines],
                negatives,
                weights[lines] * (last > first),
            )
            partial = partial / total_weight.clamp(min=1e-9)
            partial.backward()
            loss += partial.detach()
        assert table.grad is not None
        unsummed = [] if self.sharded else list(self.dense.values())  # the backward pass has summed sharded ones
        rows, gradient, loss = all_reduce_gradients(rows, table.grad, unsummed, loss)
        dense_gradients = [local_tensor(p.grad) for p in self.dense.values() if p.grad is not None]
        if self.sharded:
            norm = (all_reduce(nn.utils.get_total_norm(dense_gradients) ** 2) + gradient.norm() ** 2).sqrt()
        else:
            norm = nn.utils.get_total_norm([*dense_gradients, gradient])
        shrink = min(1.0, self.config.clip_norm / (float(norm) + 1e-6))
        if shrink < 1.0:
            torch._foreach_mul_([*dense_gradients, gradient], shrink)  # pyright: ignore[reportPrivateImportUsage]
        moved = (rows > 0) & gradient.any(dim=1)  # the padding row stays zero, and what only frozen blocks read
        rows, gradient = rows[moved], gradient[moved]
        if self.before_update is not None:
            self.before_update(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.row_optimizer.step(self.encoder.item_embeddings.weight, rows, gradient, self.learning_rate)
        return StepResult(float(loss), float(total_weight), float(norm), rows)

    def _weights(self, batch: Batch) -> Tensor:
        """Return (B, T) what each target counts: below zero where the person disliked it, zero where there is none."""
        weights = batch.target_weights
        return torch.where(weights < 0, weights * self.config.dislike_weight, weights)


def train_top_layers(encoder: BehaviourEncoder, most_bytes: int) -> None:
    """Freeze the dense weights except the uppermost: A and the final norm, then whole blocks, then what these read.

    Of them no more than `most_bytes` bytes are trained. The first that would be too much is frozen with all below it.
    """
    below = [encoder.position_embeddings, encoder.kind_embeddings, encoder.gap_embeddings, encoder.value_embeddings]
    levels: list[Sequence[Tensor]] = [[encoder.interest_to_item, *encoder.final_norm.parameters()]]
    levels += [list(block.parameters()) for block in reversed(encoder.blocks)]
    levels += [[embedding.weight for embedding in below]]
    room = most_bytes
    for level in levels:
        room -= sum(parameter.nbytes for parameter in level if parameter.requires_grad)
        if room < 0:
            for parameter in level:
                parameter.requires_grad_(False)


def keep_freed_memory() -> None:
    """Let the process keep what it frees, for good: else glibc returns every large tensor to the system after each step
    and faults it in again page by page, a tenth of a step on a CPU. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def compile_blocks(encoder: BehaviourEncoder) -> None:
    """Have torch.compile work on every block; names of weights stay, and hooks of sharding stay outside of it."""
    for block in encoder.blocks:
        setattr(block, "forward", torch.compile(block.forward))  # noqa: B010  a type checker sees a method in it
