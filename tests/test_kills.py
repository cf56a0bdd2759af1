"""SIGKILL at any moment: started again with the same command, a run ends with the bits of the undisturbed one."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, die_at, overrides, run_program, tiny_config
from test_train_run import assert_identical, curve, renamed, status

from pipeline.checkpoint.folder import read_description, verify_files
from pipeline.checkpoint.pointers import checkpoint_folders, pointed_folder, step_of
from pipeline.config.keys import Config
from train.run import run

WORKERS = ("--nproc-per-node", "2")


def kill_config(folder: Path, **train: int) -> Config:
    return tiny_config(
        folder, model={"dropout": 0.1}, train=train, checkpoint={"every_steps": 2, "keep": 2}, eval={"every_steps": 4},
        log={"tensorboard": True},
    )  # fmt: skip


def before_forking() -> None:
    """What every fork would import again for itself, and no thread pool, whose threads a fork lacks."""
    import tensorboard.backend.event_processing.event_accumulator
    import torch
    import torch.utils.tensorboard

    assert tensorboard and torch.utils.tensorboard
    torch.set_num_threads(1)


def in_a_fresh_process(work: Any, *arguments: Any) -> Any:
    """A process that forks must not have run torch's thread pool yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def scalars(config: Config, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.run_dir / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def assert_undisturbed(found: Config, wanted: Config) -> None:
    """Weights, moments, pointers, rows and TensorBoard's curves."""
    assert_identical(found, wanted)
    assert status(found)["state"] == "done"
    for pointer in ("latest", "best"):
        assert (found.run_dir / "checkpoints" / pointer).read_bytes() == (
            wanted.run_dir / "checkpoints" / pointer
        ).read_bytes()
    for name in ("train/loss", "val/loss"):
        assert scalars(found, name) == scalars(wanted, name)


# ---- at each change of a folder ----


def die_everywhere(config: Config, every: int) -> int:
    """Each rename, sync and removal of a run in turn, then one of its second start. Returns the number of kills."""
    before_forking()
    straight = renamed(config, "straight")
    assert die_at(0, lambda: run(straight))
    kills = 0
    for operation in itertools.count(1, every):
        killed = renamed(config, f"killed-{operation}")
        if die_at(operation, lambda config=killed: run(config)):
            break
        kills += 1 + (not die_at(1 + operation // 2, lambda config=killed: run(config)))
        assert die_at(0, lambda config=killed: run(config))
        assert_undisturbed(killed, straight)
        shutil.rmtree(killed.run_dir)
    return kills


@pytest.mark.parametrize(
    ("every", "at_least"),
    [pytest.param(17, 4, marks=pytest.mark.slow), pytest.param(1, 80, marks=pytest.mark.campaign)],
)
def test_killed_before_each_change_on_disk(tiny: Path, every: int, at_least: int) -> None:
    assert in_a_fresh_process(die_everywhere, kill_config(tiny, max_steps=4), every) >= at_least


# ---- at random moments ----


def kill_at_random(config: Config, kills: int) -> None:
    """Forks that run the training, each killed from outside after a random time, until one has come to its end."""
    before_forking()
    chance = random.Random(0)
    straight, killed = renamed(config, "straight"), renamed(config, "killed")
    started = time.monotonic()
    assert die_at(0, lambda: run(straight))
    whole_s = time.monotonic() - started
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            run(killed)
            os._exit(0)
        time.sleep(chance.uniform(0, whole_s / 4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert die_at(0, lambda: run(killed))
    assert_undisturbed(killed, straight)


@pytest.mark.campaign
def test_forty_kills_at_random_moments(tiny: Path) -> None:
    in_a_fresh_process(kill_at_random, kill_config(tiny, max_steps=100), 40)


# ---- two ranks ----


def torchrun(config: Config, folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *WORKERS, *options, "-m", "pipeline"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [*command, "train", "quickstart", *overrides(config)],
        cwd=folder, env=variables, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, in the order it started them."""
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in listed.stdout.split())


def last_row(config: Config) -> int:
    path = config.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except json.JSONDecodeError:
        return 0  # just being written


def wait_past(config: Config, launcher: subprocess.Popen[str], step: int) -> None:
    while last_row(config) <= step:
        assert launcher.poll() is None, launcher.communicate()[1]


@pytest.mark.parametrize(
    ("kills", "max_steps"),
    [pytest.param(1, 60, marks=pytest.mark.slow), pytest.param(8, 400, marks=pytest.mark.campaign)],
)
def test_torchrun_restarts_after_a_rank_was_killed_and_continues_exactly(
    tiny: Path, kills: int, max_steps: int
) -> None:
    config = kill_config(tiny, max_steps=max_steps)
    straight, killed = renamed(config, "straight"), renamed(config, "killed")
    result = run_program("train", "quickstart", *overrides(straight), cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    launcher = torchrun(killed, tiny, f"--max-restarts={kills}", "--monitor-interval=0.1")
    chance, reached = random.Random(1), 0
    for number in range(kills):
        wait_past(killed, launcher, reached + chance.randint(3, 20))
        reached = last_row(killed)
        os.kill(ranks_of(launcher)[number % 2], signal.SIGKILL)
    _, log = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, log
    assert_undisturbed(killed, straight)


@pytest.mark.campaign
def test_all_of_torchrun_killed_at_once(tiny: Path) -> None:
    config = kill_config(tiny, max_steps=1000)  # far more than the kills wait for, on a machine that is busy too
    config = replace(
        config, checkpoint=replace(config.checkpoint, every_steps=10), eval=replace(config.eval, every_steps=20)
    )
    straight, killed = renamed(config, "straight"), renamed(config, "killed")
    assert run_program("train", "quickstart", *overrides(straight), cwd=tiny, ranks=2).returncode == 0
    chance, reached = random.Random(2), 0
    for _ in range(6):
        launcher = torchrun(killed, tiny)
        wait_past(killed, launcher, reached + chance.randint(1, 30))
        time.sleep(chance.uniform(0, 0.05))
        reached = last_row(killed)
        for pid in (launcher.pid, *ranks_of(launcher)):  # the ranks are in sessions of their own, and would train on
            os.kill(pid, signal.SIGKILL)
        launcher.communicate()
    result = run_program("train", "quickstart", *overrides(killed), cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    assert_undisturbed(killed, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["SIGTERM", *(pytest.param(how, marks=pytest.mark.campaign) for how in ("stop-file", "deadline"))],
)
def test_two_ranks_stop_at_one_step_save_and_exit_0(tiny: Path, how: str) -> None:
    """The signal reaches one rank alone, the last one: the others learn it from the agreement."""
    config = kill_config(tiny, max_steps=100_000)
    config = replace(
        config, eval=replace(config.eval, every_steps=0), checkpoint=replace(config.checkpoint, every_steps=1000)
    )
    environment = {"PIPELINE_STOP_FILE": str(tiny / "stop")}
    if how == "deadline":
        environment["PIPELINE_DEADLINE"] = str(time.time() + 10)  # less than twice a first save: at the first step
    launcher = torchrun(config, tiny, **environment)
    if how == "stop-file":
        wait_past(config, launcher, 3)
        (tiny / "stop").touch()
    if how == "SIGTERM":
        wait_past(config, launcher, 3)
        os.kill(ranks_of(launcher)[1], signal.SIGTERM)
    _, log = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, log
    told = {"SIGTERM": "SIGTERM", "stop-file": "stop-file", "deadline": "deadline"}[how]
    assert status(config)["state"] == "stopped" and status(config)["reason"].startswith(told)
    latest = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert latest is not None and step_of(latest) == status(config)["step"]
    verify_files(latest, read_description(latest))


# ---- one process, held in the middle of a save ----

HELD = """
import os, pathlib, threading, time
real = os.fsync
def fsync(descriptor):
    while threading.current_thread().name.startswith('checkpoint') and pathlib.Path('hold').exists():
        pathlib.Path('held').touch()
        time.sleep(0.01)
    real(descriptor)
os.fsync = fsync
"""


def start_held(config: Config, folder: Path) -> subprocess.Popen[str]:
    """A training whose writing thread stops before its first sync for as long as the file `hold` is there."""
    (folder / "sitecustomize.py").write_text(HELD)
    (folder / "hold").touch()
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "pipeline", "train", "quickstart", *overrides(config)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_background_save(tiny: Path) -> None:
    """Training goes on beside the save; the killed save leaves the checkpoint before it, and the lock of the dead one."""
    config = kill_config(tiny, max_steps=40)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=10))
    straight = renamed(config, "straight")
    half = replace(config, train=replace(config.train, max_steps=10), schedule=replace(config.schedule, decay_steps=40))
    for part in (straight, half):
        run(part)
    process = start_held(config, tiny)
    wait_for(tiny / "held", process)
    while last_row(config) < 29:  # the save of step 20 is held, and training is past it
        assert process.poll() is None
    process.kill()
    process.communicate()
    checkpoints = config.run_dir / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_00000010\n"
    assert (checkpoints / ".step_00000020.partial").is_dir()
    assert f"process {process.pid} on " in (config.run_dir / ".lock").read_text()
    (tiny / "hold").unlink()
    run(config)
    assert not (checkpoints / ".step_00000020.partial").exists()
    assert curve(config) == curve(straight)
    assert scalars(config, "train/loss") == scalars(straight, "train/loss")


@pytest.mark.slow
def test_a_second_sigint_does_not_wait_for_the_save(tiny: Path) -> None:
    config = kill_config(tiny, max_steps=100_000)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=100_000))
    process = start_held(config, tiny)
    while last_row(config) < 3:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    wait_for(tiny / "held", process)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert "Traceback" not in log
    assert checkpoint_folders(config.run_dir / "checkpoints") == []
    assert status(config)["state"] == "failed"
