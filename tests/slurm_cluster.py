"""A real SLURM for the tests: two nodes on this machine, and what its tests have in common.

`conftest.py` registers it, so any test file may ask for the fixtures `cluster` and `two_node_run`.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import ROOT, tiny_config, write_dataset

from pipeline.config.keys import Config
from pipeline.config.load import to_toml

TRAIN, PREPARE, MERGE, SAMPLE, EVAL = SCRIPTS = [
    ROOT / "slurm" / f"{name}.sbatch" for name in ("train", "prepare", "merge", "sample", "eval")
]
DEADLINE_S = 300.0
LONG_STEPS = 150


def wait_until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {DEADLINE_S:.0f} s still waiting: {what}")
        time.sleep(0.1)


def status_of(run_dir: Path) -> tuple[str, int]:
    status = json.loads((run_dir / "status.json").read_text())
    return status["state"], status["step"]


PACKAGES = ["slurm-client", "slurmd", "slurmctld", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15"]

SLURM_CONF = """\
ClusterName=test
# Ports are made of job numbers, and a second such SLURM may be running on this machine.
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# No cgroups and no system daemon: any container will do.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# Not the usual 30: a save takes a moment, but the machine of the tests may be busy.
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# It looks for work once a second rather than once a minute.
SchedulerParameters=sched_interval=1,bf_interval=1
# A node may claim more processors than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=DEFAULT Nodes=n1,n2 MaxTime=INFINITE State=UP
PartitionName=all Default=YES GraceTime=120
PartitionName=graceless
PartitionName=urgent PriorityTier=10
"""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; `folder` is where jobs are submitted, with the dataset data/tiny in it."""

    environment: dict[str, str]
    folder: Path

    def call(self, *command: str) -> str:
        """The output of a SLURM command."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *arguments: str, nodes: int = 1, options: Sequence[str] = ()) -> str:
        """The number of the job; `options` are those of sbatch."""
        placed = ["--cpus-per-task=1", *([] if nodes == 1 else [f"--nodes={nodes}"])]
        return self.call("sbatch", "--parsable", *placed, *options, str(script), *arguments)

    def wait_requeued(self, job: str) -> None:
        def is_requeued() -> bool:
            found = self.job(job)
            return found["JobState"] == "PENDING" and found["Restarts"] != "0"

        wait_until(f"job {job} is queued again", is_requeued)

    def go_on(self, job: str) -> None:
        """Start a job that was queued again. SLURM holds one back for two minutes."""
        self.wait_requeued(job)
        # Nodes refuse a start in the very second in which they ended the last.
        wait_until("the nodes are cleared", lambda: self.node_states() == ["idle", "idle"])
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def processes(self, job: str) -> dict[int, dict[str, str]]:
        """The environments of the job's processes on both nodes, which are this machine, by their ids."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(line.partition("=")[::2] for line in lines)
                element = f"{environment.get('SLURM_ARRAY_JOB_ID')}_{environment.get('SLURM_ARRAY_TASK_ID')}"
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and job in (environment.get("SLURM_JOB_ID"), element):
                    found[int(folder.name)] = environment
        return found

    def rank(self, job: str, rank: int) -> int:
        """The id of the process that is this rank of the job's training: the task itself, not what it started."""
        tasks = {pid: env for pid, env in self.processes(job).items() if env.get("SLURM_PROCID") == str(rank)}
        return min(pid for pid, env in tasks.items() if "SLURM_STEP_NUM_TASKS" in env)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def node_states(self) -> list[str]:
        """Of both nodes, such as idle; empty while nothing answers."""
        command = ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout.split()

    def wait(self, job: str) -> dict[str, str]:
        """The job's end; a job that waits to be started again is still at it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(f"job {job} ends", lambda: self.job(job)["JobState"] in over)
        return self.job(job)

    def log(self, job: str) -> str:
        path = next(self.folder.glob(f"*-{job}.out"), None)
        return path.read_text() if path else ""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    installed = all(Path("/usr/sbin", name).exists() for name in ("slurmctld-wlm", "slurmd-wlm", "munged"))
    root = Path("/") if installed else unpack_packages(folder / "packages")
    plugins = next(root.glob("usr/lib/*/slurm-wlm"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment = inherited | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{root / 'usr/bin'}:{root / 'usr/sbin'}:{os.environ['PATH']}",
        # For the jobs: this interpreter, this checkout, a core for each rank. The nodes' names do not resolve.
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    if (
        not installed
    ):  # else the jobs' Python would take the system's libraries, a libpython of another version with them
        environment["LD_LIBRARY_PATH"] = f"{plugins}:{plugins.parent}"
    host, user = socket.gethostname().partition(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
    configuration = SLURM_CONF.format(
        folder=folder, host=host, user=user, plugins=plugins, ports=free_ports(3), first_job=os.getpid()
    )
    (folder / "slurm.conf").write_text(configuration)
    # Nothing here uses cgroups, but SLURM looks for them; asked for the old kind, it does so only once it needs them.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    work = folder / "work"
    write_dataset(work / "data" / "tiny")
    running = Cluster(environment, work)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        start_daemons(folder, running, str(next(root.glob("usr/sbin/slurmstepd*"))), daemons)
        yield running
        subprocess.run(["scancel", f"--user={user}"], env=environment, check=False)
        wait_until("all jobs are gone", lambda: not running.call("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def give_up(reason: str) -> NoReturn:
    """Skips, but fails where `.ci/run` wants a real SLURM."""
    if os.environ.get("PIPELINE_TESTS_NEED_SLURM"):
        pytest.fail(reason)
    pytest.skip(reason)


def unpack_packages(folder: Path) -> Path:
    """The root of the unpacked packages. Gives up where they cannot be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        give_up("a real SLURM is taken from Debian's packages, and this system has no apt-get")
    root = folder / "root"
    root.mkdir(parents=True)
    got = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    if got.returncode:
        give_up(f"apt-get cannot download SLURM: {got.stderr.strip()[-300:]}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    return root


def free_ports(count: int) -> list[int]:
    with_port = [socket.socket() for _ in range(count)]
    for one in with_port:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in with_port]
    for one in with_port:
        one.close()
    return ports


def start_daemons(folder: Path, cluster: Cluster, stepd: str, daemons: list["subprocess.Popen[bytes]"]) -> None:
    """munged, slurmctld and two slurmd as children, appended to `daemons`."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {name: str(folder / f"munge.{name}") for name in ("key", "sock", "pid", "seed")}

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            # A name with -wlm is a package's own; the plain one is a link that only an installation makes.
            path = shutil.which(f"{command[0]}-wlm", path=cluster.environment["PATH"]) or command[0]
            daemons.append(
                subprocess.Popen([path, *command[1:]], env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)
            )

    start(
        "munged", "munged", "--foreground", "--force", "--num-threads=1", f"--key-file={files['key']}",
        f"--socket={files['sock']}", f"--pid-file={files['pid']}", f"--seed-file={files['seed']}",
    )  # fmt: skip
    wait_until("munged listens", lambda: Path(files["sock"]).exists() or daemons[0].poll() is not None)
    start("slurmctld", "slurmctld", "-D", "-c")
    cores = sorted(os.sched_getaffinity(0))
    for number, node in enumerate(("n1", "n2")):
        (folder / f"spool-{node}").mkdir()
        # Each node has cores of its own where there are two: threads that fight for one make a step many times slower.
        with_core = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        try:
            start(f"slurmd-{node}", "slurmd", "-D", "-c", "-N", node, "-d", stepd)
        finally:
            os.sched_setaffinity(0, with_core)

    def is_up() -> bool:
        if any(daemon.poll() is not None for daemon in daemons):
            logs = {path.name: path.read_text(errors="replace")[-300:] for path in folder.glob("*.log")}
            pytest.fail(f"SLURM does not start here: {logs}")
        return cluster.node_states() == ["idle", "idle"]

    wait_until("both nodes are idle", is_up)


def write_config(folder: Path, name: str, dataset: str = "tiny", steps: int = 30, tokens_per_step: int = 128) -> Config:
    """folder/<name>.toml, and what is in it: few steps, each of them logged."""
    config = tiny_config(
        folder,
        run={"name": name},
        data={"dataset": dataset},
        train={"max_steps": steps, "tokens_per_step": tokens_per_step},
        eval={"every_steps": 0},
    )
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=20))
    (folder / f"{name}.toml").write_text(to_toml(config))
    return config


def write_long_config(folder: Path, name: str) -> Config:
    """A run of some ten seconds, by many micro-batches a step, so that something can happen in its middle."""
    return write_config(folder, name, steps=LONG_STEPS, tokens_per_step=1024)


def losses(run_dir: Path, steps: int = 30) -> dict[int, float]:
    """The logged loss of each step; a step that is there twice is a fault."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    return {row["step"]: row["loss"] for row in rows}


def train_undisturbed(cluster: Cluster, config: Config, *options: str) -> str:
    """The log of a job on two nodes."""
    job = cluster.submit(TRAIN, f"{config.run.name}.toml", nodes=2, options=options)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    return cluster.log(job)


@pytest.fixture(scope="session")
def two_node_run(cluster: Cluster) -> Path:
    """The folder of a run of thirty steps that two nodes trained without being disturbed, with two ranks each.

    Submitted as on a site that exports little of the environment: where sbatch's --export is not ALL, srun passes no more
    than that on to its tasks, and nothing that the script sets.
    """
    config = write_config(cluster.folder, "undisturbed")
    exported = "PATH,LD_LIBRARY_PATH,PYTHON,PYTHONPATH,OMP_NUM_THREADS,RANKS_PER_NODE=2,GLOO_SOCKET_IFNAME=lo"
    log = train_undisturbed(cluster, config, f"--export={exported}")
    assert log.count("4 rank(s) on cpu") == log.count("done at step 30") == 1  # one rank logs
    assert len(re.findall(r"^4 ranks over gloo, with .*GLOO_SOCKET_IFNAME=lo", log, flags=re.MULTILINE)) == 1
    assert len(re.findall(r"^waiting for 4 ranks of srun at 127.0.0.1:[23]\d{4}$", log, flags=re.MULTILINE)) == 1
    return config.run_dir


@pytest.fixture(scope="session")
def long_curve(cluster: Cluster) -> dict[int, float]:
    """The losses of a long run that two nodes trained without being disturbed."""
    config = write_long_config(cluster.folder, "long")
    train_undisturbed(cluster, config)
    return losses(config.run_dir, LONG_STEPS)


def check_same_weights(run_dir: Path, alone: Path) -> None:
    """The last weights of both runs, but for rounding."""
    from safetensors.torch import load_file
    from torch.testing import assert_close

    weights = Path("checkpoints", "step_00000030", "model.safetensors")
    found, wanted = load_file(run_dir / weights), load_file(alone / weights)
    assert found.keys() == wanted.keys()
    for name in wanted:
        # The key's bias has a true gradient of 0, and Adam makes full steps of its rounding.
        if not name.endswith("attn.c_attn.bias"):
            assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)
