"""pipeline submit: what is wrong is told before a job waits for it; what is right is a script that sbatch takes as it is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run_program, tiny_config
from slurm_cluster import Cluster, status_of, unpack_packages, write_config

from pipeline import log
from pipeline.cli import main as cli
from pipeline.config.load import to_toml
from pipeline.errors import UserError
from pipeline.files import holder, one_writer
from pipeline.runs import RunFolder, State, Status
from prepare.run import PrepareOptions
from prepare.run import run as prepare
from slurm import sbatch, submit
from slurm.doctor import examine
from slurm.job import Job, comment_on

# One job was submitted, and its script came through stdin.
FAKE_SBATCH = """#!/bin/bash
if [[ -e refuse && $* == *"$(cat refuse.only 2>/dev/null)"* ]]; then cat refuse >&2; exit 1; fi
number=$((41 + $(ls sbatch.*.args 2>/dev/null | wc -l) + 1))
printf '%s\\n' "$@" >sbatch.$number.args
cat >sbatch.$number.script
env >sbatch.$number.env
echo "$number;cluster"
"""
# What SLURM hides is in rows of its own.
FAKE_LIST = """#!/bin/bash
name=$(basename "$0")
cat "$name.rows" 2>/dev/null
[[ " $* " != *" --all "* ]] || cat "$name.hidden" 2>/dev/null
"""
JOB = Job(time="24:00:00", nodes=2, gpus_per_node="0")


@pytest.fixture
def site(tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A folder to submit from, with a dataset, a config and stand-ins for SLURM's commands."""
    commands = tiny / "bin"
    commands.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("squeue", FAKE_LIST), ("sinfo", FAKE_LIST), ("scontrol", FAKE_LIST)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tiny / "tiny.toml").write_text(to_toml(tiny_config(tiny, run={"name": "run"})))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(submit, "LOOK_S", 0.0)
    monkeypatch.setenv("HOME", str(tiny))  # no site file of this machine's user
    for name in ("PIPELINE_SITE", "PYTHON", "RANKS_PER_NODE", "SBATCH_PARTITION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tiny)
    # The command line sets the log up for itself; undone after the test.
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(log.logger, name, getattr(log.logger, name))
    caplog.set_level("INFO", "pipeline")
    return tiny


def submitted(arguments: list[str], job: Job, dry_run: bool) -> None:
    submit.train(arguments, config_arguments=arguments, stage=None, job=job, dry_run=dry_run)


def faults(arguments: list[str], job: Job = JOB, dry_run: bool = True) -> str:
    with pytest.raises(UserError) as error:
        submitted(arguments, job, dry_run)
    assert "\n" not in str(error.value)
    return str(error.value)


def options(script: str) -> dict[str, str]:
    return {directive.name: directive.value for directive in sbatch.directives(script)}


# --- the printed script ---


def test_the_printed_script_holds_the_sites_values_and_the_arguments(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = 'data.dataset=it\'s a "name" with %j, $HOME and `tick`'
    (site / "data" / "tiny").rename(site / "data" / hostile.partition("=")[2])
    job = Job(time="1-12", nodes=2, gpus_per_node="h100:8", cpus_per_task=32, partition="gpu", account="physics")
    submitted(["tiny.toml", "train.tokens_per_step=2048", hostile], job, dry_run=True)
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert options(script).items() >= {
        "job-name": "run", "nodes": "2", "gpus-per-node": "h100:8", "cpus-per-task": "32", "time": "1-12", "partition": "gpu",
        "account": "physics", "ntasks-per-node": "1", "requeue": "", "output": "%x-%j.out",
    }.items()  # fmt: skip
    assert examine(script) == []
    # What bash makes of the lines before ours, with one more argument on sbatch's command line.
    start = script.index("# Filled in by")
    prologue = script[start : script.index("\n\n", start)]
    done = subprocess.run(
        ["bash", "-c", prologue + '\nprintf "%s\\n" "$PYTHON" "$@"', "job", "more=1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [sys.executable, "tiny.toml", "train.tokens_per_step=2048", hostile, "more=1"]
    # All else is the script as it is.
    original = (ROOT / "slurm" / "train.sbatch").read_text()
    assert script.endswith(original[original.index("set -euo pipefail") :])


def test_a_node_without_gpus_is_not_asked_for_them(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(["tiny.toml"], JOB, dry_run=True)
    script = capsys.readouterr().out
    assert "gpus-per-node" not in options(script)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)


def test_the_interpreter_is_the_one_that_submits_or_the_one_that_is_named(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHON", "/opt/my python")
    submitted(["tiny.toml"], JOB, dry_run=True)
    assert "export PYTHON='/opt/my python'\n" in capsys.readouterr().out


def test_the_plan_is_printed_without_sbatch(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(site))
    submitted(["tiny.toml"], replace(JOB, gpus_per_node="a100:2", time="90"), dry_run=True)
    assert "2 node(s), 2 GPU(s) each: 4 rank(s), for 1:30:00 at a time" in caplog.text
    assert "tokens_per_step 128 = micro_batch_size 2 x block_size 16 x accumulation 1 x 4 rank(s)" in caplog.text
    assert "20,000 train tokens; 10 steps take 1,280 tokens, 0.06 epoch(s)" in caplog.text
    assert faults(["tiny.toml"], dry_run=False).startswith("sbatch was not found: submit on a login node")


def test_earlier_measured_steps_and_saves_set_the_lead_time(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(site / "runs" / "run")
    run.path.mkdir(parents=True)
    for status in (Status(State.FAILED, 0), Status(State.RUNNING, 5, step_s=128.0)):  # nothing to go by
        run.write_status(status)
        submitted(["tiny.toml"], JOB, dry_run=True)
        assert options(capsys.readouterr().out)["signal"] == "USR2@300"
    run.write_status(Status(State.STOPPED, 5, step_s=128.0, last_save_s=200.5))
    submitted(["tiny.toml"], JOB, dry_run=True)
    assert options(capsys.readouterr().out)["signal"] == "USR2@389"  # 128 s + 200.5 s + 60 s
    assert "the signal comes 389 s before the end of 360 s" in faults(["tiny.toml"], replace(JOB, time="6"))


# --- submitting ---


def test_submitting_prints_the_id_and_how_to_follow(
    site: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    submitted(["tiny.toml"], replace(JOB, partition="cpu"), dry_run=False)
    assert capsys.readouterr().out == "42\n"
    given = (site / "sbatch.42.args").read_text().splitlines()
    # Also on the command line: SBATCH_PARTITION would win over the script's line.
    assert {"--parsable", "--partition=cpu", "--nodes=2", "--time=24:00:00"} <= set(given)
    script = (site / "sbatch.42.script").read_text()
    assert options(script)["partition"] == "cpu"
    for line in (
        "job 42 (run) is in the queue",
        "tail -F run-42.out",
        "status.json",
        "scancel --signal=TERM 42",
    ):
        assert line in caplog.text


def test_a_job_that_submits_hands_on_nothing_of_itself(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "long", "MINE": "1"}
    own = ["ARRAY_JOB_ID", "ARRAY_TASK_ID", "STEP_ID", "RESTART_COUNT", "MEM_PER_CPU", "CPU_BIND", "GPUS_ON_NODE"]
    for name, value in (kept | {"MASTER_ADDR": "n9"} | {f"SLURM_{name}": "3" for name in own}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    submitted(["tiny.toml"], JOB, dry_run=False)
    # Outside a job it is the user's own choice.
    assert {"SLURM_CPU_BIND=3", "MASTER_ADDR=n9"} <= set((site / "sbatch.42.env").read_text().splitlines())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    submitted(["tiny.toml"], JOB, dry_run=False)
    handed = (site / "sbatch.43.env").read_text().splitlines()
    assert {f"{name}={value}" for name, value in kept.items()} <= set(handed)
    assert [line for line in handed if line.startswith(("SLURM_", "MASTER_"))] == ["SLURM_CONF=/etc/slurm.conf"]


def test_what_sbatch_says_comes_in_one_line(site: Path) -> None:
    (site / "refuse").write_text("sbatch: error: Batch job submission failed:\nsbatch: error: Invalid account\n")
    assert faults(["tiny.toml"], dry_run=False) == (
        "sbatch rejected the job: Batch job submission failed: Invalid account"
    )


def test_an_array_has_a_run_and_a_log_for_each_element(
    site: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = replace(JOB, array="1-5:2%2")
    submitted(["tiny.toml", "run.seed=%a", "run.name=seed-%a"], job, dry_run=False)
    script = (site / "sbatch.42.script").read_text()
    assert options(script).items() >= {"array": "1-5:2%2", "output": "%x-%A_%a.out", "job-name": "seed"}.items()
    assert examine(script) == []
    assert "set -- tiny.toml run.seed=%a run.name=seed-%a " in script
    assert "tail -F seed-42_*.out" in caplog.text
    assert "runs/seed-1 and 2 more: status.json" in caplog.text
    assert "elements of --array 1-5:2%2 would share" in faults(["tiny.toml", "run.seed=%a"], job)
    for array in ("many", "0-999999999"):
        assert f"invalid --array {array!r}: expected indices such as 0-7" in faults(
            ["tiny.toml"], replace(JOB, array=array)
        )
    assert "run.seed='x1': expected an integer >= 0" in faults(["tiny.toml", "run.seed=x%a", "run.name=%a"], job)


# --- what a site wants ---


def test_other_options_of_sbatch_go_into_the_script_and_onto_the_command_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "logs of me").mkdir()
    monkeypatch.setenv("USER", "me")
    more = {"qos": "long", "mem": "0", "constraint": "a100&nvlink", "output": "logs of %u/%x-%j.out"}
    given = [word for name, value in more.items() for word in ("--sbatch", f"{name}={value}")]
    job = ["--nodes", "2", "--gpus-per-node", "h100:4", "--time", "60", "--sbatch", "signal=USR2@600"]
    assert call(monkeypatch, "submit", "train", "tiny.toml", "train.tokens_per_step=256", *given, *job) == 0
    assert "tail -F logs\\ of\\ me/run-42.out" in capsys.readouterr().err
    script = (site / "sbatch.42.script").read_text()
    assert options(script).items() >= {**more, "gpus-per-node": "h100:4", "signal": "USR2@600"}.items()
    assert script.count("--mem") == 1  # in the place of the line that proposes it
    given_on = (site / "sbatch.42.args").read_text().splitlines()
    assert {f"--{name}={value}" for name, value in more.items()} <= set(given_on)
    assert examine(script) == []

    assert call(monkeypatch, "submit", "prepare", "stdlib", "--time", "60", "--tasks", "2", *given) == 0
    array, merge = (options((site / f"sbatch.{number}.script").read_text()) for number in (43, 44))
    assert array["output"] == "logs of %u/%x-%A_%a.out" and merge["output"] == "logs of %u/%x-%j.out"
    assert array["qos"] == merge["qos"] == "long"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("time=60", "is not allowed, because submit checks it: use --time"),
        ("dependency=afterok:7", "is not allowed, because submit checks it: use --after"),
        ("gpus=8", "is not allowed, because submit checks it: use --gpus-per-node"),
        ("gpus-per-socket=1", "is not allowed, because submit checks it: use --gpus-per-node"),
        ("ntasks-per-node=8", "is not allowed, because submit checks it: use RANKS_PER_NODE"),
        *((other, "") for other in ("--qos=long", "qos=", "qos=a\nhostname", "exclusive user")),
    ],
)
def test_an_option_that_submit_sets_itself_or_cannot_read_is_refused(site: Path, other: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        submitted(["tiny.toml"], replace(JOB, others=(other,)), dry_run=True)
    wanted = (
        f"--sbatch {other} {told}" if told else f"invalid --sbatch {other!r}: expected OPTION=VALUE or OPTION, such as"
    )
    assert str(error.value).startswith(wanted)
    submitted(["tiny.toml"], replace(JOB, others=("gres=nvme:1", "time-min=10")), dry_run=True)


@pytest.mark.parametrize(
    ("other", "ranks", "option"),
    [
        ("gres=gpu:2", 2, {"gres": "gpu:2"}),
        ("gres=nvme:1,gpu:h100:4", 4, {"gres": "nvme:1,gpu:h100:4"}),
        ("gres=gpu", 1, {"gres": "gpu"}),
        ("gpus-per-task=4", 4, {"gpus-per-task": "4"}),
        ("gpus-per-task=h100:2", 2, {"gpus-per-task": "h100:2"}),
    ],
)
def test_gpus_may_be_asked_for_as_the_site_has_it(
    site: Path, capsys: pytest.CaptureFixture[str], other: str, ranks: int, option: dict[str, str]
) -> None:
    job = replace(JOB, gpus_per_node="", others=(other, "exclusive"))
    assert (job.gpus, job.ranks) == (ranks, 2 * ranks)
    submitted(["tiny.toml", "train.tokens_per_step=1024"], job, dry_run=True)
    script = capsys.readouterr().out
    assert options(script).items() >= (option | {"exclusive": ""}).items() and "gpus-per-node" not in options(script)
    assert "#SBATCH --exclusive\n" in script
    assert faults(["tiny.toml"], replace(job, gpus_per_node="2")).startswith(
        "GPUs are requested 2 times: give --gpus-per-node or"
    )
    assert faults(["tiny.toml"], replace(JOB, gpus_per_node="")).startswith(
        "Missing option '--gpus-per-node': expected"
    )


def test_tasks_of_a_changed_script_that_are_not_the_ranks_are_told(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    (site / "train.sbatch").write_text(text.replace("--ntasks-per-node=1", "--ntasks-per-node=4"))
    monkeypatch.setattr(sbatch, "find", lambda name: site / name)
    assert faults(["tiny.toml"]) == (
        "--ntasks-per-node=4 in the script, for 1 rank(s) a node: set it to 1, or that number"
    )
    submitted(["tiny.toml", "train.tokens_per_step=256"], replace(JOB, gpus_per_node="4"), dry_run=True)


def test_a_time_limit_that_start_up_and_signal_use_up_is_told(site: Path) -> None:
    """Jobs of two minutes with the signal at 85 s trained one step a start."""
    told = faults(["tiny.toml"], replace(JOB, time="2", others=("signal=USR2@85",)))
    assert told == (
        "--time 2 leaves no time to train: 60 s to start, the signal 85 s before the end, and a tenth for training need 3 minutes"
    )
    assert "need 7 minutes" in faults(["tiny.toml"], replace(JOB, time="6"))
    submitted(["tiny.toml"], replace(JOB, time="7"), dry_run=True)
    submitted(["tiny.toml"], replace(JOB, time="3", others=("signal=USR2@85",)), dry_run=True)


FAKE_SCONTROL = """#!/bin/bash
cat "shown.$3" 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
"""


@pytest.mark.parametrize(
    ("shown", "stuck"),
    [
        ("JobState=PENDING Reason=InvalidAccount", True),
        ("JobState=PENDING Reason=QOSMaxWallDurationPerJobLimit", True),
        ("JobState=CANCELLED Reason=DependencyNeverSatisfied", True),
        ("JobState=PENDING Reason=PartitionTimeLimit", True),
        ("JobState=PENDING Reason=Priority", False),
        ("JobState=PENDING Reason=Dependency", False),
        ("JobState=PENDING Reason=Resources", False),
        ("JobState=RUNNING Reason=None", False),
    ],
)
def test_a_reason_of_the_queue_that_never_ends_is_told_a_second_later(
    site: Path, capsys: pytest.CaptureFixture[str], shown: str, stuck: bool
) -> None:
    for name, text in (("scontrol", FAKE_SCONTROL), ("scancel", '#!/bin/bash\necho "$@" >scancel.args\n')):
        (site / "bin" / name).write_text(text)
        (site / "bin" / name).chmod(0o755)
    (site / "shown.42").write_text(f"JobId=42 JobName=run\n   {shown} Dependency=(null)\n")
    if stuck:
        assert faults(["tiny.toml"], dry_run=False).startswith(
            f"job 42 was cancelled, because it would wait forever: SLURM's reason is {shown.rpartition('=')[2]}; check"
        )
        assert (site / "scancel.args").read_text() == "42\n"
    else:
        submitted(["tiny.toml"], JOB, dry_run=False)
        assert capsys.readouterr().out == "42\n"


def test_a_job_to_wait_for_that_never_was_or_has_failed_is_told(site: Path) -> None:
    (site / "bin" / "scontrol").write_text(FAKE_SCONTROL)
    (site / "bin" / "scontrol").chmod(0o755)
    (site / "shown.17").write_text("JobId=17\n   JobState=FAILED Reason=NonZeroExitCode\n")
    assert faults(["tiny.toml"], replace(JOB, after="16")).startswith("--after 16: that job is unknown; name another")
    assert faults(["tiny.toml"], replace(JOB, after="17")).startswith("--after 17: that job is failed; name another")
    for state in ("PENDING", "RUNNING", "COMPLETED"):
        (site / "shown.17").write_text(f"JobId=17\n   JobState={state} Reason=None\n")
        submitted(["tiny.toml"], replace(JOB, after="17"), dry_run=True)


@pytest.mark.parametrize("gpus", ["-1", "all", "h100:", "h100", "a:1,b:1", "8.0"])
def test_gpus_are_a_number_of_a_type_or_of_any(site: Path, gpus: str) -> None:
    assert faults(["tiny.toml"], replace(JOB, gpus_per_node=gpus)) == (
        f"invalid --gpus-per-node {gpus!r}: expected N or TYPE:N, such as 8 or h100:4"
    )


def test_each_rank_has_cores_and_a_user_who_asks_for_fewer_is_warned(
    site: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for gpus, given, cores in (("0", None, "8"), ("2", None, "8"), ("8", None, "32"), ("8", 8, "8"), ("8", 7, "7")):
        assert "core(s) for" not in caplog.text
        job = replace(JOB, gpus_per_node=gpus, cpus_per_task=given)
        submitted(["tiny.toml", "train.tokens_per_step=512"], job, dry_run=True)
        assert options(capsys.readouterr().out)["cpus-per-task"] == cores
    assert "warning: 7 core(s) for the 8 ranks of a node: " in caplog.text


# --- what is wrong ---


def test_everything_wrong_is_told_at_once(site: Path) -> None:
    told = faults(
        ["tiny.toml", "data.dataset=other", "run.device=cuda"], Job(time="1:2:3:4", nodes=3, gpus_per_node="0")
    )
    for part in (
        "invalid --time '1:2:3:4': expected minutes, h:mm:ss or d-hh:mm:ss; for a day, write 24:00:00 (line ",
        "train.tokens_per_step=128 does not divide: one micro-batch of every rank is micro_batch_size 2 x block_size 16 x 3",
        "run.device=cuda with --gpus-per-node 0",
        "other: prepare one with `pipeline prepare SOURCE --name other`",
    ):
        assert part in told
    assert faults(["tiny.toml", "trian.x=1", "model.n_head=3"]).startswith("unknown key trian.x")
    assert "; model.n_embd=32 is not a multiple of model.n_head=3" in faults(
        ["tiny.toml", "trian.x=1", "model.n_head=3"]
    )


def test_a_dataset_that_is_not_whole_or_too_small_is_told(site: Path) -> None:
    assert "data/tiny's val split has 2000 tokens, fewer than one block of 4096" in faults(
        ["tiny.toml", "model.block_size=4096", "train.tokens_per_step=16384"]
    )
    assert "val split" not in faults(
        ["tiny.toml", "model.block_size=4096", "train.tokens_per_step=7", "eval.every_steps=0"]
    )
    shard = next((site / "data" / "tiny").glob("train_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert f"{shard.name} has 39998 bytes, expected 40000" in faults(["tiny.toml"])
    (site / "data" / "tiny" / "manifest.json").unlink()
    assert "is not a complete dataset" in faults(["tiny.toml"])


def test_a_walltime_within_the_lead_time_is_told(site: Path) -> None:
    assert faults(["tiny.toml"], replace(JOB, time="5")).startswith(
        "the signal comes 300 s before the end of 300 s; raise --time, or lower the number after @ (line "
    )


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (replace(JOB, partition="gpus"), "unknown partition gpus: expected one of short, long"),
        (replace(JOB, partition="long,big"), "unknown partition big: expected one of short, long"),
        (JOB, "--time 24:00:00 is over the limit of partition short, 30:00"),
        (
            Job(time="10", nodes=8, gpus_per_node="0", partition="long"),
            "--nodes 8 is more than the 4 of partition long",
        ),
        (
            Job(time="10", nodes=2, gpus_per_node="0", cpus_per_task=17, partition="long"),
            "--cpus-per-task 17 is more than the 16 of a node of partition long",
        ),
    ],
)
def test_a_partition_that_would_keep_the_job_waiting_for_ever_is_told(site: Path, job: Job, told: str) -> None:
    (site / "sinfo.rows").write_text("short*|30:00|2|8\nlong|infinite|3|8\nlong|infinite|1|16\n")
    assert faults(["tiny.toml", "train.tokens_per_step=256"], job) == told
    submitted(["tiny.toml"], replace(JOB, partition="short,long"), dry_run=True)  # SLURM may take the long one


def test_a_hidden_partition_takes_jobs_too_and_the_default_stays(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "sinfo.rows").write_text("short*|30:00|2|8\n")
    (site / "sinfo.hidden").write_text("private|2-00:00:00|2|8\n")
    submitted(["tiny.toml"], replace(JOB, partition="private"), dry_run=True)
    assert options(capsys.readouterr().out)["partition"] == "private"
    assert faults(["tiny.toml"]) == "--time 24:00:00 is over the limit of partition short, 30:00"
    (site / "squeue.hidden").write_text(f"7|7|PENDING|pipeline:{site}/runs/run|/else|(null)\n")
    assert f"job 7, which is pending, writes {site}/runs/run" in faults(
        ["tiny.toml"], replace(JOB, partition="private")
    )


def test_a_run_that_is_in_the_queue_or_at_work_is_told_by_its_folder_and_not_its_name(site: Path) -> None:
    """Whatever the other job is called, and wherever it was submitted; one by hand, by its command."""
    run = site / "runs" / "run"
    for row in (
        f"7|7|PENDING|pipeline:{run}|/elsewhere|(null)",
        f"7|5|RUNNING|pipeline:/other:{run}|/elsewhere|(null)",
        f"7|7|PENDING|(null)|{site}|/home/me/slurm/train.sbatch tiny.toml --resume must optimizer.lr=1",
    ):
        (site / "squeue.rows").write_text(f"{row}\n")
        told = faults(["tiny.toml"], replace(JOB, job_name="another"))
        assert re.match(rf"job 7, which is (pending|running), writes {run}: wait for it, scancel 7, or choose", told)
    for row in (
        "8|8|RUNNING|pipeline:/elsewhere/runs/run|/elsewhere|(null)",
        f"8|8|RUNNING|mine|{site}|/home/me/slurm/train.sbatch tiny.toml run.name=other",
        f"8|8|RUNNING|(null)|{site}|/home/me/job.sh tiny.toml",
        f"8|8|RUNNING|(null)|{site}|/home/me/slurm/train.sbatch nonsense=",
    ):
        (site / "squeue.rows").write_text(f"{row}\n")
        submitted(["tiny.toml"], replace(JOB, job_name="run"), dry_run=True)
    (site / "squeue.rows").unlink()
    with one_writer(site / "runs" / "run"):
        assert "runs/run is being written by process" in faults(["tiny.toml"])
    assert holder(site / "runs" / "run") == ""
    submitted(["tiny.toml"], JOB, dry_run=False)


@pytest.mark.parametrize("name", ["a:b", "a|b", "a%3Ab", os.fsdecode(b"caf\xe9")])
def test_a_run_is_recognised_whatever_the_name_of_its_folder(site: Path, name: str) -> None:
    """By a comment as squeue prints it, next to the job of another user whose folder is not UTF-8."""
    comment = comment_on([Path("other"), Path(name, "run")])
    rows = f"8|8|RUNNING|(null)|/home/{os.fsdecode(bytes([0xE9]))}|/job.sh\n7|7|PENDING|{comment}|/elsewhere|(null)\n"
    (site / "squeue.rows").write_bytes(os.fsencode(rows))
    assert "job 7, which is pending, writes" in faults(["tiny.toml", f"run.dir={name}"])
    submitted(["tiny.toml", "run.dir=a"], JOB, dry_run=True)


@pytest.mark.slow
def test_a_name_that_is_not_utf8_reaches_the_script(site: Path) -> None:
    source = os.fsdecode(b"caf\xe9.txt")
    Path(source).write_text("To be, or not to be.")
    arguments = ("submit", "prepare", source, "--name", "x", "--tokenizer", "byte", "--time", "60")
    done = run_program(*arguments, "--cpus-per-task", "1", cwd=site)
    assert done.returncode == 0, done.stderr
    script = (site / f"sbatch.{done.stdout.strip()}.script").read_bytes()
    assert b"\nset -- 'caf\xe9.txt' --name x" in script
    command = [sys.executable, "-m", "pipeline", *arguments, "--cpus-per-task", "1", "--dry-run"]
    printed = subprocess.run(
        command, cwd=site, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert printed.stdout == script


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(site: Path) -> None:
    (site / "locked").mkdir(mode=0o500)
    assert "cannot write to locked/run: no permission" in faults(["tiny.toml", "run.dir=locked"])


def test_a_run_folder_that_is_a_file_is_told(site: Path) -> None:
    (site / "file").write_text("")
    assert "cannot create file/run: " in faults(["tiny.toml", "run.dir=file"])


def test_a_mixture_of_two_vocabularies_is_told(site: Path) -> None:
    (site / "corpus.txt").write_text("To be, or not to be.\n" * 200)
    prepare(PrepareOptions(["corpus.txt"], tokenizer="char", val_fraction=0.3))
    mixture = 'data.mixture=[{dataset="tiny", weight=1}, {dataset="corpus", weight=1}]'
    assert "has the vocabulary char (12 tokens" in faults(["tiny.toml", mixture, "eval.every_steps=0"])


def test_a_sites_changes_to_the_script_are_examined_too(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = (ROOT / "slurm" / "train.sbatch").read_text().replace("--output=%x-%j.out", "--output=logs/%j.out")
    (site / "train.sbatch").write_text(changed.replace("#SBATCH --open-mode=append\n", ""))
    monkeypatch.setattr(sbatch, "find", lambda name: site / name)
    assert faults(["tiny.toml"]).startswith("the log folder logs does not exist: the job fails at its start")
    (site / "logs").mkdir()
    submitted(["tiny.toml"], JOB, dry_run=True)
    assert "warning: --requeue without --open-mode=append" in caplog.text


def test_numbers_and_names_that_cannot_be_are_told(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(["tiny.toml"], replace(JOB, job_name="a/b")).startswith(
        "invalid --job-name 'a/b': the log is named after it"
    )
    monkeypatch.setenv("RANKS_PER_NODE", "all")
    assert faults(["tiny.toml"]) == ("invalid RANKS_PER_NODE=all: unset it, or set it to 1 or more")


@pytest.mark.parametrize(("stage", "code"), [("scratch", 2), ("~/scratch", 2), ("/scratch", 0), ("$SLURM_TMPDIR", 0)])
def test_a_folder_to_stage_to_is_a_whole_path(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, code: int
) -> None:
    job = ["--nodes", "2", "--gpus-per-node", "0", "--time", "60", "--dry-run"]
    assert call(monkeypatch, "submit", "train", "tiny.toml", "--stage", stage, *job) == code
    out, err = capsys.readouterr()
    assert f"error: invalid --stage {stage!r}: expected an absolute path" in err if code else shlex.quote(stage) in out


def test_a_disk_that_is_too_small_is_warned_of(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1_000_000}))
    submitted(["tiny.toml"], JOB, dry_run=True)
    assert "warning: " + str(site / "runs" / "run") + " has 1 MB free: lower checkpoint.keep" in caplog.text


# --- preparing ---


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_a_preparation_is_submitted_with_its_own_options(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "my text.txt").write_text("text\n")
    given = ["my text.txt", "--name", "mine", "--tokenizer", "byte", "--dedup"]
    assert call(monkeypatch, "submit", "prepare", *given, "--time", "60", "--cpus-per-task", "4") == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert "tail -F mine-42.out" in err
    script = (site / "sbatch.42.script").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert options(script).items() >= {"job-name": "mine", "time": "60", "cpus-per-task": "4", "nodes": "1"}.items()
    line = re.search(r'^set -- (.*) "\$@"$', script, flags=re.MULTILINE)
    assert line and shlex.split(line[1]) == given
    assert examine(script) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.txt"], "no source 'nowhere.txt'"),
        (["stdlib", "--tokeniser", "byte"], "No such option"),
        (["stdlib", "--val-fraction", "2", "--workers", "0"], "invalid --val-fraction 2.0: expected 0 for no val split, or"),
        (["stdlib", "--tasks", "4", "--force"], "--force cannot be combined with --tasks"),
        (["-"], "--task-id and stdin (-) cannot be submitted"),
        (["stdlib", "--time", "x"], "invalid --time 'x': expected minutes"),
        (["stdlib", "--tasks", "8%"], "Invalid value for --tasks: expected N or N%M, got '8%'"),
        ([], "Missing argument 'SOURCE... [OPTION]...'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_prepare_would_refuse_is_refused_before(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert call(monkeypatch, "submit", "prepare", "--time", "60", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith(f"error: {told}")
    assert not list(site.glob("sbatch.*"))


def test_the_readmes_three_commands_submit_a_run_on_two_nodes(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_, train_, follow = (ROOT / "docs" / "slurm.md").read_text().split("```")[1].strip().splitlines()
    assert call(monkeypatch, *shlex.split(prepare_)[1:]) == 0
    assert call(monkeypatch, *shlex.split(train_.replace("PREPARE_JOB", "42"))[1:]) == 0
    out, err = capsys.readouterr()
    assert out == "42\n43\n"
    assert follow.replace("TRAIN_JOB", "43") in err
    assert "--dependency=afterok:42" in (site / "sbatch.43.args").read_text().splitlines()


def test_an_array_of_jobs_shares_the_work_and_one_more_joins_it(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prepare", "stdlib", "--data-dir", "my data", "--tasks", "8", "--time", "60", "--account", "physics"]
    assert call(monkeypatch, "submit", *given) == 0
    out, err = capsys.readouterr()
    assert out == "43\n"  # the job that ends last
    array, merge = ((site / f"sbatch.{number}.script").read_text() for number in (42, 43))
    assert options(array).items() >= {"array": "0-7", "output": "%x-%A_%a.out", "job-name": "stdlib"}.items()
    assert (
        "set -- stdlib --data-dir 'my data' \"$@\"" in array and "--tasks" not in re.findall("^set.*", array, re.M)[0]
    )
    assert options(merge).items() >= {"job-name": "stdlib-merge", "account": "physics", "output": "%x-%j.out"}.items()
    assert "set -- 'my data/stdlib' \"$@\"" in merge
    assert "--dependency=afterany:42" in (site / "sbatch.43.args").read_text().splitlines()
    for part in ("tail -F stdlib-42_*.out", "tail -F stdlib-merge-43.out", "scancel 42", "--after 43"):
        assert part in err
    assert examine(array) == [] == examine(merge)

    assert call(monkeypatch, "submit", *given, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out == array
    assert err.splitlines()[-1].endswith("/slurm/merge.sbatch 'my data/stdlib'")
    assert "sbatch --dependency=afterany:JOB /" in err


def test_an_array_whose_merge_is_refused_is_still_told(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "refuse").write_text("sbatch: error: Too many jobs\n")
    (site / "refuse.only").write_text("--dependency")
    assert call(monkeypatch, "submit", "prepare", "stdlib", "--tasks", "2", "--time", "60") == 2
    assert (
        "error: job 42 is in the queue, but not the job that joins its parts: sbatch rejected the job: Too many jobs; "
        "when it has ended, run pipeline merge data/stdlib\n"
    ) in capsys.readouterr().err


def test_training_may_wait_for_a_dataset_that_is_not_there_yet(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "tiny.toml", "data.dataset=coming", "--nodes", "2", "--gpus-per-node", "0", "--time", "60"]
    assert call(monkeypatch, "submit", *given) == 2
    assert "no dataset at" in capsys.readouterr().err
    assert call(monkeypatch, "submit", *given, "--after", "17") == 0
    out, err = capsys.readouterr()
    assert out == "42\n" and "and waits for job 17: if that fails, SLURM cancels this one" in err
    # Else it would be in the queue for ever, and the same command be refused.
    wanted = {"dependency": "afterok:17", "kill-on-invalid-dep": "yes"}
    assert options((site / "sbatch.42.script").read_text()).items() >= wanted.items()


def test_options_of_train_go_along_and_are_checked(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--nodes", "1", "--gpus-per-node", "0", "--time", "60", "--resume", "must", "tiny.toml"]
    assert call(monkeypatch, "submit", "train", *given) == 0
    assert 'set -- --resume must tiny.toml "$@"' in (site / "sbatch.42.script").read_text()
    assert call(monkeypatch, "submit", "train", *given, "--resume", "perhaps") == 2
    assert "checkpoint.resume='perhaps': expected auto" in capsys.readouterr().err
    assert call(monkeypatch, "submit", "train", *given, "--reusme", "must") == 2
    assert "No such option" in capsys.readouterr().err


# --- on a real SLURM ---


def test_where_slurm_cannot_be_had_its_tests_skip_and_fail_in_ci(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PIPELINE_TESTS_NEED_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="this system has no apt-get"):
        unpack_packages(tmp_path)
    (tmp_path / "dpkg").touch(mode=0o755)
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho no network >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PIPELINE_TESTS_NEED_SLURM", "1")
    # A skip that came through would only skip this test.
    with pytest.raises(
        (pytest.fail.Exception, pytest.skip.Exception), match="cannot download SLURM: no network"
    ) as ended:
        unpack_packages(tmp_path)
    assert ended.type is pytest.fail.Exception
    assert "export PIPELINE_TESTS_NEED_SLURM=1" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_training_behind_a_preparation_that_fails_leaves_the_queue(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    write_config(cluster.folder, "behind")
    failing = cluster.call("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=exit 3")
    given = ["behind.toml", "--nodes", "1", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "30"]
    done = run_program("submit", "train", *given, "--after", failing, "--sbatch", "mem=0", cwd=cluster.folder)
    assert done.returncode == 0, done.stderr
    cluster.call("scontrol", "release", failing)
    end = cluster.wait(done.stdout.strip())
    assert (end["JobState"], end["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    again = run_program("submit", "train", *given, "--dry-run", cwd=cluster.folder)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_submitted_run_ends_done_and_the_printed_script_is_taken(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    config = write_config(cluster.folder, "submitted")
    given = ["submitted.toml", "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "30"]
    printed = run_program("submit", "train", *given, "--dry-run", cwd=cluster.folder)
    assert printed.returncode == 0, printed.stderr
    (cluster.folder / "printed.sbatch").write_text(printed.stdout)
    cluster.call("sbatch", "--test-only", "printed.sbatch")

    done = run_program("submit", "train", *given, "--partition", "all", cwd=cluster.folder)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert f"tail -F submitted-{job}.out" in done.stderr
    twice = run_program("submit", "train", *given, cwd=cluster.folder)
    assert twice.returncode == 2 and f"error: job {job}, which is " in twice.stderr
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert status_of(config.run_dir) == ("done", 30)

    refused = run_program("submit", "train", *given, "--partition", "gpu", cwd=cluster.folder)
    assert refused.returncode == 2 and refused.stderr.startswith("error: unknown partition gpu: expected one of all")
    # The printed file is a job by itself; more arguments may follow its name.
    again = cluster.call("sbatch", "--parsable", "printed.sbatch", "run.name=printed", "--print-run-dir")
    assert cluster.wait(again)["JobState"] == "COMPLETED", cluster.log(again)
    assert str(config.run_dir.with_name("printed")) in cluster.log(again).splitlines()
