"""The ranks of a run: one process, or many that torchrun or srun started. Everything here also works, as a no-op, for one."""

import datetime
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline import launch
from pipeline.errors import EXIT_USER, UserError
from pipeline.launch import Placement
from pipeline.log import logger
from pipeline.machine.device import pick_device

# Start-up waits for the slowest node to import torch from a shared filesystem; a step that hangs longer is dead.
TIMEOUT = datetime.timedelta(minutes=30)
# Told before the ranks meet: one of them is often why they meet at one site and hang at another.
NETWORK_SETTINGS = ("NCCL_", "GLOO_", "TORCH_")


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks. `local_rank` and `local_size`: among those on this machine."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    local_rank: int = 0
    store: Store | None = None

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
        if odd is not None:
            self.leave_to(0)
            raise UserError(f"ranks disagree about {what}: rank 0 has {values[0]}, rank {odd} has {values[odd]}")

    @contextmanager
    def fail_together(self, patience: datetime.timedelta | None = None) -> Iterator[None]:
        """A UserError of any rank ends all of them: the first one to have it tells the user, the others stay silent.

        Nothing inside may wait for other ranks: one that failed before it would never come. `patience`: how long the slowest
        may take, where collectives would not wait for it.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        if patience is not None:
            self._await_all(patience)
        failed = [rank for rank, text in enumerate(self.gather(error and str(error))) if text is not None]
        if failed:
            self.leave_to(failed[0])
        if error is not None:
            raise error

    def leave_to(self, speaker: int) -> None:
        """End every rank but `speaker`, which is to say why. None leaves before all outlive others: the line would be lost."""
        launch.outlive_others()
        self.gather(None)
        if self.rank != speaker:
            launch.leave(EXIT_USER)

    def _await_all(self, patience: datetime.timedelta) -> None:
        """A barrier for work that may take longer than TIMEOUT, after which collectives give up."""
        if self.store is not None:
            waits, place = divmod(self.store.add("arrived", 1) - 1, self.size)
            if place == self.size - 1:
                self.store.set(f"all {waits}", "here")
            self.store.wait([f"all {waits}"], patience)


def start(device_name: str) -> World:
    """Join the ranks that torchrun or srun started (gloo on CPU, NCCL on GPUs), or be a world of one.

    Raises UserError for the device, and where the ranks cannot meet.
    """
    place = launch.placement()
    device = _own_device(device_name, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.size == 1:
        return World(place.rank, 1, place.local_size, device)
    if device.type == "mps":
        raise UserError(
            f"mps runs one process, found {place.size} ranks: use run.device=cpu, or start without torchrun"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(NETWORK_SETTINGS)]
    if settings:
        logger.info("%d ranks over %s, with %s", place.size, backend, " ".join(settings))
    store = _srun_store(place) if place.by_srun else _torchrun_store(place)
    dist.init_process_group(
        backend,
        timeout=TIMEOUT,
        store=store,
        rank=place.rank,
        world_size=place.size,
    )
    return World(place.rank, place.size, place.local_size, device, place.local_rank, PrefixStore("world", store))


def _own_device(name: str, place: Placement) -> torch.device:
    """This rank's GPU, or the device that all share. What is wrong with a node one of its ranks says, as a UserError."""
    # Under srun --gpus-per-task=1 each task sees its own GPU alone.
    sees_one = place.by_srun and torch.cuda.device_count() == 1
    try:
        if ":" in name and place.local_size > 1:
            raise UserError(
                f"device {name} is one GPU for {place.local_size} ranks: use device cuda, and each takes its own"
            )
        # Of the node's last rank, so that all find the same.
        device = pick_device(name, 0 if sees_one else place.local_size - 1)
        if name == "auto" and device.type == "cpu":
            _refuse_unseen_gpus()
    except UserError:
        launch.wait_for_turn()
        raise
    return pick_device(name, 0 if sees_one else place.local_rank)


def _refuse_unseen_gpus() -> None:
    """Else the job would train on a CPU without a word; among nodes that do see theirs it would hang, gloo beside NCCL."""
    if gpus := launch.gpus_here():
        node = launch.node_name()
        raise UserError(
            f"SLURM gave this job {gpus} GPU(s) on {node}, but torch {torch.__version__} sees none: install a torch built "
            f"for them; where nvidia-smi sees none either, submit again with --exclude={node}; run.device=cpu does without"
        )


def _torchrun_store(place: Placement) -> Store:
    """Where the ranks find each other's addresses. After a restart by torchrun the last start's are still in there
    (https://github.com/pytorch/pytorch/issues/135712), so each start looks under its own number. Launchers of
    several nodes count their restarts apart; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun helps.
    """
    store: Store = next(rendezvous("env://", place.rank, place.size, timeout=TIMEOUT))[0]
    one_launcher = os.environ.get("GROUP_WORLD_SIZE") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_launcher else "0"
    return PrefixStore(f"start {start}", store)


def _srun_store(place: Placement) -> Store:
    """The same where srun started the ranks: rank 0 keeps it. Raises UserError where they cannot meet."""
    host, port = launch.meeting_point()
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        launch.wait_for_turn()  # the first node may not know its own name either
        raise UserError(
            f"{host}, where the ranks are to meet, does not resolve on {launch.node_name()} ({error.strerror}): "
            "set MASTER_ADDR to an address of the first node that every node reaches"
        ) from None
    logger.info("waiting for %d ranks of srun at %s:%d", place.size, host, port)
    try:
        store: Store = next(rendezvous(f"tcp://{host}:{port}", place.rank, place.size, timeout=TIMEOUT))[0]
        return store
    except dist.DistError as error:
        raise UserError(
            f"the ranks cannot meet at {host}:{port} ({str(error).splitlines()[0]}): "
            "set MASTER_ADDR to an address of the first node that every node reaches, MASTER_PORT to a port free there"
        ) from None


def stop() -> None:
    """Leave the ranks. What still refers to the process group goes first: a finished rank was seen, rarely, to abort at exit."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
