"""Whole runs: what lands on disk, and that a stop, a kill and a resume leave no trace in the result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, overrides, run_program, tiny_config, write_dataset
from safetensors.torch import load_file

from pipeline.checkpoint.folder import read_description
from pipeline.checkpoint.pointers import pointed_folder, set_pointer
from pipeline.config.keys import Config
from pipeline.config.load import from_dict, to_dict
from pipeline.errors import UserError
from pipeline.files import one_writer
from pipeline.machine.ranks import World
from pipeline.runs import RunFolder, State, Status
from train.run import autocast_type, run
from train.stop import StopRequest


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(config: Config) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows(config)]


def status(config: Config) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((config.run_dir / "status.json").read_text())
    return document


def final_tensors(config: Config) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the latest checkpoint."""
    folder = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert folder is not None
    return load_file(folder / "model.safetensors") | load_file(folder / "training_state.safetensors")


def assert_identical(found: Config, wanted: Config) -> None:
    """Bit for bit the same weights, moments and curve."""
    ours, theirs = final_tensors(found), final_tensors(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert curve(found) == curve(wanted)


def renamed(config: Config, name: str) -> Config:
    return replace(config, run=replace(config.run, name=name))


def copy_of(config: Config, name: str) -> Config:
    """The run's folder under another name."""
    copied = renamed(config, name)
    shutil.rmtree(copied.run_dir, ignore_errors=True)
    shutil.copytree(config.run_dir, copied.run_dir)
    return copied


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(tiny: Path) -> None:
    config = tiny_config(tiny, log={"tensorboard": True, "every_steps": 2})
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny)
    assert result.returncode == 0, result.stderr
    written = rows(config)
    assert [row["step"] for row in written] == [2, 4, 5, 6, 8, 10]
    assert [row["tokens"] for row in written] == [256, 512, 640, 768, 1024, 1280]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"} <= written[0].keys()
    assert [row["step"] for row in written if "val_loss" in row] == [5, 10]
    assert written[-1]["loss"] < written[0]["loss"]
    ended = status(config)
    assert {name: ended[name] for name in ("state", "step", "reason")} == {"state": "done", "step": 10, "reason": ""}
    assert ended["step_s"] > 0 and ended["last_save_s"] > 0
    assert from_dict(tomllib.loads((config.run_dir / "config.toml").read_text())) == config
    checkpoints = config.run_dir / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_00000010\n"
    assert (checkpoints / "best").read_text() == "step_00000010\n"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000005", "step_00000010"]
    assert "step 10" in (config.run_dir / "log.txt").read_text()


def test_tensorboard_holds_the_same_curve(tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tiny, log={"tensorboard": True})
    run(config)
    events = EventAccumulator(str(config.run_dir / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in rows(config)
    ]
    assert [e.step for e in events.Scalars("val/loss")] == [5, 10]


@pytest.mark.slow
def test_stopped_after_every_single_step_equals_straight_through(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten starts, each stopped by its stop-file after one step, dropout on: the same bits as one start."""
    straight = tiny_config(tiny, model={"dropout": 0.2}, log={"every_steps": 5})
    run(straight)
    stop_file = tiny / "stop"
    stop_file.touch()
    monkeypatch.setenv("PIPELINE_STOP_FILE", str(stop_file))
    chopped = renamed(straight, "chopped")
    for step in range(1, 11):
        run(chopped)
        assert (status(chopped)["step"], status(chopped)["state"]) == (step, "stopped")
        assert "stop-file" in status(chopped)["reason"]
    for name, tensor in final_tensors(chopped).items():
        assert torch.equal(tensor, final_tensors(straight)[name]), name


@pytest.mark.slow
def test_resumed_in_the_middle_equals_straight_through(tiny: Path) -> None:
    straight = tiny_config(tiny, model={"dropout": 0.2})
    run(straight)
    halved = renamed(straight, "halved")
    run(replace(halved, train=replace(halved.train, max_steps=5), schedule=replace(halved.schedule, decay_steps=10)))
    run(halved)
    assert_identical(halved, straight)


def test_a_run_on_a_cpu_stays_in_the_type_it_began_with(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial may end otherwise at another start, or on another machine."""
    monkeypatch.setattr("train.run.pick_dtype", lambda name, device, n_embd: (torch.float32, f"trial of {name}"))
    config, world = tiny_config(tiny, run={"dtype": "auto"}), World(device=torch.device("cpu"))
    assert autocast_type(config, world) == (torch.float32, "trial of auto")
    RunFolder(config.run_dir).path.mkdir(parents=True)
    RunFolder(config.run_dir).write_status(Status(State.RUNNING, 0, dtype="bfloat16"))
    assert autocast_type(config, world) == (torch.bfloat16, "as the run began")
    configured = replace(config, run=replace(config.run, dtype="float32"))
    assert autocast_type(configured, world) == (torch.float32, "trial of float32"), "what is configured wins"
    RunFolder(config.run_dir).write_status(Status(State.RUNNING, 0, dtype="float16"))
    assert autocast_type(config, world) == (torch.float32, "trial of auto"), "a run that began on a GPU"


def mixed_config(folder: Path, **sections: dict[str, Any]) -> Config:
    write_dataset(folder / "data" / "other", train_tokens=500, seed=5)
    mixture = [{"dataset": "tiny", "weight": 0.7}, {"dataset": "other", "weight": 0.3}]
    return tiny_config(folder, data={"mixture": mixture} | sections.pop("data", {}), **sections)


def test_a_mixture_is_trained_and_reported_by_source(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    config = mixed_config(tiny, train={"max_steps": 20}, eval={"every_steps": 10}, checkpoint={"every_steps": 10})
    run(config)
    assert (
        "data/other (30.00% of the samples): 500 train tokens; 20 steps take 768 tokens, 1.60 epoch(s)" in caplog.text
    )
    assert "data tiny: 1,792 tokens seen, 0.09 epoch(s)" in caplog.text
    assert from_dict(tomllib.loads((config.run_dir / "config.toml").read_text())) == config
    evaluated = [row for row in rows(config) if "val_loss" in row]
    assert [(row["tokens_tiny"], row["tokens_other"]) for row in evaluated] == [(896, 384), (1792, 768)]
    for row in evaluated:
        assert row["val_loss"] == pytest.approx(0.7 * row["val_loss_tiny"] + 0.3 * row["val_loss_other"])
        assert row["tokens_tiny"] + row["tokens_other"] == row["tokens"]
    assert evaluated[-1]["epochs_other"] == pytest.approx(768 / 16 / 30)


@pytest.mark.slow
def test_a_mixture_resumed_in_the_middle_equals_straight_through(tiny: Path) -> None:
    straight = mixed_config(tiny, data={"document_mask": True}, eval={"every_steps": 0})
    run(straight)
    halved = renamed(straight, "halved")
    run(replace(halved, train=replace(halved.train, max_steps=7), schedule=replace(halved.schedule, decay_steps=10)))
    run(halved)
    assert_identical(halved, straight)


def test_other_weights_are_refused_by_name_and_so_is_another_mask(tiny: Path) -> None:
    config = mixed_config(tiny)
    run(config)
    other = tuple(replace(source, weight=0.5) for source in config.data.mixture)
    weights = "the weight of 'tiny' in data.mixture 0.7 -> 0.5, the weight of 'other' in data.mixture 0.3 -> 0.5"
    with pytest.raises(UserError, match=f"cannot resume with {weights}: set them back, .*run.branch_from"):
        run(replace(config, data=replace(config.data, mixture=other)))
    with pytest.raises(UserError, match="cannot resume with data.document_mask False -> True"):
        run(replace(config, data=replace(config.data, document_mask=True)))


def test_the_share_of_time_spent_waiting_for_data_is_logged(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    assert all(0 <= row["data_wait"] < 1 for row in rows(config))


def test_rows_past_the_resumed_step_are_dropped(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    wanted = curve(config)
    checkpoints = config.run_dir / "checkpoints"
    set_pointer(checkpoints, "latest", checkpoints / "step_00000005")
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # cut short by a crash
    run(config)
    assert curve(config) == wanted


def test_a_finished_run_has_nothing_left_to_do(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    before = final_tensors(config)
    run(config)
    assert status(config)["state"] == "done"
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_tensors(config).items())


def test_resume_must_and_never(tiny: Path) -> None:
    config = tiny_config(tiny)
    must = replace(config, checkpoint=replace(config.checkpoint, resume="must"))
    never = replace(config, checkpoint=replace(config.checkpoint, resume="never"))
    with pytest.raises(UserError, match="nothing to resume: .*checkpoint.resume=must forbids a fresh start"):
        run(must)
    assert not config.run_dir.exists()
    run(never)
    with pytest.raises(UserError, match="has checkpoints up to step_00000010, and checkpoint.resume=never forbids"):
        run(never)
    run(must)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run": {"seed": 1}}, "run.seed 1337 -> 1"),
        ({"model": {"n_layer": 3}}, "model.n_layer 2 -> 3"),
        ({"train": {"tokens_per_step": 64}}, "train.tokens_per_step 128 -> 64"),
    ],
)
def test_what_fixes_data_order_or_shapes_cannot_change_on_resume(
    tiny: Path, change: dict[str, Any], named: str
) -> None:
    run(tiny_config(tiny))
    with pytest.raises(UserError, match=f"cannot resume with {named}"):
        run(tiny_config(tiny, **change))


def test_another_dataset_cannot_take_over_a_run(tiny: Path) -> None:
    run(tiny_config(tiny))
    write_dataset(tiny / "data" / "tiny", seed=1)
    with pytest.raises(UserError, match="was trained on another dataset"):
        run(tiny_config(tiny))


def test_best_is_the_lowest_val_loss_also_across_a_resume(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    worse = replace(
        config, train=replace(config.train, max_steps=15), optimizer=replace(config.optimizer, lr=3.0, min_lr=3.0)
    )
    run(worse)
    assert rows(config)[-1]["val_loss"] > rows(config)[9]["val_loss"]
    best = pointed_folder(config.run_dir / "checkpoints", "best")
    assert best is not None and best.name == "step_00000010"


def test_training_starts_from_given_weights(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    first = rows(config)
    source = str(config.run_dir / "checkpoints" / "step_00000010")
    tuned = replace(renamed(config, "tuned"), model=replace(config.model, init_from=source))
    run(tuned)
    assert rows(tuned)[0]["loss"] < first[2]["loss"] < first[0]["loss"]


def test_dry_run_prints_the_arithmetic_and_writes_nothing(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    run(tiny_config(tiny), dry_run=True)
    assert "tokens_per_step 128 = micro_batch_size 2 x block_size 16 x accumulation 4 x 1 rank(s)" in caplog.text
    assert "20,000 train tokens; 10 steps take 1,280 tokens, 0.06 epoch(s)" in caplog.text
    assert not (tiny / "runs").exists()


def test_dry_run_refuses_what_the_run_would_refuse(tiny: Path) -> None:
    config = tiny_config(tiny)
    with pytest.raises(UserError, match="no checkpoint"):
        run(replace(config, model=replace(config.model, init_from=str(tiny / "nowhere"))), dry_run=True)
    run(config)
    with pytest.raises(UserError, match="cannot resume with run.seed"):
        run(replace(config, run=replace(config.run, seed=1)), dry_run=True)


def test_signals_are_the_callers_again_after_training(tiny: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(tiny_config(tiny))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_rank_that_is_to_outlive_the_others_still_does_after_training() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_full_disk_is_an_error_of_the_user(tiny: Path) -> None:
    """/dev/full takes no byte; a run folder under it cannot be made."""
    with pytest.raises(UserError, match="cannot write to /dev/full/run: "):
        run(tiny_config(tiny, run={"dir": "/dev/full"}))


def test_deadline_that_is_no_time_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEADLINE", "tomorrow")
    with pytest.raises(UserError, match="invalid PIPELINE_DEADLINE 'tomorrow'"):
        run(tiny_config(tiny))


def test_deadline_stops_before_it_and_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEADLINE", str(time.time() + 5))  # less than twice a first save
    config = tiny_config(tiny)
    run(config)
    assert status(config)["state"] == "stopped" and status(config)["step"] == 1
    assert status(config)["reason"].startswith("deadline")


def test_a_deadline_long_past_at_the_start_is_told_and_not_heeded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job's, say: each start would make one step and be queued again."""
    monkeypatch.setenv("PIPELINE_DEADLINE", str(time.time() - 70))
    config = tiny_config(tiny)
    run(config)
    assert status(config)["state"] == "done"
    assert (config.run_dir / "log.txt").read_text().count("s ago: ignored") == 1


def test_a_requeued_job_waits_for_what_is_left_of_its_last_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny)
    with ExitStack() as last_start:
        last_start.enter_context(one_writer(config.run_dir))
        with pytest.raises(UserError, match="is being written by process"):
            run(config)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr("pipeline.files.time.sleep", lambda _: last_start.close())
        run(config)
    assert status(config)["state"] == "done"


@pytest.mark.slow
def test_stopped_by_signals_and_killed_the_run_resumes_and_ends_the_same(tiny: Path) -> None:
    """SIGTERM and SIGINT save and exit with 0, SIGKILL costs the steps since the last checkpoint, on one run in turn."""
    straight = tiny_config(tiny, train={"max_steps": 300}, eval={"every_steps": 60}, checkpoint={"every_steps": 20})
    run(straight)
    stopped, reached = renamed(straight, "stopped"), 3
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = start(stopped, tiny)
        wait_for_rows(stopped, process, reached)
        process.send_signal(number)
        assert process.wait(timeout=60) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        if number == signal.SIGKILL:
            assert status(stopped)["state"] == "running", "a killed process cannot report it"
        else:
            assert status(stopped)["state"] == "stopped" and status(stopped)["reason"] == number.name
            assert reached <= status(stopped)["step"] < 300
            reached = status(stopped)["step"] + 22  # past another checkpoint
    run(stopped)
    assert_identical(stopped, straight)


@pytest.mark.slow
def test_a_second_writer_is_refused(tiny: Path) -> None:
    config = tiny_config(
        tiny, train={"max_steps": 100_000}, eval={"every_steps": 0}, checkpoint={"every_steps": 100_000}
    )
    process = start(config, tiny)
    wait_for_rows(config, process, 1)
    try:
        with pytest.raises(UserError, match=f"is being written by process {process.pid} on"):
            run(config)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_divergence_is_exit_code_3_and_keeps_the_last_checkpoint(tiny: Path) -> None:
    config = tiny_config(
        tiny, train={"max_steps": 50, "max_bad_steps": 2}, optimizer={"lr": 1e30, "min_lr": 1e30, "grad_clip": 0.0}
    )
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny)
    assert result.returncode == 3, result.stderr
    assert "error: 2 steps in a row" in result.stderr and "Traceback" not in result.stderr
    assert status(config)["state"] == "failed"


def start(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "train", "quickstart", *overrides(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)


def wait_for_rows(config: Config, process: subprocess.Popen[bytes], step: int) -> None:
    """Until the process has logged `step`; fails if it ends first."""
    path = config.run_dir / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)  # a loop without a pause would take a core from the process
    raise AssertionError(f"the process ended with {process.returncode} before step {step}")


def test_config_in_the_checkpoint_is_the_resolved_one(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    assert read_description(config.run_dir / "checkpoints" / "step_00000010").config == to_dict(config)
