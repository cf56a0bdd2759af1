"""Tiny Shakespeare: one text behind a URL, pinned by its commit and its content, kept in Hugging
Face's cache.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import write_atomic
from prepare.documents.lines import TextFile
from prepare.sources.items import Source
from prepare.storage.assets import assets
from prepare.storage.files import blocks
from prepare.units import Item

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


@dataclass(frozen=True)
class Shakespeare(Source):
    """Downloaded when it is first needed."""

    def items(self, unit_bytes: int) -> list[Item]:
        return [TextFile(str(self.path), SHAKESPEARE_BYTES)]

    def file_bytes(self) -> int:
        return SHAKESPEARE_BYTES

    def stamps(self) -> dict[str, Any]:
        return {"shakespeare": SHAKESPEARE_SHA256}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        about = {"path": "shakespeare", "url": SHAKESPEARE_URL}
        return [{**about, "bytes": SHAKESPEARE_BYTES, "sha256": SHAKESPEARE_SHA256}]

    @cached_property
    def path(self) -> Path:
        # Hashed on every use (a few ms), so a damaged copy is replaced and not trained on.
        path = assets() / "shakespeare" / "input.txt"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
            return path
        content = b"".join(blocks(SHAKESPEARE_URL))
        if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
            raise UserError(f"{SHAKESPEARE_URL} changed: its SHA-256 is {found}, expected {SHAKESPEARE_SHA256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        return path
