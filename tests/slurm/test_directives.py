"""pipeline doctor --slurm: each mistake is found in a script that is correct otherwise, and what only looks like one is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.errors import UserError
from slurm import doctor

# As users write scripts, not as ours are; nothing is wrong with it.
GOOD = """\
#!/bin/bash
#SBATCH --job-name=pretrain          # seen in squeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=64
#SBATCH -t 1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

trap 'touch stop' SIGUSR1
srun torchrun train.py "$@" &
wait
scontrol requeue "$SLURM_JOB_ID"
"""
Edit = tuple[str, str]  # what is in GOOD, and what replaces it


def edited(*edits: Edit) -> str:
    script = GOOD
    for old, new in edits:
        assert script.count(old) == 1, f"{old!r} occurs {script.count(old)} times"
        script = script.replace(old, new)
    return script


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_our_own_scripts_have_no_finding(path: Path) -> None:
    assert doctor.examine(path.read_text()) == []
    with_array = path.read_text().replace("#SBATCH --time", "#SBATCH --array=0-7\n#SBATCH --time", 1)
    assert doctor.examine(with_array) == []


ARRAY = ("#SBATCH --nodes=2", "#SBATCH --array=0-3\n#SBATCH --nodes=2")
# Each mistake: its check, its status, the edits that make it in GOOD, and what is on the line that is reported.
MISTAKES: dict[str, tuple[str, str, list[Edit], str]] = {
    "a text that is no script": ("no-interpreter", "fail", [("#!/bin/bash\n", "# my notes\n")], "my notes"),
    "an option after the first command": (
        "ignored-directive", "fail", [("#SBATCH --requeue\n", ""), ("trap", "true\n#SBATCH --requeue\ntrap")], "--requeue"),
    "an indented option": ("ignored-directive", "fail", [("#SBATCH --nodes", "  #SBATCH --nodes")], "--nodes"),
    "a variable for sbatch": ("unexpanded-directive", "fail", [("%x-%j.out", "$HOME/%j.out")], "--output"),
    "a home for sbatch": ("unexpanded-directive", "fail", [("%x-%j.out", "~/%j.out")], "--output"),
    "a secret": ("secret", "warn", [("#SBATCH --nodes", "#SBATCH --export=ALL,HF_TOKEN=hf_0123456789\n#SBATCH --nodes")], "HF_"),
    "a log folder that does not exist": ("log-folder", "fail", [("%x-%j.out", "logs/%x-%j.out")], "--output"),
    "a folder of errors": ("log-folder", "fail", [("%x-%j.out", "%x.out\n#SBATCH -e my-errors/%j")], "-e my-errors"),
    "a log folder with a space": ("log-folder", "fail", [("%x-%j.out", "'my logs/%j.out'")], "my logs"),
    "a log folder named by the job": ("log-folder", "fail", [("%x-%j.out", "%j/out")], "--output"),
    "a log on the node": ("log-on-node", "warn", [("%x-%j.out", "/tmp/%x-%j.out")], "--output"),
    "a log that is truncated": ("log-truncated", "warn", [("#SBATCH --open-mode=append\n", "")], "--requeue"),
    "a log that is truncated on request": ("log-truncated", "warn", [("mode=append", "mode=truncate")], "--requeue"),
    "no cores": ("no-cpus", "warn", [("#SBATCH --cpus-per-task=64\n", "")], "#!/bin/bash"),
    "fewer tasks than GPUs": ("tasks-and-gpus", "fail", [("ntasks-per-node=1", "ntasks-per-node=4")], "--gpus-per-node"),
    "more tasks than GPUs": ("tasks-and-gpus", "fail", [("#SBATCH --ntasks-per-node=1", "#SBATCH -n 32")], "--gpus-per-node"),
    "a time that is none": ("time-format", "fail", [("-t 1-00:00:00", "--time=24h")], "--time"),
    "no lead time": ("lead-time", "warn", [("B:USR1@300", "B:USR1")], "--signal"),
    "a short lead time": ("lead-time", "warn", [("B:USR1@300", "USR1@119")], "--signal"),
    "a lead time over all": ("lead-time", "fail", [("-t 1-00:00:00", "-t 5")], "--signal"),
    "a signal that nothing traps": ("signal-without-trap", "fail", [("trap 'touch stop' SIGUSR1\n", "")], "--signal"),
    "a log for all elements": (
        "array-log", "warn", [ARRAY, ("%x-%j", "%x-%A"), ('"$SLURM_JOB_ID"', "$1")], "--output"),
    "the whole array again": ("array-requeue", "fail", [ARRAY], "scontrol requeue"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_alone_and_on_its_line(mistake: str) -> None:
    check, status, edits, line = MISTAKES[mistake]
    script = edited(*edits)
    (finding,) = doctor.examine(script)
    assert (finding.check, finding.status) == (check, status)
    assert line in script.splitlines()[finding.line - 1]
    assert finding.found and finding.advice


# What looks like a mistake and is none.
NEAR_MISSES: dict[str, str] = {
    "nothing": GOOD,
    "as many tasks as GPUs": edited(("ntasks-per-node=1", "ntasks-per-node=8")),
    "as many tasks as GPUs by ntasks": edited(("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks=16")),
    "as many tasks as nodes": edited(("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks=2")),
    "a lead time just long enough": edited(("B:USR1@300", "B:USR1@120")),
    "a trap in a file that is sourced": edited(("trap 'touch stop' SIGUSR1", "source traps.sh")),
    "a signal for the tasks": edited(("B:USR1@300", "USR1@300"), ("trap 'touch stop' SIGUSR1\n", "")),
    "a log that nothing truncates": edited(("#SBATCH --requeue\n", ""), ("#SBATCH --open-mode=append\n", "")),
    "cores by GPU": edited(("cpus-per-task=64", "cpus-per-gpu=8")),
    "all cores": edited(("#SBATCH --cpus-per-task=64", "#SBATCH --exclusive")),
    "no limit": edited(("-t 1-00:00:00", "--time=unlimited")),
    "an element alone again": edited(ARRAY, ('"$SLURM_JOB_ID"', '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')),
    "a log for each element": edited(ARRAY, ("%x-%j", "%x-%A_%4a"), ('"$SLURM_JOB_ID"', "$1")),
    "a log folder for each node": edited(("%x-%j.out", "logs-%N/%j.out")),
    "options in comments": GOOD + "##SBATCH --nodes=4\n# SBATCH --nodes=4\n",
    "a here-document with a script in it": GOOD + "cat >other.sh <<'EOF'\n#SBATCH --nodes=1\nEOF\n",
    "a secret from the environment": edited(("#SBATCH --nodes", "#SBATCH --export=ALL,HF_TOKEN\n#SBATCH --nodes")),
    "a number that is no secret": edited(("#SBATCH --nodes", "#SBATCH --comment=MAX_TOKENS=1000000000\n#SBATCH --nodes")),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_a_mistake_is_not_reported(name: str) -> None:
    assert doctor.examine(NEAR_MISSES[name]) == []


def test_a_log_folder_that_exists_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "me")
    for folder in ("logs", "my logs", "logs-me/pretrain"):
        (tmp_path / folder).mkdir(parents=True)
    for output in ("logs/%x-%j.out", "'my logs/%j.out'", "logs-%u/%x/%j.out"):
        assert doctor.examine(edited(("%x-%j.out", output))) == []
    (finding,) = doctor.examine(edited(("%x-%j.out", "other-%u/%j.out")))
    assert finding.found.startswith("the log folder other-me does not exist")
    assert finding.advice == "mkdir -p other-me before sbatch"
    (finding,) = doctor.examine(edited(("%x-%j.out", "logs/%A/%a.out")))
    assert finding.advice == "put the job id into the file name"
    in_another = edited(("%x-%j.out", "logs/%x-%j.out\n#SBATCH -D logs"))
    assert [finding.check for finding in doctor.examine(in_another)] == ["log-folder"]


# --- the command ---


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(script: str) -> Path:
        path = tmp_path / "my job.sbatch"
        path.write_text(script)
        return path

    return written


def test_findings_are_lines_and_an_error_is_exit_code_2(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(edited(("%x-%j.out", "logs/%j.out"), ("B:USR1@300", "B:USR1@60")))
    with pytest.raises(UserError, match=r"has 1 error\(s\), listed above"):
        doctor.run(path, as_json=False)
    warning, error, total = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"{path}:8: warning: the signal comes 60 s before the end; write @300")
    assert error == (
        f"{path}:11: error: the log folder logs does not exist: the job fails at its start without a message; "
        "mkdir -p logs before sbatch"
    )
    assert total == f"{path}: 1 error(s), 1 warning(s)"


def test_warnings_alone_are_no_failure(write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(edited(("B:USR1@300", "B:USR1@60")))
    doctor.run(path, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 0 error(s), 1 warning(s)"
    doctor.run(path, as_json=True)
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding.keys() == {"line", "status", "check", "found", "advice"}
    assert (finding["line"], finding["status"], finding["check"]) == (8, "warn", "lead-time")


def test_a_file_that_is_missing_or_not_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        doctor.run(tmp_path / "nothing", as_json=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        doctor.run(tmp_path / "binary", as_json=False)


@pytest.mark.parametrize(
    "text", ["", "#SBATCH", "#SBATCH --signal=\n", "#SBATCH --time\n", "#SBATCH --output='a", "#SBATCH -n 0 -N 0"]
)
def test_any_text_can_be_examined(text: str) -> None:
    doctor.examine(text)
