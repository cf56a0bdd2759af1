"""Where text comes from: a corpus is one or more sources, named by the user; each becomes small units of work.

The parent only lists them, in the corpus's order; a unit reads itself in the process that encodes it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from prepare.formats import READABLE, compression_of
from prepare.sources.hub import open_hub
from prepare.sources.local import Stdin, is_glob, open_files, open_stdlib
from prepare.sources.pinned import Shakespeare
from prepare.sources.remote import open_remote
from prepare.storage.files import is_url, shown
from prepare.units import STDIN_SPOOL, Item, unit_bytes

# Pinned, so that a name always means the same text. Only the train split is read: val is chosen here for every corpus,
# so the validation split of tinystories is not used.
HUB_CORPORA = {
    "openwebtext": "hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064",
    "tinystories": "hf:roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
}
FINEWEB_EDU = "hf:HuggingFaceFW/fineweb-edu:{size}@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
# Named for their tokens; the complete corpus, called default, has 1.3 T.
FINEWEB_EDU_SIZES = ("sample-10BT", "sample-100BT", "sample-350BT", "default")
NAMED_CORPORA = (*HUB_CORPORA, "fineweb-edu[:SIZE]", "shakespeare", "stdlib")
SOURCE_KINDS = (
    f"a file ({READABLE}), a folder or a glob of those, a URL (s3://, https:// and more), {', '.join(NAMED_CORPORA)}, "
    "hf:ORG/NAME[:CONFIG][@REVISION], or - for stdin"
)


class Source(Protocol):
    def items(self, unit_bytes: int) -> list[Item]:
        """The source in pieces, in order; their units hold about so much text."""
        ...

    def files(self) -> list[Path]:
        """The local files whose hashes `record` needs."""
        ...

    def file_bytes(self) -> int | None:
        """None for a stream."""
        ...

    def stamps(self) -> dict[str, Any]:
        """By file, what changes with it and is known without reading it, such as its size and modification time."""
        ...

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """The manifest's entries for this source."""
        ...


@dataclass(frozen=True)
class Corpus:
    """All sources of one dataset, in the order given."""

    sources: list[Source]

    def items(self) -> list[Item]:
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        size = unit_bytes(self.file_bytes() or 0)
        return [item for source in self.sources for item in source.items(size)]

    def text_bytes(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        return sum(item.size for item in self._items)

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    def file_bytes(self) -> int | None:
        """Bytes of all source files; None if one of them is a stream."""
        sizes = [source.file_bytes() for source in self.sources]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def stamps(self) -> dict[str, Any]:
        return {name: stamp for source in self.sources for name, stamp in source.stamps().items()}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [entry for source in self.sources for entry in source.record(hash_of)]


def open_corpus(sources: list[str], text_field: str, folder: Path) -> Corpus:
    """Resolve what the user typed; `folder` keeps a copy of stdin. Raises UserError for what does not exist."""
    if not sources:
        raise UserError(f"no source given: expected {SOURCE_KINDS}")
    if sources.count("-") > 1:
        raise UserError("stdin (-) is given twice as a source: it can be read only once")
    return Corpus([_open_source(source, text_field, folder) for source in sources])


def default_name(source: str) -> str:
    """A dataset's name from its first source: that of a named corpus, or the stem of a path."""
    if source == "-":
        return "stdin"
    if source.startswith("hf:"):
        stem = re.split("[:@]", source[3:])[0].rpartition("/")[2].lower()
    elif is_named(source):
        stem = source
    elif is_glob(source) and not is_url(source):
        plain = [part for part in source.split("/") if not is_glob(part)]
        stem = plain[-1] if plain else ""
    elif is_url(source):
        plain = [part for part in shown(source).partition("://")[2].split("/") if part and not is_glob(part)]
        stem = _without_suffixes(plain[-1]) if plain else ""
    else:
        path = Path(source).resolve()
        stem = path.name if path.is_dir() else _without_suffixes(path.name)
    return re.sub("[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "corpus"


def is_named(source: str) -> bool:
    return source in ("shakespeare", "stdlib", *HUB_CORPORA) or source.partition(":")[0] == "fineweb-edu"


def hub_source(source: str) -> str | None:
    """The hf: name of a source that comes from the Hub; None for any other."""
    if source.startswith("hf:"):
        return source
    name, _, size = source.partition(":")
    if name != "fineweb-edu":
        return HUB_CORPORA.get(source)
    if size and size not in FINEWEB_EDU_SIZES:
        raise UserError(f"fineweb-edu has no size {size!r}: expected {', '.join(FINEWEB_EDU_SIZES)}")
    return FINEWEB_EDU.format(size=size or FINEWEB_EDU_SIZES[0])


def _without_suffixes(name: str) -> str:
    return name.removesuffix(compression_of(name)).rpartition(".")[0] or name


def _open_source(source: str, text_field: str, folder: Path) -> Source:
    hub = hub_source(source)
    if hub is not None:
        return open_hub(hub, text_field)
    if source == "stdlib":
        return open_stdlib(text_field)
    if source == "shakespeare":
        return Shakespeare()
    if source == "-":
        return Stdin(text_field, folder / STDIN_SPOOL)
    if is_url(source) and not source.startswith("file://"):
        return open_remote(source, text_field)
    found = open_files(source.removeprefix("file://"), text_field)
    if found is None:
        raise UserError(f"no source {source!r}: not a file, folder or named corpus; expected {SOURCE_KINDS}")
    return found
