"""Sources behind URLs: files, folders and globs of any fsspec file system, and single files of the
web.

Nothing is hashed, because reading a bucket twice is paid for twice: what the server reports of a
file is recorded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.formats import READABLE, format_of
from prepare.sources.items import Source
from prepare.sources.local import readable
from prepare.sources.names import is_glob
from prepare.storage.files import StoredFile, describe, filesystem, is_web, name_of, reading, remote_file, shown


@dataclass(frozen=True)
class RemoteFiles(Source):
    """The files that a URL named when the corpus was opened."""

    source: str
    remotes: list[StoredFile]

    def stored(self) -> list[StoredFile]:
        return self.remotes

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [{"path": shown(file.path), "bytes": file.size, "etag": file.etag} for file in self.remotes]


def list_remote(source: str) -> list[StoredFile]:
    """The readable files that a URL names, sorted: the file, those below the folder, or those that
    a glob matches.
    """
    if is_web(source):
        if not format_of(name_of(source)):
            raise UserError(f"{shown(source)} has no known suffix: expected one of {READABLE}")
        with reading(source):
            return [describe(source)]
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
    files = {path: info for path, info in found.items() if info["type"] == "file" and not _hidden(path, root)}
    names = readable(sorted(files), shown(source))
    return [remote_file(str(system.unstrip_protocol(path)), files[path]) for path in names]


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in path.removeprefix(root).split("/"))
