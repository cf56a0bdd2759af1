"""A run's folder: what is written is read back, and damage reads as absent."""

import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.runs import TAIL_BYTES, RunFolder, State, Status, all_runs, find_runs, newest_run


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
    deeper = tmp_path / "ablations/lr/c"  # run.dir may be runs/ablations
    (deeper / "checkpoints").mkdir(parents=True)
    (deeper / "checkpoints/latest").write_text("step_00000001")
    assert newest_run(tmp_path) == deeper


# ---- a run at a glance ----


def write_run(path: Path, rows: list[dict[str, object]], end: str = "\n", **status: object) -> RunFolder:
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows).rstrip("\n") + end)
    folder.status.write_text(json.dumps({"state": "running", "step": 0, "reason": ""} | status))
    return folder


def ago(**time: float) -> str:
    return (datetime.now(UTC) - timedelta(**time)).isoformat(timespec="seconds")


def test_a_summary_takes_the_newer_of_status_and_rows(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "loss": 3.0, "tokens": 1000, "val_loss": 2.5, "lr": 0.1},
        {"step": 20, "loss": 2.0, "tokens": 2000},
    ]
    found = write_run(tmp_path / "a", rows, step=15, loss=2.4, eta_s=60, updated_at=ago(seconds=20)).summary()
    assert (found.name, found.state, found.step, found.loss, found.tokens) == ("a", State.RUNNING, 20, 2.0, 2000)
    assert (found.val_loss, found.best_val_loss, found.lr, found.eta_s, found.losses) == (2.5, 2.5, 0.1, 60, (3.0, 2.0))
    newer = write_run(tmp_path / "b", rows, step=25, loss=1.9, val_loss=2.6, best_val_loss=2.2).summary()
    assert (newer.step, newer.loss, newer.val_loss, newer.best_val_loss, newer.tokens) == (25, 1.9, 2.6, 2.2, 2000)


def test_a_dead_run_is_recognised_by_its_age(tmp_path: Path) -> None:
    cases = {
        ago(seconds=30): State.RUNNING,
        ago(minutes=5): State.DEAD,
        ago(minutes=5).removesuffix("+00:00"): State.DEAD,
        ago(minutes=5).replace("+00:00", "Z"): State.DEAD,
        "yesterday": State.RUNNING,
    }
    for number, (updated_at, expected) in enumerate(cases.items()):
        found = write_run(tmp_path / str(number), [], eta_s=5.0, updated_at=updated_at).summary()
        assert (found.state, found.eta_s) == (expected, 5.0 if expected is State.RUNNING else None), updated_at
    ended = write_run(tmp_path / "a", [], eta_s=5.0, updated_at=ago(days=9), state="done").summary()
    assert (ended.state, ended.eta_s) == (State.DONE, None)


@pytest.mark.parametrize(
    "end", ["", "\n", '\n{"step": 3, "val_loss": 1', '\n{"step": 3, "loss": 1.0, "val', "\n[]\n\0\0\n"]
)
def test_a_half_written_row_counts_for_nothing(tmp_path: Path, end: str) -> None:
    found = write_run(
        tmp_path / "a", [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5, "val_loss": 3.25}], end
    ).summary()
    assert (found.step, found.loss, found.val_loss, found.best_val_loss) == (2, 3.5, 3.25, 3.25)


def test_the_best_of_a_long_run_is_found_past_the_rows_that_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": step, "loss": 5.0, "tokens_per_s": 1234.5678} for step in range(1, 10_001)
    ]
    rows[99]["val_loss"], rows[199]["val_loss"] = 1.5, 1.75
    folder = write_run(tmp_path / "a", rows)
    assert folder.metrics.stat().st_size > 2 * TAIL_BYTES
    found = folder.summary()
    assert (found.step, found.val_loss, found.best_val_loss) == (10_000, 1.75, 1.5)
    assert len(found.losses) < 10_000


@pytest.mark.parametrize("status", [None, "", "{", "[1]", '{"state": "asleep", "step": 1}'])
def test_a_run_without_a_status_has_no_state(tmp_path: Path, status: str | None) -> None:
    folder = write_run(tmp_path / "a", [{"step": 7, "loss": None, "lr": "fast", "mfu": math.nan}])
    folder.status.unlink() if status is None else folder.status.write_text(status)
    found = folder.summary()
    assert (found.state, found.step, found.loss, found.lr, found.losses) == (State.UNKNOWN, 7, None, None, ())


def test_runs_are_found_by_name_by_folder_and_by_the_folder_that_holds_them(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    for path in (runs / "a", runs / "b", elsewhere / "c"):
        write_run(path, [{"step": 1}])
    (runs / "no run").mkdir()
    assert [run.path for run in all_runs(runs)] == [runs / "a", runs / "b"]
    found = [run.path for run in find_runs(["a", str(elsewhere / "c"), str(runs)], runs)]
    assert found == [runs / "a", elsewhere / "c", runs / "b"], "each once"
    with pytest.raises(UserError, match="no run 'aa': expected .*did you mean a"):
        find_runs(["aa"], runs)
