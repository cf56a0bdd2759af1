"""Requests to stop: files on disks that answer badly, and a clock that leaves no time for an evaluation."""

import errno
import os
import time
from pathlib import Path

import pytest
from conftest import tiny_config
from test_train_run import rows, status

from pipeline.runs import RunFolder, State, Status
from train.run import run
from train.stop import FileRequest, StopRequest


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_disk_that_does_not_answer_is_no_request_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def stale(path: Path) -> bool:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("train.stop.LOOK_INTERVAL_S", 0.0)
    request = FileRequest(tmp_path / "save-now")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "is_file", stale)
        assert not request.exists() and not request.exists()
    assert caplog.text.count("cannot be looked for") == 1
    request.path.touch()
    assert request.exists()
    with monkeypatch.context() as disk:
        disk.setattr(Path, "unlink", lambda path, missing_ok: stale(path))
        request.remove()
    assert "could not be removed" in caplog.text


def test_the_disk_is_asked_once_a_second_and_by_one_rank_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    monkeypatch.setattr(Path, "is_file", lambda path: looks.append(path) or False)
    monkeypatch.setenv("PIPELINE_STOP_FILE", str(tmp_path / "stop"))
    first, second = StopRequest(), StopRequest(looks=False)
    for _ in range(100):
        assert first.reason(0.0) == second.reason(0.0) == ""
    assert looks == [tmp_path / "stop"]


def test_an_evaluation_for_which_there_is_no_time_is_skipped(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last start, one takes an hour, and a save a second."""
    config = tiny_config(tiny)
    RunFolder(config.run_dir).path.mkdir(parents=True)
    RunFolder(config.run_dir).write_status(Status(State.STOPPED, 0, "SIGTERM", eval_s=3600.0, last_save_s=1.0))
    monkeypatch.setenv("PIPELINE_DEADLINE", str(time.time() + 1800))
    run(config)
    assert (status(config)["state"], status(config)["step"]) == ("done", 10)
    assert not any("val_loss" in row for row in rows(config))
    assert "step 5 is not evaluated: the deadline is near" in (config.run_dir / "log.txt").read_text()


def test_a_first_step_that_would_compile_past_the_deadline_is_not_begun(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny)
    RunFolder(config.run_dir).path.mkdir(parents=True)
    RunFolder(config.run_dir).write_status(Status(State.STOPPED, 0, "SIGTERM", first_step_s=600.0, last_save_s=1.0))
    monkeypatch.setenv("PIPELINE_DEADLINE", str(time.time() + 300))
    assert run(config).startswith("deadline")
    assert (status(config)["state"], status(config)["step"]) == ("stopped", 0)
