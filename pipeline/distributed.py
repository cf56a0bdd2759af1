"""The ranks of a run: one process, or many under torchrun. Everything here also works, as a no-op, for one."""

import datetime
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.device import pick_device
from pipeline.errors import EXIT_USER, UserError

# Start-up waits for the slowest node to import torch from a shared filesystem; a step that hangs longer is dead.
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks. `local_size` counts the ranks on this machine."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place; every rank gets the same numbers."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def check_agreement(self, what: str, value: Any) -> None:
        """Ends every rank unless `value` is equal on all of them; rank 0 raises the UserError that says so."""
        values = self.gather(value)
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None and not self.is_first:
            sys.exit(EXIT_USER)
        if odd is not None:
            raise UserError(f"ranks disagree about {what}: rank 0 has {values[0]}, rank {odd} has {values[odd]}")

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """A UserError of any rank ends all of them: the first one to have it tells the user, the others stay silent.

        Nothing inside may wait for other ranks: one that failed before it would never come.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = [rank for rank, text in enumerate(self.gather(error and str(error))) if text is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            sys.exit(EXIT_USER)


def start(device_name: str) -> World:
    """Join the ranks torchrun started (gloo on CPU, NCCL on GPUs), or be a world of one. Raises UserError for the device."""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if ":" in device_name and local_size > 1:
        raise UserError(
            f"run.device={device_name} is one GPU for {local_size} ranks: use run.device=cuda, and each takes its own"
        )
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        if device.type == "mps":
            raise UserError(f"mps runs one process, found {size} ranks: use run.device=cpu, or start without torchrun")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=TIMEOUT,
            store=_store(rank, size),
            rank=rank,
            world_size=size,
        )
    return World(rank, size, local_size, device)


def _store(rank: int, size: int) -> Store:
    """Where the ranks find each other's addresses. After a restart by torchrun the last start's are still in there
    (https://github.com/pytorch/pytorch/issues/135712), so each start looks under its own number. Launchers of
    several nodes count their restarts apart; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun helps.
    """
    store: Store = next(rendezvous("env://", rank, size, timeout=TIMEOUT))[0]
    one_launcher = os.environ.get("GROUP_WORLD_SIZE") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_launcher else "0"
    return PrefixStore(f"start {start}", store)


def stop() -> None:
    """Leave the ranks. What still refers to the process group goes first: a finished rank was seen, rarely, to abort at exit."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
