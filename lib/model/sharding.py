"""Dense weights shared out among the workers that train together (FSDP2).

What it is made of is imported where somebody shards: it costs a process a second of CPU, and most never do.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from lib.model.distributed import worker_count

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


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
