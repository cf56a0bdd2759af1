"""The front door: quick help, one line for what the user can mend, and the exit code that says which end it was."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline import log
from pipeline.cli import main as cli

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
)
SUBMISSIONS = [["submit"], *(["submit", str(command.name)] for command in cli.submit.registered_commands)]
HEAVY = ("torch", "datasets", "pyarrow", "transformers", "tensorboard", "tiktoken")

HELP = f"""
import sys
from pipeline.cli.main import main
main()
print("heavy:", *(name for name in {HEAVY} if name in sys.modules))
"""
FAILING = """
from pipeline import errors, launch
from pipeline.cli import main as cli
from pipeline.config import load as config
launch.SILENCE_S = 0.0
def fail(*_):
    raise {error}
cli.config_from_arguments = fail
cli.main()
"""


def python(
    *arguments: str, cwd: Path = ROOT, stdout: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python("-m", "pipeline", *arguments, cwd=cwd)


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    before = log.logger.handlers, log.logger.level, log.logger.propagate
    yield
    log.logger.handlers, log.logger.level, log.logger.propagate = before


# ---- help ----


@pytest.mark.parametrize(
    "command", [[], *([command] for command in COMMANDS), *SUBMISSIONS], ids=lambda command: " ".join(command)
)
def test_help_answers_without_a_heavy_import(command: list[str]) -> None:
    done = python("-c", HELP, *command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert done.stderr == ""
    if command == ["train"]:
        assert "optimizer.lr=0.0006  peak learning rate" in done.stdout


def test_the_programs_help_names_every_command() -> None:
    lines = [line.split() for line in run("--help").stdout.splitlines()]
    assert {"prepare", "train", "sample", "eval", "quickstart"} <= set(COMMANDS)
    for command in [*COMMANDS, "submit"]:
        assert any(line[:1] == [command] and len(line) > 3 for line in lines), f"{command} has no help line"


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pipeline {pipeline.__version__}\n", "")


def test_train_prints_its_runs_folder_whatever_its_other_options_without_a_heavy_import(tmp_path: Path) -> None:
    arguments = ["train", "quickstart", "--resume", "must", "run.dir=here", "--print-run-dir"]
    done = python("-c", HELP, *arguments, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "here" / "quickstart"), "heavy:"]
    assert not (tmp_path / "here").exists()


# ---- what the user can mend ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command."),
        (["trian"], "No such command 'trian'."),
        (["train", "--reusme", "auto"], "No such option: --reusme"),
        (["prepare"], "Missing argument 'SOURCE...'"),
        (["sample"], "Missing option '--ckpt'"),
        (["doctor"], "Missing option '--slurm'"),
        (["submit", "trian"], "No such command 'trian'."),
        (["submit", "train", "--nodes", "0", "--gpus-per-node", "8", "--time", "60"], "Invalid value for '--nodes'"),
        (["sample", "--ckpt", "latest", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["train", "gpt3"], "no config 'gpt3': it is neither a file nor one of the presets gpt2-124m, "),
        (["train", "nope.key=1"], "unknown section [nope] (there are: "),
        (
            ["train", "run.seed=1", "model.n_head=7"],
            "model.n_embd=768 is not a multiple of model.n_head=7",
        ),  # GPT-2 124M
        (["train", "quickstart", "model.n_layers=1"], "unknown key model.n_layers (did you mean model.n_layer?)"),
        (["train", "quickstart", "--resume", "maybe"], "checkpoint.resume='maybe' is not one of auto, must, never"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    stdout, stderr = capsys.readouterr()
    assert left.value.code == 2
    assert stdout == ""
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_without_its_dataset_says_how_to_get_it(tmp_path: Path) -> None:
    done = run("train", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: no dataset at data/openwebtext: prepare one with `pipeline prepare SOURCE --name openwebtext`\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- the other ends ----


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        ("errors.UserError('first\\nsecond')", 2, "error: first second\n"),
        ("errors.Diverged('loss is nan')", 3, "error: loss is nan\n"),
        ("KeyboardInterrupt", 130, "error: interrupted\n"),
        (
            "OSError(28, 'No space left on device', 'runs/x')",
            2,
            "error: No space left on device: runs/x; make room or choose another place, then go on\n",
        ),
    ],
)
def test_an_end_that_is_no_bug_has_its_exit_code_and_no_traceback(error: str, code: int, stderr: str) -> None:
    done = python("-c", FAILING.format(error=error), "train")
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("error", ["ZeroDivisionError('ours')", "OSError(5, 'ours')"])
def test_a_bug_of_ours_is_a_traceback_and_exit_code_1(error: str) -> None:
    done = python("-c", FAILING.format(error=error), "train")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "ours" in done.stderr.splitlines()[-1]


def test_what_every_rank_finds_out_only_the_first_one_says() -> None:
    for end, code in (("Diverged", 3), ("UserError", 2)):
        done = python("-c", FAILING.format(error=f"errors.{end}('all of us')"), "train", RANK="5")
        assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.slow
def test_an_error_of_one_other_rank_says_which() -> None:
    done = python("-m", "pipeline", "sample", "--ckpt", "nowhere", RANK="5")
    assert done.stderr.startswith("[rank 5] error: no checkpoint at nowhere")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_reader_that_went_away_is_met_with_silence(option: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python("-m", "pipeline", option, stdout=writer)
    finally:
        os.close(writer)
    assert done.stderr == ""
