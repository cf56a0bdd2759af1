"""The front door: quick help that fits 80 columns, one line for what the user can fix, and an exit code for each end."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pipeline
from pipeline import log
from pipeline.cli import main as cli
from pipeline.cli import models
from pipeline.cli.command import Command
from pipeline.config.keys import SECTIONS, help_rows
from pipeline.config.load import preset_files

ROOT = Path(__file__).parents[2]


def words_of(group: click.Group, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*before, name)
        if isinstance(command, click.Group):
            yield from words_of(command, (*before, name))


COMMANDS = list(words_of(cli.app))
HEAVY = ("torch", "datasets", "pyarrow", "transformers", "tensorboard", "tiktoken")
GROUPS = ("Data", "Training", "Models", "Looking", "Cluster")

HELP = f"""
import sys
from pipeline.cli.main import main
main()
print("heavy:", *(name for name in {HEAVY} if name in sys.modules))
"""
FAILING = """
from pipeline import errors, launch
from pipeline.cli import main as cli, training
launch.SILENCE_S = 0.0
def fail(*_):
    raise {error}
training.config_from_arguments = fail
cli.main()
"""


def python(
    *arguments: str, cwd: Path = ROOT, stdout: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "80"} | variables
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


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_help_fits_80_columns_and_answers_without_a_heavy_import(command: tuple[str, ...], option: str) -> None:
    done = python("-c", HELP, *command, option)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, heavy = done.stdout.splitlines()
    assert lines[0].startswith("Usage: pipeline ")
    assert heavy == "heavy:"
    assert [line for line in lines if len(line) > 80] == []
    cut = [
        line for line in lines if re.search(r"\w\.\.\.", line) and "SOURCE..." not in line and "COMMAND ..." not in line
    ]
    assert not cut, "click shortens a sentence that does not fit"
    assert "Example:" in lines
    example = next(line for line in reversed(lines) if line.startswith("  ")).split("#")[0]
    assert "pipeline" in example


def test_the_programs_help_has_each_command_in_a_group_with_a_complete_sentence() -> None:
    lines = run("--help").stdout.splitlines()
    assert [line[:-1] for line in lines if line[:-1] in GROUPS] == list(GROUPS)
    for name in (name for name, command in cli.app.commands.items() if not command.hidden):
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.endswith(".") and len(line.split()) > 4


@pytest.mark.slow
def test_bare_program_bare_group_and_the_word_help_show_a_page() -> None:
    for words, page in (((), ()), (("submit",), ("submit",)), (("help",), ()), (("help", "merge"), ("merge",))):
        bare, asked = run(*words), run(*page, "--help")
        assert (bare.returncode, bare.stdout) == (0, asked.stdout)


def test_trains_help_has_a_line_for_each_key_under_its_section_and_for_each_preset() -> None:
    lines = run("train", "--help").stdout.splitlines()
    for section in SECTIONS:
        at = lines.index(f"Keys of [{section}], given as {section}.KEY=VALUE:")
        for name, text in help_rows(section):
            at += 1
            assert lines[at].split() == [*name.split(), *text.split()], "one line for each key, its default first"
    for preset in preset_files():
        assert any(line.split()[:1] == [preset] and len(line.split()) > 3 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_options_and_config_keys_without_a_heavy_import(shell: str) -> None:
    script = python("-c", HELP, "--show-completion", shell).stdout
    assert "_PIPELINE_COMPLETE" in script and script.endswith("heavy:\n")
    if shell == "bash":
        for words, wanted in (("tra", "train"), ("train --dry", "--dry-run"), ("train optimizer.l", "optimizer.lr=")):
            count = str(len(words.split()))
            asked = {"COMP_WORDS": f"pipeline {words}", "COMP_CWORD": count, "_PIPELINE_COMPLETE": "bash_complete"}
            assert f"plain,{wanted}" in python("-m", "pipeline", **asked).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["train mine", "prepare my-te", "inspect da", "sample --ckpt ru", "export --to ou"])
def test_completion_leaves_paths_to_the_shell(words: str) -> None:
    count = str(len(words.split()))
    asked = {"COMP_WORDS": f"pipeline {words}", "COMP_CWORD": count, "_PIPELINE_COMPLETE": "bash_complete"}
    assert python("-m", "pipeline", **asked).stdout.startswith("file,")


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pipeline {pipeline.__version__}\n", "")


def test_train_prints_its_runs_folder_whatever_its_other_options_without_a_heavy_import(tmp_path: Path) -> None:
    arguments = ["train", "quickstart", "--resume", "must", "run.dir=here", "--print-run-dir"]
    done = python("-c", HELP, *arguments, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "here" / "quickstart"), "heavy:"]
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("command", "arguments"), [(models.sample, []), (models.evaluate, []), (models.export, ["--to", "there"])]
)
def test_the_newest_checkpoint_is_taken_by_default(command: Command, arguments: list[str]) -> None:
    assert command.parse(arguments)["options"].ckpt == "latest"


def test_an_option_that_is_not_given_has_the_stages_default_and_a_list_may_be_repeated() -> None:
    from sample.options import SampleOptions

    assert models.sample.parse([])["options"] == SampleOptions()
    given = models.sample.parse(["--prompt", "a", "--prompt", "b", "--top-k", "0", "--json"])["options"]
    assert given == SampleOptions(prompts=["a", "b"], top_k=0, json=True)
    assert models.evaluate.parse(["--tasks", "a, b,"])["options"].tasks == ("a", "b")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_runs_on_ranks_checks_the_nodes_before_torch_is_imported(command: str) -> None:
    code = f"from pipeline.machine import meeting\nmeeting.check_nodes = lambda: print('checked')\n{HELP}"
    done = python("-c", code, command, *(["--print-run-dir"] if command == "train" else ["--split", "test"]))
    assert done.stdout.splitlines()[0] == "checked"


# ---- what the user can fix ----


@pytest.mark.parametrize(
    ("arguments", "message", "page"),
    [
        (["trian"], "No such command 'trian'", "pipeline"),
        (["train", "--reusme", "auto"], "No such option", "pipeline train"),
        (["prepare"], "Missing argument 'SOURCE...'", "pipeline prepare"),
        (["prepare", "a", "--name"], "Option '--name' requires an argument", "pipeline prepare"),
        (["export"], "Missing option '--to'", "pipeline export"),
        (["sample", "--bad-rows", "skip"], "No such option", "pipeline sample"),
        (["prepare", "--ckpt", "latest"], "No such option", "pipeline prepare"),
        (["submit", "trian"], "No such command 'trian'", "pipeline submit"),
        (
            ["submit", "train", "--nodes", "0", "--gpus-per-node", "8", "--time", "60"],
            "Invalid value for '--nodes': 0 is not in the range",
            "pipeline submit train",
        ),
        (
            ["submit", "train", "--nodes", "1", "--time", "60"],
            "Missing option '--gpus-per-node'",
            "",
        ),
        (
            ["sample", "--ckpt", "latest", "--top-k", "many"],
            "Invalid value for '--top-k': 'many' is",
            "pipeline sample",
        ),
        (["train", "gpt3"], "no config 'gpt3': expected a TOML file or one of the presets 1x24g, ", ""),
        (["train", "zzz.key=1"], "unknown key zzz.key (see pipeline train --help)", ""),
        (["train", "run.seed=1", "model.n_head=7"], "model.n_embd=768 is not a multiple of model.n_head=7", ""),
        (["train", "quickstart", "model.n_layers=1"], "unknown key model.n_layers (did you mean model.n_layer?)", ""),
        (["train", "quickstart", "--resume", "maybe"], "checkpoint.resume='maybe': expected auto, must, never", ""),
        (
            ["train", "--max-steps", "200"],
            "No such option '--max-steps': config keys are given as SECTION.KEY=VALUE (did you mean train.max_steps=VALUE?)",
            "pipeline train",
        ),
        (
            ["train", "--lr", "3e-4"],  # though --help is near
            "No such option '--lr': config keys are given as SECTION.KEY=VALUE (did you mean optimizer.lr=VALUE?)",
            "pipeline train",
        ),
        (
            ["train", "max_steps=200"],
            "invalid override 'max_steps=200': expected section.key=value (did you mean train.max_steps=200?)",
            "",
        ),
        (["train", "shakespeare_char"], "no config 'shakespeare_char' (did you mean shakespeare-char?)", ""),
        (["train", "gpt-2"], "no config 'gpt-2' (did you mean gpt2-124m?)", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    page: str,
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
    assert stderr.replace("option: --", "option '--").startswith(f"error: {message}"), stderr
    assert not page or stderr.endswith(f"(see {page} --help)\n"), stderr
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
            "error: No space left on device: runs/x; make room or choose another path, then run the command again\n",
        ),
    ],
)
def test_an_end_that_is_no_bug_has_its_exit_code_and_no_traceback(error: str, code: int, stderr: str) -> None:
    done = python("-c", FAILING.format(error=error), "train")
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("error", ["ZeroDivisionError('ours')", "OSError(22, 'ours')"])
def test_a_bug_of_ours_is_a_traceback_and_exit_code_1(error: str) -> None:
    done = python("-c", FAILING.format(error=error), "train")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "ours" in done.stderr.splitlines()[-1]


def test_what_every_rank_finds_out_only_the_first_one_says() -> None:
    done = python("-c", FAILING.format(error="errors.UserError('all of us')"), "train", RANK="5")
    assert (done.returncode, done.stderr) == (2, "")


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
