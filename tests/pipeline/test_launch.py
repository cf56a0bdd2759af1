"""Which rank a process is: tables of what launchers set, and steps of srun on a real two-node SLURM."""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster, write_config
from torch.distributed import HashStore

from pipeline import launch
from pipeline.errors import UserError
from pipeline.launch import Placement
from pipeline.machine import ranks as distributed
from pipeline.machine.device import share_threads
from train.parallel import should_compile

TORCHRUN = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
# What SLURM 22.05 sets: the allocation's in every shell of a job, the step's in what srun starts.
SALLOC = {
    "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip
BATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "1110"}
ONE_TASK = BATCH | {
    "SLURM_NTASKS": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip


def step(task: int, counts: str, node: int, local: int) -> dict[str, str]:
    per_node = launch.tasks_per_node(counts)
    own = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    shape = {"SLURM_STEP_NUM_TASKS": str(sum(per_node)), "SLURM_STEP_NUM_NODES": str(len(per_node))}
    return ONE_TASK | own | shape | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "SILENCE_S", 0.0)
    terminated = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, terminated)


def started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Placement:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    placement = launch.placement()
    assert launch.rank() == placement.rank
    return placement


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Placement()),
        (TORCHRUN, Placement(9, 16, 1, 8)),
        (SALLOC, Placement()),
        (BATCH, Placement()),
        (ONE_TASK, Placement()),
        (step(9, "8(x2)", 1, 1), Placement(9, 16, 1, 8, by_srun=True)),
        (step(2, "2,1", 1, 0), Placement(2, 3, 0, 1, by_srun=True)),
        # Numbered in turn over the nodes: the second node's first task is task 1, and rank 4 of 4 + 1.
        (step(1, "4,1", 1, 0), Placement(4, 5, 0, 1, by_srun=True)),
        (TORCHRUN | step(1, "1(x2)", 1, 0), Placement(9, 16, 1, 8)),
        (TORCHRUN | ONE_TASK, Placement(9, 16, 1, 8)),
        # RANK and its kin, set by hand to what SLURM says.
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"} | step(9, "8(x2)", 1, 1), Placement(9, 16, 1, 1)),
        ({"PMI_SIZE": "16", "PMI_RANK": "9"} | step(9, "8(x2)", 1, 1), Placement(9, 16, 1, 8, by_srun=True)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Placement()),
    ],
    ids=[
        "nothing", "torchrun", "salloc", "batch", "srun -n1", "srun", "uneven", "cyclic", "torchrun on each node",
        "torchrun in srun -n1", "by hand", "srun --mpi=pmi2", "mpirun -n1",
    ],
)  # fmt: skip
def test_each_launcher_is_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: Placement
) -> None:
    assert started(monkeypatch, variables) == wanted


def of_torchrun(agents: int, local_rank: int = 0) -> dict[str, str]:
    return TORCHRUN | {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank), "GROUP_WORLD_SIZE": str(agents)}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (of_torchrun(16) | step(0, "8(x2)", 0, 0), "srun started 16 tasks on 2 node(s), but RANK=0 and WORLD_SIZE=16"),
        (of_torchrun(1) | step(0, "1(x2)", 0, 0), "and pass --nnodes=2"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | step(0, "8(x2)", 0, 0), "unset RANK and WORLD_SIZE"),
        (of_torchrun(1) | step(0, "8", 0, 0), "in a shell of srun --pty, use --ntasks=1 or unset SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "0"} | BATCH, "mpirun started 16 processes"),
        ({"PMI_SIZE": "16", "PMI_RANK": "0"} | step(0, "1(x2)", 0, 0), "or srun with one task per rank"),
    ],
    ids=[
        "torchrun in every task", "a torchrun alone on each node", "left over", "torchrun in a shell of srun --pty", "mpirun",
        "mpirun over srun",
    ],
)  # fmt: skip
def test_launchers_that_contradict_each_other_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        started(monkeypatch, variables)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "variables",
    [
        of_torchrun(16, local_rank=3) | step(0, "8(x2)", 0, 0),
        of_torchrun(16) | step(5, "8(x2)", 0, 5),
        {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "2"},
    ],
    ids=["another rank of the first task", "another task", "mpirun"],
)
def test_only_the_first_process_refuses_aloud(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as left:
        started(monkeypatch, variables)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n[1-2]", "n1"),
        ("gpu-a[01-03,07],b1", "gpu-a01"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("x5", "x5"),
        ("a,b[2-3]", "a"),
        ("c[08,10-12].site", "c08.site"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


def test_tasks_that_srun_bound_to_cores_do_not_share_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    started(monkeypatch, step(0, "4(x2)", 0, 0))
    assert share_threads(4) == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")  # the eight are this task's own, of the node's 32
    assert share_threads(4) == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")  # not bound: the eight are the node's
    assert share_threads(4) == 3
    for name, value in of_torchrun(1).items():
        monkeypatch.setenv(name, value)
    assert share_threads(4) == 2  # the task was torchrun's
    assert taken == [2, 8, 3, 2]


def test_without_a_c_compiler_nothing_is_compiled_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: Triton would fail at the first step."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert should_compile("auto", torch.device("cuda")) == (False, "Triton finds no C compiler ($CC, gcc, clang)")
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert should_compile("auto", torch.device("cuda"))[0]


def test_without_pythons_headers_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a slim image: the launchers that Triton builds include Python.h."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setenv("CC", "/opt/bin/cc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    header = tmp_path / "include" / "Python.h"
    expected = False, f"Triton needs {header}: install python3-dev"
    assert should_compile("auto", torch.device("cuda")) == expected
    header.parent.mkdir()
    header.touch()
    assert should_compile("auto", torch.device("cuda"))[0]


def test_one_gpu_for_several_ranks_is_refused_in_words_of_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "placement", lambda: Placement(size=2, local_size=2))
    with pytest.raises(
        UserError, match=r"^device cuda:0 is one GPU for 2 ranks: use device cuda, and each rank takes its own"
    ):
        distributed.start("cuda:0")


@pytest.mark.parametrize("seen", [1, 8], ids=["bound to its own", "all visible"])
def test_a_rank_of_srun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    """With --gpus-per-task=1 SLURM hides the others. Stand-ins: there is no GPU here."""
    taken: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("pipeline.machine.ranks.meeting", lambda: None)
    monkeypatch.setattr("pipeline.machine.ranks._srun_store", lambda *_: HashStore())
    started(monkeypatch, step(11, "8(x2)", 1, 3))
    world = distributed.start("auto")
    assert taken == [world.device] == [torch.device("cuda", 0 if seen == 1 else 3)]
    assert (world.rank, world.size, world.local_rank, world.local_size) == (11, 16, 3, 8)


def test_more_ranks_than_gpus_are_refused_by_the_first_though_it_would_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    started(monkeypatch, of_torchrun(1))
    with pytest.raises(UserError, match="cuda:7 was requested, but this machine has 4 CUDA"):
        distributed.start("auto")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")


@pytest.mark.parametrize(
    ("variables", "waits"),
    [({}, 0), (step(0, "8(x2)", 0, 0), 0), (step(8, "8(x2)", 1, 0), 1), (step(9, "8(x2)", 1, 1), 2)],
    ids=["alone", "first", "first of its node", "another"],
)
def test_a_job_with_gpus_does_not_fall_back_to_the_cpu_and_one_rank_says_so_before_the_others(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None, variables: dict[str, str], waits: int
) -> None:
    """One whose own GPU alone is broken speaks too, in the end."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.launch.time.sleep", waited.append)
    started(monkeypatch, variables)
    for device in ("auto", "cuda"):
        with pytest.raises(UserError) as refusal:
            distributed.start(device)
        assert f"torch {torch.__version__} sees no" in str(refusal.value)
        assert len(waited) == waits
        waited.clear()


def test_a_node_without_its_gpus_is_named_and_the_cpu_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    assert distributed.start("cpu").device.type == "cpu"
    with pytest.raises(
        UserError, match=r"^SLURM allocated 8 GPU\(s\) to this job on n2, .*--exclude=n2, or set run.device=cpu"
    ):
        distributed.start("auto")


# --- a real SLURM ---


def srun(cluster: Cluster, *command: str, nodes: int = 2, tasks: int = 2, **variables: str) -> tuple[int, str]:
    """The exit code and the stderr of a step with `tasks` tasks on each of `nodes`."""
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--kill-on-bad-exit=1"]
    environment = cluster.environment | {"MASTER_ADDR": "127.0.0.1"} | variables
    done = subprocess.run(
        ["srun", *options, *command], cwd=cluster.folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def train(cluster: Cluster, *arguments: str) -> list[str]:
    return [cluster.environment["PYTHON"], "-m", "pipeline", "train", *arguments]


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "error: " in line and not line.startswith(("srun: ", "slurmstepd"))]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train", "quickstart"], ["eval"]], ids=" ".join)
def test_a_first_node_that_does_not_resolve_is_one_line_that_names_it(cluster: Cluster, command: list[str]) -> None:
    ours = [cluster.environment["PYTHON"], "-m", "pipeline", *command]
    code, stderr = srun(cluster, *ours, tasks=1, MASTER_ADDR="")
    assert (code, len(complaints(stderr))) == (2, 1), stderr
    assert "error: node n1 cannot resolve 'n1', where the ranks meet" in stderr
    assert "set MASTER_ADDR" in stderr


@pytest.mark.campaign
def test_a_node_that_does_not_see_its_gpus_is_named_once_and_none_waits_for_it(cluster: Cluster) -> None:
    write_config(cluster.folder, "lost-gpus")
    command = shlex.join(train(cluster, "lost-gpus.toml", "run.device=auto"))
    lost = f"[[ $SLURMD_NODENAME == n1 ]] || export SLURM_GPUS_ON_NODE=8; exec {command}"
    code, stderr = srun(cluster, "bash", "-c", lost, CUDA_VISIBLE_DEVICES="")
    assert code and len(complaints(stderr)) == 1, stderr
    assert "[rank 2] error: SLURM allocated 8 GPU(s) to this job on n2, but torch" in stderr


@pytest.mark.slow
def test_torchrun_in_every_task_is_refused_in_one_line(cluster: Cluster) -> None:
    torchrun = [cluster.environment["PYTHON"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    code, stderr = srun(cluster, *torchrun, "-m", "pipeline", "train", "quickstart", nodes=1)
    assert code != 0
    ours = [line for line in complaints(stderr) if "srun started" in line]
    assert len(ours) == 1, stderr
    assert "error: srun started 2 tasks on 1 node(s), but RANK=0 and WORLD_SIZE=1 disagree" in ours[0]
