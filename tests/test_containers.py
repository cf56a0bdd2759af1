"""The container recipes, checked by reading them: nothing here builds one."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

DOCKERFILE, APPTAINER = ROOT / "containers" / "Dockerfile", ROOT / "containers" / "pipeline.def"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
both = pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=lambda path: path.name)


def code(recipe: Path) -> str:
    """A recipe without its comments, and with continued lines joined."""
    lines = [line for line in recipe.read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines))


def copied(recipe: Path) -> set[str]:
    """What a recipe copies from the checkout."""
    if recipe == DOCKERFILE:
        arguments = re.findall(r"^COPY (?!--from)(.+)$", code(recipe), re.MULTILINE)
        return {name for line in arguments for name in line.split()[:-1]}
    section = re.search(r"^%files\n(.*?)^%", code(recipe), re.MULTILINE | re.DOTALL)
    assert section
    pairs = [line.split() for line in section[1].splitlines() if line.strip()]
    assert all(target == f"/src/{source}" for source, target in pairs)
    return {source for source, _ in pairs}


def install(recipe: Path) -> str:
    """The command that installs the program."""
    (found,) = re.findall(r"/opt/pipeline/bin/python -m pip install .*?'\.\[fast\]'", code(recipe))
    return found


@both
def test_what_is_copied_is_tracked_and_is_all_that_a_wheel_needs(recipe: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing distinguishes the project's files from others")
    names = copied(recipe)
    for name in names:
        listed = subprocess.run(["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=True)
        assert listed.stdout, f"{recipe.name} copies {name}, which is not tracked"
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    described = {
        PROJECT["project"]["readme"],
        *PROJECT["project"]["license-files"],
        "pyproject.toml",
        "constraints.txt",
    }
    assert names == {*wheel["packages"], *wheel["force-include"], *described}


@both
def test_versions_are_those_of_the_lock_file(recipe: Path) -> None:
    assert install(recipe).endswith("-c constraints.txt '.[fast]'")
    assert "constraints.txt" in copied(recipe)
    assert install(DOCKERFILE).replace('"$TORCH_INDEX"', "'{{ TORCH_INDEX }}'") == install(APPTAINER)


@both
def test_the_base_has_a_python_that_the_project_takes(recipe: Path) -> None:
    (version,) = re.findall(r"BASE=docker\.io/library/python:(\d+)\.(\d+)-slim", code(recipe))
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["project"]["requires-python"])
    assert least
    assert tuple(map(int, version)) >= tuple(map(int, least.groups()))


def test_the_image_runs_the_program_itself_as_an_ordinary_user() -> None:
    """A shell would keep the signals that ask for a save."""
    stages = code(DOCKERFILE).split("\nFROM ")
    assert len(stages) == 3 and " AS build" in stages[1]
    assert "pip install" not in stages[2]
    lines = stages[2].splitlines()
    assert lines[-1] == 'ENTRYPOINT ["pipeline"]'
    assert "USER pipeline" in lines
    assert any("pipeline --version" in line for line in lines[: lines.index("USER pipeline")])
    assert re.search(r'^%runscript\n\s+exec pipeline "\$@"$', code(APPTAINER), re.MULTILINE)
    assert re.search(r"^%test\n\s+pipeline --version$", code(APPTAINER), re.MULTILINE)


def test_the_shell_of_the_apptainer_recipe_parses() -> None:
    sections = re.split(r"^%(\w+)\n", code(APPTAINER), flags=re.MULTILINE)
    scripts = dict(zip(sections[1::2], sections[2::2], strict=True))
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=scripts[name], text=True, check=True)
