"""Units of text -> parts on disk.

A part depends on its unit and the tokenizer alone: the corpus is divided into units without regard
to the number of workers, and it does not matter which worker encodes which unit, or when.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import TokenIds, token_dtype
from prepare.encoding.contamination import Contaminated, Contamination
from prepare.encoding.engine import PLAIN, Checked, Engine, Plain
from prepare.encoding.pieces import PIECE_CHARACTERS, blocks_of, pieces
from prepare.encoding.screen import Screen
from prepare.unfinished.parts import PartWriter, Summary, part_name, report
from prepare.units import NOT_UTF8, Document, Refused, Unit, Unreadable, grouped
from prepare.workers import Workers

# Why a document is left out, next to the reasons of `prepare.units`; the manifest counts documents
# by these words.
EMPTY = "empty"
REFUSED = "refused by the tokenizer"
# Every character or byte is a token there, so a piece that ends inside a word still gives the ids
# of the document.
ENDS_ANYWHERE = ("char", "byte")
# Text of a shared document per call of a worker: handing it over costs 1 ms, encoding it 20 or more.
GROUP_BYTES = 1 << 20


# What is unusual about a document that is kept.
SPLIT_INSIDE_WORD = "cut inside a word"


@dataclass(frozen=True)
class UnitJob:
    """One unit to encode, the key and number under which its part is kept, and whether it is the last
    of its item.

    With a limit, only its first `limit` documents are kept; `truncated` if it had more in the part
    that was encoded before.
    """

    item: str
    unit: int
    last: bool
    work: Unit
    limit: int | None = None
    truncated: bool = False


@dataclass(frozen=True)
class EncodingOptions:
    """What all units have in common. `parts` and `vocabulary` are folders, `evaluation` the file of
    n-grams to look for and the names of their sources.
    """

    tokenizer: dict[str, Any]
    parts: Path
    vocabulary: Path
    seed: int
    engine: str = PLAIN
    near_dedup: bool = False
    evaluation: tuple[Path, list[str]] | None = None


class UnitEncoder:
    """Encodes unit after unit in one process; with `workers`, long documents by all of these."""

    def __init__(self, options: EncodingOptions, workers: Workers | None = None) -> None:
        self._options, self._workers = options, workers
        self._folder, self._seed = options.parts, options.seed
        self._tokenizer = from_spec(options.tokenizer, options.vocabulary)
        self._engine: Engine = Plain(self._tokenizer) if options.engine == PLAIN else Checked(options.engine)
        contamination = Contamination(*options.evaluation) if options.evaluation else None
        self._screen = Screen(options.near_dedup, contamination) if options.near_dedup or contamination else None
        # Hugging Face's library, which has no token_bytes, may look beyond the end of a word.
        end = self._tokenizer.decode_bytes([self._tokenizer.end_of_text])
        self._end = end or b"\xff"  # which is in no UTF-8 text
        self._has_end = f"{end.decode(errors='replace')} as ordinary text; --document-separator splits at it"
        self._ends_with_words = self._tokenizer.token_bytes() is not None or self._tokenizer.name == "word"

    def encode(self, job: UnitJob) -> Summary:
        """Write the part of a unit."""
        summary = Summary(item=job.item, unit=job.unit, last=job.last, engine=self._engine.name, size=job.work.size)
        path = self._folder / part_name(job.item, job.unit, first=job.limit if job.truncated else None)
        writer = PartWriter(path, token_dtype(self._tokenizer.vocab_size), self._tokenizer.end_of_text)
        try:
            # A document is skipped with a reason, or kept and perhaps reported; only kept ones
            # count towards the limit, so --limit-docs 100 gives 100 documents.
            kept = 0
            for position, document in job.work.documents():
                writer.begin_document(position)
                try:
                    result = self._write(document, writer)
                except UserError:
                    # A character that `char` has not learned, as it is beyond the limit: the last
                    # unit is encoded again up to there, and what follows does not count.
                    if job.limit is None or job.truncated:
                        raise
                    writer.abandon_document()
                    break
                summary.rows += 1
                if isinstance(result, Refused):
                    where = job.work.locate(position)
                    example = f"{where} ({result.detail})" if result.broken and result.detail else where
                    report(summary.skipped, result.reason, example, first=[where] if result.broken else ())
                    if isinstance(result, Contaminated):
                        writer.list_left_out(document=where, evaluation_text=result.evaluation_text, words=result.words)
                    continue
                for unusual in result:
                    report(summary.unusual, unusual, job.work.locate(position))
                kept += 1
                if kept == job.limit:
                    break
            self._engine.end_unit()  # may raise EngineFault: before the part has its name
            return writer.close(summary)
        except BaseException:
            writer.discard()
            raise

    def _write(self, document: Document, writer: PartWriter) -> Refused | Sequence[str]:
        """Why the document is skipped, or what is unusual about it: for nearly every one nothing."""
        if isinstance(document, Refused):
            return document
        if not isinstance(document, bytes) or len(document) > PIECE_CHARACTERS:
            return self._write_pieces(blocks_of(document), writer)
        # Nearly every document comes this way, without the incremental decoder and hash that long
        # ones need.
        if not document:
            return Refused(EMPTY)
        if self._screen and (found := self._screen.begin(document.decode())):
            return found
        try:
            writer.add(self._engine.encode(document))
        except ValueError:
            return Refused(REFUSED)
        signature = self._screen.signature() if self._screen else b""
        writer.end_document(len(document), xxhash.xxh3_128_digest(document, self._seed), signature)
        return [self._has_end] if self._end in document else ()

    def _write_pieces(self, blocks: Iterable[bytes], writer: PartWriter) -> Refused | Sequence[str]:
        digest = xxhash.xxh3_128(seed=self._seed)
        size, before = 0, b""
        unusual: list[str] = []

        def hashed() -> Iterator[bytes]:
            nonlocal size, before
            for block in blocks:
                digest.update(block)
                size += len(block)
                before += block  # with the end of the last block, as the marker may lie across both
                if not unusual and self._end in before:
                    unusual.append(self._has_end)
                before = before[-len(self._end) :]
                yield block

        count, all_safe = 0, True
        fault: Refused | None = None

        def texts() -> Iterator[bytes]:
            nonlocal count, all_safe, fault
            try:
                for piece, safe in pieces(hashed()):
                    if self._screen and (found := self._screen.go_on(piece) if count else self._screen.begin(piece)):
                        fault = found
                        return
                    yield piece.encode()
                    count, all_safe = count + 1, all_safe and safe
            # Workers may still be encoding pieces before it, and the first fault of a document counts.
            except UnicodeDecodeError:
                fault = Refused(NOT_UTF8, broken=True)
            except Unreadable as error:
                fault = error.refused

        try:
            for ids in self._encode_in_order(texts()):
                writer.add(ids)
        except ValueError:
            fault = Refused(REFUSED)
        if fault:
            writer.abandon_document()
            return fault
        if size == 0:
            return Refused(EMPTY)
        writer.end_document(size, digest.digest(), self._screen.signature() if self._screen else b"")
        same_ids = count == 1 or self._tokenizer.name in ENDS_ANYWHERE or (all_safe and self._ends_with_words)
        return unusual if same_ids else [*unusual, SPLIT_INSIDE_WORD]

    def _encode_in_order(self, texts: Iterator[bytes]) -> Iterator[TokenIds]:
        if self._workers is None:
            return map(self._engine.encode, texts)
        groups = grouped(texts, len, GROUP_BYTES)
        return self._workers.map(encode_pieces, ((self._options, group) for group, _ in groups), in_order=True)

    def encode_pieces(self, texts: Sequence[bytes]) -> TokenIds:
        """The ids of neighbouring pieces. Raises ValueError and EngineFault."""
        ids = [self._engine.encode(text) for text in texts]
        self._engine.end_unit()
        return np.concatenate(ids, dtype=token_dtype(self._tokenizer.vocab_size), casting="unsafe")


def encode(arguments: tuple[EncodingOptions, UnitJob]) -> Summary:
    """Encode one unit in this process."""
    options, job = arguments
    return _encoder_of(options).encode(job)


def encode_pieces(arguments: tuple[EncodingOptions, Sequence[bytes]]) -> TokenIds:
    """Encode a group of pieces of a document whose part another process writes."""
    options, texts = arguments
    return _encoder_of(options).encode_pieces(texts)


def _encoder_of(options: EncodingOptions) -> UnitEncoder:
    """It is kept, with the tokenizer, while the options are the same."""
    global _encoder
    if _encoder is None or _encoder[0] != options:
        _encoder = (options, UnitEncoder(options))
    return _encoder[1]


_encoder: tuple[EncodingOptions, UnitEncoder] | None = None


def load() -> None:
    """Import what encoding needs in a worker before there is work for it: a third of a second."""
    import_module("pyarrow.parquet")
    BytePairTokenizer("gpt2").encode("")
