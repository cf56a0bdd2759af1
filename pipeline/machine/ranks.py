"""The ranks of a run: one process, or many that torchrun or srun started. Everything here also
works for one, as a no-op.
"""

import datetime
import gc
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline import launch
from pipeline.errors import UserError, as_failure
from pipeline.launch import Placement
from pipeline.log import logger
from pipeline.machine.device import keep_freed_memory, memory_failure, pick_device
from pipeline.machine.meeting import Meeting, meeting
from pipeline.machine.watch import START_S, Fault, Watch

# Logged before the ranks meet: one of them is often why they meet at one site and hang at another.
NETWORK_SETTINGS = ("NCCL_", "GLOO_", "TORCH_")


@dataclass(frozen=True)
class World(Placement):
    """This process among the ranks, with its device, and what the ranks exchange small values in."""

    device: torch.device = field(kw_only=True)
    store: Store | None = field(default=None, kw_only=True)
    watch: Watch = field(default_factory=Watch, kw_only=True)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place, with the same result on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def check_agreement(self, what: str, value: Any) -> None:
        """Unless `value` is equal on all ranks, all exit; rank 0 raises a UserError."""
        values = self.gather(value)
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            error = UserError(f"ranks disagree about {what}: rank 0 has {values[0]}, rank {odd} has {values[odd]}")
            self.leave_to(Fault.of(error))
            raise error

    @contextmanager
    def fail_together(self, patience: datetime.timedelta | None = None) -> Iterator[None]:
        """An error of any rank ends all of them: the lowest rank that has one reports it, the others
        exit silently.

        Nothing inside may wait for other ranks: one that failed would never come. `patience`: how
        long the slowest may take, if that is longer than collectives wait.
        """
        failure: Exception | None = None
        if patience is not None:
            self.watch.phase = replace(self.watch.phase, limit_s=patience.total_seconds())
        try:
            yield
        except Exception as error:
            failure = memory_failure(error, self.device) or as_failure(error) or error
            traceback.clear_frames(error.__traceback__)  # which hold memory, and what should end before the process
        if patience is not None:
            self._await_all(patience)
            self.watch.enter("start-up")
        faults = self.gather(failure and Fault.of(failure, self.rank))
        if fault := next(filter(None, faults), None):
            self.leave_to(fault)
        if failure is not None:
            raise failure

    def start_watch(self, timeout_s: float) -> None:
        """Look out for ranks that fail, or take longer than `timeout_s` for a step. All call it together."""
        start = self.gather(time.time_ns())[0]  # a store may still have what an earlier start wrote
        if self.store is not None:
            self.watch.start(PrefixStore(f"watch {start}", self.store), timeout_s)

    def leave_to(self, fault: Fault) -> None:
        """Every rank exits but the fault's, which reports it. No rank exits before all ignore
        SIGTERM: the line would be lost.
        """
        launch.outlive_others()
        self.barrier()
        self.watch.is_agreed = True
        if self.rank != fault.rank:
            launch.leave(fault.code, str(fault))

    def _await_all(self, patience: datetime.timedelta) -> None:
        """A barrier for work that may take longer than collectives wait."""
        if self.store is not None:
            # The counter never goes back: its multiples of the world size number the barriers.
            waits, place = divmod(self.store.add("arrived", 1) - 1, self.size)
            if place == self.size - 1:
                self.store.set(f"all {waits}", "here")
            self.store.wait([f"all {waits}"], patience)


def start(device_name: str, timeout_s: float = START_S) -> World:
    """Join the ranks of torchrun or srun (gloo on CPU, NCCL on GPUs), or be a world of one.
    `timeout_s`: how long ranks wait for each other, if that is more than START_S.

    Raises UserError if the device is unavailable, or the ranks cannot meet.
    """
    place = launch.placement()
    device = _own_device(device_name, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if place.size == 1:
        return World(**vars(place), device=device)
    store = _join(place, device, datetime.timedelta(seconds=max(timeout_s, START_S)))
    return World(**vars(place), device=device, store=PrefixStore("world", store), watch=Watch(place))


def _join(place: Placement, device: torch.device, timeout: datetime.timedelta) -> Store:
    if device.type == "mps":
        raise UserError(f"mps supports one process, found {place.size} ranks: use run.device=cpu, or one process")
    backend = "nccl" if device.type == "cuda" else "gloo"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(NETWORK_SETTINGS)]
    if settings:
        logger.info("%d ranks over %s, with %s", place.size, backend, " ".join(settings))
    store = _srun_store(place, meeting(), timeout) if place.by_srun else _torchrun_store(place, timeout)
    # NCCL's flight recorder, which the watch prints after a hang: the last 2,000 collectives.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # Longer than the watch waits, as that can name the rank that is late.
    dist.init_process_group(backend, timeout=2 * timeout, store=store, rank=place.rank, world_size=place.size)
    return store


def _own_device(name: str, place: Placement) -> torch.device:
    """This rank's GPU, or the device all share. One rank of a node without it raises UserError."""
    # Under srun --gpus-per-task=1 each task sees its own GPU alone.
    sees_one = place.by_srun and torch.cuda.device_count() == 1
    try:
        if ":" in name and place.local_size > 1:
            raise UserError(
                f"device {name} is one GPU for {place.local_size} ranks: use device cuda, and each rank takes its own"
            )
        # The last rank's, so that all ranks of a node get the same verdict.
        device = pick_device(name, 0 if sees_one else place.local_size - 1)
        if name == "auto" and device.type == "cpu":
            _refuse_unseen_gpus()
    except UserError:
        launch.wait_for_turn()
        raise
    return pick_device(name, 0 if sees_one else place.local_rank)


def _refuse_unseen_gpus() -> None:
    """Without this a job would train on CPUs unnoticed, or hang: gloo here, NCCL on other nodes."""
    if gpus := launch.gpus_here():
        node = launch.node_name()
        raise UserError(
            f"SLURM allocated {gpus} GPU(s) to this job on {node}, but torch {torch.__version__} sees none: install a torch "
            f"built for them; if nvidia-smi sees none either, submit again with --exclude={node}, or set run.device=cpu"
        )


def _torchrun_store(place: Placement, timeout: datetime.timedelta) -> Store:
    """Where the ranks find each other's addresses. After a restart by torchrun those of the last
    start are still in it (https://github.com/pytorch/pytorch/issues/135712), so each start has its
    own prefix. Launchers of several nodes count their restarts separately; there,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun helps.
    """
    store: Store = next(rendezvous("env://", place.rank, place.size, timeout=timeout))[0]
    one_launcher = os.environ.get("GROUP_WORLD_SIZE") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_launcher else "0"
    return PrefixStore(f"start {start}", store)


def _srun_store(place: Placement, meeting: Meeting, timeout: datetime.timedelta) -> Store:
    """The same if srun started the ranks: rank 0 hosts it. Raises UserError if they cannot meet."""
    # The socket of the meeting, which has held the port since.
    listener = None if meeting.listener is None else meeting.listener.detach()
    try:
        return TCPStore(
            meeting.host, meeting.port, world_size=place.size, is_master=place.rank == 0, timeout=timeout,
            multi_tenant=True, master_listen_fd=listener,
        )  # fmt: skip
    except dist.DistError as error:
        raise UserError(
            f"the ranks cannot meet at {meeting.host}:{meeting.port} ({str(error).splitlines()[0]}): set MASTER_ADDR to an "
            "address of the first node that every node reaches"
        ) from None


def stop() -> None:
    """Part in order, without references to the group: with them a rank rarely aborted at exit."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
