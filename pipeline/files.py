"""How this project writes to disk: a file that is there is complete, and its bytes can be checked.

Writing goes beside, is synced, then renamed over the target. rename(2) is atomic within a filesystem, and a synced folder
keeps the new name across a power cut.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import xxhash

from pipeline.errors import UserError
from pipeline.log import logger

HASH_BLOCK_BYTES = 1 << 22
LOOK_AGAIN_S = 0.5


def sync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Give a finished file or folder its final name, durably."""
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash, sees the old file or the new one and nothing between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    publish(partial, path)


def read_limited(path: Path, most_bytes: int) -> bytes:
    """A file that is read whole, and that a stranger may have written. Raises UserError for a larger one, or no file."""
    if not path.is_file():  # to open a pipe would wait for a writer
        raise UserError(f"{path} is not a file: wanted one of up to {most_bytes:,} bytes")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"{path} is too large: wanted up to {most_bytes:,} bytes, found {path.stat().st_size:,}")
    return content


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
    """Another process holds what was asked for."""


@contextmanager
def one_writer(folder: Path, name: str = ".lock", shared: bool = False, patience_s: float = 0.0) -> Iterator[None]:
    """Hold `folder` against a second writer; shared, against one that holds it alone.

    The lock is the kernel's (flock), so it goes with its process and is never stale. Raises Held, which
    says who holds it, where that one does not let go within `patience_s`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another place") from None
    with file:
        deadline, told = time.monotonic() + patience_s, False
        while not _is_locked(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder):
            file.seek(0)
            taken = f"{folder} is being written by {file.read().strip()}"
            if time.monotonic() >= deadline:
                raise Held(f"{taken}: wait for it, or choose another name")
            if not told:
                logger.info("%s: waiting", taken)
            told = True
            time.sleep(LOOK_AGAIN_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_locked(file: TextIO, operation: int, folder: Path) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{folder} lies on a file system that cannot lock files ({error.strerror}): choose another place, "
            "or mount it with locks (Lustre: -o flock)"
        ) from None
    return True


def holder(folder: Path, name: str = ".lock") -> str:
    """Who holds `folder` against other writers, as `one_writer` noted it; empty where nobody does, or nothing tells."""
    try:
        with (folder / name).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, with the file
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return ""
