"""What to change where memory is short: the largest micro-batch that fits, found by trying."""

from collections.abc import Iterable
from traceback import clear_frames

import torch

from pipeline.config.keys import Config
from pipeline.machine.device import autocast, memory_failure
from train import parallel
from train.data.batches import model_inputs
from train.trainer import Trainer


def explained(error: Exception, trainer: Trainer) -> Exception:
    """`error` or, where memory was short in a step, one that says which micro-batch would fit."""
    config, world = trainer.config, trainer.world
    if memory_failure(error, world.device) is None:
        return error
    clear_frames(error.__traceback__)  # which hold the activations
    fitting = largest_fitting(trainer, smaller_micro_batches(config, world.size))
    remedy = "use a smaller model.block_size, or more GPUs with parallel.strategy=fsdp"
    if fitting is not None:
        remedy = (
            f"set train.micro_batch_size={fitting}, the largest that fits; train.tokens_per_step keeps the batch equal"
        )
    if config.model.activation_checkpointing == "none":
        remedy += "; or set model.activation_checkpointing=block"
    where = f"step {trainer.step} with train.micro_batch_size={config.train.micro_batch_size}"
    return memory_failure(error, world.device, f"{where}: {remedy}") or error


def smaller_micro_batches(config: Config, world_size: int) -> list[int]:
    """The sizes below train.micro_batch_size with which tokens_per_step still divides, largest first."""
    per_rank = config.train.tokens_per_step // config.model.block_size // world_size
    return [size for size in range(config.train.micro_batch_size - 1, 0, -1) if per_rank % size == 0]


def largest_fitting(trainer: Trainer, sizes: Iterable[int]) -> int | None:
    """The first of `sizes` whose gradients the device has memory for; None if it has for none. Of a
    sharded model, which takes all ranks to gather, one of half as many sequences is taken to fit.
    """
    parameters = list(trainer.model.parameters())
    if parallel.is_sharded(trainer.model):
        return next((size for size in sizes if 2 * size <= trainer.config.train.micro_batch_size), None)
    trainer.optimizer.zero_grad(set_to_none=True)
    for size in sizes:
        if trainer.world.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            take_gradients(trainer, size, parameters)
            return size
        except Exception as error:
            clear_frames(error.__traceback__)
    return None


def take_gradients(trainer: Trainer, size: int, parameters: list[torch.nn.Parameter]) -> None:
    """What a step needs memory for, with a micro-batch of `size` sequences; nothing is kept."""
    # The first update has yet to allocate the optimizer's moments.
    moments = [] if trainer.optimizer.state else [trainer.optimizer.initial_state(p) for p in parameters]
    windows = torch.zeros(size, trainer.config.model.block_size + 1, dtype=torch.long)
    # Not compiled, which takes more memory, but compiling for another size would take minutes.
    with torch.compiler.set_stance("force_eager"), autocast(trainer.world.device, trainer.dtype):
        loss = trainer.model(*model_inputs(windows, trainer.config, trainer.mixture, trainer.world.device))
    # Not `backward`: it would call the hooks by which ranks exchange gradients.
    torch.autograd.grad(loss, parameters)
    del moments
