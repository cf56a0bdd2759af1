"""Checkpoints written beside training: a copy in memory stops it for a moment, files, hashes and syncs do not."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.folder import State
from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.model.sharding import whole


class Saver:
    """Writes one checkpoint at a time in a thread of its own. On ranks other than 0 it has nothing to do."""

    def __init__(self) -> None:
        self.last_save_s: float | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] | None = None  # what was handed to the thread last
        self._memory: dict[str, Tensor] = {}

    def reserve(self, state: State) -> None:
        """Get the memory of the copies ready: its first use takes longer than copying (measured: 12 times as long)."""
        self._work = self._executor.submit(self._reserve, state)

    @property
    def unused(self) -> bool:
        return self._work is None

    def start(self, state: State, write: Callable[[State], Path]) -> None:
        """Copy `state`, then have `write` take the copy to the disk while the caller goes on.

        At most one is in flight: the one before is waited for. Where that one failed nothing is started, since
        `failed` and `wait` are about to tell.
        """
        started = time.monotonic()
        failed = self._work is not None and self._work.exception() is not None
        copy = self._copy(state)  # in any case: where `state` is sharded, the other ranks are handing in their parts
        if failed:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies out of the GPU were only asked for
        self._work = self._executor.submit(self._write, copy, write, time.monotonic() - started)

    @property
    def busy(self) -> bool:
        return self._work is not None and not self._work.done()

    @property
    def failed(self) -> bool:
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def wait(self) -> None:
        """Until what was started is on the disk. Raises what it died of."""
        if self._work is None:
            return
        try:
            self._work.result()
        except OSError as error:
            raise UserError(
                f"a checkpoint could not be written: {error}; mend that and start again: the run goes on from the one before"
            ) from error

    def close(self) -> None:
        """End the thread, after the checkpoint in flight: none may be left while the process goes down."""
        self._executor.shutdown()

    def _reserve(self, state: State) -> None:
        for kind, tensors in (("weights", state.weights), ("optimizer", state.optimizer)):
            for name, tensor in tensors.items():
                self._memory_for(f"{kind}.{name}", tensor).zero_()

    def _write(self, copy: State, write: Callable[[State], Path], stall_s: float) -> None:
        started = time.monotonic()
        try:
            folder = write(copy)
        except Exception as error:
            logger.error("a checkpoint could not be written: %s", error)  # at once: training asks after its step
            raise
        self.last_save_s = time.monotonic() - started
        logger.info("saved %s in %.2f s, for which training stood still for %.3f s", folder, self.last_save_s, stall_s)

    def _copy(self, state: State) -> State:
        def copied(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
            return {
                name: self._memory_for(f"{kind}.{name}", tensor).copy_(whole(tensor), non_blocking=tensor.is_cuda)
                for name, tensor in tensors.items()
            }

        return State(copied(state.weights, "weights"), copied(state.optimizer, "optimizer"))

    def _memory_for(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._memory:
            self._memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._memory[name]
