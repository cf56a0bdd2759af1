"""Sources that are files of this machine: files, folders and globs of them, the standard library, a
copy of stdin, and Tiny Shakespeare in Hugging Face's cache.
"""

import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import hash_bytes, hash_file, write_atomic
from prepare.documents.lines import split_lines
from prepare.documents.streams import Stream
from prepare.formats import READABLE, Format, format_of
from prepare.sources.items import Source
from prepare.sources.listing import Listing
from prepare.sources.names import is_glob
from prepare.sources.walk import every_file, matches
from prepare.storage.compressed import BYTE_ORDER_MARK, recognized_blocks
from prepare.storage.files import StoredFile, assets, blocks, reading, shown
from prepare.units import BLOCK_BYTES, Item, Reading

# Folders with more files are recorded in the manifest as one entry.
MOST_FILES_LISTED = 1000

# Left out of the corpus `stdlib`: installed packages, tests, and folders of tables or that differ
# between versions.
STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
# Pinned by its commit and its content.
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


@dataclass(frozen=True)
class Files(Source):
    """Local files of known suffixes, below `root` if they come from a folder.

    `about` describes a corpus that the manifest records as one entry.
    """

    paths: list[Path]
    root: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def files(self) -> list[Path]:
        return self.paths

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        if self.root is None or (not self.about and len(self.paths) <= MOST_FILES_LISTED):
            return [
                {"path": shown(file.path), "bytes": file.size, "hash": hash_of(Path(file.path))}
                for file in self.stored()
            ]
        # One hash over the files' hashes and their paths in the folder, so that the folder may be
        # moved.
        listing = "".join(f"{path.relative_to(self.root).as_posix()}\t{hash_of(path)}\n" for path in self.paths)
        total = {
            "files": len(self.paths),
            "bytes": sum(file.size for file in self.stored()),
            "hash": hash_bytes(os.fsencode(listing)),
        }
        return [{"path": shown(str(self.root)), **self.about, **total}]


@dataclass(frozen=True)
class Stdin(Source):
    """Standard input, kept in a file so that it can be read more than once, and by several
    processes.

    If its first line that is not blank is a JSON object, it is JSON lines; otherwise every line is
    a document.
    """

    spool: Path

    def split(self, file: StoredFile, unit_bytes: int) -> Iterator[Item]:
        head = next(blocks(file.path), b"").removeprefix(BYTE_ORDER_MARK).lstrip()
        text_field = self.reading.text_field if _is_json_object(head) else None
        if text_field is None and self.reading.document_separator:
            yield Stream(file.path, Format.TEXT, self.reading, size=file.size)
        else:
            yield from split_lines(file.path, file.size, text_field, unit_bytes)

    def files(self) -> list[Path]:
        return [self._spooled]

    def stored(self) -> list[StoredFile]:
        return [self._stored]

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [{"path": "-", "bytes": self._stored.size, "hash": self._stored.etag}]

    @cached_property
    def _stored(self) -> StoredFile:
        # By its content: the copy is written again at every start.
        return StoredFile(str(self._spooled), self._spooled.stat().st_size, hash_file(self._spooled))

    @cached_property
    def _spooled(self) -> Path:
        with self.spool.open("wb") as file:
            file.writelines(recognized_blocks(sys.stdin.buffer, "stdin"))
        return self.spool


@dataclass(frozen=True)
class Shakespeare(Source):
    """Tiny Shakespeare, downloaded when it is first needed; nothing where it was named before."""

    def stored(self) -> list[StoredFile]:
        return [] if self.passed_over else [StoredFile(str(_shakespeare()), SHAKESPEARE_BYTES, SHAKESPEARE_SHA256)]

    def split(self, file: StoredFile, unit_bytes: int) -> Iterator[Item]:
        return super().split(replace(file, path=str(self.path)), unit_bytes)

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        about = {"path": "shakespeare", "url": SHAKESPEARE_URL}
        return [] if self.passed_over else [{**about, "bytes": SHAKESPEARE_BYTES, "sha256": SHAKESPEARE_SHA256}]

    @cached_property
    def path(self) -> Path:
        # Hashed on every use (a few ms), so a damaged copy is replaced and not trained on.
        path = _shakespeare()
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
            return path
        content = b"".join(blocks(SHAKESPEARE_URL))
        if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
            raise UserError(f"{SHAKESPEARE_URL} changed: its SHA-256 is {found}, expected {SHAKESPEARE_SHA256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        return path


def _shakespeare() -> Path:
    return assets() / "shakespeare" / "input.txt"


def open_files(source: str, reading: Reading, seen: set[str]) -> Files | None:
    """The files that a path or a glob names, except those `seen` before; None if it is neither."""
    path, listing = Path(source), Listing(seen)
    found, root = _found(path), None
    if found is None:
        if not is_glob(source):
            return None
        paths = matches(source, listing, reading.split)
        listing.check(f"the glob {shown(source)}", paths)
    elif stat.S_ISDIR(found.st_mode):
        paths, root = every_file(path, listing, reading.split), path
        listing.check(f"the folder {shown(source)}", paths)
    elif not stat.S_ISREG(found.st_mode):
        raise UserError(f"{shown(source)} is not a regular file: write its text to a file, or pipe it into prepare -")
    elif not format_of(path.name):
        raise UserError(f"{shown(source)} has no known suffix: expected one of {READABLE}")
    else:
        paths = [path] if listing.takes(source, found.st_size, os.path.realpath(path)) else []
    return Files(reading, paths, root=root, passed_over=listing.passed_over, has_splits=listing.has_splits)


def _found(path: Path) -> os.stat_result | None:
    """None where nothing has this name."""
    try:
        return path.stat()
    except PermissionError:  # something may have it
        with reading(str(path)):
            raise
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def open_stdlib(reading: Reading, seen: set[str]) -> Files:
    root, listing = Path(sysconfig.get_path("stdlib")), Listing(seen)
    paths = matches(f"{root}/**/*.py", listing, reading.split, STDLIB_WITHOUT)
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    about = {"path": "stdlib", "python": python}
    return Files(reading, paths, root=root, about=about, passed_over=listing.passed_over)


def open_shakespeare(reading: Reading, seen: set[str]) -> Source:
    listing = Listing(seen)
    listing.is_new(SHAKESPEARE_URL, SHAKESPEARE_URL)
    return Shakespeare(reading, passed_over=listing.passed_over)


def _is_json_object(head: bytes) -> bool:
    """Whether the first line is one, judged by its first byte if the line is longer than `head`."""
    if b"\n" not in head and len(head) >= BLOCK_BYTES // 2:
        return head.startswith(b"{")
    try:
        return isinstance(json.loads(head.partition(b"\n")[0]), dict)
    except ValueError:
        return False
