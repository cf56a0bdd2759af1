"""Which rank of a run this process is: from torchrun or, with one task per rank, from srun. No
torch.

torchrun   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
srun       SLURM_STEP_NUM_TASKS and others that srun sets. SLURM_NTASKS and SLURM_PROCID will not
           do: a batch script and the shell of salloc may have them too, and are no ranks (seen with
           SLURM 22.05)
neither    a single process
"""

import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from pipeline.errors import EXIT_USER, Left, UserError

# Launchers kill the other ranks once one has exited, so those that stay silent exit later than the
# one that reports.
SILENCE_S = 10.0


@dataclass(frozen=True)
class Placement:
    """One process among the ranks of a run, and among those of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    by_srun: bool = False


def rank() -> int:
    """The rank of this process; 0 for a single process."""
    return _claimed().rank


def is_alone() -> bool:
    """Whether this process is the only rank."""
    return _claimed().size == 1


def placement() -> Placement:
    """This process among the ranks. If two launchers contradict each other, every rank exits, the
    first with a UserError.
    """
    _refuse_mpi()
    _refuse_two_launchers()
    return _claimed()


def outlive_others() -> None:
    """Ignore SIGTERM from here on: launchers send it to the others once one rank has exited."""
    if _claimed().size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave(code: int, reason: str = "") -> NoReturn:
    """Exit with this code, even if another rank has exited already."""
    outlive_others()
    raise Left(code, reason)


def end_process(code: int) -> NoReturn:
    """Exit immediately: from any thread, without cleaning up, after what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def wait_for_turn() -> None:
    """Before an error that other ranks may have too: rank 0 reports it immediately, the first rank
    of another node later, the others last. Once one has reported and exited, its launcher ends
    those that wait.
    """
    # Not rank 0: one silence. Not the first rank of its node either: another one.
    for number in (rank(), _claimed().local_rank):
        if number:
            _stay_silent()
    outlive_others()


def leave_to_first() -> NoReturn:
    """Exit without a message: rank 0 has the same error, and reports it."""
    _stay_silent()
    leave(EXIT_USER)


def _stay_silent() -> None:
    signal.signal(signal.SIGTERM, lambda *_: leave(EXIT_USER))
    time.sleep(SILENCE_S)


def first_host(nodes: str) -> str:
    """The first name of a list such as `gpu[01-03,07],login`. Containers have no scontrol."""
    # Every bracket becomes its first number, and what follows the first comma outside goes.
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each node of a step: `4(x2),1` is 4, 4, 1."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in counts for _ in range(int(times or 1))]


def node_name() -> str:
    """This machine, by its name in SLURM if it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gpus_here() -> int:
    """The GPUs of this node that SLURM allocated to the job; 0 if there are none, or no SLURM."""
    return _number("SLURM_GPUS_ON_NODE", 0)


def was_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return _number("SLURM_RESTART_COUNT", 0) > 0


def cores_per_rank() -> int | None:
    """The cores srun gave each rank; None if it started none, or without --cpus-per-task."""
    return _number("SLURM_CPUS_PER_TASK", 0) or None if _claimed().by_srun else None


def _claimed() -> Placement:
    if "RANK" not in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_srun()
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    return Placement(_number("RANK", 0), _number("WORLD_SIZE", 1), local_rank=local_rank, local_size=local_size)


def _of_srun() -> Placement:
    """Ranks count node by node. SLURM_PROCID does so too, but not under --distribution=cyclic."""
    counts = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    node, local_rank = _number("SLURM_NODEID", 0), _number("SLURM_LOCALID", 0)
    before = sum(counts[:node])
    return Placement(before + local_rank, sum(counts), local_rank=local_rank, local_size=counts[node], by_srun=True)


def _refuse_two_launchers() -> None:
    """torchrun needs one task a node and all nodes; RANK set by hand may agree with srun."""
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS", 1), _number("SLURM_STEP_NUM_NODES", 1)
    if "RANK" not in os.environ or tasks == 1:
        return
    claimed, by_torchrun = _claimed(), "GROUP_WORLD_SIZE" in os.environ
    # torchrun reports its agents, one for each node. Set by hand, the ranks have to be at least as
    # many as the tasks.
    agents = _number("GROUP_WORLD_SIZE", claimed.size)
    if tasks == nodes and agents >= tasks:
        return
    slurms = _of_srun()
    if not by_torchrun and (claimed.rank, claimed.size) == (slurms.rank, slurms.size):
        return
    if _number("SLURM_PROCID", 0) or claimed.local_rank:
        leave_to_first()
    raise UserError(
        f"srun started {tasks} tasks on {nodes} node(s), but RANK={claimed.rank} and WORLD_SIZE={claimed.size} disagree: "
        f"for torchrun, start one task a node (srun --ntasks-per-node=1) and pass --nnodes={nodes}; for one task per rank, "
        "start no torchrun and unset RANK and WORLD_SIZE; in a shell of srun --pty, use --ntasks=1 or unset "
        "SLURM_STEP_NUM_TASKS"
    )


def _refuse_mpi() -> None:
    """Processes of mpirun that SLURM counts differently would each train alone, into one folder."""
    for size, rank_ in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        # srun --mpi=pmi2 sets PMI_SIZE too, to the number of its tasks.
        processes = _number(size, 1)
        if "RANK" in os.environ or processes in (1, _number("SLURM_STEP_NUM_TASKS", 1)):
            continue
        if _number(rank_, 0):
            leave_to_first()
        raise UserError(
            f"mpirun started {processes} processes ({size}), but none of them knows its rank: "
            "use torchrun, or srun with one task per rank"
        )


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def start_worker() -> None:
    """The first call in a worker process of multiprocessing: it leaves Ctrl-C to its parent, and
    exits with it.

    It lives here and not in a stage: unpickling it imports `pipeline`, which then finds the stages
    from any folder.
    """
    import threading  # here and below: one command in ten has workers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker waits on a pipe whose writing end it holds too: after kill -9 of the parent it would
    wait for ever.
    """
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
