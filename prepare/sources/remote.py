"""Sources behind URLs: files, folders and globs of any fsspec file system, and single files of the
web.

Nothing is hashed, because reading a bucket twice is paid for twice: what the server reports of a
file is recorded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.formats import READABLE, format_of
from prepare.sources.items import Source
from prepare.sources.listing import FOLDER_OF_A_GLOB, HIDDEN_FILE, Listing
from prepare.sources.names import is_glob
from prepare.storage.files import StoredFile, describe, filesystem, is_web, name_of, reading, remote_file, shown
from prepare.units import Reading


@dataclass(frozen=True)
class RemoteFiles(Source):
    """The files that a URL named when the corpus was opened."""

    remotes: list[StoredFile]

    def stored(self) -> list[StoredFile]:
        return self.remotes

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [{"path": shown(file.path), "bytes": file.size, "etag": file.etag} for file in self.remotes]


def open_remote(source: str, reading: Reading, seen: set[str]) -> RemoteFiles:
    listing = Listing(seen)
    return RemoteFiles(reading, _list_remote(source, listing), passed_over=listing.passed_over)


def _list_remote(source: str, listing: Listing) -> list[StoredFile]:
    """The readable files that a URL names, sorted: the file, those below the folder, or those that
    a glob matches.
    """
    if is_web(source):
        source = source.partition("#")[0]  # what follows is never sent
        if not format_of(name_of(source)):
            raise UserError(f"{shown(source)} has no known suffix: expected one of {READABLE}")
        with reading(source):
            found = describe(source)
        return [found] if listing.takes(source, found.size, source) else []
    files = [file for file in _find(source, listing) if listing.takes(file.path, file.size, file.path)]
    listing.check(shown(source), files)
    return files


def _find(source: str, listing: Listing) -> Iterator[StoredFile]:
    system, name = filesystem(source)
    try:
        # An earlier listing may be out of date.
        system.invalidate_cache()
        if is_glob(name):
            found = system.glob(name, detail=True)
        elif system.isfile(name):
            found = {name: system.info(name)}
        else:
            found = system.find(name, detail=True)
    except Exception as error:  # as in storage: each file system raises its own kinds
        raise UserError(
            f"cannot list {shown(source)}: {type(error).__name__}: {one_line(error)}; "
            "check the address, the credentials and the network"
        ) from None
    # Hidden files are skipped below what the user named, even if the path to it has a hidden part.
    root = re.split(r"[*?[]", name)[0].rpartition("/")[0] if is_glob(name) else name
    for path, info in sorted(found.items()):
        url = str(system.unstrip_protocol(path))
        if any(part.startswith(".") for part in path.removeprefix(root).split("/")):
            listing.pass_over(HIDDEN_FILE, url)
        elif info["type"] == "file":
            yield remote_file(url, info)
        elif "**" not in name:  # which also names what is in the folder
            listing.pass_over(FOLDER_OF_A_GLOB, url)
