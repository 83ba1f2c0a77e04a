"""Training on several workers: collectives over torch.distributed, and sharded dense weights (FSDP2).

Without a process group the world size is 1, and every collective returns what it was given. The FSDP2 modules are
imported where weights are sharded: they cost a process a second of CPU, and most processes never shard.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.batches import Batch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Value = TypeVar("Value")

# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def world_size() -> int:
    """Return the number of workers that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_rank_0() -> bool:
    """Return whether this worker has rank 0, or there is no other."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def local_batch(batch: Batch) -> Batch:
    """Return the histories that this worker trains on, of a batch that every worker holds."""
    if world_size() == 1:
        return batch
    part = batch[slice(distributed.get_rank(), None, world_size())]
    if len(part.rows):
        return part
    # fewer histories than workers: one that has no target, so that this worker joins the collectives
    return replace(batch[:1], target_weights=torch.zeros_like(batch.target_weights[:1]))


def broadcast_from_rank_0(compute: Callable[[], Value]) -> Value:
    """Return on every worker what `compute` returns on rank 0; the others do not call it."""
    if world_size() == 1:
        return compute()
    values = [compute() if is_rank_0() else None]
    distributed.broadcast_object_list(values)
    return cast("Value", values[0])


def require_equal(checksum: str) -> None:
    """Check that all workers have the same 64-bit checksum; a barrier, too.

    Raises:
        RuntimeError: they differ; on every worker.
    """
    if world_size() == 1:
        return
    own = torch.tensor([int(checksum, 16) - 2**63])
    if any(not torch.equal(other, own) for other in _all_gather(own)):
        raise RuntimeError("the workers' weights differ; they must start again from one version")


def all_reduce(value: Tensor) -> Tensor:
    """Sum a tensor over all workers, in place, and return it."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def _all_gather(value: Tensor) -> list[Tensor]:
    """Return every worker's tensor, all of one shape, by rank."""
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    distributed.all_gather(gathered, value)
    return gathered


def all_reduce_gradients(
    rows: Tensor, gradient: Tensor, dense: Sequence[nn.Parameter], loss: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum dense gradients, the loss and the gradients of item rows over all workers.

    Args:
        rows: (R,) distinct item rows that this worker has gradients of.
        gradient: (R, C) their gradients.
        dense: parameters whose `grad` becomes the sum, in place.
        loss: a scalar.

    Returns:
        The rows that any worker has, their summed gradients, and the summed loss.
    """
    if world_size() == 1:
        return rows, gradient, loss
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in dense]
    flat = all_reduce(torch.cat([loss.view(1), *(each.flatten() for each in gradients)]))  # one call for all of them
    loss, rest = flat[0], flat[1:]
    for parameter, part in zip(dense, rest.split([p.numel() for p in dense]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return *_all_reduce_rows(rows, gradient), loss


def _all_reduce_rows(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradients (R, C) of rows (R,), of which each worker has its own."""
    missing = int(torch.cat(_all_gather(torch.tensor([len(rows)], device=rows.device))).max()) - len(rows)
    # the padding is row 0, whose gradient is zero
    all_rows = torch.cat(_all_gather(F.pad(rows, (0, missing))))
    all_gradients = torch.cat(_all_gather(F.pad(gradient, (0, 0, 0, missing))))
    distinct, places = torch.unique(all_rows, return_inverse=True)
    return distinct, gradient.new_zeros(len(distinct), gradient.shape[1]).index_add_(0, places, all_gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights


def shard(model: nn.Module, blocks: nn.ModuleList, precision: str) -> None:
    """Shard the dense weights over all workers (FSDP2): each block is a unit, and the rest of the model is one.

    The item table stays whole on every worker, because RowAdam owns it. Gradients are summed, not averaged: the loss
    is divided by the weight of all workers' targets already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    # blocks are gathered in the precision in which they compute, and their gradients are summed in float32
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bfloat16" else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    untrained = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, mesh=mesh, ignored_params=untrained)
    for module in (*blocks, model):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the other way, a factor of the reduction, needs NCCL


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor; told by its method, because importing DTensor takes a second."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; an all-gather where it is sharded, so every worker must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this worker's shard of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def distribute_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a whole value on the device of `tensor`, sharded as `tensor` is; every worker has the whole value."""
    value = value.to(tensor.device)
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value
