"""Prompts line after line: through a real pseudo-terminal, down a pipe, and what a session leaves behind."""

import builtins
import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pipeline.errors import UserError
from sample import interactive
from sample import run as sample
from sample.options import SampleOptions

CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def type_in(monkeypatch: pytest.MonkeyPatch, state: Path, *answers: str | type[BaseException]) -> None:
    """A terminal at which somebody answers so."""
    lines = iter(answers)

    def answer(sign: str) -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(interactive, "at_terminal", lambda: True)
    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setenv("XDG_STATE_HOME", str(state))


# ---- down a pipe ----


def test_lines_of_a_pipe_are_prompts_to_its_end(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, b"AB\nCD\n\nEF")
    sample.run(SampleOptions(ckpt="latest", interactive=True, max_new_tokens=5, temperature=0, seed=1))
    out, err = capsys.readouterr()
    texts = out.removesuffix("\n").split("\n---------------\n")
    assert [text[:2] for text in texts[:2]] == ["AB", "CD"] and texts[3].startswith("EF")
    assert interactive.SIGN not in out and "Ctrl" not in err

    sample.run(SampleOptions(ckpt="latest", max_new_tokens=5, temperature=0, seed=1))
    assert texts[2] == capsys.readouterr().out, "an empty line begins a document"


def test_a_line_that_cannot_be_a_prompt_is_told_and_the_next_one_answered(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_b(prompt: str, tokenizer: Any) -> list[int]:
        if prompt == "B":
            raise UserError("no B in\x1b this vocabulary")
        return list(prompt.encode())

    monkeypatch.setattr(sample, "encode_prompt", refuse_b)
    pipe_in(monkeypatch, b"A\nB\nC\n")
    sample.run(SampleOptions(ckpt="latest", interactive=True, max_new_tokens=3, seed=1))
    out = capsys.readouterr().out
    assert out.startswith("A") and out.count("---") and out.split("---\n")[1].startswith("C")
    assert "error: no B in\\x1b this vocabulary" in caplog.text


def test_the_same_line_twice_gives_two_texts_and_a_seed_repeats_both(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = []
    for _ in range(2):
        pipe_in(monkeypatch, b"A\nA\n")
        sample.run(SampleOptions(ckpt="latest", interactive=True, max_new_tokens=30, seed=(1 << 63) - 1))
        sessions.append(capsys.readouterr().out)
    first, second = sessions[0].split(sample.SEPARATOR)
    assert first != second.removesuffix("\n")
    assert sessions[0] == sessions[1]


def test_a_pipe_of_other_bytes_is_one_line(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lenient in ("utf-8", "latin-1"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), lenient, "surrogateescape"))
        with pytest.raises(UserError, match="stdin is not UTF-8 text"):
            list(interactive.ask())


def test_ctrl_c_ends_a_program_that_reads_a_pipe(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    pipe_in(monkeypatch, b"A\nB\n")
    monkeypatch.setattr(sample.Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.run(SampleOptions(ckpt="latest", interactive=True))


# ---- at a terminal ----


def test_ctrl_c_at_the_sign_begins_the_line_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    type_in(monkeypatch, tmp_path, "one", KeyboardInterrupt, "two", EOFError)
    assert list(interactive.ask()) == ["one", "two"]


def test_the_history_is_for_its_owners_eyes_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    file = tmp_path / "pipeline" / "history"
    file.parent.mkdir()
    file.touch(mode=0o644)
    type_in(monkeypatch, tmp_path, "one", EOFError)
    readline.clear_history()
    for line in interactive.ask():
        readline.add_history(line)
    assert file.read_text().splitlines()[-1] == "one"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("hindrance", ["no readline", "a file where the folder should be"])
def test_without_a_history_it_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hindrance: str
) -> None:
    if hindrance == "no readline":
        monkeypatch.setitem(sys.modules, "readline", None)
    else:
        (tmp_path / "pipeline").touch()
    type_in(monkeypatch, tmp_path, "one", EOFError)
    assert list(interactive.ask()) == ["one"]


def test_the_history_lies_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for state, folder in (
        ("/state", "/state"),
        ("", "/home/someone/.local/state"),
        ("relative", "/home/someone/.local/state"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert interactive.history_file() == Path(folder, "pipeline/history")


class Terminal:
    """A program on a pseudo-terminal, and what it has written there."""

    def __init__(self, handle: int) -> None:
        self.handle, self.seen = handle, b""

    def type(self, keys: bytes) -> None:
        os.write(self.handle, keys)

    def expect(self, words: bytes) -> bytes:
        """Wait for `words`; returns what came before them."""
        assert self.waited_for(words, timeout_s=120), f"waited for {words!r}, saw {self.seen!r}"
        before, _, self.seen = self.seen.partition(words)
        return before

    def break_line(self) -> None:
        """Ctrl-C until the next sign comes: Python's readline loses one that comes just before it waits for a key."""
        self.type(CTRL_C)
        while not self.waited_for(b"\r\n> ", timeout_s=5):
            self.type(CTRL_C)
        self.expect(b"\r\n> ")

    def waited_for(self, words: bytes, timeout_s: float) -> bool:
        """Whether `words` have come by then."""
        end = time.monotonic() + timeout_s
        while words not in self.seen:
            if not select.select([self.handle], [], [], max(0, end - time.monotonic()))[0]:
                return False
            try:
                self.seen += os.read(self.handle, 65536)
            except OSError:  # the other side is closed
                pytest.fail(f"it ended before {words!r}: {self.seen!r}")
        return True


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def at_terminal(folder: Path, state: Path, *options: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """`pipeline sample --interactive` in a session of its own; its log comes out of the same terminal."""
    ours, theirs = pty.openpty()
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(state),
        "TERM": "dumb",
    }
    command = [sys.executable, "-m", "pipeline", "sample", "--ckpt", "latest", "--interactive", *options]
    process = subprocess.Popen(
        command, cwd=folder, env=variables, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_take_terminal
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.slow
def test_a_session_at_a_terminal(trained: Path, tmp_path: Path) -> None:
    """A text that would never end is stopped, the program goes on, the next session knows the lines of the first."""
    endless = ("--temperature", "0", "--max-new-tokens", str(10**9))
    with at_terminal(trained, tmp_path, *endless) as (terminal, process):
        assert b"Ctrl-D exits" in terminal.expect(b"> ")
        terminal.type(b"first\n")
        terminal.expect(b"first\r\nfirst")  # what is typed, then the text that begins with it
        terminal.type(CTRL_C)
        terminal.expect(b"\r\n> ")
        terminal.type(b"half a li")
        terminal.expect(b"half a li")
        terminal.break_line()
        terminal.type(b"second\n")
        terminal.expect(b"second\r\nsecond")
        terminal.type(CTRL_C)
        assert b"---" not in terminal.expect(b"\r\n> ")
        terminal.type(CTRL_D)
        assert process.wait(timeout=120) == 0
    file = tmp_path / "pipeline" / "history"
    assert file.stat().st_mode & 0o777 == 0o600
    with at_terminal(trained, tmp_path, "--temperature", "0", "--max-new-tokens", "4") as (terminal, process):
        terminal.expect(b"> ")
        terminal.type(UP + UP + b"\n")
        terminal.expect(b"\r\nfirst")
        terminal.expect(b"\r\n> ")
        terminal.type(CTRL_D)
        assert process.wait(timeout=120) == 0
