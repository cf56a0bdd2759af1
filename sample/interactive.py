"""Prompts from a terminal or a pipe, line by line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from pipeline.errors import UserError

SIGN = "> "
REMEMBERED_LINES = 1000


def at_terminal() -> bool:
    """Whether a person types the lines; otherwise they are read to the end of a pipe."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask() -> Iterator[str]:
    """Every line, until Ctrl-D or the end of the pipe; Ctrl-C discards a line. Raises UserError."""
    if not at_terminal():
        yield from _piped_lines()
        return
    with _history(history_file()):
        while True:
            try:
                line = input(SIGN)
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            except EOFError:
                sys.stdout.write("\n")
                return
            yield line


def history_file() -> Path:
    """In the folder of the XDG base directory specification for state that outlives a restart."""
    # The specification has relative paths ignored.
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()) / "pipeline" / "history"


def _piped_lines() -> Iterator[str]:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # as a prompt file, whatever the locale
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 text: {error}") from None


@contextmanager
def _history(path: Path) -> Iterator[None]:
    """Lines of earlier starts at the arrow keys; none without readline or a writable folder."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(REMEMBERED_LINES)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Prompts may be private; chmod is for a file that existed with other permissions.
        path.touch(mode=0o600)
        path.chmod(0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)
