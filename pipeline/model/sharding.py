"""Tensors of which each rank holds a part, and the same tensors whole: a checkpoint folder has whole ones only."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """`tensor` in one piece. A sharded one is gathered, so every rank must ask for it, and in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(tensor: Tensor) -> int:
    """Into how many parts `tensor` is cut: rank r holds that with the number r modulo this."""
    return int(tensor.device_mesh.shape[-1]) if isinstance(tensor, DTensor) else 1


def part_for(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole `tensor`, what a rank holds that holds `parameter`. Each cuts out its own part; nothing travels."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
