"""The batch scripts: their text, and their logic against stand-ins for SLURM's commands."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import EVAL, MERGE, PREPARE, SAMPLE, SCRIPTS, TRAIN, wait_until

TRAIN_SRUN = ROOT / "slurm" / "train-srun.sbatch"
both = pytest.mark.parametrize("script", [TRAIN, TRAIN_SRUN], ids=lambda path: path.name)

# --- the files ---


@pytest.mark.parametrize("script", [*SCRIPTS, TRAIN_SRUN], ids=lambda path: path.name)
def test_bash_parses_the_script_and_it_leaves_the_step_of_another_job(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert 'unset "${!SLURM_STEP_@}"' in script.read_text()


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
    for script in (PREPARE, MERGE):
        assert directives(script).items() >= {"nodes": "1", "ntasks": "1", "requeue": "", "open-mode": "append"}.items()
    for script in (SAMPLE, EVAL):  # what they found lies apart from what they said
        assert directives(script).items() >= {"output": "%x-%j.out", "error": "%x-%j.err"}.items()


# --- the script's decisions, with stand-ins for SLURM's commands ---

FAKE_SRUN = """#!/bin/bash
env >srun.env
printf '%s\\n' "$@" >srun.args
# What the second node would run: srun's own options up to "bash", then the command.
(until [[ $1 == bash || $# == 0 ]]; do shift; done; PYTHON=node-python SLURM_NODEID=1 SLURMD_NODENAME=n2 "$@") >srun.agent
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
# On the second node: the rendezvous finds its address, and what torchrun would be given is printed.
FAKE_PYTHON = """#!/bin/bash
if [[ $2 == pipeline.rendezvous ]]; then echo 10.0.0.2; else echo "$@"; fi
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) if [[ ${SCONTROL_FAILS:-} ]]; then exit 1; fi ;;&
    show) if [[ $2 == node ]]; then echo "   NodeAddr=localhost NodeHostName=$3 Version=22.05.8"; else echo n1; echo n2; fi ;;
    requeue) echo "$2" >>requeued ;;
esac
"""
FAKE_SQUEUE = """#!/bin/bash
case "$*" in
    *PreemptTime*) echo "${PREEMPTED:-N/A}   " ;;
    *%K*) echo "${ARRAY_INDEX:-N/A}" ;;
    *) if [[ ${SLURM_TIME_FORMAT:-standard} == standard ]]; then echo 2030-01-01T00:00:00; else echo 00:00; fi ;;
esac
"""


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a batch script as SLURM would, in `tmp_path`; srun, scontrol and squeue are stand-ins steered by variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": FAKE_SQUEUE, "node-python": FAKE_PYTHON}
    for name, text in stand_ins.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "tiny.toml").write_text("")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RDZV_"))}
    fixed = {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TZ": "UTC",
        "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4",
        "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_SUBMIT_DIR": str(tmp_path), "SRUN_STATE": "stopped", "SRUN_STEP": "1",
        "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1",
    }  # fmt: skip
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, script: Path = TRAIN, **variables: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            ["bash", str(script), *(arguments or ("tiny.toml",))],
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


@both
def test_a_stopped_run_is_queued_again_and_a_done_one_is_not(pretend: Pretend, tmp_path: Path, script: Path) -> None:
    assert ended(pretend(script=script))[0] == 0
    assert requeued(tmp_path) == ["70"]
    assert ended(pretend(script=script, SRUN_STATE="done", SLURM_RESTART_COUNT="1"))[0] == 0
    assert requeued(tmp_path) == ["70"]


@both
def test_the_tasks_get_what_is_set_here_and_the_deadline_whatever_the_sites_and_the_users_formats(
    pretend: Pretend, tmp_path: Path, script: Path
) -> None:
    assert ended(pretend(script=script, SLURM_EXPORT_ENV="NONE", SLURM_TIME_FORMAT="relative"))[0] == 0
    tasks = (tmp_path / "srun.env").read_text().splitlines()
    deadline = 1893456000 - 60  # 2030, less a minute to leave
    assert {"SLURM_EXPORT_ENV=ALL", f"PIPELINE_DEADLINE={deadline}"} <= set(tasks)


@both
def test_a_job_submitted_from_inside_an_arrays_element_is_itself(
    pretend: Pretend, tmp_path: Path, script: Path
) -> None:
    others = {"SLURM_ARRAY_JOB_ID": "60", "SLURM_ARRAY_TASK_ID": "3", "SLURM_STEP_NUM_TASKS": "8"}
    assert ended(pretend("tiny.toml", "data.dataset=100%a", script=script, **others))[0] == 0
    assert requeued(tmp_path) == ["70"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-1] == "data.dataset=100%a"
    assert not re.findall("^SLURM_(?:ARRAY|STEP)_.*", (tmp_path / "srun.env").read_text(), flags=re.MULTILINE)


@pytest.mark.slow
def test_each_start_has_its_own_rendezvous_and_the_ranks_know_when_to_stop(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend("tiny.toml", "optimizer.lr=1e-3"))[0] == 0
    first = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").read_text().splitlines())
    assert (tmp_path / "srun.args").read_text().splitlines()[-2:] == ["tiny.toml", "optimizer.lr=1e-3"]
    assert ended(pretend(SLURM_RESTART_COUNT="1"))[0] == 0
    second = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").read_text().splitlines())
    assert (first["RDZV_ID"], second["RDZV_ID"]) == ("70-0", "70-1")
    assert first["RDZV_ENDPOINT"].startswith("localhost:2") and first["RDZV_ENDPOINT"] != second["RDZV_ENDPOINT"]
    assert first["PIPELINE_STOP_FILE"] == str(tmp_path / "runs" / "tiny" / ".stop-70-0")
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
    assert "is_host=0," in agent and "--local-addr=10.0.0.2 " in agent
    assert agent.endswith("-m pipeline train tiny.toml optimizer.lr=1e-3\n")


@pytest.mark.slow
def test_so_is_a_preparation_which_would_else_make_the_share_of_an_element(pretend: Pretend, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    others = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    arguments = ["corpus.txt", "--name", "whole", "--tokenizer", "byte", "--workers", "1"]
    assert ended(pretend(*arguments, script=PREPARE, **others))[0] == 0
    assert (tmp_path / "data" / "whole" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("gpus", "tasks"),
    [("8", {"SLURM_NTASKS_PER_NODE": "1"}), ("1", {"SLURM_NTASKS_PER_NODE": "8"}), ("8", {})],
    ids=["idle GPUs", "shared GPU", "tasks not told"],
)
def test_under_srun_each_task_has_a_gpu(pretend: Pretend, tmp_path: Path, gpus: str, tasks: dict[str, str]) -> None:
    code, errors = ended(pretend(script=TRAIN_SRUN, SLURM_GPUS_ON_NODE=gpus, **tasks))
    number = tasks.get("SLURM_NTASKS_PER_NODE", "1")
    assert (code, len(errors.splitlines())) == (2, 1)
    assert f"error: {gpus} GPU(s) a node for {number} task(s)" in errors
    assert not (tmp_path / "srun.args").exists()
    told = {"SLURM_TASKS_PER_NODE": f"{gpus}(x2)"} | dict.fromkeys(tasks, gpus)
    assert ended(pretend(script=TRAIN_SRUN, SLURM_GPUS_ON_NODE=gpus, **told))[0] == 0


@both
def test_an_array_element_has_a_run_of_its_own_and_requeues_only_itself(
    pretend: Pretend, tmp_path: Path, script: Path
) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "ARRAY_INDEX": "3"}
    assert ended(pretend("tiny.toml", "run.seed=%a", script=script, **element))[0] == 0
    assert requeued(tmp_path) == ["70_3"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-1] == "run.seed=3"


@both
def test_a_failure_is_not_queued_again_and_keeps_its_exit_code(pretend: Pretend, tmp_path: Path, script: Path) -> None:
    code, errors = ended(pretend(script=script, SRUN_STATE="failed", SRUN_EXIT="3"))
    assert code == 3
    assert ("not queued again" in errors) == (script == TRAIN)  # there torchrun's code says less than a rank's own
    assert requeued(tmp_path) == []


@pytest.mark.slow
def test_a_preempted_run_that_saved_in_its_grace_is_queued_again(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(SRUN_EXIT="1", PREEMPTED="2030-01-01T00:00:00"))[0] == 0
    assert requeued(tmp_path) == ["70"]
    assert ended(pretend(SRUN_STATE="done", PREEMPTED="2030-01-01T00:00:00"))[0] == 0
    assert requeued(tmp_path) == ["70"]


@both
def test_a_dry_run_does_not_come_back(pretend: Pretend, tmp_path: Path, script: Path) -> None:
    assert ended(pretend("tiny.toml", "--dry-run", script=script))[0] == 0
    assert requeued(tmp_path) == []


def test_options_of_train_reach_it(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend("tiny.toml", "--resume", "must"))[0] == 0
    assert (tmp_path / "srun.args").read_text().splitlines()[-3:] == ["tiny.toml", "--resume", "must"]


def test_a_rendezvous_host_that_does_not_resolve_is_one_line(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(RDZV_HOST="no-such-host.invalid"))
    assert code == 2
    [line] = errors.splitlines()
    assert (
        line.startswith("error: node n1 does not find the rendezvous host 'no-such-host.invalid'")
        and "RDZV_HOST" in line
    )
    assert not (tmp_path / "srun.args").exists()


@both
def test_a_misspelt_key_starts_nothing(pretend: Pretend, tmp_path: Path, script: Path) -> None:
    code, errors = ended(pretend("tiny.toml", "trian.max_steps=3", script=script))
    assert (code, errors.splitlines()) == (2, ["error: unknown section [trian] (did you mean train?)"])
    assert not (tmp_path / "srun.args").exists()


def test_without_the_nodes_names_the_job_ends(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(SCONTROL_FAILS="1"))[0] == 1
    assert not (tmp_path / "srun.args").exists()


@pytest.mark.slow
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
