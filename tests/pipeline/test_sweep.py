"""`train --sweep` and `train --from`, as their user meets them: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, overrides, run_program, tiny_config

from pipeline.cli.sweep import ended_before, name_with, named, split_values, variants
from pipeline.config.load import config_from_arguments, from_dict, to_dict
from pipeline.errors import UserError
from pipeline.runs import RunFolder, State


def state_of(folder: Path, name: str) -> tuple[State, int]:
    status = RunFolder(folder / "runs" / name).read_status()
    assert status is not None
    return status.state, status.step


def sweep(folder: Path, *sweeps: str, **sections: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    options = [word for text in sweeps for word in ("--sweep", text)]
    return run_program("train", "quickstart", *overrides(tiny_config(folder, **sections)), *options, cwd=folder)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        (" 1 , 2 ", ["1", "2"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ('[{dataset="a",weight=1}],[]', ['[{dataset="a",weight=1}]', "[]"]),
        ('"a, b",c', ["a, b", "c"]),
        ("one", ["one"]),
        ("", [""]),
        ("1,", ["1", ""]),
        (",1", ["", "1"]),
    ],
)
def test_values_are_split_at_commas_outside_lists_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_two_keys_make_a_grid_and_each_run_a_name_that_says_its_values() -> None:
    grid = variants(["optimizer.lr=1e-3,3e-3", "optimizer.betas=[0.9,0.95],[0.9,0.99]"])
    assert grid == [
        ["optimizer.lr=1e-3", "optimizer.betas=[0.9,0.95]"], ["optimizer.lr=1e-3", "optimizer.betas=[0.9,0.99]"],
        ["optimizer.lr=3e-3", "optimizer.betas=[0.9,0.95]"], ["optimizer.lr=3e-3", "optimizer.betas=[0.9,0.99]"],
    ]  # fmt: skip
    assert name_with("a", grid[1]) == "a-lr-1e-3-betas-0.9-0.99"
    words, config = named(["quickstart", "run.name=a"], grid[1])
    assert config.run.name == "a-lr-1e-3-betas-0.9-0.99" and config.optimizer.betas == (0.9, 0.99)
    assert config == config_from_arguments(words)


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["optimizer.lr"], "invalid --sweep 'optimizer.lr'"),
        (["optimizer.lr="], "invalid --sweep 'optimizer.lr='"),
        (["optimizer.lr=1,,2"], "invalid --sweep"),
        (["optimizer.lr=1,1"], "values that differ"),
        (["run.name=a,b"], "run.name itself"),
        (["optimizer.lr=1,2", "optimizer.lr=3,4"], "each key once"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_in_a_line(sweeps: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants(sweeps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lrr=1,2", "unknown key optimizer.lrr (did you mean optimizer.lr?)"),
        ("optimizer.lr=1e-3,fast", "optimizer.lr='fast': expected a number > 0"),
        ("model.n_head=2,3", "model.n_embd=32 is not a multiple of model.n_head=3"),
        ("data.dataset=a/b,a-b", "would have the same name"),
    ],
)
def test_all_configs_are_checked_before_the_first_run_begins(tiny: Path, text: str, message: str) -> None:
    result = sweep(tiny, text)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert message in result.stderr and not (tiny / "runs").exists()


@pytest.mark.slow
def test_a_sweep_trains_each_run_once_passes_over_what_diverges_and_ends_with_a_table(tiny: Path) -> None:
    keys = {"train": {"max_bad_steps": 2}, "optimizer": {"min_lr": 1e-4}}
    result = sweep(tiny, "optimizer.lr=1e-2,1e30,5e-3", **keys)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1::2]] == [
        ["run-lr-1e-2", "done"], ["run-lr-5e-3", "done"], ["run-lr-1e30", "failed"],
    ]  # fmt: skip
    assert [line.strip() for line in lines[2::2]] == ["optimizer.lr=0.01", "optimizer.lr=0.005", "optimizer.lr=1e+30"]
    logs = {path: path.read_text() for path in (tiny / "runs").glob("*/log.txt")}
    again = sweep(tiny, "optimizer.lr=1e-2,1e30,5e-3", **keys)
    assert again.returncode == 0 and again.stdout.count("done") == 2
    assert again.stderr.count("done, not repeated") == 2 and again.stderr.count("diverged, not repeated") == 1
    assert {path: path.read_text() for path in logs} == logs
    # A change makes them other runs than those that ended.
    longer = sweep(tiny, "optimizer.lr=1e-2", **keys | {"train": {"max_bad_steps": 2, "max_steps": 12}})
    assert longer.returncode == 0 and state_of(tiny, "run-lr-1e-2") == (State.DONE, 12)


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others_and_the_sweep_says_so(tiny: Path) -> None:
    result = sweep(tiny, "data.dataset=missing,tiny")
    assert result.returncode == 2
    assert "1 of 2 runs failed (see above): run-dataset-missing" in result.stderr.splitlines()[-1]
    assert state_of(tiny, "run-dataset-tiny") == (State.DONE, 10)
    diverged = sweep(tiny, "optimizer.lr=1e29,1e30", train={"max_bad_steps": 2})
    assert diverged.returncode == 3 and "every run of the sweep diverged" in diverged.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_hand_saved_and_the_sweep(tiny: Path, number: signal.Signals) -> None:
    config = tiny_config(tiny, train={"max_steps": 100_000}, checkpoint={"every_steps": 100_000})
    command = [sys.executable, "-m", "pipeline", "train", "quickstart", *overrides(config), "--sweep", "run.seed=1,2"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tiny, env=variables, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    metrics = tiny / "runs" / "run-seed-1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "the sweep has stopped at run 1 of 2: the same command resumes" in log
    state, step = state_of(tiny, "run-seed-1")
    assert state is State.STOPPED and "run-seed-1  stopped" in out
    assert (tiny / "runs" / "run-seed-1" / "checkpoints" / f"step_{step:08d}").is_dir()
    assert not (tiny / "runs" / "run-seed-2").exists()


@pytest.mark.slow
def test_torchrun_and_batch_scripts_are_refused_in_a_line(tiny: Path) -> None:
    words = ["train", "quickstart", *overrides(tiny_config(tiny)), "--sweep", "run.seed=1,2"]
    ranks = run_program(*words, cwd=tiny, ranks=2)
    assert ranks.returncode != 0 and ranks.stderr.count("error: --sweep starts one process after the other") == 1
    script = run_program(*words, "--print-run-dir", cwd=tiny)
    assert (script.returncode, script.stdout) == (2, "") and "--sweep" in script.stderr
    job = run_program("submit", *words, "--nodes", "1", "--gpus-per-node", "0", "--time", "1:00:00", cwd=tiny)
    assert job.returncode == 2 and "use --array" in job.stderr
    assert not (tiny / "runs").exists()


@pytest.mark.slow
def test_a_dry_run_checks_every_run_and_trains_none(tiny: Path) -> None:
    words = ["train", "quickstart", *overrides(tiny_config(tiny)), "--sweep", "run.seed=1,2", "--dry-run"]
    result = run_program(*words, cwd=tiny)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert result.stderr.count("nothing was written") == 2 and not (tiny / "runs").exists()


# ---- train --from ----


@pytest.mark.slow
def test_from_a_run_begins_another_with_its_config(tiny: Path) -> None:
    base = tiny_config(tiny, run={"dir": "runs"}, data={"data_dir": "data"}, checkpoint={"resume": "never"})
    assert run_program("train", "quickstart", *overrides(base), cwd=tiny).returncode == 0
    for words, name in (([], "run-2"), (["optimizer.weight_decay=0.2"], "run-weight_decay-0.2"), (["run.name=x"], "x")):
        result = run_program("train", "--from", "run", *words, cwd=tiny)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["run"] == f"runs/{name}"
        made = from_dict(read(tiny / "runs" / name))
        assert made.model == base.model and made.checkpoint.resume == "auto" and made.run.name == name
    # The same command resumes the run that it made.
    assert "from runs" in run_program("train", "--from", "run", "run.name=x", cwd=tiny).stderr
    assert read(tiny / "runs" / "run-weight_decay-0.2")["optimizer"]["weight_decay"] == 0.2
    assert sorted(path.name for path in (tiny / "runs").iterdir()) == ["run", "run-2", "run-weight_decay-0.2", "x"]


def read(folder: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((folder / "config.toml").read_text())


@pytest.mark.slow
def test_a_runs_config_file_resumes_it(tiny: Path) -> None:
    base = tiny_config(tiny, run={"dir": "runs"})
    assert run_program("train", "quickstart", *overrides(base), cwd=tiny).returncode == 0
    result = run_program("train", "runs/run/config.toml", "train.max_steps=12", cwd=tiny)
    assert result.returncode == 0 and state_of(tiny, "run") == (State.DONE, 12)
    assert to_dict(from_dict(read(tiny / "runs" / "run"))) == read(tiny / "runs" / "run")
    assert ended_before(from_dict(read(tiny / "runs" / "run"))) in ("", "done")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "nope"], "no run 'nope'"),
        (["--from", "runs"], "is a folder of 2 runs: name one of them"),
        (["quickstart", "--from", "a"], "got the config quickstart and --from a: give one of them"),
        (
            ["--from", "a", "run.name=a"],
            "begins a new run: choose another run.name, or resume it: train runs/a/config.toml",
        ),
        (["--from", "a", "optimizer.lrr=1"], "unknown key optimizer.lrr"),
        (["--from", "a", f"eval.sample_prompt={'x' * 64}"], "at most 64 characters"),
    ],
)
def test_what_from_cannot_do_is_said_in_a_line(tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("a", "b"):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.path.mkdir(parents=True)
        folder.config.write_text(f'[run]\nname = "{name}"\n')
        folder.status.write_text('{"state": "done", "step": 1}')
    result = run_program("train", *words, cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert message in result.stderr
