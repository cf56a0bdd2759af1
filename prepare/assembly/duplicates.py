"""Exact duplicates in a corpus of any size, in bounded memory.

Documents are equal if the 128 bits of their hashes are. The hashes are distributed over files by
their first bits, so equal ones meet in the same file, and each file is small enough to be sorted in
memory.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.vocabulary.tokenizer import token_dtype
from prepare.assembly.splits import numbered_parts
from prepare.documents.lines import Lines
from prepare.encoding.pieces import blocks_of
from prepare.storage.files import blocks
from prepare.unfinished.journal import Plan
from prepare.unfinished.parts import Part
from prepare.units import POSITION_BITS, Batch, Document, Item, Refused, Unit

# Records per file: 48 MB, and about 150 MB while they are sorted.
DOCUMENTS_PER_FILE = 2_000_000
# Beyond 256 * 2 M = 512 M documents the files get larger instead: all are open at a time, and 1,024
# is the usual limit.
MAX_FILES = 256
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])


def mark_duplicates(hashes: Iterable[npt.NDArray[np.uint64]], documents: int, folder: Path) -> Path:
    """A file with one byte per document of the corpus: 1 if an earlier document has the same text.

    `hashes` yields the two halves of the documents' XXH3-128 in corpus order, as (n, 2) arrays.
    """
    target = folder / "duplicates"
    marks = np.memmap(target, dtype=np.bool_, mode="w+", shape=(max(documents, 1),))  # mmap(2) refuses 0 bytes
    bits = min((documents // DOCUMENTS_PER_FILE).bit_length(), MAX_FILES.bit_length() - 1)
    files = [folder / f"hashes_{number:03d}.partial" for number in range(1 << bits)]
    try:
        _distribute(hashes, files, bits)
        for path in files:
            _mark(np.fromfile(path, dtype=_RECORD), marks)
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    marks.flush()
    return target


def _distribute(hashes: Iterable[npt.NDArray[np.uint64]], paths: list[Path], bits: int) -> None:
    """Append a record for each document to the file that the first `bits` of its hash number."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        document = 0
        for halves in hashes:
            records = np.empty(len(halves), _RECORD)
            records["high"], records["low"] = halves[:, 0], halves[:, 1]
            records["document"] = np.arange(document, document + len(halves))
            document += len(halves)
            # A shift by 64 is undefined in C, so a single file is a special case.
            number = records["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(halves), np.uint64)
            order = np.argsort(number, kind="stable")
            borders = np.searchsorted(number[order], np.arange(1, len(files)))
            for file, chunk in zip(files, np.split(records[order], borders), strict=True):
                file.write(chunk.tobytes())


def _mark(records: npt.NDArray[Any], marks: npt.NDArray[np.bool_]) -> None:
    # Sorted by hash, then by document: of neighbours with the same hash all but the first are
    # duplicates.
    order = np.lexsort((records["document"], records["low"], records["high"]))
    records = records[order]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    marks[records["document"][1:][same]] = True


def locate_duplicate(number: int, parts: list[Path], items: Iterable[tuple[str, Item]], plan: Plan) -> str:
    """Where document `number` of the corpus is, and which earlier document has its text.

    `items` are those of the corpus by the keys of their parts.
    """
    dtype = token_dtype(plan.tokenizer["vocab_size"])
    part, documents = next(each for each in numbered_parts(parts, dtype) if number < each[1].number + each[1].stop)
    digest = part.hashes[number - documents.number]

    def copies(part: Part) -> npt.NDArray[np.int64]:
        return np.flatnonzero((part.hashes == digest).all(axis=1))

    def locate(part: Part, copy: int) -> str:
        # Parts hold no positions: their unit is read again, up to the copy of the text that is wanted.
        item = next(item for key, item in items if key == part.summary.item)
        unit = next(islice(item.units(), part.summary.unit, None))
        found = (position for position, document in unit.documents() if _digest(document, plan) == digest.tobytes())
        position = next(islice(found, copy, None), None)
        return f"document {number} of the corpus" if position is None else _locate(unit, position)

    first = next(part for part, _ in numbered_parts(parts, dtype) if copies(part).size)
    copy = int(np.searchsorted(copies(part), number - documents.number))
    return f"{locate(part, copy)}, the same as {locate(first, 0)}"


def _locate(unit: Unit | Item, position: int) -> str:
    """With its line, where lines are documents: units know bytes, editors know lines."""
    if isinstance(unit, Batch):
        return _locate(unit.items[position >> POSITION_BITS], position & ((1 << POSITION_BITS) - 1))
    where = unit.locate(position)
    if isinstance(unit, Lines):
        where += f" (line {1 + sum(block.count(10) for block in blocks(unit.path, 0, position))})"
    return where


def _digest(document: Document, plan: Plan) -> bytes:
    """As the encoder computes it; of a document that it skips, one that no other has."""
    digest = xxhash.xxh3_128(seed=plan.options["seed"])
    for block in blocks_of(b"" if isinstance(document, Refused) else document):
        digest.update(block)
    return digest.digest()
