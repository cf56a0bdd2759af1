"""Our packages come from where `pipeline` lies, whatever the working folder holds: nanoGPT's has a train.py and a sample.py."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, overrides, run_program, tiny_config, write_dataset
from tree import PACKAGES
from tree import STAGES as PACKAGES_OF_STAGES

import pipeline

RAISE = "raise RuntimeError(f'the file of the working folder ran: {__file__}')\n"
LIBRARIES = ("datasets", "tokenizers", "numpy", "torch", "click", "rich", "requests", "safetensors")


@pytest.fixture
def nanogpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a file, or a package, under each name of a stage and of some libraries, all of which raise."""
    for name in (*pipeline.STAGES, *LIBRARIES):
        (tmp_path / f"{name}.py").write_text(RAISE)
    for name in ("train", "slurm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(RAISE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_stages_are_the_packages_that_the_wheel_carries() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert pipeline.STAGES == PACKAGES_OF_STAGES
    assert tuple(wheel["packages"]) == PACKAGES


@pytest.mark.slow
def test_python_m_takes_our_packages(nanogpt: Path) -> None:
    (nanogpt / "corpus.txt").write_text("some text, and more of it\n" * 50)
    done = run_program("prepare", "corpus.txt", "--name", "a", "--tokenizer", "byte", "--workers", "2", cwd=nanogpt)
    assert done.returncode == 0, done.stderr
    assert run_program("inspect", "data/a", cwd=nanogpt).returncode == 0


@pytest.mark.slow
def test_torchrun_takes_our_packages(nanogpt: Path) -> None:
    write_dataset(nanogpt / "data" / "tiny")
    config = tiny_config(nanogpt, train={"max_steps": 2})
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "pipeline"]
    done = subprocess.run(
        [*command, "train", "quickstart", *overrides(config)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (nanogpt / "runs/run/checkpoints/latest").is_file()


@pytest.mark.slow
def test_the_console_script_takes_our_packages(nanogpt: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As pip writes it: the workers of `prepare` run the script's own first lines again."""
    script = tmp_path_factory.mktemp("bin") / "pipeline"
    script.write_text(
        "import sys\nfrom pipeline.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    (nanogpt / "corpus.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(100)))
    done = subprocess.run(
        [sys.executable, str(script), "prepare", "corpus.jsonl", "--tokenizer", "byte", "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_notebook_takes_our_stages_and_the_libraries_it_always_took(nanogpt: Path) -> None:
    """`python -c` searches the working folder first, as a notebook does; that stays so for what is not ours."""
    for name in LIBRARIES:
        (nanogpt / f"{name}.py").unlink()
    (nanogpt / "model.py").write_text("name = 'the user'\n")
    code = "import pipeline, model, train, slurm.sbatch; print(model.name, train.__file__, slurm.sbatch.__file__)"
    assert python(code) == f"the user {ROOT}/train/__init__.py {ROOT}/slurm/sbatch.py"


@pytest.mark.slow
def test_workers_that_a_notebook_starts_take_our_stages(nanogpt: Path) -> None:
    for name in LIBRARIES:
        (nanogpt / f"{name}.py").unlink()
    code = "import pipeline; from prepare.workers import Workers\nwith Workers(2) as w: print(*w.map(abs, [1, -2]))"
    assert sorted(python(code).split()) == ["1", "2"]


@pytest.mark.slow
def test_a_module_of_the_users_that_was_there_before_gives_way_when_the_door_is_used(nanogpt: Path) -> None:
    (nanogpt / "train" / "__init__.py").write_text("name = 'the user'\n")
    (nanogpt / "numpy.py").unlink()
    code = "import train; import pipeline; pipeline.open_dataset; import train.trainer; print(train.trainer.__file__)"
    for name in LIBRARIES:
        (nanogpt / f"{name}.py").unlink(missing_ok=True)
    assert python(code) == f"{ROOT}/train/trainer.py"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["relative path", "symlink", "checkout"])
def test_every_way_to_reach_the_folder_of_the_packages(
    way: str, nanogpt: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, path = nanogpt, str(ROOT)
    if way == "relative path":
        path = os.path.relpath(ROOT, nanogpt)
    elif way == "symlink":
        folder = tmp_path_factory.mktemp("links") / "here"
        folder.symlink_to(nanogpt)
    else:  # the packages lie in the working folder itself, and nowhere else on sys.path
        folder, path = ROOT, ""
    done = run_program("inspect", "no-such-file", cwd=folder, PYTHONPATH=path, PWD=str(folder))
    assert (done.returncode, done.stderr[:6]) == (2, "error:"), done.stderr
