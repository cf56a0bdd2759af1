"""How this project writes to disk: a file that exists is complete, and its bytes can be checked.

A file is written under another name, synced, then renamed over the target. rename(2) is atomic
within a filesystem, and a synced folder keeps the new name across a power failure.
"""

import fcntl
import itertools
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, get_args, get_origin

import xxhash

from pipeline.errors import UserError
from pipeline.log import logger

HASH_BLOCK_BYTES = 1 << 22
POLL_INTERVAL_S = 0.5


def sync(path: Path) -> None:
    """Force the contents of a file or folder to the disk."""
    # A descriptor for reading is enough for fsync, and the only kind that a folder has.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Give a finished file or folder its final name, durably."""
    # In this order: a name must not become durable before its content.
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def unique() -> str:
    """Part of a name that no other process takes, on whichever machine that shares the folder."""
    return secrets.token_hex(8)  # process numbers return, and are the same on two machines


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash, finds the old file or the new one and
    nothing in between.
    """
    partial = path.with_name(f".{path.name}.{unique()}.partial")
    try:
        partial.write_bytes(content)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def unused_name(path: Path) -> Path:
    """`path`, or with the first of `_2`, `_3`, ... after its stem that nothing has yet."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def read_limited(path: Path, most_bytes: int) -> bytes:
    """The content of a file that may come from anyone. Raises UserError for a larger one, or what
    is not a file.
    """
    if not path.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"{path} is not a file: expected one of at most {most_bytes:,} bytes")
    # Not by its size in the folder, which may grow until it is read.
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"{path} is too large: expected at most {most_bytes:,} bytes, got {path.stat().st_size:,}")
    return content


def check_types(document: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises TypeError for a value from JSON that does not have exactly the type in `wanted`: its
    true is an int to isinstance.
    """
    for name, value in document.items():
        options = get_args(wanted[name]) if isinstance(wanted[name], UnionType) else (wanted[name],)
        if type(value) not in [get_origin(option) or option for option in options]:
            raise TypeError(f"{name} has the type {type(value).__name__}")


def dump_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """In UTF-8. A number that is not finite becomes null, as JSON has none.

    Hashes are taken of it, so its form must not change.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(
        _finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, separators=separators
    ).encode()


def parse_json(content: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, or is nested too deeply to be meant. An integer
    past 64 bits is a float, and so refused where an integer is expected.
    """
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return finite(value) if isinstance(value, float) else value


def finite(value: Any) -> float | None:
    """A number as a float; None for one that is not finite, and for anything else."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer
        return None
    return found if math.isfinite(found) else None


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # 64 bits have up to 19 digits and a sign


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def is_plain_name(name: str) -> bool:
    """Whether it names something in a folder, and leads to no other folder."""
    return Path(name).name == name not in ("", "..")


def hash_bytes(content: bytes) -> str:
    """XXH3-128 as 32 hexadecimal digits: for finding damage, not for secrets."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_file(path: Path) -> str:
    """`hash_bytes` of a file's content, read in blocks of 4 MiB."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


class Held(UserError):
    """Another process holds the lock."""


@contextmanager
def one_writer(folder: Path, name: str = ".lock", shared: bool = False, patience_s: float = 0.0) -> Iterator[None]:
    """Lock `folder` against a second writer; `shared`, against one that holds it exclusively.

    The lock is the kernel's (flock), so it is released with its process and never stale. Raises
    Held, which names the process that has it, unless that releases it within `patience_s`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a+: opening for writing would erase the name of the process that has the lock.
        file = (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    with file:
        deadline, reported = time.monotonic() + patience_s, False
        while not _is_locked(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder):
            file.seek(0)
            taken = f"{folder} is being written by {file.read().strip()}"
            if time.monotonic() >= deadline:
                raise Held(f"{taken}: wait for it, or choose another name")
            if not reported:
                logger.info("%s: waiting", taken)
            reported = True
            time.sleep(POLL_INTERVAL_S)
        # For people and `holder`: the lock itself does not need it.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_locked(file: TextIO, operation: int, folder: Path) -> bool:
    """Whether the lock was free, and is now taken."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{folder} is on a file system that cannot lock files ({error.strerror}): choose another folder, "
            "or mount it with locks (Lustre: -o flock)"
        ) from None
    return True


def holder(folder: Path, name: str = ".lock") -> str:
    """The process that has locked `folder`, as `one_writer` recorded it; empty where none has, or
    it cannot be read.
    """
    with suppress(OSError), (folder / name).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released immediately, with the file
        except BlockingIOError:
            return file.read().strip() or "another process"
    return ""
