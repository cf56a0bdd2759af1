"""train.max_minutes: a run that ends by the clock of its training, over all its starts; and the JSON line at its end."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, overrides, run_program, tiny_config, write_documents
from test_train_run import rows, status

from pipeline.checkpoint.folder import read_description
from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import Config
from pipeline.dataset.foreign import NANOGPT
from pipeline.dataset.mixture import Mixture
from train.metrics.record import bits_per_byte
from train.run import run

MINUTES = 0.02


def timed_config(folder: Path, minutes: float = MINUTES, **sections: dict[str, Any]) -> Config:
    return tiny_config(folder, train={"max_steps": 1_000_000, "max_minutes": minutes}, **sections)


def trained_s(config: Config) -> float:
    latest = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert latest is not None
    return read_description(latest).trained_s


@pytest.mark.slow
def test_a_run_ends_done_once_its_minutes_are_used_up(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = timed_config(tiny, eval={"every_steps": 100_000}, checkpoint={"every_steps": 100_000})
    assert run(config) == ""
    ended = status(config)
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("done", "max_minutes", 0)
    # The step at which they are used up is treated as the last one: evaluated, saved, a row.
    last = rows(config)[-1]
    assert last["step"] == ended["step"] < 1_000_000 and last["val_loss"] == ended["val_loss"]
    assert (config.run_dir / "checkpoints" / f"step_{ended['step']:08d}").is_dir()
    assert trained_s(config) == pytest.approx(ended["trained_s"])
    assert 60 * MINUTES <= ended["trained_s"] < 60 * MINUTES + 1
    assert ended["tokens"] == last["tokens"] == 128 * ended["step"]

    with caplog.at_level("INFO", "pipeline"):
        assert run(config) == ""
    again = status(config)
    assert (again["state"], again["reason"], again["step"]) == ("done", "max_minutes", ended["step"])
    assert f"done at step {ended['step']}: train.max_minutes={MINUTES} are used up" in caplog.text
    assert trained_s(config) == pytest.approx(ended["trained_s"])

    more = timed_config(tiny, 2 * MINUTES, eval={"every_steps": 100_000}, checkpoint={"every_steps": 100_000})
    assert run(more) == ""
    assert 120 * MINUTES <= trained_s(more) < 120 * MINUTES + 1
    assert status(more)["step"] > ended["step"]


@pytest.mark.slow
def test_the_starts_of_a_run_share_its_minutes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped three times; what it trained before is not given to it again."""
    config = timed_config(tiny, 5 * MINUTES)
    (tiny / "stop").touch()
    monkeypatch.setenv("PIPELINE_STOP_FILE", str(tiny / "stop"))
    before, spent = 0.0, []
    for _ in range(3):
        assert run(config).startswith("stop-file")
        assert status(config)["state"] == "stopped"
        spent.append(trained_s(config) - before)
        before = trained_s(config)
    assert min(spent) > 0
    monkeypatch.delenv("PIPELINE_STOP_FILE")
    began = time.monotonic()
    assert run(config) == ""
    assert time.monotonic() - began > 60 * 5 * MINUTES - before
    assert 300 * MINUTES <= trained_s(config) < 300 * MINUTES + 1


@pytest.mark.slow
def test_evaluations_and_saves_take_none_of_the_minutes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.evaluation import Evaluation

    measure = Evaluation.run
    monkeypatch.setattr(Evaluation, "run", lambda self, model: (time.sleep(0.3), measure(self, model))[1])
    config = tiny_config(tiny, train={"max_minutes": 1000.0}, eval={"every_steps": 2})
    began = time.monotonic()
    run(config)
    assert trained_s(config) < time.monotonic() - began - 1.5
    assert (status(config)["reason"], status(config)["step"]) == ("", 10)


@pytest.mark.slow
def test_a_killed_run_counts_what_led_to_its_checkpoint(tiny: Path) -> None:
    config = timed_config(tiny, 0.5, checkpoint={"every_steps": 20})
    command = [sys.executable, "-m", "pipeline", "train", "quickstart", *overrides(config)]
    process = subprocess.Popen(command, cwd=tiny, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"})
    while not (config.run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = trained_s(config)
    assert 0 < saved < 30
    short = timed_config(tiny, saved / 60, checkpoint={"every_steps": 20})
    step = int(read_description(sorted(config.run_dir.glob("checkpoints/step_*"))[-1]).step)
    result = run_program("train", "quickstart", *overrides(short), cwd=tiny)
    assert result.returncode == 0, result.stderr
    assert (status(short)["step"], status(short)["reason"]) == (step, "max_minutes")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.campaign)])
def test_ranks_agree_on_the_last_step_and_one_of_them_prints_the_result(tiny: Path, strategy: str) -> None:
    config = timed_config(tiny, 0.05, parallel={"strategy": strategy})
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found, ended = json.loads(line), status(config)
    assert found == {
        "run": str(config.run_dir), "state": "done", "reason": "max_minutes", "step": ended["step"],
        "tokens": 128 * ended["step"], "loss": ended["loss"], "val_loss": rows(config)[-1]["val_loss"],
        "bits_per_byte": pytest.approx(found["val_loss"] / math.log(2) * 2000 / 1999), "seconds": ended["trained_s"],
    }  # fmt: skip
    assert 3 <= found["seconds"] < 5
    again = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2)
    assert (again.returncode, json.loads(again.stdout)["step"]) == (0, ended["step"]), again.stderr
    assert "are used up" in again.stderr


@pytest.mark.slow
def test_a_dry_run_prints_no_result_and_a_stopped_one_says_so(tiny: Path) -> None:
    config = tiny_config(tiny)
    dry = run_program("train", "quickstart", *overrides(config), "--dry-run", cwd=tiny)
    assert (dry.returncode, dry.stdout) == (0, "")
    (tiny / "stop").touch()
    stopped = run_program("train", "quickstart", *overrides(config), cwd=tiny, PIPELINE_STOP_FILE=str(tiny / "stop"))
    found = json.loads(stopped.stdout.splitlines()[-1])
    assert (stopped.returncode, found["state"], found["val_loss"]) == (0, "stopped", None)
    assert found["reason"].startswith("stop-file") and found["step"] >= 1


def test_bits_per_byte_are_those_of_the_val_splits(tiny: Path) -> None:
    """Of a mixture, by weight, as its loss is; of shards that do not record their bytes, unknown."""
    write_documents(tiny / "data" / "other", {"train": [["long enough for a window of it"]], "val": [["ab", "cd"]]})
    weights = [{"dataset": "tiny", "weight": 0.25}, {"dataset": "other", "weight": 0.75}]
    mixture = Mixture(tiny_config(tiny, data={"mixture": weights}))
    expected = 0.25 * 1999 / 2000 + 0.75 * 4 / 6
    assert bits_per_byte(math.log(2), mixture) == pytest.approx(1 / expected)
    foreign = Mixture(tiny_config(tiny))
    object.__setattr__(foreign.sources[0].manifest, "program", NANOGPT)
    assert bits_per_byte(1.0, foreign) is None
