"""What a source consists of: each readable file once in a command; everything else that lies there
is counted by reason, with an example.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.log import printable
from prepare.formats import READABLE, SEEKING, compression_of, format_of
from prepare.storage.compressed import text_blocks
from prepare.storage.files import is_web, name_of, shown

HIDDEN_FILE, EMPTY, REPEATED = "hidden file", "empty file", "already listed"
NOT_A_FILE, FOLDER_OF_A_GLOB = "not a regular file", "folder, where the glob asks for files"
# Reasons in the log and the manifest; a folder of dumps may have as many suffixes as files.
MOST_REASONS = 40
OTHER_SUFFIXES = "other unknown suffixes"
# Longer ones are no suffixes, but names with a period in them.
LONGEST_SUFFIX = 12
# Nothing compresses to 9 (zstd) to 32 (xz) bytes, and gzip may add the file's name.
MOST_BYTES_OF_NOTHING = 512


class Listing:
    """Collects the files of one source; `seen` holds the identities of the files taken before, by
    whichever source of the command.
    """

    def __init__(self, seen: set[str]) -> None:
        self.passed_over: dict[str, dict[str, Any]] = {}
        self.has_splits = False
        self._seen = seen

    def takes(self, path: str, size: int, identity: str) -> bool:
        """Whether the file is read; if not, it is counted.

        `identity` is the same for all names of one file.
        """
        if format_of(name_of(path)) is None:
            self.pass_over(_suffix(path), path)
        elif _is_empty(path, size):
            self.pass_over(EMPTY, path)
        else:
            return self.is_new(identity, path)
        return False

    def is_new(self, identity: str, path: str) -> bool:
        """Whether this is the first time; any other is counted."""
        if identity in self._seen:
            self.pass_over(REPEATED, path)
            return False
        self._seen.add(identity)
        return True

    def pass_over(self, reason: str, path: str) -> None:
        if reason not in self.passed_over and len(self.passed_over) >= MOST_REASONS and "suffix" in reason:
            reason = OTHER_SUFFIXES
        self.passed_over.setdefault(reason, {"count": 0, "example": shown(path)})["count"] += 1

    def check(self, what: str, files: Sequence[Any]) -> None:
        """Raises UserError if there is nothing in a source, and nothing of it was taken before."""
        if files or REPEATED in self.passed_over:
            return
        found = ", ".join(
            f"{entry['count']:,} {reason} ({entry['example']})" for reason, entry in self.passed_over.items()
        )
        raise UserError(
            f"{what} has no readable files, found {f'only {found}' if found else 'no files'}: expected {READABLE}"
        )


def _suffix(path: str) -> str:
    """The reason by which a file of no known format is counted."""
    name = Path(name_of(path)).name
    # Of notes.pdf.gz both suffixes tell why, and so of .parquet.gz, as .gz alone is a known one.
    compression = compression_of(name)
    inner = Path(name.removesuffix(compression)).suffix
    suffix = printable(inner + compression if len(inner) <= LONGEST_SUFFIX else compression)
    return f"unknown suffix {suffix}" if suffix else "no suffix"


def _is_empty(path: str, size: int) -> bool:
    """Whether no text can be in a file, known before it is read; an empty Parquet or Arrow file is damaged,
    and reported as that.
    """
    name = name_of(path)
    if format_of(name) in SEEKING or size > MOST_BYTES_OF_NOTHING:
        return False
    if size == 0 and not is_web(path):
        return True
    # A web server need not tell a size, and the archive of nothing has one.
    try:
        return (size == 0 or compression_of(name) != "") and next(text_blocks(path), None) is None
    except Exception:  # a damaged file is not empty: whoever reads it reports the damage
        return False
