"""inspect RUN --step N shows the texts that a step was trained on: those of the loader, in mixtures and branches."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import run_program, tiny_config, write_dataset
from test_trainer import poisoned, trainer_of

import train.trainer
from observe.steps import describe_step
from pipeline.cli.main import app
from pipeline.config.keys import Config
from pipeline.config.load import to_toml
from pipeline.errors import UserError
from pipeline.runs import RunFolder
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from train.metrics.record import FileMetrics
from train.run import run
from train.stop import StopRequest

Batches = list[list[list[int]]]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The windows of every micro-batch that went into a step."""
    taken: Batches = []
    real = train.trainer.model_inputs

    def model_inputs(windows: torch.Tensor, *arguments: Any) -> Any:
        taken.append(windows.tolist())
        return real(windows, *arguments)

    monkeypatch.setattr("train.trainer.model_inputs", model_inputs)
    return taken


def texts(config: Config, step: int) -> list[str]:
    return [sample["text"] for sample in describe_step(RunFolder(config.run_dir), step)["samples"]]


def decoded(batches: Batches) -> list[str]:
    return [ByteTokenizer().decode_bytes(window).decode() for batch in batches for window in batch]


def mixed(folder: Path, **sections: dict[str, Any]) -> Config:
    write_dataset(folder / "data" / "other", seed=1)
    mixture = [{"dataset": "tiny", "weight": 0.7}, {"dataset": "other", "weight": 0.3}]
    return tiny_config(folder, data={"mixture": mixture}, **sections)


@pytest.mark.parametrize("config_of", [tiny_config, mixed])
def test_every_step_of_a_run_and_of_its_branch(
    tiny: Path, config_of: Callable[..., Config], trained_on: Batches
) -> None:
    config = config_of(tiny)
    run(config)
    for step in range(10):
        assert texts(config, step) == decoded(trained_on[4 * step : 4 * step + 4]), step
    trained_on.clear()
    trunk = str(config.run_dir / "checkpoints" / "step_00000005")
    branch = config_of(tiny, run={"name": "branch", "branch_from": trunk}, train={"tokens_per_step": 64})
    run(branch)
    assert texts(branch, 5) == decoded(trained_on[:2])
    assert texts(branch, 9) == decoded(trained_on[8:10])


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing(tiny: Path, trained_on: Batches) -> None:
    config = tiny_config(tiny)
    (tiny / "run.toml").write_text(to_toml(config))
    assert run_program("train", "run.toml", cwd=tiny, ranks=2).returncode == 0
    on_two = texts(config, 7)
    run(tiny_config(tiny, run={"name": "alone"}))
    assert on_two == decoded(trained_on[28:32])


def test_the_line_about_a_skipped_step_names_the_command_that_shows_its_texts(
    tiny: Path, caplog: pytest.LogCaptureFixture, trained_on: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, train={"max_bad_steps": 2})
    folder = RunFolder(config.run_dir)
    trainer = poisoned(trainer_of(config), {3}, math.nan)
    metrics = FileMetrics(folder)
    trainer.fit(metrics, StopRequest())
    metrics.close()
    folder.config.write_text(to_toml(config))
    command = f"pipeline inspect {folder.path} --step 3"
    (line,) = (record.getMessage() for record in caplog.records if "skipped" in record.getMessage())
    assert line.endswith(f"its texts: {command}")
    result = CliRunner().invoke(app, [*command.split()[1:], "--json"], catch_exceptions=False)
    described = json.loads(result.stdout)
    (bad,) = folder.rows(folder.bad_steps)
    assert (described["step"], described["first_sample"], len(described["samples"])) == (
        3,
        bad["first_sample"],
        bad["samples"],
    )
    assert (described["reason"], described["loss"]) == ("not finite", "nan")
    assert [sample["text"] for sample in described["samples"]] == decoded(trained_on[12:16])
    shown = CliRunner().invoke(app, command.split()[1:], catch_exceptions=False).stdout
    assert shown.startswith(f"{folder.path}, step 3: 8 samples, loss nan") and described["samples"][0]["text"] in shown


def test_where_the_data_has_changed_no_wrong_text_is_shown(tiny: Path) -> None:
    config = tiny_config(tiny, train={"max_steps": 5})
    run(config)
    write_dataset(tiny / "data" / "tiny", seed=3)
    with pytest.raises(UserError, match="is not the dataset that .* was trained on .*: restore that one"):
        describe_step(RunFolder(config.run_dir), 1)


def test_a_branch_that_has_saved_nothing_is_refused(tiny: Path) -> None:
    config = tiny_config(tiny, run={"name": "branch", "branch_from": "runs/a"})
    config.run_dir.mkdir(parents=True)
    RunFolder(config.run_dir).config.write_text(to_toml(config))
    with pytest.raises(UserError, match="is a branch without a checkpoint"):
        describe_step(RunFolder(config.run_dir), 1)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--step", "3"])
    assert isinstance(result.exception, UserError) and "no run" in str(result.exception)
