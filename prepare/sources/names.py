"""What a source may be called: the named corpora, and which kind of source a name stands for."""

import re
from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import UserError
from prepare.formats import READABLE, compression_of, format_of
from prepare.storage.files import is_url, shown

# Pinned, so that a name always means the same text. Only the train split is read: val is chosen
# here for every corpus, so the validation split of tinystories is not used.
HUB_CORPORA = {
    "openwebtext": "hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064",
    "tinystories": "hf:roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
}
FINEWEB_EDU = "hf:HuggingFaceFW/fineweb-edu:{size}@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
# Named for their tokens; the complete corpus, called default, has 1.3 T.
FINEWEB_EDU_SIZES = ("sample-10BT", "sample-100BT", "sample-350BT", "default")
NAMED_CORPORA = (*HUB_CORPORA, "fineweb-edu", "shakespeare", "stdlib")
# For errors and for the help of `pipeline prepare`.
SOURCE_KINDS = (
    f"a corpus ({', '.join(NAMED_CORPORA)}), hf:ORG/NAME[:CONFIG][@REVISION], "
    f"a file ({READABLE}), a folder or a glob of those, a URL (s3://, https:// and more), or - for stdin"
)


def is_named(source: str) -> bool:
    return source in NAMED_CORPORA or source.startswith("fineweb-edu:")


def did_you_mean(source: str) -> str:
    """The corpus whose name is close to `source`, for an error; an empty string if none is."""
    close = get_close_matches(source.lower(), NAMED_CORPORA, n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


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


def without_file_protocol(source: str) -> str:
    """The path in a file:// URL; any other source as it is."""
    return source.removeprefix("file://").removeprefix("local://")


def is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def default_name(source: str) -> str:
    """A dataset's name from its first source: that of a named corpus, or the stem of a path."""
    if source.startswith("hf:"):  # without the config and the revision
        stem = re.split("[:@]", source[3:])[0].rpartition("/")[2].lower()
    elif source == "-" or is_named(source):
        stem = "stdin" if source == "-" else source
    elif is_url(source) or (is_glob(source) and not Path(source).exists()):
        # The last part of the path that is not a pattern; without a URL's protocol and query.
        parts = [part for part in shown(source).rpartition("://")[2].split("/") if part and not is_glob(part)]
        stem = _without_suffixes(parts[-1]) if parts else ""
    else:
        stem = _without_suffixes(Path(source).resolve().name)
    return re.sub("[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "corpus"


def _without_suffixes(name: str) -> str:
    """Only what tells the format is removed, so that a folder `v1.5` keeps its name."""
    return name.removesuffix(compression_of(name)).rpartition(".")[0] if format_of(name) else name
