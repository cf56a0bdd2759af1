"""Bringing one file here: beside, continued where it was cut off, checked, then renamed."""

import hashlib
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import hash_bytes, publish
from prepare.storage.files import Remote, open_bytes, reading, shown
from prepare.units import BLOCK_BYTES


def download(remote: Remote, target: Path, sha256: str | None = None) -> None:
    """Make `target` a copy of the file. Raises UserError where what came is not what was told or wanted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A part of another version is never continued: its name holds what tells versions apart.
    version = hash_bytes(f"{remote.url} {remote.etag} {remote.size}".encode())
    partial = target.with_name(f".{target.name}.{version}.partial")
    if not (remote.ranges and remote.etag):
        partial.unlink(missing_ok=True)
    with reading(remote.url), open_bytes(remote.url) as source, partial.open("ab") as file:
        if file.tell():
            source.seek(file.tell())
        while block := source.read(BLOCK_BYTES):
            file.write(block)
        size = file.tell()
    if remote.ranges and size != remote.size:
        partial.unlink()
        raise UserError(f"{shown(remote.url)} gave {size:,} bytes, told were {remote.size:,}: fetch it again")
    if sha256 is not None and (found := sha256_of(partial)) != sha256:
        partial.unlink()
        raise UserError(f"{shown(remote.url)} has other content than is pinned: SHA-256 {found}, wanted {sha256}")
    publish(partial, target)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
