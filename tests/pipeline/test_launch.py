"""Who a process is among the ranks: tables of what launchers set, and whole steps of srun on a real two-node SLURM."""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program
from safetensors.torch import load_file
from slurm_cluster import Cluster, check_same_weights, losses, status_of, wait_until, write_config
from torch.distributed import HashStore

from pipeline import launch
from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.launch import Placement
from pipeline.machine import ranks as distributed
from pipeline.machine.device import share_threads, should_compile

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
        (of_torchrun(1) | step(0, "1(x2)", 0, 0), "to be told of all nodes (--nnodes=2)"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | step(0, "8(x2)", 0, 0), "RANK and WORLD_SIZE unset"),
        (of_torchrun(1) | step(0, "8", 0, 0), "a shell of srun --pty wants --ntasks=1, or SLURM_STEP_NUM_TASKS unset"),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "0"} | BATCH, "mpirun started 16 processes"),
        ({"PMI_SIZE": "16", "PMI_RANK": "0"} | step(0, "1(x2)", 0, 0), "with srun and one task a rank"),
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


def test_the_meeting_point_is_the_first_node_and_the_users_word_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, step(9, "8(x2)", 1, 1))
    host, port = launch.meeting_point()
    assert host == "n1"
    # The rule of slurm/train.sbatch: below 32768, where the kernel's own begin, and another one for each step and start.
    assert port == 20000 + (70 * 16 + 3) % 12000
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launch.meeting_point() == ("n1", port + 1)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch.meeting_point() == ("10.0.0.7", 29500)


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


def test_one_gpu_for_several_ranks_is_refused_in_words_of_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "placement", lambda: Placement(size=2, local_size=2))
    with pytest.raises(
        UserError, match=r"^device cuda:0 is one GPU for 2 ranks: use device cuda, and each takes its own"
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
    monkeypatch.setattr("pipeline.machine.ranks._srun_store", lambda _: HashStore())
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
    with pytest.raises(UserError, match=r"^SLURM gave this job 8 GPU\(s\) on n2, .*--exclude=n2; run.device=cpu"):
        distributed.start("auto")


# --- the batch script ---


def test_the_script_warns_the_ranks_and_not_itself() -> None:
    subprocess.run(["bash", "-n", str(TRAIN_SRUN)], check=True)
    directives = re.findall(r"^#SBATCH --(.*)$", TRAIN_SRUN.read_text(), flags=re.MULTILINE)
    assert {"signal=USR2@300", "requeue", "open-mode=append", "output=%x-%j.out"} <= set(directives)


# --- a real SLURM ---

TRAIN_SRUN = ROOT / "slurm" / "train-srun.sbatch"
# The tenth step of the first start ends once a signal has come; every rank runs this when Python starts.
SLOW_FROM_STEP_TEN = """
import os, pathlib, time
if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from train.stop import StopRequest
    real, asked = StopRequest.reason, []
    def reason(self, *seconds):
        asked.append(1)
        while len(asked) == 10 and not self._signal:
            pathlib.Path("step-ten").touch()
            time.sleep(0.05)
        return real(self, *seconds)
    StopRequest.reason = reason
"""


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


@pytest.fixture(scope="module")
def srun_run(cluster: Cluster) -> Path:
    """The folder of a run that two nodes trained without torchrun, two ranks on each."""
    config = write_config(cluster.folder, "srun")
    code, stderr = srun(cluster, *train(cluster, "srun.toml"), GLOO_SOCKET_IFNAME="lo")
    assert code == 0, stderr
    assert stderr.count("4 rank(s) on cpu") == stderr.count("done at step 30") == 1  # one rank talks
    assert len(re.findall(r"^4 ranks over gloo, with .*GLOO_SOCKET_IFNAME=lo", stderr, flags=re.MULTILINE)) == 1
    assert len(re.findall(r"^waiting for 4 ranks of srun at 127.0.0.1:[23]\d{4}$", stderr, flags=re.MULTILINE)) == 1
    return config.run_dir


@pytest.mark.slow
def test_srun_alone_trains_to_the_weights_of_one_process(cluster: Cluster, srun_run: Path) -> None:
    alone = write_config(cluster.folder, "srun-alone")
    assert run_program("train", "srun-alone.toml", cwd=cluster.folder).returncode == 0
    assert losses(srun_run) == pytest.approx(losses(alone.run_dir), rel=1e-4)
    check_same_weights(srun_run, alone.run_dir)


@pytest.mark.slow
def test_each_node_stages_the_data_on_a_disk_of_its_own_and_the_run_is_the_same(
    cluster: Cluster, srun_run: Path
) -> None:
    config = write_config(cluster.folder, "srun-staged")
    command = shlex.join(train(cluster, "srun-staged.toml")) + ' --stage "$PWD/disk-$SLURMD_NODENAME"'
    code, stderr = srun(cluster, "bash", "-c", f"exec {command}")
    assert code == 0, stderr
    for node in ("n1", "n2"):
        (copy,) = (cluster.folder / f"disk-{node}").glob("tiny-*")
        assert (copy / ".staged").read_text() == load_manifest(cluster.folder / "data" / "tiny").fingerprint
    weights = Path("checkpoints", "step_00000030", "model.safetensors")
    found, wanted = load_file(config.run_dir / weights), load_file(srun_run / weights)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_under_srun_a_mistake_is_one_line_and_its_exit_code_survives(cluster: Cluster) -> None:
    write_config(cluster.folder, "mistaken", dataset="nowhere")
    code, stderr = srun(cluster, *train(cluster, "mistaken.toml"), tasks=1)
    assert (code, len(complaints(stderr))) == (2, 1), stderr
    assert "error: no dataset at" in complaints(stderr)[0]
    code, stderr = srun(cluster, *train(cluster, "quickstart", "trian.max_steps=3"))
    assert (code, complaints(stderr)) == (2, ["error: unknown section [trian] (did you mean train?)"]), stderr
    write_config(cluster.folder, "diverges")
    code, stderr = srun(
        cluster, *train(cluster, "diverges.toml", "optimizer.lr=1e30", "train.max_bad_steps=2"), tasks=1
    )
    assert (code, len(complaints(stderr))) == (3, 1), stderr


@pytest.mark.slow
def test_a_first_node_that_does_not_resolve_is_one_line_that_names_it(cluster: Cluster) -> None:
    code, stderr = srun(cluster, *train(cluster, "quickstart"), tasks=1, MASTER_ADDR="")
    assert (code, len(complaints(stderr))) == (2, 1), stderr
    assert "error: n1, where the ranks are to meet, does not resolve" in stderr
    assert "set MASTER_ADDR" in stderr


@pytest.mark.campaign
def test_a_node_that_does_not_see_its_gpus_is_named_once_and_none_waits_for_it(cluster: Cluster) -> None:
    write_config(cluster.folder, "lost-gpus")
    command = shlex.join(train(cluster, "lost-gpus.toml", "run.device=auto"))
    lost = f"[[ $SLURMD_NODENAME == n1 ]] || export SLURM_GPUS_ON_NODE=8; exec {command}"
    code, stderr = srun(cluster, "bash", "-c", lost, CUDA_VISIBLE_DEVICES="")
    assert code and len(complaints(stderr)) == 1, stderr
    assert "[rank 2] error: SLURM gave this job 8 GPU(s) on n2, but torch" in stderr


@pytest.mark.slow
def test_torchrun_in_every_task_is_refused_in_one_line(cluster: Cluster) -> None:
    torchrun = [cluster.environment["PYTHON"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    code, stderr = srun(cluster, *torchrun, "-m", "pipeline", "train", "quickstart", nodes=1)
    assert code != 0
    ours = [line for line in complaints(stderr) if "srun started" in line]
    assert len(ours) == 1, stderr
    assert "error: srun started 2 tasks on 1 node(s), but RANK=0 and WORLD_SIZE=1 say otherwise" in ours[0]


def start_slow_run(cluster: Cluster, name: str) -> tuple[str, Path]:
    """A job at its tenth step, which ends once a signal has come, so that the run is not over before; and the run's folder."""
    config = write_config(cluster.folder, name)
    slow = cluster.folder / "slow"
    slow.mkdir(exist_ok=True)
    (slow / "sitecustomize.py").write_text(SLOW_FROM_STEP_TEN)
    (cluster.folder / "step-ten").unlink(missing_ok=True)
    variables = f"--export=ALL,MASTER_ADDR=127.0.0.1,PYTHONPATH={slow}:{ROOT}"
    options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", variables)
    job = cluster.call("sbatch", *options, str(TRAIN_SRUN), f"{name}.toml")
    wait_until("step ten is at work", (cluster.folder / "step-ten").exists)
    return job, config.run_dir


@pytest.mark.campaign
def test_scancel_ends_a_job_of_srun_for_good_and_saves(cluster: Cluster) -> None:
    job, run_dir = start_slow_run(cluster, "srun-cancelled")
    cluster.call("scancel", job)
    end = cluster.wait(job)
    wait_until("the nodes are cleared", lambda: cluster.node_states() == ["idle", "idle"])
    assert (cluster.job(job)["JobState"], end["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    assert status_of(run_dir) == ("stopped", 10), cluster.log(job)


@pytest.mark.campaign
def test_the_warning_signal_to_the_ranks_saves_requeues_and_leaves_the_curve_as_it_was(
    cluster: Cluster, srun_run: Path
) -> None:
    """Sent as --signal=USR2@300 does it: to every process of the step, and not to the batch script."""
    job, run_dir = start_slow_run(cluster, "srun-warned")
    cluster.call("scancel", "--signal=USR2", job)
    cluster.wait_requeued(job)
    assert status_of(run_dir) == ("stopped", 10), cluster.log(job)
    cluster.go_on(job)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert status_of(run_dir) == ("done", 30)
    assert losses(run_dir) == pytest.approx(losses(srun_run), rel=1e-4)
