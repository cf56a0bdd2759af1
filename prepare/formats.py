"""What a file's name tells: the format of its text and how it is compressed.

Every list of suffixes is derived from here.
"""

from enum import Enum


class Format(Enum):
    """How documents lie in a file; the value holds its suffixes."""

    TEXT = (".txt", ".md", ".py")  # one document, or several with a separator
    JSON_LINES = (".jsonl", ".ndjson")
    JSON = (".json",)
    CSV = (".csv",)
    TSV = (".tsv",)
    PARQUET = (".parquet",)
    ARROW = (".arrow",)
    WARC = (".warc", ".wet")


COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
SUFFIXES = {suffix: each for each in Format for suffix in each.value}
# These compress their own pages, and are read by seeking: .parquet.gz is not a format.
SEEKING = (Format.PARQUET, Format.ARROW)
READABLE = f"{' '.join(SUFFIXES)}; all but Parquet and Arrow also compressed as {' '.join(COMPRESSIONS)}"


def compression_of(name: str) -> str:
    """The suffix of the compression, or an empty string."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def format_of(name: str) -> Format | None:
    """None for a file that cannot be read."""
    compression = compression_of(name)
    inner = name.lower().removesuffix(compression)
    found = next((SUFFIXES[suffix] for suffix in SUFFIXES if inner.endswith(suffix)), None)
    return None if compression and found in SEEKING else found
