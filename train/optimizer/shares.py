"""Work on a stack of matrices, shared out over the ranks: each computes some, all get what they need.

2 replicas of matrices A B C         each rank computes   A B | C    and gathers the others' results
2 shards of rows, A1 B1 C1 | A2 B2 C2    exchange them to   A B | C    and, computed, back again
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from pipeline.model.sharding import is_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Compute = Callable[[Tensor], Tensor]


def over_ranks(stack: Tensor, like: Tensor, compute: Compute) -> Tensor:
    """`compute` of each of the n matrices in `stack`, (n, rows of this rank, C), as this rank holds
    them: complete, or its shard of the rows where `like`, one of their parameters, is sharded. All
    ranks call it together, and each computes every matrix of its share from the same bits.
    """
    if is_shard(like):
        return _over_shards(stack, like, compute)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _over_replicas(stack, compute)
    return compute(stack)


def _over_replicas(stack: Tensor, compute: Compute) -> Tensor:
    ranks, count = dist.get_world_size(), len(stack)
    share = -(-count // ranks)
    # Zero matrices fill up the last shares: a collective takes equal parts.
    mine = compute(pad(stack, (0, 0, 0, 0, 0, ranks * share - count)).chunk(ranks)[dist.get_rank()])
    everyones = mine.new_empty(ranks * share, *mine.shape[1:])
    dist.all_gather_into_tensor(everyones, mine.contiguous())
    return everyones[:count]


def _over_shards(stack: Tensor, like: "DTensor", compute: Compute) -> Tensor:
    """A rank gets the rows of its share alone: an all-gather would send every rank all of them."""
    mesh, rows, count = like.device_mesh, like.shape[0], len(stack)
    group, ranks = mesh.get_group(mesh.ndim - 1), mesh.shape[-1]
    # FSDP2 shards rows as torch.chunk divides them: the last shards may have fewer, or none.
    share, shard = -(-count // ranks), -(-rows // ranks)

    def exchanged(parts: Tensor) -> Tensor:
        """parts[i] sent to rank i, for what each rank has sent here."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    padded = pad(stack, (0, 0, 0, shard - stack.size(1), 0, ranks * share - count))
    received = exchanged(padded.view(ranks, share, shard, -1))
    computed = compute(received.transpose(0, 1).flatten(1, 2)[:, :rows])
    parts = pad(computed, (0, 0, 0, ranks * shard - rows)).view(share, ranks, shard, -1).transpose(0, 1)
    return exchanged(parts.contiguous()).flatten(0, 1)[:count, : stack.size(1)]
