"""log.also: rows reach the libraries, whatever they do cannot reach the run, and no token is in any file of ours."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import overrides, run_program, tiny_config

from pipeline.config.keys import TRACKERS
from train.metrics import trackers
from train.metrics.trackers import Tracker

TOKEN = "hf_TheTokenThatMustNotBeWritten"
# A module of the library's name, which does as HOW says and writes what it gets to GOT.
STAND_IN = """
import json, os, sys, time
how, got = os.environ["HOW"], open(os.environ["GOT"], "a")
class api: api_key = os.environ.get("WANDB_API_KEY")
def act(*arguments, **options):
    print("logged in with", os.environ.get("WANDB_API_KEY"), file=sys.stderr)
    os.system("echo $WANDB_API_KEY")
    if how == "hangs": time.sleep(1000)
    if how == "raises": raise ConnectionError(f"https://user:{os.environ['WANDB_API_KEY']}@host refused")
    if how == "dies": os.kill(os.getpid(), 9)
    if how == "asks": input("token? ")
    got.write(json.dumps([arguments, options], default=str) + chr(10)); got.flush()
init = log = finish = set_experiment = start_run = log_params = log_metrics = end_run = act
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All three libraries, as a program of this environment finds them; returns the file of what they got."""
    library = tmp_path / "library"
    library.mkdir()
    for name in TRACKERS:
        (library / f"{name}.py").write_text(STAND_IN)
    for name, value in {"GOT": str(tmp_path / "got"), "HOW": "works", "WANDB_API_KEY": TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(library))
    monkeypatch.syspath_prepend(str(library))
    return tmp_path / "got"


def received(got: Path) -> list[list[object]]:
    return [json.loads(line) for line in got.read_text().splitlines()]


@pytest.mark.parametrize("name", TRACKERS)
def test_every_row_arrives_under_the_names_of_tensorboard(name: str, tiny: Path, stand_in: Path) -> None:
    tracker = Tracker(name, tiny_config(tiny, run={"name": "mine"}))
    for step in range(1, 31):
        tracker.write({"step": step, "loss": 2.5, "val_loss_a": 3.0, "mfu": None, "grad_norm/attn": 0.1})
    tracker.close()
    calls = received(stand_in)
    rows = [call for call in calls if "train/loss" in json.dumps(call[0])]
    expected = {"train/loss": 2.5, "val/loss_a": 3.0, "grad_norm/attn": 0.1}
    assert rows == [[[expected], {"step": step}] for step in range(1, 31)]
    assert "mine" in json.dumps(calls[:2]) and "model.n_layer" in json.dumps(calls[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [("raises", "ConnectionError"), ("asks", "EOFError"), ("dies", ""), ("hangs", "no answer in 1 s")],
)
def test_a_library_that_fails_costs_its_rows_and_a_line(
    how: str, reason: str, tiny: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOW", how)
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    began = time.monotonic()
    tracker = Tracker("wandb", tiny_config(tiny))
    for step in range(1, 20_001):  # more than a pipe and the rest that is kept hold
        tracker.write({"step": step, "loss": 2.5, "grad_norm": 1.25, "tokens_per_s": 123.456})
    tracker.close()
    assert time.monotonic() - began < 15
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == f"log.also: wandb did not get all rows ({reason}); metrics.jsonl has them"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["works", "raises"])
def test_a_run_with_all_three_ends_well_and_holds_no_token(
    how: str, tiny: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, log={"also": list(TRACKERS), "tensorboard": True, "profile_steps": 2})
    search = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parents[2])])
    done = run_program("train", "quickstart", *overrides(config), cwd=tiny, HOW=how, PYTHONPATH=search, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in config.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    lines = [line for line in done.stderr.splitlines() if line.startswith("log.also")]
    assert len(lines) == (0 if how == "works" else 3), done.stderr


def test_a_library_that_is_not_installed_is_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    assert not trackers.is_installed("surely_not_installed", "log.also")
    assert (
        "surely_not_installed is not installed, so log.also is ignored: pip install surely_not_installed" in caplog.text
    )
    assert trackers.is_installed("json", "log.also") and sys.modules["json"]
