"""Whole jobs of the batch scripts on a real two-node SLURM."""

import json
import os
import re
import shlex
import signal
from contextlib import chdir, suppress
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from slurm_cluster import (
    EVAL,
    LONG_STEPS,
    MERGE,
    PREPARE,
    TRAIN,
    Cluster,
    check_same_weights,
    losses,
    status_of,
    wait_until,
    write_config,
    write_long_config,
)

from pipeline.dataset.shards import load_manifest
from prepare.run import PrepareOptions, run
from prepare.sources.corpus import Snapshot, open_corpus
from prepare.unfinished.journal import Journal, Share
from prepare.units import Reading


def check_came_back(cluster: Cluster, job: str) -> None:
    """The job was queued again once, and is done."""
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)


@pytest.mark.slow
def test_two_nodes_train_to_the_weights_of_one_process(cluster: Cluster, two_node_run: Path) -> None:
    assert status_of(two_node_run) == ("done", 30)
    alone = write_config(cluster.folder, "alone")
    assert run_program("train", "alone.toml", cwd=cluster.folder).returncode == 0
    assert losses(two_node_run) == pytest.approx(losses(alone.run_dir), rel=1e-4)
    check_same_weights(two_node_run, alone.run_dir)


@pytest.mark.slow
def test_the_warning_signal_saves_requeues_and_leaves_the_curve_as_it_was(cluster: Cluster, two_node_run: Path) -> None:
    """In a job submitted from inside another one, with the data staged on a disk of each node: four ranks again."""
    config = write_config(cluster.folder, "warned")
    outer = "RANK=5,WORLD_SIZE=8,SLURM_STEP_ID=0,SLURM_STEP_NUM_TASKS=8,MASTER_ADDR=n9,SLURM_ARRAY_TASK_ID=3"
    slow = write_pause(cluster, step=10)
    job = cluster.submit(
        TRAIN, "warned.toml", "--stage", "$PWD/disk of $SLURMD_NODENAME", nodes=2,
        options=["--cpus-per-task=2", f"--export=ALL,RANKS_PER_NODE=2,{outer},PYTHONPATH={slow}:{ROOT}"],
    )  # fmt: skip
    wait_until("step ten is at work", (slow / "paused").exists)
    # As --signal=USR2@300 does: to every process of the step, and not to the batch script.
    cluster.call("scancel", "--signal=USR2", job)
    cluster.wait_requeued(job)
    assert status_of(config.run_dir) == ("stopped", 10)
    cluster.go_on(job)
    check_came_back(cluster, job)
    assert status_of(config.run_dir) == ("done", 30)
    assert "start 0 of job" in cluster.log(job) and "start 1 of job" in cluster.log(job)
    assert losses(config.run_dir) == pytest.approx(losses(two_node_run), rel=1e-5)
    for node in ("n1", "n2"):
        (copy,) = (cluster.folder / f"disk of {node}").glob("tiny-*")
        assert (copy / ".staged").read_text() == load_manifest(cluster.folder / "data" / "tiny").fingerprint


# A step of the first start ends once a signal has come; every rank runs this when Python starts.
PAUSE = """
import os, pathlib, time
if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from train.stop import StopRequest
    real, asked = StopRequest.reason, []
    def reason(self, *seconds):
        asked.append(1)
        while len(asked) == {step} and not self._signal:
            pathlib.Path(__file__).with_name("paused").touch()
            time.sleep(0.05)
        return real(self, *seconds)
    StopRequest.reason = reason
"""


def write_pause(cluster: Cluster, step: int) -> Path:
    """A folder that makes ranks which have it in PYTHONPATH wait in this step, so that no run is over before a signal."""
    folder = cluster.folder / "pause"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PAUSE.replace("{step}", str(step)))
    return folder


def start_long_run(cluster: Cluster, name: str, *options: str) -> tuple[str, Path]:
    """A job whose training is past its first checkpoint and far from its end, and the run's folder."""
    run_dir = write_long_config(cluster.folder, name).run_dir
    job = cluster.submit(TRAIN, f"{name}.toml", nodes=2, options=options)
    wait_until(f"{name} trains", lambda: logged_steps(run_dir) > 20)
    return job, run_dir


def logged_steps(run_dir: Path) -> int:
    rows = run_dir / "metrics.jsonl"
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def stopped_at(run_dir: Path) -> int:
    """The step at which a run was saved, in the middle of its training."""
    state, step = status_of(run_dir)
    assert state == "stopped" and 20 < step < LONG_STEPS
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"
    return step


def check_done(run_dir: Path, curve: dict[int, float]) -> None:
    assert status_of(run_dir) == ("done", LONG_STEPS)
    assert losses(run_dir, LONG_STEPS) == pytest.approx(curve, rel=1e-5)


def check_goes_on(cluster: Cluster, name: str, step: int) -> None:
    """The same command again, to the end, from the checkpoint of this step."""
    again = cluster.submit(TRAIN, f"{name}.toml", nodes=2)
    end = cluster.wait(again)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), cluster.log(again)
    assert f"step_{step:08d}: step {step} of {LONG_STEPS}" in cluster.log(again)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("how", "state"), [((), "CANCELLED"), (("--signal=TERM",), "COMPLETED")], ids=["plain", "TERM"]
)
def test_scancel_saves_and_the_same_command_goes_on(
    cluster: Cluster, long_curve: dict[int, float], how: tuple[str, ...], state: str
) -> None:
    name = f"cancelled-{state}"
    job, run_dir = start_long_run(cluster, name)
    cluster.call("scancel", *how, job)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == (state, "0"), cluster.log(job)
    wait_until("the nodes are cleared", lambda: cluster.node_states() == ["idle", "idle"])
    check_goes_on(cluster, name, stopped_at(run_dir))
    check_done(run_dir, long_curve)


@pytest.mark.campaign
def test_a_requeue_by_the_administrator_saves_and_goes_on(cluster: Cluster, long_curve: dict[int, float]) -> None:
    job, run_dir = start_long_run(cluster, "requeued")
    cluster.call("scontrol", "requeue", job)
    cluster.go_on(job)
    stopped_at(run_dir)
    check_came_back(cluster, job)
    check_done(run_dir, long_curve)


@pytest.mark.campaign
@pytest.mark.parametrize("partition", ["all", "graceless"])
def test_a_job_of_higher_priority_has_the_run_save_and_come_back(
    cluster: Cluster, long_curve: dict[int, float], partition: str
) -> None:
    """With a GraceTime only the ranks are told, without one the script as well."""
    job, run_dir = start_long_run(cluster, f"preempted-{partition}", f"--partition={partition}")
    urgent = cluster.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    stopped_at(run_dir)
    cluster.go_on(job)
    check_came_back(cluster, job)
    check_done(run_dir, long_curve)


@pytest.mark.campaign
def test_a_rank_that_is_killed_queues_the_job_again_from_its_last_checkpoint(
    cluster: Cluster, long_curve: dict[int, float]
) -> None:
    job, run_dir = start_long_run(cluster, "killed")
    os.kill(cluster.rank(job, 1), signal.SIGKILL)
    cluster.wait_requeued(job)
    wait_until("the processes of both nodes are gone", lambda: not cluster.processes(job))
    latest = (run_dir / "checkpoints" / "latest").read_text().strip()
    assert latest >= "step_00000020"
    assert re.search(rf"error: training crashed \(task 1 on n2: Killed\), saved {latest}: requeueing", cluster.log(job))
    assert "not requeued" not in cluster.log(job)
    cluster.go_on(job)
    check_came_back(cluster, job)
    assert f"{latest}: step {int(latest.removeprefix('step_'))} of {LONG_STEPS}" in cluster.log(job)
    check_done(run_dir, long_curve)
    for rank, node in enumerate(("n1", "n2")):
        log = (run_dir / "ranks" / f"rank-{rank}.log").read_text()
        assert re.findall(r"^--- start (\d) of job \d+ on (\w+)$", log, flags=re.MULTILINE) == [
            ("0", node),
            ("1", node),
        ]


@pytest.mark.campaign
def test_a_node_that_is_lost_is_not_the_end_of_the_run(cluster: Cluster, long_curve: dict[int, float]) -> None:
    """SLURM queues the job again; the script, whose srun fails first, does not say otherwise."""
    job, run_dir = start_long_run(cluster, "lost-node")
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.wait_requeued(job)
    assert "not requeued" not in cluster.log(job), cluster.log(job)
    if cluster.node_states() != ["idle", "idle"]:
        with suppress(AssertionError):  # it came back by itself
            cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.go_on(job)
    check_came_back(cluster, job)
    check_done(run_dir, long_curve)


# On the node n1 the check finds too few GPUs; every rank runs this when Python starts.
BROKEN = """
import os
if os.environ.get("SLURMD_NODENAME") == "n1" and "SLURM_STEP_ID" in os.environ:
    import train.checks.nodes
    train.checks.nodes.faults_here = lambda world: iter(["7 GPU(s) where SLURM allocated 8"])
"""


@pytest.mark.campaign
def test_a_node_that_fails_its_check_is_named_and_excluded(cluster: Cluster) -> None:
    config = write_config(cluster.folder, "unfit")
    folder = cluster.folder / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BROKEN)
    paths = f"--export=ALL,RANKS_PER_NODE=2,PYTHONPATH={folder}:{ROOT}"
    job = cluster.submit(TRAIN, "unfit.toml", options=[paths, "--cpus-per-task=2"])
    cluster.wait_requeued(job)
    assert "error: node n1 failed its check: 7 GPU(s) where SLURM allocated 8" in cluster.log(job)
    assert f"excluded for job {job}: n1" in cluster.log(job)
    assert not config.run_dir.joinpath("status.json").exists()  # nothing was trained
    cluster.go_on(job)
    check_came_back(cluster, job)
    assert cluster.job(job)["ExcNodeList"] == "n1" and "start 1 of job" in cluster.log(job)
    assert status_of(config.run_dir) == ("done", 30)


@pytest.mark.campaign
def test_a_second_job_on_a_run_ends_and_touches_nothing(cluster: Cluster) -> None:
    """By hand, under another name: `submit` would have refused it before it waited."""
    job, run_dir = start_long_run(cluster, "contested", "--job-name=first", "--cpus-per-task=2")
    second = cluster.submit(TRAIN, "contested.toml", nodes=2, options=["--job-name=second"])
    end = cluster.wait(second)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0"), cluster.log(second)
    assert f"error: {run_dir} is being trained by job {job}" in cluster.log(second)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert status_of(run_dir) == ("done", LONG_STEPS)


@pytest.mark.campaign
def test_near_a_real_time_limit_slurms_signal_saves_and_requeues(
    cluster: Cluster, long_curve: dict[int, float]
) -> None:
    # SLURM looks twice a minute, and counts half a minute in: the warning comes 50 to 80 s after the start.
    job, run_dir = start_long_run(cluster, "warned-late", "--time=5", "--signal=USR2@220")
    # That time passes without training, so that the run is in its middle and its curve a short one.
    ranks = [cluster.rank(job, rank) for rank in (0, 1)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        wait_until("SLURM warns of the time limit", lambda: all(map(has_pending_signal, ranks)))
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)
    cluster.go_on(job)
    stopped_at(run_dir)
    check_came_back(cluster, job)
    check_done(run_dir, long_curve)


def has_pending_signal(pid: int) -> bool:
    """Whether a process that was stopped has got SIGUSR2, or has even ended: SLURM 22.05 continues it first."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^(?:Shd|Sig)Pnd:\s*(\w+)$", status, flags=re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1 for mask in masks)


@pytest.mark.campaign
def test_a_limit_of_one_minute_is_enough_for_a_step_and_a_save(cluster: Cluster, two_node_run: Path) -> None:
    """What a first save may take does not fit in, so the run's own look at the clock ends it after a step."""
    config = write_config(cluster.folder, "hurried")
    job = cluster.submit(TRAIN, "hurried.toml", nodes=2, options=["--time=1", "--signal=USR2@1"])
    cluster.wait_requeued(job)
    assert status_of(config.run_dir) == ("stopped", 1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.go_on(job)
    check_came_back(cluster, job)
    assert losses(config.run_dir) == pytest.approx(losses(two_node_run), rel=1e-4)


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued_and_keeps_its_exit_code(cluster: Cluster) -> None:
    for name in ("no-data", "diverging", "nowhere"):
        write_config(cluster.folder, name, dataset="nowhere" if name == "no-data" else "tiny")
    diverge = ("optimizer.lr=1e30", "train.max_bad_steps=2")
    nowhere = ["--export=ALL,MASTER_ADDR=no-such-host.invalid"]
    jobs = {
        (2, "error: unknown key trian.max_steps"): cluster.submit(TRAIN, "quickstart", "trian.max_steps=3"),
        (2, "error: no dataset at"): cluster.submit(TRAIN, "no-data.toml", nodes=2),
        (2, "error: node n1 cannot resolve 'no-such-host.invalid'"):
            cluster.submit(TRAIN, "nowhere.toml", nodes=2, options=nowhere),
        (3, "error: 2 steps in a row"): cluster.submit(TRAIN, "diverging.toml", *diverge, nodes=2),
    }  # fmt: skip
    for (code, line), job in jobs.items():
        end = cluster.wait(job)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{code}:0", "0"), cluster.log(job)
        errors = [text for text in cluster.log(job).splitlines() if text.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith(line), cluster.log(job)
        assert len(cluster.log(job).splitlines()) < 40  # short enough to read
    assert status_of(cluster.folder / "runs" / "diverging")[0] == "failed"


@pytest.mark.campaign
def test_a_job_that_comes_back_twice_without_a_checkpoint_ends(cluster: Cluster) -> None:
    write_config(cluster.folder, "unlucky")
    job = cluster.submit(TRAIN, "unlucky.toml", nodes=2)
    for start in (0, 1):  # its ranks are not there yet
        wait_until(f"start {start}", lambda start=start: f"start {start} of job" in cluster.log(job))
        cluster.call("scontrol", "requeue", job)
        cluster.go_on(job)
    end = cluster.wait(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "65:0", "2"), cluster.log(job)
    assert "error: none: 2 starts in a row made no checkpoint" in cluster.log(job)


@pytest.mark.slow
def test_an_eval_job_writes_its_results_apart_from_the_log(cluster: Cluster, two_node_run: Path) -> None:
    """Also submitted from inside another job, of whose step it has the variables."""
    checkpoint = two_node_run / "checkpoints" / "step_00000030"
    step = "SLURM_STEP_NUM_TASKS=8,SLURM_STEP_NUM_NODES=1,SLURM_STEP_TASKS_PER_NODE=8"
    options = [f"--export=ALL,RANKS_PER_NODE=2,{step}"]
    job = cluster.submit(EVAL, f"--ckpt={checkpoint}", "--data=tiny", "--json", options=options)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert json.loads(cluster.log(job))["loss"] > 0


@pytest.mark.slow
def test_the_commands_that_the_docs_show_work_as_they_are(cluster: Cluster) -> None:
    """With fewer steps: from preparing to a sample, whose text is apart from the log."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    commands = page.partition("To see all of it work")[2].split("```")[1].strip().splitlines()
    job = ""
    for command in commands:
        words = shlex.split(re.sub(r"[A-Z]+_JOB", job, command).replace(" slurm/", f" {ROOT}/slurm/"))
        if "quickstart" in words:
            words += ["train.max_steps=20", "checkpoint.every_steps=20", "eval.every_steps=0"]
        job = cluster.call(*words).split()[-1]
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert len(commands) == 3
    assert load_manifest(cluster.folder / "data" / "stdlib-bytes").count("val", "tokens") > 0
    assert cluster.log(job).startswith("def ")


@pytest.mark.campaign
def test_an_array_of_prepare_jobs_outlives_its_elements(cluster: Cluster) -> None:
    """One is requeued and one killed, each in its middle and alone; the dataset is that of one undisturbed process."""
    corpus = cluster.folder / "shared"
    corpus.mkdir()
    for number in range(60):
        lines = [f'{{"text": "line {i} of file {number}, of which each task has twenty"}}\n' for i in range(25_000)]
        (corpus / f"{number:02d}.jsonl").write_text("".join(lines))
    dataset = cluster.folder / "data" / "shared"
    array = cluster.submit(PREPARE, "shared", "--shard-tokens", "10000000", options=["--array=0-2"])
    too_early = cluster.submit(MERGE, str(dataset), options=[f"--dependency=afterany:{array}"])

    wait_until("element 2 has begun", lambda: finished_items(dataset, 2))
    for pid in cluster.processes(f"{array}_2"):
        os.kill(pid, signal.SIGKILL)
    wait_until("element 1 has begun", lambda: finished_items(dataset, 1))
    cluster.call("scontrol", "requeue", f"{array}_1")
    cluster.wait_requeued(f"{array}_1")
    assert cluster.wait(f"{array}_2")["JobState"] == "FAILED"
    assert all(0 < finished_items(dataset, element) < 20 for element in (1, 2))
    assert cluster.wait(f"{array}_0")["JobState"] == "COMPLETED"

    assert cluster.job(too_early)["Reason"] == "Dependency"
    cluster.go_on(f"{array}_1")
    assert cluster.wait(f"{array}_1")["JobState"] == "COMPLETED"
    assert (cluster.wait(too_early)["ExitCode"], cluster.log(too_early).count("--task-id 2 of --tasks 3")) == ("2:0", 1)
    assert not (dataset / "manifest.json").exists()

    cluster.call("scontrol", "requeue", f"{array}_2")
    cluster.go_on(f"{array}_2")
    assert cluster.wait(f"{array}_2")["JobState"] == "COMPLETED"
    merged = cluster.submit(MERGE, str(dataset), options=[f"--dependency=afterany:{array}"])
    assert cluster.wait(merged)["JobState"] == "COMPLETED", cluster.log(merged)
    assert [cluster.job(f"{array}_{element}")["Restarts"] for element in (0, 1, 2)] == ["0", "1", "1"]

    run(PrepareOptions([str(corpus)], name="alone", data_dir=str(cluster.folder / "data"), shard_tokens=10_000_000))
    assert load_manifest(dataset).fingerprint == load_manifest(cluster.folder / "data" / "alone").fingerprint


def finished_items(dataset: Path, task: int, tasks: int = 3) -> int:
    """How many items of the corpus a task of a preparation has finished."""
    journal = Journal(dataset)
    plan = journal.plan()
    if plan is None:
        return 0
    with chdir(plan.working_folder):  # which the sources are named from
        listed = list(Snapshot(open_corpus(plan.sources, Reading(), dataset), plan.unit_bytes, lambda file: file))
    mine = Share(task, tasks).items([item.size for _, item in listed])
    return len(journal.finished().keys() & {listed[number][0] for number in mine})
