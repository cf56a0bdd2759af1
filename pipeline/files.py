"""How this project writes to disk: a file that is there is complete, and its bytes can be checked.

Writing goes beside, is synced, then renamed over the target. rename(2) is atomic within a filesystem, and a synced folder
keeps the new name across a power cut.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from pipeline.errors import UserError

HASH_BLOCK_BYTES = 1 << 22


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
def one_writer(folder: Path, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Hold `folder` against a second writer; shared, against one that holds it alone.

    The lock is the kernel's (flock), so it goes with its process and is never stale. Raises Held, which
    says who holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another place") from None
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise Held(f"{folder} is being written by {holder}: wait for it, or choose another name") from None
        except OSError as error:
            raise UserError(
                f"{folder} lies on a file system that cannot lock files ({error.strerror}): choose another place, "
                "or mount it with locks (Lustre: -o flock)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
