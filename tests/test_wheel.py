"""The wheel: everything a run needs is inside, and works from another folder without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tree import PACKAGES

ROOT = Path(__file__).parents[1]
# What pip says where the build backend itself cannot be fetched: no fault of ours.
NO_REGISTRY = (
    "No matching distribution found for hatchling",
    "ConnectionError",
    "NewConnectionError",
    "ReadTimeoutError",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(folder)]
    built = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    if built.returncode and any(sign in built.stdout + built.stderr for sign in NO_REGISTRY):
        pytest.skip("pip cannot fetch hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files(folder: Path, kinds: tuple[str, ...]) -> dict[str, bytes]:
    """Those of our packages, by their path in `folder`."""
    found = [path for package in PACKAGES for kind in kinds for path in (folder / package).rglob(f"*.{kind}")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if "configs" not in path.parts}


def test_the_wheel_holds_the_packages_the_presets_the_scripts_and_the_rank_table(installed: Path) -> None:
    kinds = ("py", "sbatch", "tiktoken", "toml", "html", "svg", "css", "js", "txt")
    assert files(installed, kinds) == files(ROOT, kinds)
    presets = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.toml")}
    assert {path.name: path.read_bytes() for path in (installed / "pipeline" / "configs").iterdir()} == presets
    assert "gpt2-124m.toml" in presets
    assert (installed / "slurm" / "train.sbatch").is_file()
    assert (installed / "pipeline" / "vocabulary" / "gpt2.tiktoken").is_file()


def test_the_wheel_holds_nothing_else(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == set(PACKAGES)


def test_the_wheel_declares_the_command(installed: Path) -> None:
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "pipeline = pipeline.cli.main:main" in entry_points.read_text()


def test_an_installed_program_finds_its_batch_scripts_from_any_folder(installed: Path, tmp_path: Path) -> None:
    arguments = ["prepare", "stdlib", "--tasks", "2", "--time", "60", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "submit", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\n#SBATCH --array=0-1\n" in done.stdout
    assert f"{installed}/slurm/merge.sbatch data/stdlib" in done.stderr


def test_an_installed_program_finds_its_presets_from_any_folder(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "train", "gpt2-124m"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no dataset at data/openwebtext: ")
