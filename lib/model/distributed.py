"""Workers that train together over torch.distributed: collectives, and dense weights shared out among them (FSDP2).

A worker alone hears itself. What sharding is made of is imported where somebody shards: it costs a process a second of
CPU, and most never do.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.batches import Batch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Said = TypeVar("Said")


def worker_count() -> int:
    """How many workers train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first_worker() -> bool:
    """Whether this is the one that speaks for all."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def part_of_worker(batch: Batch) -> Batch:
    """The histories of a batch that this worker trains on where all of them have the whole batch."""
    if worker_count() == 1:
        return batch
    part = batch[slice(distributed.get_rank(), None, worker_count())]
    if len(part.rows):
        return part
    return replace(batch[:1], target_weights=torch.zeros_like(batch.target_weights[:1]))  # it counts nothing


def word_of_first(say: Callable[[], Said]) -> Said:
    """What the first worker says, on all of them; the others are not asked."""
    if worker_count() == 1:
        return say()
    said = [say() if is_first_worker() else None]
    distributed.broadcast_object_list(said)
    return cast("Said", said[0])


def require_equal(checksum: str) -> None:
    """Make sure that all workers have the same 64-bit checksum; nobody returns before all have called.

    Raises:
        RuntimeError: they have not, on each of them.
    """
    if worker_count() == 1:
        return
    own = torch.tensor([int(checksum, 16) - 2**63])
    all_of_them = [torch.empty_like(own) for _ in range(worker_count())]
    distributed.all_gather(all_of_them, own)
    if any(not torch.equal(other, own) for other in all_of_them):
        raise RuntimeError("the workers' weights differ; they must start again from one version")


def summed_over_workers(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers."""
    if worker_count() > 1:
        distributed.all_reduce(value)
    return value


def gather_gradients(
    rows: Tensor, gradient: Tensor, dense: list[nn.Parameter], loss: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum dense gradients, loss and item-row gradients over all workers; each worker gets the same result."""
    if worker_count() == 1:
        return rows, gradient, loss
    flat = torch.cat(
        [loss.view(1)] + [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in dense]
    )
    distributed.all_reduce(flat)
    loss, rest = flat[0], flat[1:]
    for parameter, part in zip(dense, rest.split([p.numel() for p in dense]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    world = worker_count()
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
    return rows, summed, loss


def shard(model: nn.Module, blocks: nn.ModuleList, precision: str) -> None:
    """Share the dense weights out among all workers (FSDP2): each block's, and those of the model that are no block's.

    The item table stays whole on every worker, because RowAdam owns it. Gradients are summed, not averaged: the loss
    is divided by the weight of all workers' targets already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (worker_count(),))
    # blocks are gathered in the precision in which they compute, and their gradients summed in full
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bfloat16" else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    untrained = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, mesh=mesh, ignored_params=untrained)
    for module in (*blocks, model):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # not as a factor of the reduction, which NCCL alone has


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each worker has a part of it; told by its method, for only `shard` should pay for importing DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each worker has a shard; every worker must ask for it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this worker has, in the same memory."""
    return tensor.to_local() if is_shard(tensor) else tensor


def placed_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value on the device of `tensor`, sharded where that is; every worker has the whole value."""
    value = value.to(tensor.device)
    if is_shard(tensor):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value
