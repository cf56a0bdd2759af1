"""Checkpoints written while training continues: it stops for a copy in memory, not for files,
hashes and syncs.

    training thread   step | copy | step | step | step | ...
    writing thread               | files, hashes, sync, rename |

The copy is what makes the checkpoint one moment's: the optimizer changes its tensors in place at
the next step.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.folder import (
    Description,
    State,
    folder_name,
    read_description,
    write_checkpoint,
)
from pipeline.checkpoint.load import open_optimizer, read_optimizer
from pipeline.checkpoint.pointers import best_folder, checkpoint_folders, set_pointer
from pipeline.checkpoint.prune import prune_checkpoints
from pipeline.config.keys import Config
from pipeline.config.load import from_dict, to_dict
from pipeline.errors import UserError, reason_of
from pipeline.log import logger
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import gather
from pipeline.runs import Position, RunFolder
from pipeline.vocabulary.tokenizer import Tokenizer
from train.optimizer.groups import Optimizer
from train.spikes import StepGuard
from train.stop import FileRequest

# A save is given twice the time that the last one took; before any was made, this many seconds.
FIRST_SAVE_S = 30.0

ALIGNMENT_BYTES = 64  # of each tensor in the memory of the copies: a cache line


class Saver:
    """Writes one checkpoint at a time in a thread. Used by rank 0 only."""

    def __init__(self) -> None:
        self.last_save_s: float | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copies: State | None = None  # every save uses the same memory
        self._allocation: Future[None] | None = None
        self._save: Future[None] | None = None  # the one handed to the thread last

    def reserve(self, state: State) -> None:
        """Touch the memory of the copies once, while training continues: the first use takes 12
        times as long as a copy.
        """
        self._allocation = self._thread.submit(self._allocate, state)

    @property
    def reserved(self) -> bool:
        return self._allocation is not None

    @property
    def busy(self) -> bool:
        return any(work is not None and not work.done() for work in (self._allocation, self._save))

    @property
    def failed(self) -> bool:
        return self._save is not None and self._save.done() and self._save.exception() is not None

    def check(self) -> None:
        """Raises what went wrong with the last save, if that has ended."""
        if self.failed:
            self.wait()

    def start(self, state: State, write: Callable[[State], Path]) -> None:
        """Copy `state`, then have `write` put the copy on the disk while the caller continues.

        At most one save is in flight: the one before is waited for. If that one failed nothing is
        started, since `failed` and `wait` are about to report it.
        """
        started = time.monotonic()
        if self._allocation is not None:
            self._allocation.result()
        before_failed = self._save is not None and self._save.exception() is not None
        # In any case, as copying a sharded state takes all ranks, and the others are handing in
        # their shards.
        copy = self._copy(state)
        if before_failed:
            return
        # Not by a run on the CPU of a machine with a GPU.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # copies from the GPU have only been queued
        self._save = self._thread.submit(self._write, copy, write, time.monotonic() - started)

    def wait(self) -> None:
        """Until the last save is on the disk. Raises what went wrong with it."""
        if self._save is None:
            return
        try:
            self._save.result()
        except OSError as error:
            raise UserError(
                f"a checkpoint could not be written, the one before is intact: {reason_of(error)}"
            ) from error

    def close(self) -> None:
        """End the thread, after the checkpoint in flight: the process must not end in the middle of
        one.
        """
        self._thread.shutdown()

    def _allocate(self, state: State) -> None:
        for tensors in vars(self._memory_for(state)).values():
            for copy in tensors.values():
                copy.zero_()

    def _write(self, copy: State, write: Callable[[State], Path], stall_s: float) -> None:
        started = time.monotonic()
        folder = write(copy)
        self.last_save_s = time.monotonic() - started
        logger.info("saved %s in %.2f s; training waited %.3f s for the copy", folder, self.last_save_s, stall_s)

    def _copy(self, state: State) -> State:
        copies = self._memory_for(state)
        for kind, tensors in vars(state).items():
            for name, tensor in tensors.items():
                gather(tensor, vars(copies)[kind][name])
        return copies

    def _memory_for(self, state: State) -> State:
        """Tensors as in `state`, complete and on the CPU, which a save may overwrite."""
        if self._copies is None or _shapes(self._copies) != _shapes(state):
            self._copies = None  # freed first: there are never two
            self._copies = State(**{kind: _new_copies(tensors) for kind, tensors in vars(state).items()})
        return self._copies


def _shapes(state: State) -> dict[str, dict[str, torch.Size]]:
    return {kind: {name: tensor.shape for name, tensor in tensors.items()} for kind, tensors in vars(state).items()}


def _new_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised tensors of the same shapes and types, all in one piece of CPU memory."""
    ends = list(accumulate(-(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for tensor in tensors.values()))
    memory = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
    if device := next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None):
        with torch.cuda.device(device):  # by default a thread's is GPU 0, whose memory a CUDA context would take
            _pin(memory)
    return {
        name: memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), begin in zip(tensors.items(), (0, *ends), strict=False)
    }


def _pin(memory: Tensor) -> None:
    """From a GPU only a copy to pinned memory runs while the GPU does other work.

    torch's allocator of pinned memory would round the size up to a power of two.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        logger.warning(
            "checkpoints are copied to memory that is not pinned (CUDA error %d): training waits longer", error
        )


def choose_best(checkpoints: Path, eval_tokens: int) -> float:
    """Point `best` at the lowest val loss that was measured on as many tokens, and return that loss;
    infinity where there is none. Also after the best of all was set aside, or damaged.
    """
    losses = {}
    for folder in checkpoint_folders(checkpoints):
        with suppress(UserError, OSError):  # a damaged one cannot be the best
            description = read_description(folder)
            comparable = from_dict(description.config).eval.tokens == eval_tokens
            if comparable and description.val_loss is not None and math.isfinite(description.val_loss):
                losses[folder] = description.val_loss
    if not losses:
        return math.inf
    best = min(losses, key=losses.__getitem__)
    if best_folder(checkpoints) != best:
        set_pointer(checkpoints, "best", best)
    return losses[best]


@dataclass
class Checkpoints:
    """What a run saves and restores. `dataset` is the fingerprint of its mixture."""

    config: Config
    world: World
    model: LanguageModel
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: StepGuard
    tokenizer: Tokenizer
    dataset: str
    best_val_loss: float = math.inf  # of those on the disk; rank 0 alone looks there
    began_at: Position = field(default_factory=Position)  # zero, or where the run branched from another
    trained_s: float = 0.0  # of all steps up to now, those of earlier starts included
    saver: Saver = field(default_factory=Saver)
    last_step: int = 0  # of the checkpoint started last, or restored

    def __post_init__(self) -> None:
        self.save_now = FileRequest(self.run.save_now)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.run_dir)

    @property
    def requested(self) -> bool:
        """Whether the user asks for one by creating `save-now`; not while the save in flight may be
        about to remove it.
        """
        return self.world.is_first and not self.saver.busy and self.save_now.exists()

    @property
    def save_s(self) -> float:
        """Seconds that a save may take."""
        return 2 * (FIRST_SAVE_S if self.saver.last_save_s is None else self.saver.last_save_s)

    @property
    def left_s(self) -> float:
        """Seconds of training that train.max_minutes leaves, by this rank's clock."""
        return 60 * (self.config.train.max_minutes or math.inf) - self.trained_s

    def reserve(self) -> None:
        """Have the saver get its memory: after the first good step, when the optimizer has its state."""
        if self.world.is_first and not self.saver.reserved and any(self.optimizer.state.values()):
            self.saver.reserve(State.of(self.model, self.optimizer))

    def save(self, step: int, val_loss: float | None) -> None:
        """Have rank 0 write a checkpoint while training continues; `latest` will name it, and
        `best` if it is the best.
        """
        best = val_loss is not None and math.isfinite(val_loss) and val_loss < self.best_val_loss
        if val_loss is not None and best:
            self.best_val_loss = val_loss
        self.last_step = step
        state = State.of(self.model, self.optimizer)
        if not self.world.is_first:
            state.hand_in()
            return
        description = self.describe(step, val_loss)
        requested = self.save_now.exists()

        def write(state: State) -> Path:
            folder = write_checkpoint(
                self.run.checkpoints, state, self.model, self.tokenizer, description=description, best=best
            )
            if requested:
                self.save_now.remove()
            keep = self.config.checkpoint
            prune_checkpoints(self.run.checkpoints, keep.keep, keep.keep_every_steps)
            return folder

        self.saver.start(state, write)

    def describe(self, step: int, val_loss: float | None) -> Description:
        return Description(
            step=step, tokens=self.began_at.at(step, self.config).tokens, config=to_dict(self.config),
            tokenizer=self.tokenizer.spec(), dataset=self.dataset, began_at=asdict(self.began_at), val_loss=val_loss,
            scaler=self.scaler.state_dict(), bad_steps=self.guard.bad_steps, grad_norms=self.guard.norms,
            trained_s=self.trained_s,
        )  # fmt: skip

    def save_last_good(self, step: int) -> Path:
        """The checkpoint of the last step that reached the weights, from which they have not changed
        since: written, and waited for, unless the run has it. All ranks call it together.
        """
        self.wait()  # it may be in flight
        folder = self.run.checkpoints / folder_name(step)
        if not self.world.gather(folder.is_dir())[0]:
            self.guard.bad_steps = 0
            self.save(step, None)
            self.wait()
        return folder

    def restore(self, folder: Path, began_at: Position) -> int:
        """Restore, into a run that began at a position, what a verified checkpoint holds besides the
        weights; return its step. The rest follows from the seed and the step. Rank 0 reads, and all
        ranks call it together.
        """
        found, tensors = None, None
        with self.world.fail_together():
            if self.world.is_first:
                found = read_description(folder)
                before, name = found.config["optimizer"]["name"], self.config.optimizer.name
                if before == name:
                    tensors = open_optimizer(self.optimizer, self.model, folder)
                else:  # in a branch: momentum and moments of the one mean nothing to the other
                    logger.warning(
                        "optimizer.name %s -> %s: its state starts from zero, the weights do not", before, name
                    )
        description: Description
        description, has_state = self.world.gather((found, bool(tensors)))[0]
        if has_state:
            read_optimizer(self.optimizer, self.model, tensors)
        if description.scaler:  # empty where the run was not in float16
            self.scaler.load_state_dict(description.scaler)
        self.guard.restore(description.grad_norms, description.bad_steps)
        self.last_step, self.began_at, self.trained_s = description.step, began_at, description.trained_s
        return description.step

    def save_rest(self, step: int) -> None:
        """Before a run ends by a fault: the steps since the last checkpoint, waited for. A failure is logged
        alone, as the fault matters more.
        """
        if step > self.last_step:
            self.save(step, None)
        if self.world.is_first and not self.saver.failed:
            try:
                self.saver.wait()
            except UserError as error:
                logger.warning("%s", error)

    def wait(self) -> None:
        """Until rank 0 has written the last one. All ranks call it together, and a failure ends all
        of them.
        """
        with self.world.fail_together():
            self.saver.wait()
