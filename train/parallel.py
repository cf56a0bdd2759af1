"""How ranks share one model: a copy each (ddp), a part each (fsdp), or parts inside a node and copies over nodes (hsdp).

Loss, gradient norm and steps are those of one rank under each of them, and the checkpoint folder is the same: a run may go
on under another one, with another number of ranks. Sharding is PyTorch's FSDP2: a block's weights are whole only while it
computes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole


def mesh_of(strategy: str, world: World) -> DeviceMesh | None:
    """The ranks between which weights are cut up, one row a node under hsdp; None where every rank holds all of them.

    All ranks call it together. Raises UserError where the nodes differ in size.
    """
    if strategy == "ddp" or world.size == 1:
        return None
    if strategy == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    sizes = sorted(set(world.gather(world.local_size)))
    with world.fail_together():
        if len(sizes) > 1 or world.size % sizes[0]:
            raise UserError(
                f"parallel.strategy=hsdp wants as many ranks on every node, found {world.size} ranks and nodes of "
                f"{' and '.join(map(str, sizes))}: start torchrun with one --nproc-per-node, or set parallel.strategy=fsdp"
            )
    shape = (world.size // sizes[0], sizes[0])
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def place(model: LanguageModel, world: World, mesh: DeviceMesh | None, dtype: torch.dtype, compiled: bool) -> None:
    """Bring the model from the CPU to the device, whole or, with a mesh, this rank's part of it."""
    if mesh is not None:
        shard(model, mesh, dtype, compiled)
        return
    model.to(world.device)
    if compiled:
        model.compile()


def shard(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype, compiled: bool) -> None:
    """Leave this rank its part of every parameter: block by block, so that no device ever holds the whole model.

    Raises UserError for float16.
    """
    if dtype == torch.float16:
        raise UserError(
            "float16 trains under parallel.strategy=ddp only, as its loss scaling does not look across shards: "
            "set run.dtype=bfloat16 or float32, or parallel.strategy=ddp"
        )
    # Autocast would turn a block's matrices into `dtype` before each product: gathered as such, half as much travels. The
    # residual stream stays float32, as without sharding; so what is outside of the blocks is gathered in float32.
    in_blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if compiled:  # the forward pass alone: what FSDP does around it cannot be traced
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    fully_shard(model, mesh=mesh)


def replicate(model: LanguageModel, world: World) -> LanguageModel | DistributedDataParallel:
    """What to call in training, once every copy or part is filled. The copies are made equal: they start as rank 0's."""
    if isinstance(model, FSDPModule):
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            if parameter.device_mesh.ndim == 2:
                dist.broadcast(parameter.to_local().detach(), group=parameter.device_mesh.get_group(0), group_src=0)
        return model
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def reduce_gradients(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Ranks average their gradients in the backward pass of a step's last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Let go of the gathered weights that a forward pass keeps for a backward pass, where none comes."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_model(model: LanguageModel, world: World) -> LanguageModel | None:
    """On rank 0 the model with all of its weights: itself, or of a sharded one a copy on the CPU. All ranks call it."""
    if not isinstance(model, FSDPModule):
        return model if world.is_first else None
    copy = LanguageModel.uninitialised(model.config, model.vocab_size) if world.is_first else None
    copies = dict(copy.named_parameters()) if copy else {}
    for name, parameter in model.named_parameters():
        gathered = whole(parameter.detach())
        if copy:
            copies[name].detach().copy_(gathered)
    return copy


def in_words(strategy: str, mesh: DeviceMesh | None, world: World) -> str:
    """The log's line on who holds what."""
    if mesh is None:
        return "one rank holds everything" if world.size == 1 else f"ddp: {world.size} whole copies"
    copies, parts = (1, *mesh.shape)[-2:]
    return f"{strategy}: weights, gradients and optimizer state in {parts} parts, {copies} time(s)"
