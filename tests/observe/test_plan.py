"""`pipeline plan`: what it prints, marks and never refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_dataset

from observe.plan.figures import Mark, Plan, figures
from observe.plan.run import run
from pipeline.config.load import load_config, to_toml
from pipeline.errors import UserError
from pipeline.machine.gpus import hardware, hardware_named
from pipeline.runs import RunFolder, State, Status

KINDS = {"weights", "gradients", "optimizer", "activations", "logits", "other", "total"}
KEYS = {
    "parameters", "parameters_without_embeddings", "flops_per_token", "tokens_per_step", "steps", "tokens", "epochs",
    "memory_per_rank", "largest_micro_batch_size", "checkpoint_bytes", "disk_bytes", "step_s", "hours", "gpu_hours",
    "assumptions",
}  # fmt: skip
TINY = [
    "quickstart",
    "data.dataset=tiny",
    "model.block_size=16",
    "train.tokens_per_step=128",
    "train.micro_batch_size=2",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, on: str = "cpu", **asked: Any) -> dict[str, Any]:
    run(arguments, on=on, measured=False, json=True, **asked)
    return json.loads(capsys.readouterr().out)


def page(capsys: pytest.CaptureFixture[str], *arguments: str, on: str = "cpu") -> str:
    run(arguments, on=on, measured=False, json=False)
    return capsys.readouterr().out


def test_gpt2_on_eight_h100(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "gpt2-124m", on="h100x8", price_per_gpu_hour=2.5, time_limit_s=12 * 3600)
    assert found.keys() >= KEYS and found["memory_per_rank"].keys() >= KINDS
    assert (found["parameters"], found["parameters_without_embeddings"]) == (124_439_808, 85_056_000)
    assert found["tokens"] == 600_000 * 524_288 and found["epochs"] is None and found["marks"]["epochs"] == "unknown"
    # llm.c takes 140 ms a step, nanoGPT's shape 24 hours for these steps.
    assert found["step_s"] == pytest.approx(0.140, rel=0.1)
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
    assert found["price"] == pytest.approx(2.5 * found["gpu_hours"]) and found["jobs"] == 2
    assert found["disk_bytes"] == 5 * found["checkpoint_bytes"] == 5 * 12 * 124_439_808
    assert set(found["marks"].values()) <= {mark.value for mark in Mark}
    assert {(way["strategy"], way["activation_checkpointing"]) for way in found["memory_by_strategy"]} == {
        (strategy, how) for strategy in ("ddp", "fsdp", "hsdp") for how in ("none", "block")
    }


def test_a_thousand_ranks_are_planned_in_under_three_seconds_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.cli.main import app\n"
        "app(['plan', 'gpt2-1558m', '--on', 'h100x1024', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - began < 3
    found = json.loads(done.stdout)
    assert found["parameters"] == 1_557_611_200
    assert "does not divide" in " ".join(found["warnings"]) and found["tokens_per_step"] == 1024 * 1024


@pytest.mark.parametrize(
    "preset", ["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m", "quickstart", "shakespeare-char"]
)
@pytest.mark.parametrize("on", ["cpu", "cpux3", "4090", "a100-40x16", "h100x3", "h100x1000000"])
def test_the_page_fits_eighty_columns_whatever_the_ranks(
    capsys: pytest.CaptureFixture[str], preset: str, on: str
) -> None:
    lines = page(capsys, preset, on=on).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("planned without the dataset" in line for line in lines)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    found = Plan(load_config("gpt2-350m", ["train.tokens_per_step=8388608"]), hardware("a100-40x8"))
    most = found.largest_micro_batch(found.config)
    at = {
        size: Plan(load_config("gpt2-350m", [f"train.micro_batch_size={size}", f"train.tokens_per_step={size * 16384}"]),
                   found.hardware).fits
        for size in (most, most + 2)
    }  # fmt: skip
    assert 1 < most < 1024 and at == {most: True, most + 2: False}


def test_what_fits_nowhere_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "gpt2-1558m", on="t4")
    assert not found["fits"] and found["largest_micro_batch_size"] == 0
    assert "use more or larger GPUs" in " ".join(found["warnings"])
    remedy = " ".join(plan(capsys, "gpt2-1558m", on="l4x64")["warnings"])
    assert "set parallel.strategy=fsdp" in remedy


def test_epochs_are_counted_and_too_many_are_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(folder / "tiny", train_tokens=500)
    arguments = [*TINY, f"data.data_dir={folder}"]
    found = plan(capsys, *arguments, "train.max_steps=20")
    assert found["epochs"] == pytest.approx(160 / 30, abs=1e-3) and not found["warnings"]
    assert "epochs: past 10" in " ".join(plan(capsys, *arguments, "train.max_steps=2000")["warnings"])


@pytest.mark.parametrize("manifest", [None, "{", "[]"], ids=["unfinished", "damaged", "another document"])
def test_a_dataset_that_cannot_be_read_does_not_stop_a_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], manifest: str | None
) -> None:
    (folder / "data/bad").mkdir(parents=True)
    if manifest is not None:
        (folder / "data/bad/manifest.json").write_text(manifest)
    found = plan(capsys, "quickstart", "data.dataset=bad")
    assert found["epochs"] is None and "data/bad" in found["warnings"][0]


def test_a_branch_takes_the_steps_after_its_trunk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs/trunk/checkpoints/step_00000300").mkdir(parents=True)
    (folder / "runs/trunk/checkpoints/latest").write_text("step_00000300\n")
    branch = ["quickstart", "run.name=b", "train.max_steps=1000"]
    assert plan(capsys, *branch, "run.branch_from=trunk")["steps"] == 700
    lost = plan(capsys, *branch, "run.branch_from=nothing")
    assert lost["steps"] == 1000 and "run.branch_from=nothing" in " ".join(lost["warnings"])


def test_a_run_is_set_next_to_its_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = RunFolder(folder / "runs/mine")
    run_folder.path.mkdir(parents=True)
    run_folder.config.write_text(to_toml(load_config("quickstart", ["run.name=mine"])))
    run_folder.write_status(Status(State.DONE, 100, tokens_per_s=4096.0))
    for name in ("mine", "runs/mine"):
        assert plan(capsys, name)["measured"]["step_s"] == pytest.approx(1.0)
    assert "Planned and measured" in page(capsys, "mine")
    assert "Planned and measured" in page(capsys, "quickstart", "run.name=mine")
    assert "Planned and measured" not in page(capsys, "quickstart", "run.name=mine", "model.n_layer=2")


def test_a_kind_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    for name in ("h1000", "x8", "h100x0", "", "cpux", "h100-40"):
        with pytest.raises(UserError, match=r"expected KIND or KINDxN with KIND one of cpu, .*h100.*4090"):
            hardware(name)
    assert str(hardware("A100-80x8")) == "a100x8" and str(hardware("a100-40x16")) == "a100-40x16"
    assert hardware("a100-40x16").nodes == 2 and hardware_named("NVIDIA H100 80GB HBM3", 2) == hardware("h100x2")
    assert hardware_named("mps", 1) is None


@pytest.mark.slow
def test_a_measurement_replaces_the_assumed_time(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("observe.plan.measured.BUDGET_S", 0.2)
    run(TINY, on="cpu", measured=True, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["marks"]["step_s"] == "measured" and 0 < found["step_s"] < 60
    with pytest.raises(UserError, match="--measure measures this machine, cpu"):
        run(TINY, on="h100", measured=True, json=True)


def test_every_figure_that_is_not_counted_says_what_it_rests_on() -> None:
    found = Plan(load_config("gpt2-124m", []), hardware("h100x8"))
    bare = [
        figure.key
        for part in figures(found).values()
        for figure in part
        if figure.mark is Mark.FORMULA and not figure.note
    ]
    assert not bare
