"""Tensors that are sharded over ranks, and the same tensors complete: a checkpoint folder has
complete ones only.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor. A sharded one is gathered, so every rank must call this, in the same
    order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(tensor: Tensor) -> int:
    """How many parts `tensor` is sharded into: rank r holds the part with the number r modulo this."""
    return int(tensor.device_mesh.shape[-1]) if isinstance(tensor, DTensor) else 1


def part_for(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A complete `tensor` sharded as `parameter` is. Each rank slices its own part; nothing is
    communicated.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    # Without a source rank torch assumes that all ranks hold the same tensor, and broadcasts nothing.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
