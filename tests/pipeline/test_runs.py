"""A run's folder: what is written is read back, and damage reads as absent."""

import os
from pathlib import Path

import pytest

from pipeline.runs import RunFolder, State, Status, newest_run


def test_a_status_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_status() is None
    for status in (Status(State.RUNNING, 3), Status(State.STOPPED, 7, "SIGTERM", step_s=0.5, last_save_s=2.0)):
        folder.write_status(status)
        assert folder.read_status() == status


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"state": "asleep", "step": 1, "reason": ""}', '{"state": "done"}']
)
def test_a_damaged_status_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert RunFolder(tmp_path).read_status() is None


def test_the_newest_run_is_the_one_that_saved_last(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    for name, age_s in (("b", 10), ("a", 0), ("c", 20)):
        checkpoints = RunFolder(tmp_path / name).checkpoints
        checkpoints.mkdir(parents=True)
        (checkpoints / "latest").write_text("step_00000001\n")
        os.utime(checkpoints / "latest", (1e9 - age_s, 1e9 - age_s))
    (tmp_path / "without-checkpoints").mkdir()
    assert newest_run(tmp_path) == tmp_path / "a"
