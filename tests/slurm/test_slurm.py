"""The batch scripts: their directives, and their decisions against stand-ins for SLURM's commands."""

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
from slurm_cluster import EVAL, MERGE, PREPARE, SAMPLE, SCRIPTS, TRAIN

# --- the files ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_the_script_and_it_leaves_the_step_of_another_job(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert 'unset "${!SLURM_STEP_@}"' in script.read_text()


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), flags=re.MULTILINE))


def test_the_directives_that_saving_and_requeueing_rest_on_are_there() -> None:
    found = directives(TRAIN)
    # Without B: it reaches the ranks and not the script.
    assert found["signal"] == "USR2@300"
    assert found["ntasks-per-node"] == "1"
    assert found["open-mode"] == "append"
    assert {"requeue", "nodes", "time", "cpus-per-task"} <= found.keys()
    # The submit folder is the only one sure to exist, and a site without GPUs refuses --gpus-per-node.
    assert "/" not in found["output"]
    assert "gpus-per-node" not in found
    for script in (PREPARE, MERGE):
        assert directives(script).items() >= {"nodes": "1", "ntasks": "1", "requeue": "", "open-mode": "append"}.items()
    for script in (SAMPLE, EVAL):  # results apart from the log
        assert directives(script).items() >= {"output": "%x-%j.out", "error": "%x-%j.err"}.items()


# --- the script's decisions, with stand-ins for SLURM's commands ---

FAKE_SRUN = """#!/bin/bash
env >srun.env
printf '%s\\n' "$@" >srun.args
# What a task would run: srun's options up to "bash", then the command.
(until [[ $1 == bash || $# == 0 ]]; do shift; done; PYTHON=fake-python "$@") >srun.task
mkdir -p "$RUN_DIR/checkpoints"
echo "step_$SRUN_STEP" >"$RUN_DIR/checkpoints/latest"
echo "{\\"state\\": \\"$SRUN_STATE\\", \\"step\\": 1, \\"reason\\": \\"$SRUN_REASON\\"}" >"$RUN_DIR/status.json"
exit "${SRUN_EXIT:-0}"
"""
# A rank that gets the warning signal before it handles it.
FAKE_PYTHON = """#!/bin/bash
kill -USR2 $$
echo "$@"
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) if [[ ${SCONTROL_FAILS:-} ]]; then exit 1; fi ;;&
    show) if [[ $2 == node ]]; then echo "   NodeAddr=localhost NodeHostName=$3 Version=22.05.8"; else echo n1; echo n2; fi ;;
    requeue) if [[ ${NO_REQUEUE:-} ]]; then exit 1; fi; echo "$2" >>requeued ;;
esac
"""
FAKE_SQUEUE = """#!/bin/bash
if [[ ${SQUEUE_FAILS:-} ]]; then exit 1; fi
case "$*" in
    *PreemptTime*) echo "${PREEMPTED:-N/A}   " ;;
    *%K*) echo "${ARRAY_INDEX:-N/A}" ;;
    *) [[ $SLURM_TIME_FORMAT == standard ]] && end=2030-01-01T00:00:00; echo "${end:-00:00}  ${STARTS:-0} " ;;
esac
"""


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a batch script as SLURM would, in `tmp_path`; srun, scontrol and squeue are stand-ins steered by variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": FAKE_SQUEUE, "fake-python": FAKE_PYTHON}
    for name, text in stand_ins.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "tiny.toml").write_text("")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    fixed = {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TZ": "UTC",
        "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "SRUN_STATE": "stopped", "SRUN_STEP": "1",
        "SRUN_REASON": "SIGUSR2", "RUN_DIR": "runs/tiny",
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


def environment(folder: Path) -> dict[str, str]:
    """What the tasks get."""
    return dict(line.partition("=")[::2] for line in (folder / "srun.env").read_text().splitlines())


@pytest.mark.parametrize(
    ("state", "reason", "back"),
    [
        ("stopped", "SIGUSR2", ["70"]),
        ("stopped", "deadline: 40 s left, a step and a save need 61 s", ["70"]),
        ("stopped", "SIGTERM", []),
        ("stopped", "SIGINT", []),
        ("stopped", "stop-file /runs/deadline", []),
        ("done", "", []),
    ],
)
def test_a_run_that_its_time_limit_stopped_is_requeued_and_no_other(
    pretend: Pretend, tmp_path: Path, state: str, reason: str, back: list[str]
) -> None:
    code, errors = ended(pretend(SRUN_STATE=state, SRUN_REASON=reason))
    assert code == 0, errors
    assert requeued(tmp_path) == back
    assert ("not requeued; the same command resumes" in errors) == (state == "stopped" and not back)
    assert len(errors.splitlines()) == (1 if state == "done" else 2)  # a log is short


def test_a_site_that_does_not_requeue_is_reported(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(NO_REQUEUE="1"))
    assert code == 75 and "error: this site does not requeue: submit the same command again" in errors


def test_the_tasks_get_what_is_set_here_and_the_deadline_whatever_the_sites_and_the_users_formats(
    pretend: Pretend, tmp_path: Path
) -> None:
    assert ended(pretend(SLURM_EXPORT_ENV="NONE", SLURM_TIME_FORMAT="relative"))[0] == 0
    deadline = 1893456000 - 60  # 2030, minus a minute for exiting
    assert environment(tmp_path).items() >= {"SLURM_EXPORT_ENV": "ALL", "PIPELINE_DEADLINE": str(deadline)}.items()


def test_where_squeue_does_not_answer_the_run_goes_on_without_a_deadline(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(SQUEUE_FAILS="1", SLURM_RESTART_COUNT="1"))
    assert code == 0 and "warning: squeue does not report when the job ends" in errors
    assert environment(tmp_path).items() >= {"PIPELINE_DEADLINE": "", "SLURM_RESTART_COUNT": "1"}.items()
    assert requeued(tmp_path) == ["70"]


def test_a_job_submitted_from_inside_another_one_is_itself(pretend: Pretend, tmp_path: Path) -> None:
    """From a rank of an array's element that was requeued before."""
    array = {"SLURM_ARRAY_JOB_ID": "60", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "7"}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "n9", "MASTER_PORT": "1"}
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    assert ended(pretend("tiny.toml", "data.dataset=100%a", **array, **step, **torchrun))[0] == 0
    assert requeued(tmp_path) == ["70"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-1] == "data.dataset=100%a"
    tasks = environment(tmp_path)
    assert not [name for name in tasks if name.startswith(("SLURM_ARRAY", "SLURM_STEP")) or name in torchrun]
    assert (tasks["MASTER_ADDR"], tasks.get("MASTER_PORT"), tasks["SLURM_RESTART_COUNT"]) == ("localhost", None, "0")


def test_the_users_address_of_the_first_node_is_kept(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(MASTER_ADDR="10.0.0.7", MASTER_PORT="4000"))[0] == 0
    assert environment(tmp_path).items() >= {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}.items()


@pytest.mark.parametrize(
    ("variables", "ranks", "cores"),
    [
        ({}, 1, 4),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}, 8, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "8"}, 8, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "2"}, 2, 2),
        ({"SLURM_NTASKS_PER_NODE": "3"}, 3, 4),
        ({"RANKS_PER_NODE": "6"}, 6, 1),
    ],
    ids=["cpu", "gpus", "a task each", "fewer on request", "tasks", "more than cores"],
)
def test_srun_starts_a_rank_for_each_gpu_and_divides_the_cores(
    pretend: Pretend, tmp_path: Path, variables: dict[str, str], ranks: int, cores: int
) -> None:
    assert ended(pretend("tiny.toml", "optimizer.lr=1e-3", **variables))[0] == 0
    options = (tmp_path / "srun.args").read_text().splitlines()
    wanted = {"--nodes=2", f"--ntasks={2 * ranks}", f"--ntasks-per-node={ranks}", f"--cpus-per-task={cores}"}
    assert wanted | {"--kill-on-bad-exit=1"} <= set(options)
    # Otherwise srun refuses more tasks than the job has cores.
    assert environment(tmp_path).get("SLURM_OVERCOMMIT") == ("1" if variables.get("RANKS_PER_NODE") == "6" else None)
    # The signal came before anything handled it.
    assert (tmp_path / "srun.task").read_text() == "-m pipeline train tiny.toml optimizer.lr=1e-3\n"


@pytest.mark.parametrize(
    ("gpus", "variables", "ranks"),
    [
        ("8", {"SLURM_NTASKS_PER_NODE": "4"}, "4"),
        ("2", {"SLURM_NTASKS_PER_NODE": "8"}, "8"),
        ("2", {"RANKS_PER_NODE": "4"}, "4"),
    ],
    ids=["idle GPUs", "shared GPUs", "shared on request"],
)
def test_each_rank_has_a_gpu(
    pretend: Pretend, tmp_path: Path, gpus: str, variables: dict[str, str], ranks: str
) -> None:
    code, errors = ended(pretend(SLURM_GPUS_ON_NODE=gpus, **variables))
    assert (code, len(errors.splitlines())) == (2, 1)
    assert f"error: {gpus} GPU(s) a node for {ranks} rank(s)" in errors
    assert not (tmp_path / "srun.args").exists()


@pytest.mark.slow
def test_a_preparation_from_inside_an_array_is_not_an_elements_share(pretend: Pretend, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    others = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    arguments = ["corpus.txt", "--name", "whole", "--tokenizer", "byte", "--workers", "1"]
    assert ended(pretend(*arguments, script=PREPARE, **others))[0] == 0
    assert (tmp_path / "data" / "whole" / "manifest.json").exists()


def test_an_array_element_has_its_own_run_and_requeues_only_itself(pretend: Pretend, tmp_path: Path) -> None:
    """In a folder whose name has spaces, too."""
    element = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "ARRAY_INDEX": "3"}
    arguments = ["tiny.toml", "run.seed=%a", "run.dir=my runs", "run.name=seed-%a-of-%a"]
    code, errors = ended(pretend(*arguments, RUN_DIR="my runs/seed-3-of-3", **element))
    assert code == 0 and errors.count(f"{tmp_path}/my runs/seed-3-of-3") == 1
    assert requeued(tmp_path) == ["70_3"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-4:-1] == ["tiny.toml", "run.seed=3", "run.dir=my runs"]
    assert (tmp_path / "my runs" / "seed-3-of-3" / "slurm-progress").read_text() == "none 0\n"


@pytest.mark.parametrize("code", ["2", "3", "1"])
def test_a_failure_is_not_requeued_and_keeps_its_exit_code(pretend: Pretend, tmp_path: Path, code: str) -> None:
    found, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT=code))
    assert found == int(code)
    assert f"error: training failed (exit code {code}) and is not requeued" in errors
    assert requeued(tmp_path) == []


@pytest.mark.slow
def test_a_preempted_run_is_requeued_unless_it_is_done(pretend: Pretend, tmp_path: Path) -> None:
    preempted = {"PREEMPTED": "2030-01-01T00:00:00"}
    assert ended(pretend(SRUN_REASON="SIGTERM", **preempted))[0] == 0
    assert ended(pretend(SRUN_EXIT="143", SRUN_STATE="running", **preempted))[0] == 0
    assert requeued(tmp_path) == ["70", "70"]
    assert ended(pretend(SRUN_STATE="done", **preempted))[0] == 0
    assert requeued(tmp_path) == ["70", "70"]


def test_a_dry_run_does_not_come_back_and_options_of_train_reach_it(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend("tiny.toml", "--resume", "must", "--dry-run"))[0] == 0
    assert requeued(tmp_path) == []
    assert (tmp_path / "srun.args").read_text().splitlines()[-4:] == ["tiny.toml", "--resume", "must", "--dry-run"]


def test_a_misspelled_key_starts_nothing(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend("tiny.toml", "trian.max_steps=3"))
    assert (code, errors.splitlines()) == (2, ["error: unknown key trian.max_steps (did you mean train.max_steps?)"])
    assert not (tmp_path / "srun.args").exists()


def test_without_the_nodes_names_the_job_ends(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(SCONTROL_FAILS="1"))[0] == 1
    assert not (tmp_path / "srun.args").exists()


@pytest.mark.slow
def test_two_starts_in_a_row_without_a_new_checkpoint_end_the_chain(pretend: Pretend, tmp_path: Path) -> None:
    codes = [ended(pretend(STARTS=str(start), SRUN_STEP="5"))[0] for start in range(4)]
    # Start 0 made step 5, starts 1 and 2 nothing new.
    assert codes == [0, 0, 0, 65]
    assert len(requeued(tmp_path)) == 3
    # A new job begins the count anew; so does progress.
    assert [ended(pretend(SRUN_STEP="6"))[0], ended(pretend(STARTS="1"))[0]] == [0, 0]
    assert (tmp_path / "runs" / "tiny" / "slurm-progress").read_text() == "step_6 0\n"
