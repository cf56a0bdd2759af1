"""Units of text -> parts on disk.

A part depends on its unit and the tokenizer alone: units are cut before the number of workers is looked at, and it does
not matter which worker takes which, or when.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import xxhash

from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer, token_dtype
from prepare.encoding.engine import Engine, Gigatoken, Plain
from prepare.encoding.pieces import PIECE_CHARACTERS, pieces
from prepare.unfinished.parts import PartWriter, Summary, part_name, report
from prepare.units import NOT_UTF8, Document, Refused, Unit

EMPTY = "empty"
REFUSED = "refused by the tokenizer"
# A piece of a long document that holds no place where a word surely ends.
CUT = "cut inside a word"
# Every character is a token of its own there, so a cut falls between two in any case.
CUT_ANYWHERE = ("char", "byte")


@dataclass(frozen=True)
class Task:
    """One unit to encode: its place in the plan, and whether it is its item's last."""

    item: int
    unit: int
    last: bool
    work: Unit
    limit: int | None

    @property
    def name(self) -> str:
        return part_name(self.item, self.unit)


@dataclass(frozen=True)
class Encoder:
    """All that a worker needs beside the unit. `folder` is where parts go; `vocabulary` holds the tokenizer's files."""

    spec: dict[str, Any]
    folder: Path
    vocabulary: Path
    seed: int
    fast: bool

    def tokenizer(self) -> Tokenizer:
        return from_spec(self.spec, self.vocabulary)


class UnitEncoder:
    """Encodes unit after unit in one process."""

    def __init__(self, encoder: Encoder) -> None:
        self._folder, self._seed = encoder.folder, encoder.seed
        self._tokenizer = encoder.tokenizer()
        self._engine: Engine = Gigatoken() if encoder.fast else Plain(self._tokenizer)
        # A tokenizer of Hugging Face's library may look across a word's end.
        self._ends_with_words = self._tokenizer.token_bytes() is not None or self._tokenizer.name == "word"

    def encode(self, task: Task) -> Summary:
        """Write the part of a unit. With a limit, only that many documents of it are taken."""
        self._engine.begin_unit()
        summary = Summary(task.item, task.unit, task.last, self._engine.name, task.work.size)
        path = self._folder / task.name
        writer = PartWriter(path, token_dtype(self._tokenizer.vocab_size), self._tokenizer.end_of_text)
        try:
            taken = 0
            for position, document in task.work.documents():
                problem = self._encode_document(document, writer)
                if problem == CUT:
                    report(summary.unusual, CUT, task.work.locate(position))
                elif problem:
                    report(summary.skipped, problem, task.work.locate(position))
                    continue
                taken += 1
                if taken == task.limit:
                    break
            self._engine.end_unit()
            return writer.close(summary)
        except BaseException:
            writer.discard()
            raise

    def _encode_document(self, document: Document, writer: PartWriter) -> str | None:
        """Write a document; returns why it was left out, or `CUT`, or None."""
        if isinstance(document, Refused):
            return document.reason
        if isinstance(document, bytes):
            if not document:
                return EMPTY
            if len(document) > PIECE_CHARACTERS:
                return self._encode_pieces([document], writer)
            try:
                writer.add(self._engine.encode(document))
            except ValueError:
                return REFUSED
            writer.end_document(len(document), xxhash.xxh3_128_digest(document, self._seed))
            return None
        return self._encode_pieces(document.blocks(), writer)

    def _encode_pieces(self, blocks: Iterable[bytes], writer: PartWriter) -> str | None:
        digest = xxhash.xxh3_128(seed=self._seed)
        size = 0

        def passing() -> Iterator[bytes]:
            nonlocal size
            for block in blocks:
                digest.update(block)
                size += len(block)
                yield block

        count, all_safe = 0, True
        try:
            for piece, safe in pieces(passing()):
                writer.add(self._engine.encode(piece.encode()))
                count += 1
                all_safe = all_safe and safe
        except ValueError as error:  # UnicodeDecodeError is one too
            writer.abandon_document()
            return NOT_UTF8 if isinstance(error, UnicodeDecodeError) else REFUSED
        if size == 0:
            return EMPTY
        writer.end_document(size, digest.digest())
        if self._tokenizer.name in CUT_ANYWHERE:
            return None
        return None if count == 1 or (all_safe and self._ends_with_words) else CUT


def encode(job: tuple[Encoder, Task]) -> Summary:
    """Encode one unit, in whatever process this is; the tokenizer is kept from one call to the next."""
    global _encoder
    encoder, task = job
    if _encoder is None or _encoder[0] != encoder:
        _encoder = (encoder, UnitEncoder(encoder))
    return _encoder[1].encode(task)


_encoder: tuple[Encoder, UnitEncoder] | None = None


def load() -> None:
    """What encoding needs of a worker, before there is work for it: a third of a second."""
    import_module("pyarrow.parquet")
    BytePairTokenizer("gpt2")
