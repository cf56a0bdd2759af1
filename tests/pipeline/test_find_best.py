"""--ckpt best says which run it took and whether another one is better; --ckpt takes a run's name; pipeline config."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import run_program

from pipeline.checkpoint.find import find_checkpoint
from pipeline.config.keys import KEYS
from pipeline.config.load import config_from_arguments, from_dict, origins
from pipeline.runs import RunFolder


def copy(folder: Path, name: str, best: float | None, dataset: str = "tiny") -> RunFolder:
    """The trained run with another best val loss, on another dataset."""
    run = RunFolder(folder / "runs" / name)
    shutil.copytree(folder / "runs" / "run", run.path)
    document = json.loads(run.status.read_text()) | {"best_val_loss": best, "step": 11}
    run.status.write_text(json.dumps(document))
    run.config.write_text(run.config.read_text().replace('dataset = "tiny"', f'dataset = "{dataset}"'))
    return run


@pytest.fixture
def several(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    for name, best, dataset in (("a", 1.5, "tiny"), ("b", 1.25, "tiny"), ("worse", 9.0, "tiny"), ("other", 0.5, "x")):
        copy(tmp_path, name, best, dataset)
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "status.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_best_names_its_run_and_the_best_other_one_on_the_same_data(
    several: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "pipeline"):
        assert find_checkpoint("best", Path("runs/a")).parent == Path("runs/a/checkpoints")
    assert "best of runs/a: step_" in caplog.text and "val loss 1.5000" in caplog.text
    assert (
        "1 other run(s) on the same data have a lower one, the lowest is 1.2500: --ckpt best --run-dir runs/b"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level("INFO", "pipeline"):
        find_checkpoint("best", Path("runs/b"))
        find_checkpoint("latest", Path("runs/worse"))
    assert "other run" not in caplog.text and caplog.text.count("best of") == 1


def test_a_run_under_runs_is_a_checkpoint_by_its_name(several: Path) -> None:
    assert find_checkpoint("a", None) == find_checkpoint("runs/a", None) == find_checkpoint("latest", Path("runs/a"))


@pytest.mark.slow
def test_config_prints_a_file_that_gives_the_same_config_and_says_where_each_value_is_from(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optimizer]\nlr = 1e-3\n[run]\nseed = 7\n")
    words = ["mine.toml", "train.max_steps=5", " optimizer.weight_decay = 0.2"]
    printed = run_program("config", *words, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    as_json = json.loads(run_program("config", *words, "--json", cwd=tmp_path).stdout)
    assert as_json.keys() == KEYS.keys()
    assert as_json["optimizer.lr"] == {
        "value": 1e-3, "origin": "mine.toml", "meaning": KEYS["optimizer.lr"].metadata["text"], "expected": "a number > 0",
    }  # fmt: skip
    found = {name: row["origin"] for name, row in as_json.items() if row["origin"] != "default"}
    assert found == {
        "run.name": "mine.toml", "run.seed": "mine.toml", "optimizer.lr": "mine.toml", "train.max_steps": "command line",
        "optimizer.weight_decay": "command line",
    }  # fmt: skip
    config = from_dict(tomllib.loads(printed.stdout))
    assert (config.run.name, config.run.seed, config.optimizer.lr, config.train.max_steps) == ("mine", 7, 1e-3, 5)
    wrong = run_program("config", "mine.toml", "optimizer.lrr=1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)


def test_origins_of_a_preset_name_it() -> None:
    assert config_from_arguments([]).run.name == "gpt2-124m"
    assert origins([])["run.name"] == "preset gpt2-124m" and origins([])["run.seed"] == "default"
    assert origins(["quickstart", "run.seed=1"])["run.seed"] == "command line"
