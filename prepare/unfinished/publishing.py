"""The last step: the staged dataset takes the place of an earlier one, and of nothing else.

Only what `prepare` wrote is ever removed or replaced. A manifest tells what that is, even a damaged
one; and a hidden record next to it, which also holds what is known of the source files.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.dataset import foreign
from pipeline.dataset.shards import MANIFEST_NAME, Manifest
from pipeline.errors import UserError
from pipeline.files import sync, write_atomic
from pipeline.vocabulary.specs import vocabulary_file
from prepare.storage.files import StoredFile
from prepare.unfinished.journal import Journal, dump

RECORD_NAME = ".prepared.json"
# The names of our files, as a manifest and our record hold them.
_WRITTEN = re.compile(
    rb'"((?:train|val)_\d{5,}\.bin|vocabulary\.(?:json|tiktoken)|tokenizer\.json|decontaminated\.jsonl)"'
)


def is_publishing(journal: Journal) -> bool:
    return (journal.staged / MANIFEST_NAME).exists()


def publish(journal: Journal, manifest: Manifest, hashes: dict[StoredFile, str]) -> None:
    known = [[file.path, file.size, file.etag, digest] for file, digest in hashes.items()]
    names = [path.name for path in _staged(journal) if path.name != RECORD_NAME]  # a kill may have left it
    record = {"files": names, "hashes": known}
    write_atomic(journal.staged / RECORD_NAME, dump(record))
    manifest.save(journal.staged)
    finish_publishing(journal)


def finish_publishing(journal: Journal) -> None:
    """Move the staged dataset over the one it replaces; the caller holds the exclusive lock.

    The old manifest goes first and the new one comes last, so that a manifest never stands next to
    other shards. The old one is kept until then, because it tells which files it listed.
    """
    if not is_publishing(journal):
        return
    sync(journal.staged)
    staged, dataset = _staged(journal), journal.dataset
    ours = check_free(journal, [path.name for path in staged])
    manifest = dataset / MANIFEST_NAME
    if manifest.exists():
        # One that lists nothing of ours is another program's, and stays.
        manifest.rename(journal.folder / "replaced.json" if ours else dataset / f"{MANIFEST_NAME}.replaced")
    for name in ours - {path.name for path in staged}:
        (dataset / name).unlink(missing_ok=True)
    for path in staged:
        path.rename(dataset / path.name)
    sync(dataset)
    (journal.staged / MANIFEST_NAME).rename(manifest)
    sync(dataset)
    journal.clear()


def prepared_hashes(dataset: Path) -> dict[StoredFile, str]:
    """The hashes of a finished dataset's source files; empty if they are not known."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads((dataset / RECORD_NAME).read_bytes())
        return {StoredFile(*stamp): digest for *stamp, digest in record["hashes"]}
    return {}


def check_free(journal: Journal, names: Iterable[str]) -> set[str]:
    """The files in the dataset's folder that `prepare` wrote.

    Raises UserError if one of `names`, or of those, is another program's.
    """
    ours = _written(journal)
    for name in {*names, *ours} - {RECORD_NAME}:
        path = journal.dataset / name
        if path.is_file() and (name not in ours or _has_header(path)):
            raise UserError(
                f"{path} is in the way and was not written by `pipeline prepare`: move it elsewhere, or choose another --name"
            )
    return ours


def _staged(journal: Journal) -> list[Path]:
    passing = (MANIFEST_NAME, ".partial")
    return sorted(path for path in journal.staged.iterdir() if not path.name.endswith(passing))


def _written(journal: Journal) -> set[str]:
    found: set[str | None] = set()
    for path in (journal.dataset / MANIFEST_NAME, journal.folder / "replaced.json", journal.dataset / RECORD_NAME):
        with suppress(OSError):
            content = path.read_bytes()
            found |= {name.decode() for name in _WRITTEN.findall(content)}
            with suppress(ValueError, TypeError, LookupError):
                found.add(vocabulary_file(str(json.loads(content)["tokenizer"]["name"])))
    return {name for name in found if name}


def _has_header(path: Path) -> bool:
    """Whether a file shows another program's format."""
    try:
        return path.suffix == ".bin" and foreign.sniff(path) == foreign.LLM_C
    except UserError:
        return True
