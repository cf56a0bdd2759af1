"""watch reads runs from their files alone: live on a terminal, once into a pipe, as JSON for scripts."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_log import without_control_sequences

from observe.runs import format_entries
from observe.watch import running_or_newest
from pipeline.cli.main import app
from pipeline.errors import UserError
from pipeline.runs import RunFolder, RunSummary, State

ROOT = Path(__file__).parents[2]
CONTRACT = {
    "name", "state", "step", "loss", "val_loss", "best_val_loss", "lr", "tokens", "tokens_per_s", "eta_s", "updated_at",
}  # fmt: skip


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.fixture
def write_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    monkeypatch.chdir(tmp_path)

    def write(name: str, age_s: float = 1.0, end: str = "", **status: Any) -> RunFolder:
        folder = RunFolder(Path("runs") / name)
        folder.path.mkdir(parents=True, exist_ok=True)
        row = {"step": 10, "tokens": 1000, "loss": 3.25, "lr": 0.001, "tokens_per_s": 500.0, "val_loss": 3.125}
        folder.metrics.write_text(json.dumps(row) + "\n" + end)
        document = {"state": "running", "step": 12, "loss": 3.0, "eta_s": 90.0, "updated_at": ago(age_s)} | status
        folder.status.write_text(json.dumps(document))
        return folder

    return write


def watched(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["watch", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    runs: list[dict[str, Any]] = json.loads(result.stdout)
    return runs


def test_json_has_the_keys_that_scripts_rely_on(write_run: Callable[..., RunFolder]) -> None:
    write_run("a", end='{"step": 20, "lo')
    (run,) = watched("a", "--once")
    assert set(run) >= CONTRACT
    assert {name: run[name] for name in CONTRACT - {"updated_at"}} == {
        "name": "a", "state": "running", "step": 12, "loss": 3.0, "val_loss": 3.125, "best_val_loss": 3.125, "lr": 0.001,
        "tokens": 1000, "tokens_per_s": 500.0, "eta_s": 90.0,
    }  # fmt: skip


def test_without_a_name_it_takes_all_that_run_or_else_the_newest(write_run: Callable[..., RunFolder]) -> None:
    write_run("a", state="done", age_s=50)
    write_run("b", state="stopped", age_s=20)
    write_run("c", age_s=4000)  # says running, and is dead
    assert [run["name"] for run in watched()] == ["b"]
    write_run("d"), write_run("e")
    assert [run["name"] for run in watched()] == ["d", "e"]
    assert [(run["name"], run["state"]) for run in watched("c", "runs/a")] == [("c", "dead"), ("a", "done")]


def test_where_there_is_no_run_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run under .*: start one with pipeline train"):
        running_or_newest(tmp_path)


def test_into_a_pipe_it_prints_once_and_draws_nothing_over(write_run: Callable[..., RunFolder]) -> None:
    write_run("a"), write_run("b", state="failed", reason="disk full")
    one = CliRunner().invoke(app, ["watch", "a"], catch_exceptions=False).stdout
    assert "a: running" in one and "0:01:30 left" in one and "\x1b" not in one
    both = CliRunner().invoke(app, ["watch", "a", "b"], catch_exceptions=False).stdout
    assert [line.split()[:2] for line in both.splitlines()] == [["name", "state"], ["a", "running"], ["b", "failed"]]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rows_keep_state_rate_and_time_left_at_any_width(width: int) -> None:
    run = RunSummary(
        State.RUNNING, 123_456, name="a-name-that-is-longer-than-there-is-room-for", max_steps=600_000, loss=3.2,
        tokens_per_s=812_345.0, eta_s=123_456.0,
    )  # fmt: skip
    dead = RunSummary(State.DEAD, 1, name="b", age_s=90_000.0)
    first, second = format_entries([run.as_json(), dead.as_json()], width)[1:]
    assert len(first.rstrip()) <= width
    for figure in ("a-name", "running", "123,456", "812k", "1d 10h"):
        assert figure in first
    assert second.split()[:4] == ["b", "dead", "1d", "1h"]


def on_a_pty(arguments: list[str], enough: Callable[[str], bool], then: bytes = b"", **more: str) -> tuple[str, int]:
    """What `pipeline watch` draws until there is enough of it, then a key; and its exit code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "20", "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-m", "pipeline", "watch", *arguments]
    process = subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                written += os.read(ours, 4096)
            if then and enough(written.decode(errors="replace")):
                os.write(ours, then)
                then = b""
    except OSError:  # how Linux ends a pseudo-terminal
        pass
    finally:
        os.close(ours)
    return written.decode(), process.wait(10)


@pytest.mark.slow
def test_on_a_terminal_it_follows_a_run_to_its_end(write_run: Callable[..., RunFolder]) -> None:
    write_run("a")

    def enough(written: str) -> bool:
        if "step 12" in written and "step 40" not in written:
            write_run("a", step=40, state="done", loss=2.5)
        return False

    written, code = on_a_pty(["a"], enough, then=b"-")
    assert (
        code == 0
        and "a: running" in written
        and "a: done" in written
        and "loss 2.5" in without_control_sequences(written)
    )


@pytest.mark.slow
def test_ctrl_c_leaves_it_and_nothing_is_drawn_twice(write_run: Callable[..., RunFolder]) -> None:
    write_run("a"), write_run("b")
    started = time.monotonic()
    written, code = on_a_pty([], lambda text: "b  " in text and time.monotonic() > started + 8, then=b"\x03")
    assert code == 0 and "Traceback" not in written
    assert written.count("tokens/s") <= 2, "what has not changed is not drawn again"


def test_a_dumb_terminal_gets_it_once(write_run: Callable[..., RunFolder]) -> None:
    write_run("a")
    written, code = on_a_pty(["a"], lambda text: False, TERM="dumb")
    assert code == 0 and written.count("a: running") == 1 and "\x1b" not in written
