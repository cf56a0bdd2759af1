"""The talk: a bar on a terminal, plain lines anywhere else, and rank 0 alone unless something is wrong."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import log

ROOT = Path(__file__).parents[2]
REPORT = """
from pipeline import log
log.configure()
with log.ProgressReport("encode", total=100, unit="MB") as report:
    report.advance(30, "7 documents")
    log.logger.info("an [info] line")
    log.logger.warning("a warning")
    print("the result")
"""


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    before = log.logger.handlers, log.logger.level, log.logger.propagate
    yield
    log.logger.handlers, log.logger.level, log.logger.propagate = before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time the log sees; a test moves it by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def environment(**more: str) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "RANK")}
    return without | {"TERM": "xterm", "COLUMNS": "100"} | more


def on_a_terminal(script: str, **more: str) -> tuple[str, str]:
    """What a script writes to stderr, a pseudo-terminal, and to stdout, a pipe."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 4096):
            written += block
    except OSError:  # how Linux tells the end of a pseudo-terminal
        pass
    finally:
        os.close(ours)
    stdout = process.communicate()[0]
    assert process.returncode == 0, written.decode()
    return written.decode(), stdout.decode()


def into_a_pipe(script: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=True
    )
    return done.stderr


def without_control_sequences(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# ---- progress ----


def test_progress_into_a_file_is_a_plain_line_every_interval(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure()
    with log.ProgressReport("encode", total=400, unit="MB", done=100) as report:
        for seconds in (log.LINE_INTERVAL_S - 0.5, 0.5, log.LINE_INTERVAL_S - 0.5, 0.5):
            clock[0] += seconds
            report.advance(25, "7 documents")
    assert capsys.readouterr().err.splitlines() == [
        "encode: 150 MB, 5.0 MB/s, 7 documents, 50 s left",
        "encode: 200 MB, 5.0 MB/s, 7 documents, 40 s left",
    ]


def test_progress_of_a_stream_tells_amounts_and_no_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    with log.ProgressReport("encode", total=None, unit="MB") as report:
        clock[0] += log.LINE_INTERVAL_S
        report.advance(12345)
    assert capsys.readouterr().err == "encode: 12,345 MB, 1,234.5 MB/s\n"


def test_on_a_terminal_progress_is_a_bar_that_log_lines_do_not_tear() -> None:
    terminal, _ = on_a_terminal(REPORT)
    assert "\x1b[" in terminal
    lines = [line.strip() for line in re.split(r"[\r\n]+", without_control_sequences(terminal))]
    assert any(re.match(r"encode .*━.* 30% .*7 documents", line) for line in lines), terminal
    assert "an [info] line" in lines  # square brackets are not markup
    assert "a warning" in lines


def test_what_is_printed_under_a_bar_stays_on_stdout() -> None:
    assert on_a_terminal(REPORT)[1] == "the result\n"


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}])
def test_into_a_pipe_there_is_never_a_control_character(variables: dict[str, str]) -> None:
    assert into_a_pipe(REPORT, **variables) == "an [info] line\na warning\n"


def test_another_rank_shows_no_bar_on_a_terminal() -> None:
    terminal, _ = on_a_terminal(REPORT, RANK="1")
    assert "━" not in terminal
    assert without_control_sequences(terminal).split("\r\n") == ["[rank 1] a warning", ""]


# ---- lines ----


@pytest.mark.parametrize(
    ("rank", "lines"), [("0", "said\nbeware\n"), ("3", "[rank 3] beware\n"), (None, "said\nbeware\n")]
)
def test_only_rank_0_talks_and_the_others_say_who_warns(
    rank: str | None, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    log.configure()
    log.configure()  # as often as one likes: no line comes twice
    log.logger.info("said")
    log.logger.warning("beware")
    assert capsys.readouterr().err == lines


def test_a_log_file_gets_every_line_with_its_time_after_those_of_an_earlier_start(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("earlier\n", encoding="utf-8")
    log.configure()
    with log.also_to_file(path):
        log.logger.info("said %s", "é")
        log.logger.warning("beware")
    log.logger.info("said to the terminal alone")
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(f"earlier\n{moment} INFO said é\n{moment} WARNING beware\n", path.read_text(encoding="utf-8"))
