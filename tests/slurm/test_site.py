"""The site's file: what its keys become in a script, and what is wrong with one that cannot be used."""

import subprocess
from pathlib import Path

import pytest
from conftest import run_program
from slurm_cluster import SCRIPTS

from pipeline.errors import UserError
from slurm import site


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_SITE", str(tmp_path / "site.toml"))
    return tmp_path / "site.toml"


FULL = """
modules = ["cuda/12.4", "my module"]
exports = {NCCL_SOCKET_IFNAME = "ib0", GREETING = "it's $HOME"}
srun = ["--container-image=/images/a b.sqsh", "--cpu-bind=cores"]
python = "/usr/bin/python3"
"""


def evaluated(text: str, script: str) -> list[str]:
    """What bash prints for `script` after the site's lines, under the options of our scripts."""
    program = f"set -euo pipefail\nsite_srun=() on_node=() TASK_PYTHON=here\n{text}{script}"
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_site_adds_modules_variables_options_of_srun_and_an_interpreter(file: Path) -> None:
    file.write_text(FULL)
    module = 'module() { printf "%s\\n" "$@" "$unset_variable"; }\n'  # as the real one, it fails under set -u
    words = 'printf "%s\\n" "$NCCL_SOCKET_IFNAME" "$GREETING" "${site_srun[@]}" "$TASK_PYTHON" "${#on_node[@]}"'
    assert evaluated(module + site.shell(site.load()), words) == [
        "load", "cuda/12.4", "my module", "", "ib0", "it's $HOME", "--container-image=/images/a b.sqsh", "--cpu-bind=cores",
        "/usr/bin/python3", "6",
    ]  # fmt: skip


def test_a_module_that_cannot_be_loaded_ends_the_script(file: Path) -> None:
    file.write_text('modules = ["none"]')
    program = f"set -euo pipefail\nmodule() {{ return 1; }}\n{site.shell(site.load())}echo went on"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: module load none failed\n")


def test_without_a_file_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_SITE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert site.load() == site.Site() and site.shell(site.Site()) == ""
    (tmp_path / ".config" / "pipeline").mkdir(parents=True)
    (tmp_path / ".config" / "pipeline" / "site.toml").write_text('python = "p"')
    assert site.load() == site.Site(python="p")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("modules = [", "Invalid value"),
        ('module = ["a"]', "unexpected keyword argument 'module'; its keys are modules, exports, srun, python"),
        ('modules = "cuda"', "invalid value 'cuda' in"),
        ("exports = {A = 1}", "expected dict of strings"),
        ("python = 3", "invalid value 3"),
        ('exports = {"A-B" = "1"}', "invalid 'A-B' in"),
        ('srun = ["--ntasks=4"]', "invalid '--ntasks=4' in"),
        ('srun = ["image.sqsh"]', "expected the name of a variable, or --OPTION=VALUE of srun"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, told: str
) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        site.load()
    assert told in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_the_scripts_end_with_that_line(file: Path, tmp_path: Path) -> None:
    file.write_text("python = 3")
    done = run_program("batch", "site", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: invalid value 3 in ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_uses_the_site(script: Path) -> None:
    text = script.read_text()
    assert 'site=$("$PYTHON" -m pipeline batch site)\neval "$site"\n' in text
    assert '"${site_srun[@]}"' in text or '"${on_node[@]}" "$TASK_PYTHON"' in text
