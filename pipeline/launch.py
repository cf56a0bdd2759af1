"""Which rank of a run this process is, and where the ranks meet: what torchrun says or, with one task a rank, srun. No torch.

torchrun   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
srun       SLURM_STEP_NUM_TASKS and its kin, which srun sets. SLURM_NTASKS and SLURM_PROCID will not do: a batch script
           and the shell of salloc may have them too, and are no ranks (seen with SLURM 22.05)
neither    a world of one
"""

import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from pipeline.errors import EXIT_USER, UserError

# Ports from 32768 on are the kernel's to give away; slurm/train.sbatch takes from the same range.
FIRST_PORT, PORTS, PORTS_PER_JOB = 20000, 12000, 16
# Launchers kill the others once one rank has left, so those that stay silent leave later than the one that speaks.
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
    """This process's number among the ranks of its run; 0 where it is alone."""
    return _claimed().rank


def placement() -> Placement:
    """This process among the ranks. Where two launchers contradict each other, ends them all, the first with a UserError."""
    _refuse_mpi()
    _refuse_two_launchers()
    return _claimed()


def outlive_others() -> None:
    """From here on this rank ends by itself: a launcher tells the others to end once one of them has left."""
    if _claimed().size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """Exit with this code, also where another rank has left already."""
    outlive_others()
    sys.exit(code)


def wait_for_turn() -> None:
    """Before a word about what other ranks may have too: the first rank speaks at once, the first of another node later, the
    others last. Once one has spoken and left, its launcher ends those that wait.
    """
    for number in (rank(), _claimed().local_rank):
        if number:
            _stay_silent()
    outlive_others()


def leave_to_first() -> NoReturn:
    """End this rank without a word: the first one has the same trouble, and says so."""
    _stay_silent()
    leave(EXIT_USER)


def _stay_silent() -> None:
    signal.signal(signal.SIGTERM, lambda *_: leave(EXIT_USER))
    time.sleep(SILENCE_S)


def meeting_point() -> tuple[str, int]:
    """The host and port at which rank 0 of a step waits for the others: the step's first node, unless the user says
    otherwise. Each start and each step of a job has a port of its own.
    """
    host = os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_STEP_NODELIST"])
    own = _number("SLURM_RESTART_COUNT", 0) + _number("SLURM_STEP_ID", 0)
    port = FIRST_PORT + (_number("SLURM_JOB_ID", 0) * PORTS_PER_JOB + own) % PORTS
    return host, int(os.environ.get("MASTER_PORT") or port)


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list such as `gpu[01-03,07],login`. Not by scontrol, which containers lack."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def tasks_per_node(text: str) -> list[int]:
    """How many tasks each node of a step has: `4(x2),1` is 4, 4, 1."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in counts for _ in range(int(times or 1))]


def node_name() -> str:
    """This machine, as SLURM calls it where it is one of its nodes."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gpus_here() -> int:
    """The GPUs of this node that SLURM gave the job; 0 where it gave none, or is not there."""
    return _number("SLURM_GPUS_ON_NODE", 0)


def was_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return _number("SLURM_RESTART_COUNT", 0) > 0


def cores_per_rank() -> int | None:
    """The cores that srun gave each rank, where it started them and was told how many."""
    return _number("SLURM_CPUS_PER_TASK", 0) or None if _claimed().by_srun else None


def _claimed() -> Placement:
    if "RANK" not in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_srun()
    return Placement(
        _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    )


def _of_srun() -> Placement:
    """Ranks count node by node. SLURM_PROCID does so too, but not under --distribution=cyclic."""
    counts = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    node, local_rank = _number("SLURM_NODEID", 0), _number("SLURM_LOCALID", 0)
    return Placement(sum(counts[:node]) + local_rank, sum(counts), local_rank, counts[node], by_srun=True)


def _refuse_two_launchers() -> None:
    """Torchrun is one task a node and knows all of them; RANK set by hand may also be srun's own count."""
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS", 1), _number("SLURM_STEP_NUM_NODES", 1)
    if "RANK" not in os.environ or tasks == 1:
        return
    told, by_torchrun = _claimed(), "GROUP_WORLD_SIZE" in os.environ
    agents = _number("GROUP_WORLD_SIZE", told.size)
    if tasks == nodes and agents >= tasks:
        return
    slurms = _of_srun()
    if not by_torchrun and (told.rank, told.size) == (slurms.rank, slurms.size):
        return
    if _number("SLURM_PROCID", 0) or told.local_rank:
        leave_to_first()
    raise UserError(
        f"srun started {tasks} tasks on {nodes} node(s), but RANK={told.rank} and WORLD_SIZE={told.size} say otherwise: "
        f"torchrun wants one task a node (srun --ntasks-per-node=1) and to be told of all nodes (--nnodes={nodes}); "
        "one task a rank wants no torchrun, and RANK and WORLD_SIZE unset; a shell of srun --pty wants --ntasks=1, or "
        "SLURM_STEP_NUM_TASKS unset"
    )


def _refuse_mpi() -> None:
    """Processes of mpirun that SLURM does not count alike would each train alone, into one folder."""
    variables = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
    for size, rank_ in variables:
        processes = _number(size, 1)
        if "RANK" in os.environ or processes in (1, _number("SLURM_STEP_NUM_TASKS", 1)):
            continue
        if _number(rank_, 0):
            leave_to_first()
        raise UserError(
            f"mpirun started {processes} processes ({size}), and none of them is told its rank: "
            "start them with torchrun, or with srun and one task a rank"
        )


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def start_worker() -> None:
    """The first call in a worker process of multiprocessing: it leaves Ctrl-C to its parent, and exits with it.

    It lives here and not in a stage: unpickling it imports `pipeline`, which then finds the stages from any folder.
    """
    import threading  # here and below: one command in ten has workers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker waits on a pipe whose writing end it holds too: after kill -9 of the parent it would wait for ever."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
