"""How this project writes to disk: a file that is there is complete, and its bytes can be checked.

Writing goes beside, is synced, then renamed over the target. rename(2) is atomic within a filesystem, and a synced folder
keeps the new name across a power cut.
"""

import os
from pathlib import Path

import xxhash

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
