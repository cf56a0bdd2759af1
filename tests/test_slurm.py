"""The batch scripts: their logic against stand-ins for SLURM's commands, and whole jobs on a real two-node SLURM."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import ROOT, run_program, tiny_config, write_dataset
from safetensors.torch import load_file
from torch.testing import assert_close

from pipeline.config import Config, to_toml
from pipeline.shards import load_manifest
from prepare.run import PrepareOptions, run

TRAIN, PREPARE = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "prepare.sbatch"
DEADLINE_S = 150.0


def wait_until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {DEADLINE_S:.0f} s still waiting: {what}")
        time.sleep(0.1)


def status_of(run_dir: Path) -> tuple[str, int]:
    status = json.loads((run_dir / "status.json").read_text())
    return status["state"], status["step"]


# --- the files ---


@pytest.mark.parametrize("script", [TRAIN, PREPARE], ids=lambda path: path.name)
def test_bash_parses_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", [TRAIN, PREPARE], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False).stdout == ""


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), flags=re.MULTILINE))


def test_the_directives_that_saving_and_requeueing_rest_on_are_there() -> None:
    found = directives(TRAIN)
    assert found["signal"] == "B:USR2@300"
    assert found["ntasks-per-node"] == "1"
    assert found["open-mode"] == "append"
    assert {"requeue", "nodes", "time", "cpus-per-task"} <= found.keys()
    # The submit folder is the only one sure to exist, and a site without GPUs refuses --gpus-per-node.
    assert "/" not in found["output"]
    assert "gpus-per-node" not in found
    assert directives(PREPARE).items() >= {"nodes": "1", "ntasks": "1", "requeue": "", "open-mode": "append"}.items()


# --- the script's decisions, with stand-ins for SLURM's commands ---

FAKE_SRUN = """#!/bin/bash
env >srun.env
printf '%s\\n' "$@" >srun.args
# What the second node would run: srun's own options up to "bash", then the command.
(until [[ $1 == bash ]]; do shift; done; PYTHON=echo SLURM_NODEID=1 SLURMD_NODENAME=n2 "$@") >srun.agent
if [[ ${SRUN_WAITS:-} ]]; then
    touch srun.waits
    until [[ -e $PIPELINE_STOP_FILE ]]; do sleep 0.05; done
    rm -f srun.waits
fi
mkdir -p runs/tiny/checkpoints
echo "step_$SRUN_STEP" >runs/tiny/checkpoints/latest
echo "{\\"state\\": \\"$SRUN_STATE\\"}" >runs/tiny/status.json
exit "${SRUN_EXIT:-0}"
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) if [[ ${SCONTROL_FAILS:-} ]]; then exit 1; fi; echo n1; echo n2 ;;
    requeue) echo "$2" >>requeued ;;
esac
"""
FAKE_SQUEUE = "#!/bin/bash\necho 2030-01-01T00:00:00\n"


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts train.sbatch as SLURM would, in `tmp_path`; srun, scontrol and squeue are stand-ins steered by variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("squeue", FAKE_SQUEUE)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "tiny.toml").write_text("")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RDZV_"))}
    fixed = {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TZ": "UTC",
        "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SRUN_STATE": "stopped", "SRUN_STEP": "1",
    }  # fmt: skip
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            ["bash", str(TRAIN), *(arguments or ("tiny.toml",))],
            cwd=tmp_path, env=inherited | fixed | variables, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # a stand-in of srun may have outlived its script
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


Pretend = Callable[..., "subprocess.Popen[str]"]


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def requeued(folder: Path) -> list[str]:
    path = folder / "requeued"
    return path.read_text().split() if path.exists() else []


def test_a_stopped_run_is_queued_again_and_a_done_one_is_not(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend())[0] == 0
    assert requeued(tmp_path) == ["70"]
    assert ended(pretend(SRUN_STATE="done", SLURM_RESTART_COUNT="1"))[0] == 0
    assert requeued(tmp_path) == ["70"]


def test_each_start_has_its_own_rendezvous_and_the_ranks_know_when_to_stop(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend("tiny.toml", "optimizer.lr=1e-3"))[0] == 0
    first = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").read_text().splitlines())
    assert (tmp_path / "srun.args").read_text().splitlines()[-2:] == ["tiny.toml", "optimizer.lr=1e-3"]
    assert ended(pretend(SLURM_RESTART_COUNT="1"))[0] == 0
    second = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").read_text().splitlines())
    assert (first["RDZV_ID"], second["RDZV_ID"]) == ("70-0", "70-1")
    assert first["RDZV_ENDPOINT"].startswith("n1:2") and first["RDZV_ENDPOINT"] != second["RDZV_ENDPOINT"]
    assert first["PIPELINE_STOP_FILE"] == str(tmp_path / "runs" / "tiny" / ".stop-70-0")
    assert int(first["PIPELINE_DEADLINE"]) == 1893456000 - 60  # 2030-01-01 UTC, less the minute to leave in
    assert first["SRUN_CPUS_PER_TASK"] == "4"


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [({}, 1), ({"SLURM_GPUS_ON_NODE": "8"}, 8), ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "2"}, 2)],
    ids=["cpu", "gpus", "told"],
)
def test_a_node_starts_a_rank_for_each_of_its_gpus(
    pretend: Pretend, tmp_path: Path, variables: dict[str, str], ranks: int
) -> None:
    assert ended(pretend("tiny.toml", "optimizer.lr=1e-3", **variables))[0] == 0
    agent = (tmp_path / "srun.agent").read_text()
    assert f"--nnodes=2 --nproc-per-node={ranks} " in agent
    assert "is_host=0," in agent and "--local-addr=n2 " in agent
    assert agent.endswith("-m pipeline train tiny.toml optimizer.lr=1e-3\n")


def test_an_array_element_has_a_run_of_its_own_and_requeues_only_itself(pretend: Pretend, tmp_path: Path) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert ended(pretend("tiny.toml", "run.seed=%a", **element))[0] == 0
    assert requeued(tmp_path) == ["70_3"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-1] == "run.seed=3"


def test_a_failure_is_not_queued_again_and_keeps_its_exit_code(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT="3"))
    assert code == 3
    assert "not queued again" in errors
    assert requeued(tmp_path) == []


def test_a_misspelt_key_starts_nothing(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend("tiny.toml", "trian.max_steps=3"))
    assert (code, errors.splitlines()) == (2, ["error: unknown section [trian] (did you mean train?)"])
    assert not (tmp_path / "srun.args").exists()


def test_without_the_nodes_names_the_job_ends(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(SCONTROL_FAILS="1"))[0] == 1
    assert not (tmp_path / "srun.args").exists()


def test_two_starts_in_a_row_without_a_new_checkpoint_end_the_chain(pretend: Pretend, tmp_path: Path) -> None:
    codes = [ended(pretend(SLURM_RESTART_COUNT=str(start), SRUN_STEP="5"))[0] for start in range(4)]
    # Start 0 made step 5, starts 1 and 2 nothing new.
    assert codes == [0, 0, 0, 65]
    assert len(requeued(tmp_path)) == 3
    # Submitted anew, the count begins anew; so it does after progress.
    assert [ended(pretend(SRUN_STEP="6"))[0], ended(pretend(SLURM_RESTART_COUNT="1"))[0]] == [0, 0]
    assert (tmp_path / "runs" / "tiny" / "slurm-progress").read_text() == "step_6 0\n"


@pytest.mark.parametrize(("number", "back"), [(signal.SIGUSR2, ["70"]), (signal.SIGTERM, [])], ids=["USR2", "TERM"])
def test_a_signal_leaves_the_stop_file_and_the_script_waits_for_the_save(
    pretend: Pretend, tmp_path: Path, number: int, back: list[str]
) -> None:
    process = pretend(SRUN_WAITS="yes")
    wait_until("srun runs", (tmp_path / "srun.waits").exists)
    process.send_signal(number)
    assert ended(process)[0] == 0
    assert requeued(tmp_path) == back
    assert not list((tmp_path / "runs" / "tiny").glob(".stop-*"))


# --- a real SLURM: two slurmd on this machine, from Debian's packages, unpacked and not installed ---

PACKAGES = ["slurm-client", "slurmd", "slurmctld", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15"]

SLURM_CONF = """\
ClusterName=test
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
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# A node may claim more processors than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
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

    def submit(self, script: Path, *arguments: str, nodes: int = 1) -> str:
        return self.call("sbatch", "--parsable", f"--nodes={nodes}", "--cpus-per-task=1", str(script), *arguments)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def node_states(self) -> list[str]:
        """Of both nodes, such as idle; empty while nothing answers."""
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
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
    unpacked = unpack_packages(folder / "packages")
    plugins = next(unpacked.glob("usr/lib/*/slurm-wlm"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment = inherited | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}",
        "PATH": f"{unpacked}/usr/bin:{unpacked}/usr/sbin:{os.environ['PATH']}",
        # For the jobs: this interpreter, this checkout, and node names that do not resolve.
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "RDZV_HOST": "127.0.0.1",
        "LOCAL_ADDR": "127.0.0.1",
    }
    host, user = socket.gethostname().partition(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
    configuration = SLURM_CONF.format(folder=folder, host=host, user=user, plugins=plugins, ports=free_ports(3))
    (folder / "slurm.conf").write_text(configuration)
    (folder / "state").mkdir()
    work = folder / "work"
    write_dataset(work / "data" / "tiny")
    running = Cluster(environment, work)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        start_daemons(folder, running, str(next(unpacked.glob("usr/sbin/slurmstepd*"))), daemons)
        yield running
        subprocess.run(["scancel", f"--user={user}"], env=environment, check=False)
        wait_until("all jobs are gone", lambda: not running.call("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def unpack_packages(folder: Path) -> Path:
    """The root of the unpacked packages. Skips where they cannot be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("a real SLURM is taken from Debian's packages, and this system has no apt-get")
    root = folder / "root"
    root.mkdir(parents=True)
    got = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    if got.returncode:
        pytest.skip(f"apt-get cannot download SLURM: {got.stderr.strip()[-300:]}")
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
    """munged, slurmctld and two slurmd as children, appended to `daemons`. Skips where they do not come up."""
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
            pytest.skip(f"SLURM does not start here: {logs}")
        return cluster.node_states() == ["idle", "idle"]

    wait_until("both nodes are idle", is_up)


def write_config(folder: Path, name: str, dataset: str = "tiny") -> Config:
    """folder/<name>.toml, and what is in it: thirty steps, each of them logged."""
    config = tiny_config(
        folder, run={"name": name}, data={"dataset": dataset}, train={"max_steps": 30}, eval={"every_steps": 0}
    )
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=20))
    (folder / f"{name}.toml").write_text(to_toml(config))
    return config


def losses(run_dir: Path) -> dict[int, float]:
    """The logged loss of each step; a step that is there twice is a fault."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="session")
def two_node_run(cluster: Cluster) -> Path:
    """The folder of a run that two nodes trained without being disturbed."""
    config = write_config(cluster.folder, "undisturbed")
    job = cluster.submit(TRAIN, "undisturbed.toml", nodes=2)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "2 rank(s) on cpu" in cluster.log(job)
    return config.run_dir


@pytest.mark.slow
def test_two_nodes_train_to_the_weights_of_one_process(cluster: Cluster, two_node_run: Path) -> None:
    assert status_of(two_node_run) == ("done", 30)
    alone = write_config(cluster.folder, "alone")
    assert run_program("train", "alone.toml", cwd=cluster.folder).returncode == 0
    weights = Path("checkpoints", "step_00000030", "model.safetensors")
    found, wanted = load_file(two_node_run / weights), load_file(alone.run_dir / weights)
    assert found.keys() == wanted.keys()
    for name in wanted:
        # The key's bias has a true gradient of 0, and Adam makes full steps of its rounding.
        if not name.endswith("attn.c_attn.bias"):
            assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_the_warning_signal_saves_requeues_and_leaves_the_curve_as_it_was(cluster: Cluster, two_node_run: Path) -> None:
    config = write_config(cluster.folder, "warned")
    job = cluster.submit(TRAIN, "warned.toml", nodes=2)
    # Before the first step, so that the run cannot be over before the signal comes: it stops after that step.
    wait_until("the job starts", lambda: "start 0 of job" in cluster.log(job))
    cluster.call("scancel", "--batch", "--signal=USR2", job)
    wait_until("the job is queued again", lambda: cluster.job(job)["JobState"] == "PENDING")
    assert status_of(config.run_dir) == ("stopped", 1)

    # SLURM holds a requeued job back for two minutes. Nodes refuse a start in the very second in which they ended the last.
    wait_until("the nodes are cleared", lambda: cluster.node_states() == ["idle", "idle"])
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+2")
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert status_of(config.run_dir) == ("done", 30)
    assert "start 0 of job" in cluster.log(job) and "start 1 of job" in cluster.log(job)
    assert losses(config.run_dir) == pytest.approx(losses(two_node_run), rel=1e-5)


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    misspelt = cluster.submit(TRAIN, "quickstart", "trian.max_steps=3", nodes=2)
    write_config(cluster.folder, "no-data", dataset="nowhere")
    no_data = cluster.submit(TRAIN, "no-data.toml")
    end = cluster.wait(misspelt)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(misspelt).splitlines() == ["error: unknown section [trian] (did you mean train?)"]
    end = cluster.wait(no_data)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert cluster.log(no_data).count("no dataset at") == 1


@pytest.mark.slow
def test_a_prepare_job_makes_a_whole_dataset(cluster: Cluster) -> None:
    (cluster.folder / "corpus.txt").write_text("To be, or not to be, that is the question.\n" * 500)
    job = cluster.submit(PREPARE, "corpus.txt", "--name", "corpus", "--tokenizer", "byte", "--val-fraction", "0.1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    manifest = load_manifest(cluster.folder / "data" / "corpus")
    assert manifest.count("train", "tokens") + manifest.count("val", "tokens") > 500 * 40


@pytest.mark.slow
def test_an_array_of_prepare_jobs_shares_one_dataset(cluster: Cluster) -> None:
    lines = [f'{{"text": "line {i} of a corpus that is more than one unit of work"}}\n' for i in range(80_000)]
    (cluster.folder / "shared.jsonl").write_text("".join(lines))
    arguments = ("shared.jsonl", "--tokenizer", "byte", "--shard-tokens", "1000000")
    array = cluster.call("sbatch", "--parsable", "--array=1-3", "--cpus-per-task=1", str(PREPARE), *arguments)
    for element in (1, 2, 3):
        assert cluster.wait(f"{array}_{element}")["JobState"] == "COMPLETED"
    logs = "".join(path.read_text() for path in cluster.folder.glob("prepare-*.out"))
    assert "task 2 of 3" in logs or "task 1 of 3" in logs or "task 0 of 3" in logs
    run(PrepareOptions(
        [str(cluster.folder / "shared.jsonl")], name="alone", data_dir=str(cluster.folder / "data"), tokenizer="byte",
        shard_tokens=1_000_000,
    ))  # fmt: skip
    shared, alone = (load_manifest(cluster.folder / "data" / name) for name in ("shared", "alone"))
    assert len(shared.splits["train"]) > 3
    assert shared.fingerprint == alone.fingerprint
