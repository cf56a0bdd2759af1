"""Where text comes from: a corpus is some sources, named by the user; each becomes small units of work.

The parent only plans: planning order is the corpus's order, and units read themselves wherever they are encoded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from prepare.hub import open_hub
from prepare.local import SUFFIXES, Stdin, is_glob, open_files, open_stdlib
from prepare.readers import STDIN_SPOOL, Item, unit_bytes

OPENWEBTEXT = "hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064"
SOURCE_KINDS = (
    f"a file ({' '.join(SUFFIXES)}), a folder or a glob of those, stdlib, openwebtext, "
    "hf:ORG/NAME[:CONFIG][@REVISION], or - for stdin"
)


class Source(Protocol):
    def items(self, unit_bytes: int) -> list[Item]:
        """The source in pieces, in its order; a unit of them holds about so much text."""
        ...

    def files(self) -> list[Path]:
        """The local files whose hashes `record` asks for."""
        ...

    def file_bytes(self) -> int | None: ...

    def stamps(self) -> dict[str, Any]:
        """By file, what changes when it does and is known without reading it, such as its size and its time."""
        ...

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """What the manifest says of this source."""
        ...


@dataclass(frozen=True)
class Corpus:
    """All sources of one dataset, in the order given."""

    sources: list[Source]

    def items(self) -> list[Item]:
        size = unit_bytes(self.file_bytes() or 0)
        return [item for source in self.sources for item in source.items(size)]

    def text_bytes(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        return sum(item.size for item in self.items())

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    def file_bytes(self) -> int | None:
        """Bytes of all source files; None where one of them is a stream."""
        sizes = [source.file_bytes() for source in self.sources]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def stamps(self) -> dict[str, Any]:
        return {name: stamp for source in self.sources for name, stamp in source.stamps().items()}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [entry for source in self.sources for entry in source.record(hash_of)]


def open_corpus(sources: list[str], text_field: str, folder: Path) -> Corpus:
    """Resolve what the user typed; `folder` is where stdin would be spooled. Raises UserError for what is not there."""
    if not sources:
        raise UserError(f"no source given: wanted {SOURCE_KINDS}")
    if sources.count("-") > 1:
        raise UserError("stdin (-) is named twice as a source: it can be read only once")
    return Corpus([_open_source(source, text_field, folder) for source in sources])


def default_name(source: str) -> str:
    """A dataset's name from its first source: a named corpus's own, else the stem of what was named."""
    if source in ("stdlib", "openwebtext"):
        return source
    if source == "-":
        return "stdin"
    if source.startswith("hf:"):
        stem = re.split("[:@]", source[3:])[0].rpartition("/")[2].lower()
    elif is_glob(source):
        plain = [part for part in source.split("/") if not is_glob(part)]
        stem = plain[-1] if plain else ""
    else:
        path = Path(source).resolve()
        stem = path.name if path.is_dir() else path.stem
    return re.sub("[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "corpus"


def _open_source(source: str, text_field: str, folder: Path) -> Source:
    if source == "stdlib":
        return open_stdlib(text_field)
    if source == "-":
        return Stdin(text_field, folder / STDIN_SPOOL)
    if source == "openwebtext" or source.startswith("hf:"):
        return open_hub(OPENWEBTEXT if source == "openwebtext" else source, text_field)
    found = open_files(source, text_field)
    if found is None:
        raise UserError(f"no source {source!r}: it is no file, folder or named corpus; wanted {SOURCE_KINDS}")
    return found
