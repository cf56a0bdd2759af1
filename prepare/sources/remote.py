"""Sources behind URLs: files, folders and globs of any fsspec file system, and single files of the web.

Nothing is hashed, because reading a bucket twice is paid for twice: what is recorded is what the server says of a file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.log import logger
from prepare.sources.local import is_glob, readable
from prepare.sources.offline import load, offline_folder, url_record
from prepare.sources.plan import READABLE, SourceFile, kind, plan
from prepare.storage.files import Remote, describe, filesystem, is_web, name_of, reading, remote_file, shown
from prepare.units import Item


@dataclass(frozen=True)
class RemoteFiles:
    source: str
    remotes: list[Remote]
    text_field: str
    spool: Path

    def items(self, unit_bytes: int) -> list[Item]:
        files = (SourceFile(remote.url, remote.size, remote.ranges) for remote in self.remotes)
        return list(plan(files, self.text_field, unit_bytes, str(self.spool)))

    def files(self) -> list[Path]:
        return []

    def file_bytes(self) -> int:
        return sum(remote.size for remote in self.remotes)

    def stamps(self) -> dict[str, Any]:
        return {shown(remote.url): [remote.size, remote.etag] for remote in self.remotes}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """Raises UserError where the files are others than those that were planned."""
        if list_remote(self.source) != self.remotes:
            raise UserError(f"{shown(self.source)} changed while it was read: prepare it again")
        return [{"path": shown(remote.url), "bytes": remote.size, "etag": remote.etag} for remote in self.remotes]


@dataclass(frozen=True)
class FetchedFiles:
    """Copies of files behind URLs, recorded as the files themselves would be."""

    told: dict[Path, dict[str, Any]]
    text_field: str
    spool: Path

    def items(self, unit_bytes: int) -> list[Item]:
        files = (SourceFile(str(path), told["bytes"]) for path, told in self.told.items())
        return list(plan(files, self.text_field, unit_bytes, str(self.spool)))

    def files(self) -> list[Path]:
        return []

    def file_bytes(self) -> int:
        return sum(told["bytes"] for told in self.told.values())

    def stamps(self) -> dict[str, Any]:
        return {told["url"]: [told["bytes"], told["etag"]] for told in self.told.values()}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [{"path": told["url"], "bytes": told["bytes"], "etag": told["etag"]} for told in self.told.values()]


def open_remote(source: str, text_field: str, spool: Path) -> RemoteFiles | FetchedFiles:
    folder = offline_folder()
    record = load(url_record(folder, source)) if folder else None
    if folder and record:
        record.check(folder)
        logger.info("%s: using what was fetched into %s", shown(source), folder)
        return FetchedFiles({folder / place: told for place, told in record.files.items()}, text_field, spool)
    return RemoteFiles(source, list_remote(source), text_field, spool)


def list_remote(source: str) -> list[Remote]:
    """The readable files that a URL names, by name: itself, those below it, or those a glob finds."""
    if is_web(source):
        if not kind(name_of(source)):
            raise UserError(f"{shown(source)} is no file of a known kind: wanted {READABLE}")
        with reading(source):
            return [describe(source)]
    system, name = filesystem(source)
    try:
        # What was listed before may be old.
        system.invalidate_cache()
        if is_glob(name):
            found = system.glob(name, detail=True)
        elif system.isfile(name):
            found = {name: system.info(name)}
        else:
            found = system.find(name, detail=True)
    except Exception as error:  # as in storage: every file system's own kinds
        raise UserError(
            f"cannot list {shown(source)}: {type(error).__name__}: {one_line(error)}; "
            "check the address, the credentials and the network"
        ) from None
    root = re.split(r"[*?[]", name)[0].rpartition("/")[0] if is_glob(name) else name
    files = {path: info for path, info in found.items() if info["type"] == "file" and not _hidden(path, root)}
    names = readable(sorted(files), f"{shown(source)}")
    return [remote_file(str(system.unstrip_protocol(path)), files[path]) for path in names]


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in path.removeprefix(root).split("/"))
