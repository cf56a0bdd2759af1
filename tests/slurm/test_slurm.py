"""The batch scripts: their directives, and their decisions against stand-ins for SLURM's commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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
[[ -z ${SRUN_SLEEP:-} ]] || { : >srun.args; sleep "$SRUN_SLEEP"; }
printf '%s\\n' "$@" >srun.args
# What a task would run: srun's options up to "bash", then the command.
(until [[ $1 == bash || $# == 0 ]]; do shift; done; SLURM_PROCID=1 SLURMD_NODENAME=n2 TASK_PYTHON=fake-python "$@") >srun.task
mkdir -p "$RUN_DIR/checkpoints"
echo "step_$SRUN_STEP" >"$RUN_DIR/checkpoints/latest"
reason=$SRUN_REASON step_s=${SRUN_STEP_S:-null}
echo "{\\"state\\": \\"$SRUN_STATE\\", \\"step\\": 1, \\"reason\\": \\"$reason\\", \\"step_s\\": $step_s}" >"$RUN_DIR/status.json"
[[ -z ${SRUN_SAYS:-} ]] || echo -e "$SRUN_SAYS" >&2
exit "${SRUN_EXIT:-0}"
"""
# A rank that gets the warning signal before it handles it.
FAKE_PYTHON = """#!/bin/bash
kill -USR2 $$
echo "$@"
[[ -z ${RANK_SAYS:-} ]] || echo "$RANK_SAYS" >&2
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) if [[ ${SCONTROL_FAILS:-} ]]; then exit 1; fi ;;&
    show) if [[ $2 == job ]]; then echo "JobState=${JOB_STATE:-RUNNING} Partition=all NumNodes=2 ExcNodeList=(null)"; exit; fi ;;&
    show) if [[ $2 == node ]]; then echo "   NodeAddr=localhost NodeHostName=$3 Version=22.05.8"; else echo n1; echo n2; fi ;;
    requeue) if [[ ${NO_REQUEUE:-} ]]; then exit 1; fi; echo "$2" >>requeued ;;
    update) echo "$*" >>updated ;;
esac
"""
FAKE_SINFO = """#!/bin/bash
printf '%s\\n' ${NODES:-n1 n2 n3}
"""
FAKE_SQUEUE = """#!/bin/bash
if [[ ${SQUEUE_FAILS:-} ]]; then exit 1; fi
case "$*" in
    *PreemptTime*) echo "${PREEMPTED:-N/A}   " ;;
    *%K*) echo "${ARRAY_INDEX:-N/A}" ;;
    *%o*) cat queue 2>/dev/null ;;
    *%k*) echo "(null)" ;;
    *) [[ $SLURM_TIME_FORMAT == standard ]] && end=2030-01-01T00:00:00; echo "${end:-00:00}  ${STARTS:-0} " ;;
esac
"""


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a batch script as SLURM would, in `tmp_path`; srun, scontrol and squeue are stand-ins steered by variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {
        "srun": FAKE_SRUN,
        "scontrol": FAKE_SCONTROL,
        "squeue": FAKE_SQUEUE,
        "sinfo": FAKE_SINFO,
        "fake-python": FAKE_PYTHON,
    }
    stand_ins["scancel"] = "#!/bin/bash\n"
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


def start_of(run_dir: Path) -> dict[str, Any]:
    """What the folder of a run says about the last start of its job."""
    found: dict[str, Any] = json.loads((run_dir / "slurm.json").read_text())
    return found


def exclusions(folder: Path) -> list[str]:
    """What SLURM was asked to keep the job away from."""
    path = folder / "updated"
    return [line for line in path.read_text().splitlines() if "ExcNodeList" in line] if path.exists() else []


def requeued(folder: Path) -> list[str]:
    path = folder / "requeued"
    return path.read_text().split() if path.exists() else []


def environment(folder: Path) -> dict[str, str]:
    """What the tasks get."""
    return dict(line.partition("=")[::2] for line in (folder / "srun.env").read_text().splitlines())


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_site_that_does_not_requeue_is_reported(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(NO_REQUEUE="1"))
    assert code == 75 and "error: this site does not requeue: submit the same command again" in errors


@pytest.mark.slow
def test_the_tasks_get_what_is_set_here_and_the_deadline_whatever_the_sites_and_the_users_formats(
    pretend: Pretend, tmp_path: Path
) -> None:
    assert ended(pretend(SLURM_EXPORT_ENV="NONE", SLURM_TIME_FORMAT="relative"))[0] == 0
    deadline = 1893456000 - 60  # 2030, minus a minute for exiting
    assert environment(tmp_path).items() >= {"SLURM_EXPORT_ENV": "ALL", "PIPELINE_DEADLINE": str(deadline)}.items()


@pytest.mark.slow
def test_where_squeue_does_not_answer_the_run_goes_on_without_a_deadline(pretend: Pretend, tmp_path: Path) -> None:
    code, errors = ended(pretend(SQUEUE_FAILS="1", SLURM_RESTART_COUNT="1"))
    assert code == 0 and "warning: squeue does not report when the job ends" in errors
    assert environment(tmp_path).items() >= {"PIPELINE_DEADLINE": "", "SLURM_RESTART_COUNT": "1"}.items()
    assert requeued(tmp_path) == ["70"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_users_address_of_the_first_node_is_kept(pretend: Pretend, tmp_path: Path) -> None:
    assert ended(pretend(MASTER_ADDR="10.0.0.7", MASTER_PORT="4000"))[0] == 0
    assert environment(tmp_path).items() >= {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}.items()


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_array_element_has_its_own_run_and_requeues_only_itself(pretend: Pretend, tmp_path: Path) -> None:
    """In a folder whose name has spaces, too."""
    element = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "ARRAY_INDEX": "3"}
    arguments = ["tiny.toml", "run.seed=%a", "run.dir=my runs", "run.name=seed-%a-of-%a"]
    code, errors = ended(pretend(*arguments, RUN_DIR="my runs/seed-3-of-3", **element))
    assert code == 0 and errors.count(f"{tmp_path}/my runs/seed-3-of-3") == 1
    assert requeued(tmp_path) == ["70_3"]
    assert (tmp_path / "srun.args").read_text().splitlines()[-4:-1] == ["tiny.toml", "run.seed=3", "run.dir=my runs"]
    assert (
        start_of(tmp_path / "my runs" / "seed-3-of-3").items()
        >= {"job": "70_3", "checkpoint": "none", "stalled": 0}.items()
    )


KILLED = "srun: error: n2: task 1: Killed"
ENDED_BY_SRUN = "srun: error: n1: tasks 0-3: Terminated"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "srun_code", "code"),
    [
        ("", 2, 2),
        ("", 3, 3),
        ("", 143, 143),  # scancel --signal=TERM before training handles it
        (ENDED_BY_SRUN, 143, 143),
        ("", 130, 130),
        (f"srun: error: n1: task 0: Exited with exit code 2\n{ENDED_BY_SRUN}", 143, 2),
        (f"{ENDED_BY_SRUN}\nsrun: error: n1: tasks 0-1: Exited with exit code 3", 143, 3),
        ("srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Exited with exit code 2", 2, 2),
    ],
)
def test_an_error_of_the_user_and_a_divergence_are_not_requeued_and_keep_their_exit_code(
    pretend: Pretend, tmp_path: Path, says: str, srun_code: int, code: int
) -> None:
    """srun itself exits with the highest code: 143, of the tasks that it ended after the first failure."""
    found, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT=str(srun_code), SRUN_SAYS=says))
    assert found == code
    assert f"error: training failed (exit code {code}) and is not requeued" in errors
    assert requeued(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "srun_code", "told"),
    [
        (f"{KILLED}\n{ENDED_BY_SRUN}", 143, "task 1 on n2: Killed"),
        (
            "srun: error: n2: task 1: Out Of Memory\nsrun: error: n1: task 0: Exited with exit code 2",
            143,
            "Out Of Memory",
        ),
        ("srun: error: n1: task 0: Exited with exit code 1", 1, "task 0 on n1: Exited with exit code 1"),
        ("srun: error: n2: tasks 2-3: Aborted (core dumped)", 134, "tasks? 2-3 on n2: Aborted"),
        ("srun: error: n2: task 3: Exited with exit code 137", 137, "task 3 on n2: "),
        ("", 1, "exit code 1"),
    ],
    ids=["killed", "host memory", "exception", "NCCL abort", "killed inside", "srun says nothing"],
)
def test_a_crash_is_requeued_from_the_last_checkpoint(
    pretend: Pretend, tmp_path: Path, says: str, srun_code: int, told: str
) -> None:
    _, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT=str(srun_code), SRUN_SAYS=says, SRUN_STEP="7"))
    assert requeued(tmp_path) == ["70"]
    assert re.search(rf"error: training crashed \(.*{told}.*\), saved step_7: requeueing job 70", errors), errors
    assert exclusions(tmp_path) == []


@pytest.mark.slow
def test_crashes_without_progress_end_with_the_exit_code_of_the_crash(pretend: Pretend, tmp_path: Path) -> None:
    crash = {"SRUN_STATE": "failed", "SRUN_EXIT": "1", "SRUN_STEP": "5"}
    codes = [ended(pretend(STARTS=str(start), **crash))[0] for start in range(3)]
    assert codes == [0, 0, 1] and requeued(tmp_path) == ["70", "70"]  # the first made step 5, the others nothing
    assert "2 starts in a row made no checkpoint" in ended(pretend(STARTS="2", **crash))[1]


@pytest.mark.slow
def test_a_node_that_ended_two_starts_is_excluded_from_the_third(pretend: Pretend, tmp_path: Path) -> None:
    for start in range(2):
        _, errors = ended(
            pretend(STARTS=str(start), SRUN_STATE="failed", SRUN_EXIT="137", SRUN_SAYS=KILLED, SRUN_STEP=str(start + 1))
        )
        assert ("excluded for job 70: n2" in errors) == (start == 1)
    assert exclusions(tmp_path) == ["update JobId=70 ExcNodeList=n2"]
    # Of another job nothing is known.
    ended(pretend(STARTS="0", SRUN_STATE="failed", SRUN_EXIT="137", SRUN_SAYS=KILLED, SRUN_STEP="9"))
    assert len(exclusions(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
        "error: node n2 failed its check: 7 of 8 GPUs",
    ],
    ids=["ECC", "Xid", "check"],
)
def test_a_node_whose_hardware_is_broken_is_excluded_at_once(pretend: Pretend, tmp_path: Path, line: str) -> None:
    """Though the first task that failed was another node's."""
    says = "srun: error: n1: task 0: Exited with exit code 1"
    _, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT="1", SRUN_SAYS=says, RANK_SAYS=line))
    log = (tmp_path / "runs" / "tiny" / "ranks" / "rank-1.log").read_text()
    assert log.splitlines() == ["--- start 0 of job 70 on n2", line] or line in log
    assert "excluded for job 70: n2" in errors and requeued(tmp_path) == ["70"]


@pytest.mark.slow
def test_what_a_rank_of_an_earlier_start_logged_excludes_no_node(pretend: Pretend, tmp_path: Path) -> None:
    """The run had more ranks before, or its job had another number."""
    logs = tmp_path / "runs" / "tiny" / "ranks"
    logs.mkdir(parents=True)
    for rank, header in ((3, "start 0 of job 69 on n3"), (7, "start 1 of job 70 on n3")):
        (logs / f"rank-{rank}.log").write_text(f"--- {header}\nuncorrectable ECC error\n")
    (logs / "rank-8.log").write_text("no header, uncorrectable ECC error\n")
    _, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT="1", SRUN_STEP="5"))
    assert "excluded" not in errors and requeued(tmp_path) == ["70"] and exclusions(tmp_path) == []


@pytest.mark.slow
def test_a_node_without_which_the_job_could_not_start_is_not_excluded(pretend: Pretend, tmp_path: Path) -> None:
    _, errors = ended(pretend(SRUN_STATE="failed", SRUN_EXIT="1", RANK_SAYS="uncorrectable ECC error", NODES="n1 n2"))
    assert "warning: n2 failed, but partition all has no other node for the job" in errors
    assert requeued(tmp_path) == ["70"] and exclusions(tmp_path) == []


@pytest.mark.parametrize("state", ["NODE_FAIL", "PENDING"])
def test_a_job_that_slurm_ends_itself_is_not_said_to_be_over(pretend: Pretend, tmp_path: Path, state: str) -> None:
    """A node died: SLURM queues the job again, and srun's failure is not the last word."""
    code, errors = ended(pretend(SRUN_STATE="running", SRUN_EXIT="1", SRUN_STEP="7", JOB_STATE=state))
    assert code == 1 and requeued(tmp_path) == []
    assert f"SLURM ended this start ({state}), saved step_7: a requeued job resumes from it" in errors
    assert "not requeued" not in errors


@pytest.mark.slow
def test_a_signal_to_the_script_is_seen_before_it_says_that_the_run_is_over(pretend: Pretend, tmp_path: Path) -> None:
    process = pretend(SRUN_STATE="stopped", SRUN_REASON="SIGTERM", SRUN_SLEEP="3")
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.args").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == 0 and "SLURM ended this start (SIGTERM), saved step_1" in errors
    assert "not requeued" not in errors and requeued(tmp_path) == []


@pytest.mark.slow
def test_a_start_that_trains_for_a_small_part_of_its_time_counts_as_stalled(pretend: Pretend, tmp_path: Path) -> None:
    """One step of a tenth of a second for each start-up of seconds: checkpoints alone would be progress."""
    for start in range(3):
        code, errors = ended(pretend(STARTS=str(start), SRUN_STEP=str(start + 1), SRUN_STEP_S="0.000001"))
        if code:
            break
    assert (code, start) == (65, 1)
    assert "2 starts in a row" in errors and "trained for less than a tenth of their time" in errors
    for start in range(3):  # a step takes most of the time
        assert ended(pretend(STARTS=str(start), SRUN_STEP=str(10 * start + 10), SRUN_STEP_S="60"))[0] == 0
    # A single step in each start may be one that compiled for a minute.
    codes = [ended(pretend(STARTS=str(start), SRUN_STEP=str(start + 40), SRUN_STEP_S="60"))[0] for start in range(3)]
    assert codes[:2] == [0, 0] and codes[2] == 65


@pytest.mark.slow
def test_a_second_job_on_a_run_touches_nothing(pretend: Pretend, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    (tmp_path / "queue").write_text(f"69|69|RUNNING|pipeline:{run_dir}|/elsewhere|(null)\n")
    code, errors = ended(pretend())
    assert (code, errors.splitlines()) == (
        2,
        [f"train.sbatch: error: {run_dir} is being trained by job 69: wait for it, or choose another run.name"],
    )
    assert not run_dir.exists()
    mine, waits, other = (
        f"70|70|RUNNING|pipeline:{run_dir}",
        f"69|69|PENDING|pipeline:{run_dir}",
        "69|69|RUNNING|pipeline:/x",
    )
    for harmless in (mine, waits, other):
        (tmp_path / "queue").write_text(f"{harmless}|/elsewhere|(null)\n")
        assert ended(pretend())[0] == 0


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
    # Start 0 made step 5, starts 1 and 2 nothing new; one that SLURM itself requeued would end at its start.
    assert codes == [0, 0, 65, 65]
    assert len(requeued(tmp_path)) == 2
    # A new job begins the count anew; so does progress.
    assert [ended(pretend(SRUN_STEP="6"))[0], ended(pretend(STARTS="1"))[0]] == [0, 0]
    assert start_of(tmp_path / "runs" / "tiny").items() >= {"checkpoint": "step_6", "stalled": 0}.items()
