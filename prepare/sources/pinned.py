"""Tiny Shakespeare: one text behind a URL, pinned by its commit and its content."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from prepare.documents.lines import TextFile
from prepare.sources.download import download, sha256_of
from prepare.sources.offline import offline_folder
from prepare.storage.files import Remote, describe, reading
from prepare.units import Item

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


@dataclass(frozen=True)
class Shakespeare:
    """Brought into `spool` when it is first read, unless a fetched copy is at hand."""

    spool: Path

    def items(self, unit_bytes: int) -> list[Item]:
        return [TextFile(str(self._path), SHAKESPEARE_BYTES)]

    def files(self) -> list[Path]:
        return []

    def file_bytes(self) -> int:
        return SHAKESPEARE_BYTES

    def stamps(self) -> dict[str, Any]:
        return {"shakespeare": SHAKESPEARE_SHA256}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        about = {"path": "shakespeare", "url": SHAKESPEARE_URL}
        return [{**about, "bytes": SHAKESPEARE_BYTES, "sha256": SHAKESPEARE_SHA256}]

    @cached_property
    def _path(self) -> Path:
        folder = offline_folder()
        path = (folder or self.spool) / "shakespeare" / "input.txt"
        if path.is_file():
            if (found := sha256_of(path)) != SHAKESPEARE_SHA256:
                raise UserError(f"{path} is not tiny Shakespeare: SHA-256 {found}, wanted {SHAKESPEARE_SHA256}")
            return path
        path = self.spool / "shakespeare" / "input.txt"
        fetch_shakespeare(path)
        return path


def fetch_shakespeare(path: Path) -> None:
    with reading(SHAKESPEARE_URL):
        remote: Remote = describe(SHAKESPEARE_URL)
    download(remote, path, SHAKESPEARE_SHA256)
