"""The numbers a run reports: rows that any JSON reader takes, and throughput that adds up."""

import gzip
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import overrides, run_program, tiny_config
from test_trainer import trainer_of

from pipeline.machine.gpus import format_peak, peak_flops
from pipeline.runs import RunFolder, State, Status
from train.metrics.live import LiveStatus, Throughput
from train.metrics.record import FileMetrics
from train.metrics.tensorboard import TensorBoard
from train.run import run


def metrics_in(folder: Path) -> FileMetrics:
    return FileMetrics(RunFolder(folder))


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = metrics_in(tmp_path)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "mfu": None})
    metrics.close()
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.0,
        "mfu": None,
    }


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    metrics = metrics_in(tmp_path)
    metrics.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    metrics.close()


def test_throughput_counts_training_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two laps of 2 s and 1 s, which is what is left of 99 s beside an evaluation of 98 s.
    clock = iter([0.0, 2.0, 2.5, 100.5, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput(tokens_per_step=600, flops_per_token=1000, peak_flops=1e6)
    throughput.start()
    throughput.lap()
    with throughput.paused():
        pass
    throughput.lap()
    assert throughput.tokens_per_s == 1200 / 3
    assert throughput.mfu == pytest.approx(400 * 1000 / 1e6)
    assert throughput.last_step_s == 1.0
    assert throughput.columns(waited_s=1.5) == {"tokens_per_s": 400, "mfu": pytest.approx(0.4), "data_wait": 0.5}
    assert throughput.tokens_per_s == 0, "a row's speeds are those since the last one"


def test_a_status_keeps_the_times_of_an_earlier_start_and_is_rewritten_while_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(Status(State.STOPPED, 5, "SIGTERM", exit_code=0, step_s=0.5, last_save_s=2.0))
    monkeypatch.setattr("train.metrics.live.STATUS_INTERVAL_S", 0.05)
    with LiveStatus(folder) as live:
        assert folder.read_status() == Status(State.RUNNING, 5, step_s=0.5, last_save_s=2.0)
        live.step_ended(6, 10, 0.25, math.inf)
        while folder.read_status().step != 6:
            time.sleep(0.01)
        found = folder.read_status()
        assert (found.step_s, found.first_step_s, found.last_save_s) == (0.25, 0.25, 2.0)
        assert found.eta_s == pytest.approx(1.0, rel=0.5)
        live.end(State.DONE, "", 0)
        live.end(State.FAILED, "later", 1)
    assert (folder.read_status().state, folder.read_status().exit_code) == (State.DONE, 0)
    assert folder.read_status().updated_at.endswith("+00:00")


def test_a_status_that_cannot_be_replaced_on_a_full_disk_still_says_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(Status(State.RUNNING, 5))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pipeline.runs.write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_status(Status(State.RUNNING, 6))
    folder.write_status(Status(State.FAILED, 6, "full", loss=float("nan")))
    assert folder.read_status() == Status(State.FAILED, 6, "full")


def test_mfu_is_unknown_without_a_peak() -> None:
    assert Throughput(1, 1, None).mfu is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 PCIe", 756), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989), ("NVIDIA H20", 148), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090 Ti", 80), ("AMD Instinct MI300X", 1307), ("AMD Instinct MI300X OAM", 1307),
    ],
)  # fmt: skip
def test_a_gpu_has_the_dense_peak_of_its_data_sheet(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12
    assert format_peak(name) == f"device {name}: peak {tflops:,.1f} TFLOP/s, dense bfloat16"


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3080 with Max-Q Design", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4080 SUPER", "Tesla P100-PCIE-16GB", "cpu", "mps",
    ],
)  # fmt: skip
def test_a_part_that_only_shares_a_name_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None
    assert format_peak(name) == f"device {name}: peak FLOP/s unknown, so no mfu"


@pytest.mark.slow
def test_a_run_resumed_within_the_same_second_keeps_one_curve(tmp_path: Path) -> None:
    """The killed start's events sort last by their name: they must not hide what the resumed one wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(RunFolder(tmp_path), 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step)})
    first.close()
    (events,) = (tmp_path / "tb").iterdir()
    second = int(time.time())
    events.rename(events.with_name(f"events.out.tfevents.{second:010d}.zzz.1.0"))
    resumed = TensorBoard(RunFolder(tmp_path), 2)
    for step in (3, 4, 5):
        resumed.write({"step": step, "loss": 10.0 * step})
    resumed.close()
    found = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


# ---- curves, figures by layer, what they compare with ----


@pytest.mark.slow
def test_curves_are_in_groups_with_hyperparameters_texts_and_reference_lines(tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(
        tiny, train={"max_steps": 100}, eval={"every_steps": 50, "sample_prompt": "A"},
        log={"tensorboard": True, "every_steps": 10},
    )  # fmt: skip
    run(config, preview=lambda *_, **options: "BC")
    events = EventAccumulator(str(config.run_dir / "tb")).Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "val/loss",
        "optimizer/lr",
        "optimizer/grad_norm",
        "speed/tokens_per_s",
        "speed/memory_bytes",
    } <= set(tags["scalars"])
    assert {"grad_norm/attn.c_attn.weight", "update_ratio/mlp.c_proj.weight"} <= set(tags["scalars"])
    assert not [name for name in tags["scalars"] if "/" not in name]
    assert {"sample/text_summary", "config/text_summary"} <= set(tags["tensors"])
    plugins = {events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.summary_metadata}
    assert {"hparams", "custom_scalars"} <= plugins
    references = json.loads(RunFolder(config.run_dir).references.read_text())
    for name, value in references.items():
        line = [(event.step, event.value) for event in events.Scalars(f"reference/{name}")]
        assert line == [(1, pytest.approx(value)), (100, pytest.approx(value))]
    # Each id follows from the one before it by 1, 2 or 3 of 50.
    assert references["unigram_entropy"] == pytest.approx(math.log(50), abs=0.05)
    assert references["bigram_entropy"] == pytest.approx(math.log(3), abs=0.05)


def test_figures_by_layer_are_those_of_the_whole_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.metrics.layers.EVERY_STEPS", 8)
    trainer = trainer_of(tiny_config(tiny, log={"every_steps": 5}))
    for step in range(10):
        trainer.step = step
        before = [p.detach().clone() for p in trainer.model.parameters()]
        result = trainer.train_step()
        assert bool(trainer.layers.columns) == (step == 9), "the first multiple of a row's steps"
    columns = trainer.layers.columns
    norms = [value for name, value in columns.items() if name.startswith("grad_norm/")]
    assert math.hypot(*norms) == pytest.approx(result.grad_norm, rel=1e-5), "before clipping"
    name = "update_ratio/transformer.wte.weight"
    index = [name for name, _ in trainer.model.named_parameters()].index("transformer.wte.weight")
    after = list(trainer.model.parameters())[index].detach()
    assert columns[name] == pytest.approx(float((after - before[index]).norm() / before[index].norm()), rel=1e-4)


def test_the_best_val_loss_is_that_of_the_rows_that_are_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(Status(State.STOPPED, 30, best_val_loss=0.5, val_loss=0.5))
    folder.metrics.write_text('{"step": 10, "val_loss": 2.0, "loss": 2.1}\n{"step": 20, "val_loss": 2.5}\n')
    live = LiveStatus(folder)
    live.resumed(max_steps=40)
    assert (live.now.best_val_loss, live.now.val_loss, live.summary().losses) == (2.0, 2.5, (2.1,))
    assert live.summary().state is State.RUNNING, "the age of the last start's file is not this one's"


@pytest.mark.slow
def test_a_profile_has_the_steps_that_were_asked_for(tiny: Path) -> None:
    config = tiny_config(tiny, log={"profile_steps": 2})
    run(config)
    with gzip.open(RunFolder(config.run_dir).profile / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {name for name in names if str(name).startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}


@pytest.mark.slow
def test_ctrl_c_says_at_once_what_will_happen_and_at_the_end_how_to_resume(tiny: Path) -> None:
    config = tiny_config(
        tiny, train={"max_steps": 100_000}, eval={"every_steps": 0}, checkpoint={"every_steps": 100_000}
    )
    command = [sys.executable, "-m", "pipeline", "train", "quickstart", *overrides(config)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tiny, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    first = next(line for line in lines if line.startswith("step="))
    assert first.startswith("step=1 max_steps=100000 loss=") and "tokens_per_s=" in first
    process.send_signal(signal.SIGINT)
    rest = list(lines)
    assert process.wait(60) == 0
    assert "SIGINT: saving after this step, then exiting; Ctrl-C again exits without saving\n" in rest
    (resume,) = (line for line in rest if line.startswith("to resume: "))
    arguments = shlex.split(resume.removeprefix("to resume: pipeline "))
    assert arguments == ["train", str(config.run_dir / "config.toml")]
    done = run_program(*arguments, f"train.max_steps={RunFolder(config.run_dir).read_status().step + 1}", cwd=tiny)
    assert done.returncode == 0 and "from " in done.stderr
