"""How ranks share one model: a replica each (ddp), a shard each (fsdp), or shards inside a node and
replicas over nodes (hsdp).

    ddp, 4 ranks        fsdp, 4 ranks       hsdp, 2 nodes of 2 ranks
    ABCD ABCD ABCD ABCD   A   B   C   D       AB  CD | AB  CD

Loss, gradient norm and steps are those of one rank under each of them, and the checkpoint folder is
the same: a run may resume under another strategy, with another number of ranks. Sharding is
PyTorch's FSDP2: a block's weights are gathered only while it computes.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import gather, scatter

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

MIN_TRITON_CAPABILITY = (7, 0)  # Volta; Triton generates no code for older GPUs


def mesh_of(strategy: str, world: World) -> DeviceMesh | None:
    """The ranks over which weights are sharded, one row per node under hsdp; None where every rank
    holds all of them.

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
                f"parallel.strategy=hsdp expects the same number of ranks on every node, got {world.size} ranks and nodes of "
                f"{' and '.join(map(str, sizes))}: start torchrun with one --nproc-per-node, or set parallel.strategy=fsdp"
            )
    # Ranks are numbered node by node, so that a row of the mesh is a node, and gathering weights
    # stays inside it.
    shape = (world.size // sizes[0], sizes[0])
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def should_compile(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether `run.compile` means torch.compile here, and why."""
    if name != "auto":
        return name == "on", "as configured"
    if device.type != "cuda":
        # Measured on two cores: as fast as eager after 15 to 40 s of compiling.
        return False, f"no gain on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_TRITON_CAPABILITY:
        return False, f"Triton needs compute capability 7.0, found {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return False, "Triton finds no C compiler ($CC, gcc, clang)"
    # The launcher that Triton compiles for each kernel includes it; slim images come without.
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return False, f"Triton needs {header}: install python3-dev"
    return True, "CUDA with Triton"


def allocate(
    model: LanguageModel, world: World, mesh: DeviceMesh | None, *, dtype: torch.dtype, compiled: bool
) -> None:
    """Give a model without memory its uninitialised weights on the device: all of them or, with a
    mesh, this rank's shard of every parameter.

    Raises UserError for shards in float16.
    """
    if compiled:
        model.compile_blocks()
    if mesh is None:
        model.allocate(world.device)
        return
    if dtype == torch.float16:
        # One rank may overflow where the others do not, and only all of them together may skip the
        # step.
        raise UserError(
            "float16 needs parallel.strategy=ddp, as its loss scaling does not look across shards: "
            "set run.dtype=bfloat16 or float32, or parallel.strategy=ddp"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, as it takes a second

    # Autocast would cast a block's matrices to `dtype` before each product: gathered as such, half
    # as many bytes travel. The residual stream stays float32, as without sharding; so what is
    # outside of the blocks is gathered in float32.
    in_blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    # Embeddings, head and last norm: what no block took.
    fully_shard(model, mesh=mesh)
    model.allocate(world.device)


def distribute(complete: LanguageModel | None, model: LanguageModel) -> None:
    """Give every rank's replica or shards the weights of rank 0's `complete` model, on the CPU; the
    others have None. All ranks call it.

    So one rank reads a checkpoint, and no other one needs host memory for the model.
    """
    weights = dict(complete.named_parameters()) if complete else {}
    for name, parameter in model.named_parameters():
        scatter(parameter.detach(), weights[name].detach() if complete else None)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of every weight. In the middle of a forward pass the parameters
    themselves do not tell: they are gathered.
    """
    return _is_fsdp(model)


def _is_fsdp(model: nn.Module) -> "TypeGuard[FSDPModule]":
    module = sys.modules.get("torch.distributed.fsdp")  # which `allocate` imports
    return module is not None and isinstance(model, module.FSDPModule)


def replicate(model: LanguageModel, world: World) -> LanguageModel | DistributedDataParallel:
    """What to call in training, once every replica or shard has its weights."""
    if is_sharded(model) or world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    # Gradients that are views of the buckets that travel: one copy of them less in memory. The
    # model's one buffer, a mask, never changes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the last option, 2.9 knows no other name
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def settle_buckets(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> None:
    """Two throw-away passes, which leave no trace. After its first backward pass DDP sorts gradients
    into new buckets, by the order in which they came, and so adds them up in another order: a
    resumed run of 3 or more ranks would take its first step with other rounding than the run that
    was not interrupted.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for dropout
        for _ in range(2):
            torch.autograd.backward(loss())
            model.zero_grad(set_to_none=True)


def reduce_gradients(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Ranks average their gradients in the backward pass of a step's last micro-batch only."""
    if _is_fsdp(model):
        model.set_requires_gradient_sync(now)
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass keeps for a backward pass, where none follows."""
    if _is_fsdp(model):
        model.reshard()


def whole_model(model: LanguageModel, world: World) -> LanguageModel | None:
    """On rank 0 the model with all of its weights: itself, or a copy of a sharded one on the CPU.
    All ranks call it.
    """
    if not is_sharded(model):
        return model if world.is_first else None
    copy = LanguageModel.uninitialised(model.config, model.vocab_size) if world.is_first else None
    copies = dict(copy.named_parameters()) if copy else {}
    for name, parameter in model.named_parameters():
        gather(parameter.detach(), copies[name].detach() if copy else None)
    if world.device.type == "cuda":
        torch.cuda.synchronize()  # copies from the GPU have only been queued
    return copy


def format_strategy(strategy: str, mesh: DeviceMesh | None, world: World) -> str:
    """Which rank holds what, for the log."""
    if mesh is None:
        return "one rank holds everything" if world.size == 1 else f"ddp: {world.size} replicas"
    replicas, shards = (1, *mesh.shape)[-2:]
    return f"{strategy}: weights, gradients and optimizer state in {shards} shards, {replicas} replica(s)"
