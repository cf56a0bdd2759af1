"""Tensors that are sharded over ranks, and the same tensors complete: a checkpoint folder has
complete ones only.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Elements of one message while shards travel to rank 0, which receives one at a time: 64 MB of
# float32.
MESSAGE_ELEMENTS = 1 << 24


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    # Importing the type takes half of a second, which is spared where FSDP2 has not imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor. A sharded one is gathered, so every rank must call this, in the same
    order.
    """
    return tensor.full_tensor() if is_shard(tensor) else tensor


def gather(tensor: Tensor, target: Tensor | None) -> None:
    """Copy the complete tensor into `target`, which rank 0 passes and no other rank does. Every
    rank must call this, in the same order.

    Unlike `whole` it leaves the complete tensor on rank 0 alone, and on its device one message.
    """
    if not is_shard(tensor):
        if target is not None:
            target.copy_(tensor, non_blocking=tensor.is_cuda)
        return
    group = tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)
    ranks = dist.get_process_group_ranks(group)
    # Other groups hold copies of the same shards (hsdp).
    if ranks[0] != 0:
        return
    local = tensor.to_local().flatten()
    if target is None:
        for message in _messages(local):
            _pass_on(dist.isend, message, ranks[0], group)
        return
    # FSDP2 shards rows, as torch.chunk divides them: the last shards may be smaller, or empty.
    rows = -(-tensor.shape[0] // len(ranks))
    shards = [target[rank * rows : (rank + 1) * rows].flatten() for rank in range(len(ranks))]
    shards[0].copy_(local, non_blocking=local.is_cuda)
    for rank, shard in zip(ranks[1:], shards[1:], strict=True):
        for piece in _messages(shard):
            message = torch.empty_like(piece, device=local.device)
            _pass_on(dist.irecv, message, rank, group)
            piece.copy_(message, non_blocking=local.is_cuda)


def _pass_on(operation: Callable[..., Any], message: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """To or from another rank. As a batch of one, which NCCL sends over the group's communicator: alone it would
    get one for each pair of ranks, of hundreds of MB on rank 0's GPU, and first for a run's first checkpoint.
    """
    for work in dist.batch_isend_irecv([dist.P2POp(operation, message, rank, group)]):
        work.wait()


def _messages(shard: Tensor) -> tuple[Tensor, ...]:
    """A flat shard in messages; none for an empty one."""
    return torch.split(shard, MESSAGE_ELEMENTS) if shard.numel() else ()


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    return tensor.to_local() if is_shard(tensor) else tensor


def parts(tensor: Tensor) -> int:
    """How many parts `tensor` is sharded into: rank r holds the part with the number r modulo this."""
    return int(tensor.device_mesh.shape[-1]) if is_shard(tensor) else 1


@torch.no_grad()
def scatter(target: Tensor, tensor: Tensor | None) -> None:
    """Fill `target` on every rank, its shard where it is sharded, from the complete `tensor`, which
    rank 0 passes and no other rank does. Every rank must call this, in the same order.
    """
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        # The others pass a tensor as well, but only its shape is looked at.
        complete = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        complete = complete if tensor is None else complete.copy_(tensor)
        target.copy_(distribute_tensor(complete, target.device_mesh, target.placements, src_data_rank=0))
        return
    if tensor is not None:
        target.copy_(tensor)
    if dist.is_initialized():
        dist.broadcast(target, 0)
