"""Units -> parts: what is in a part, what is left out and why, and workers that fail."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from prepare.encoding import encode as module
from prepare.encoding.encode import EncodingOptions, UnitEncoder, UnitJob, encode
from prepare.unfinished.parts import Part, PartWriter, Summary
from prepare.units import NULL, Document, OneUnit, Refused, Texts
from prepare.workers import Workers


@dataclass(frozen=True)
class Blocks:
    """A long document, given block by block."""

    content: tuple[bytes, ...]

    def blocks(self) -> Iterator[bytes]:
        yield from self.content


def encoded(
    tmp_path: Path, documents: list[Document], tokenizer: Tokenizer | None = None, limit: int | None = None
) -> tuple[Summary, list[list[int]], Part]:
    """A part's summary, its documents' ids without end-of-text, and the part."""
    tokenizer = tokenizer or ByteTokenizer()
    options = EncodingOptions(tokenizer=tokenizer.spec(), parts=tmp_path, vocabulary=tmp_path, seed=5)
    work = Texts(tuple(documents), 1, "corpus", 10)
    summary = UnitEncoder(options).encode(UnitJob(item="key", unit=7, last=True, work=work, limit=limit))
    (path,) = tmp_path.glob("*.part")
    assert path.name == "key_000007.part"
    part = Part(path, np.dtype("<u2"))
    assert part.summary == summary
    ids = np.split(part.tokens, np.cumsum(part.lengths)[:-1]) if len(part.lengths) else []
    assert all(each[-1] == tokenizer.end_of_text for each in ids)
    return summary, [each[:-1].tolist() for each in ids], part


def test_a_part_holds_ids_lengths_bytes_and_hashes(tmp_path: Path) -> None:
    texts = [b"one", "zwölf".encode(), b"<|endoftext|>"]
    summary, ids, part = encoded(tmp_path, [*texts])
    assert [bytes(each) for each in ids] == texts
    assert part.text_bytes.tolist() == [3, 6, 13]
    digests = [xxhash.xxh3_128_intdigest(text, 5) for text in texts]
    assert part.hashes.tolist() == [[digest >> 64, digest & (2**64 - 1)] for digest in digests]
    assert (summary.documents, summary.bytes, summary.tokens, summary.last) == (3, 22, 25, True)
    assert summary.skipped == {}
    written_out = "<|endoftext|> as ordinary text; --document-separator splits at it"
    assert summary.unusual == {written_out: {"count": 1, "example": "corpus row 12"}}


@pytest.mark.parametrize("block", [1, 5, 12, 13, 14, 100])
def test_an_end_of_text_that_is_written_out_is_found_across_blocks_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 10)
    text = b"a story<|endoftext|>and another <|endoftext|>"
    long = Blocks(tuple(text[at : at + block] for at in range(0, len(text), block)))
    near = Blocks((b"<|endof", b"text|", b"<|endoftext", b"", b"|"))
    summary, ids, _ = encoded(tmp_path, [long, near, text, b"none"])
    assert bytes(ids[0]) == text
    assert [entry["count"] for entry in summary.unusual.values()] == [2]


def test_what_is_left_out_is_counted_with_the_first_place(tmp_path: Path) -> None:
    documents: list[Document] = [b"", b"a", Refused(NULL), b"", b" ", Refused(NULL), Blocks((b"", b""))]
    summary, ids, _ = encoded(tmp_path, [*documents, Blocks((b"cut \xc3", b"("))])
    assert [bytes(each) for each in ids] == [b"a", b" "]
    assert summary.skipped == {
        "empty": {"count": 3, "example": "corpus row 10"},
        "null": {"count": 2, "example": "corpus row 12"},
        "not UTF-8": {"count": 1, "example": "corpus row 17", "broken": True, "first": ["corpus row 17"]},
    }


def test_a_long_document_is_encoded_as_a_short_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"The quick brown fox, it's said, jumps.\nOver 12 lazy dogs." * 50
    gpt2 = BytePairTokenizer("gpt2")
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 100)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    _, ids, part = encoded(tmp_path, [text, Blocks((text[:77], text[77:2000], text[2000:]))], gpt2)
    assert ids[0] == ids[1] == gpt2.encode(text.decode()).tolist()
    assert part.text_bytes.tolist() == [len(text)] * 2
    assert part.hashes[0].tolist() == part.hashes[1].tolist()


def test_a_cut_inside_a_word_is_told_unless_every_character_is_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 10)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
    summary, ids, _ = encoded(tmp_path, [b"x" * 25], BytePairTokenizer("gpt2"))
    assert summary.unusual == {"cut inside a word": {"count": 1, "example": "corpus row 10"}}
    assert BytePairTokenizer("gpt2").decode_bytes(ids[0]) == b"x" * 25
    summary, _, _ = encoded(tmp_path, [b"x" * 25])
    assert summary.unusual == {}


class PanicException(BaseException):
    """As Rust's panics arrive: no Exception."""


@pytest.mark.parametrize("error", [ValueError("stack overflow"), PanicException("index out of bounds")])
def test_a_document_the_tokenizer_gives_up_on_leaves_nothing_behind(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ByteTokenizer.encode

    def refuse(tokenizer: ByteTokenizer, text: str) -> Any:
        if "bad" in text:
            raise error
        return plain(tokenizer, text)

    monkeypatch.setattr(ByteTokenizer, "encode", refuse)
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 4)
    documents: list[Document] = [b"good", b"bad", Blocks((b"much text and then bad",)), b"end"]
    summary, ids, _ = encoded(tmp_path, documents)
    assert [bytes(each) for each in ids] == [b"good", b"end"]
    assert summary.skipped == {"refused by the tokenizer": {"count": 2, "example": "corpus row 11"}}


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_a_limit_counts_what_is_kept(tmp_path: Path, limit: int) -> None:
    documents: list[Document] = [b"a", b"", b"b", Refused(NULL), b"c", b""]
    summary, ids, _ = encoded(tmp_path, documents, limit=limit)
    assert [bytes(each) for each in ids] == [b"a", b"b", b"c"][:limit]
    assert sum(entry["count"] for entry in summary.skipped.values()) == {1: 0, 2: 1, 3: 2, 9: 3}[limit]


def test_a_part_without_documents_can_be_read(tmp_path: Path) -> None:
    summary, ids, part = encoded(tmp_path, [b""])
    assert (ids, summary.documents, part.hashes.shape) == ([], 0, (0, 2))


def test_a_part_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "x.part", np.dtype("<u2"), 256)
    writer.add(np.arange(5, dtype="<u2"))
    assert not (tmp_path / "x.part").exists()
    writer.discard()
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class FailingUnit(OneUnit):
    size: int = 1
    kill: bool = False

    def documents(self) -> Iterator[tuple[int, Document]]:
        yield 0, b"before"
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("file.jsonl line 7 is not JSON")

    def locate(self, position: int) -> str:
        return "here"


def jobs(tmp_path: Path, *units: Any) -> list[tuple[EncodingOptions, UnitJob]]:
    options = EncodingOptions(tokenizer=ByteTokenizer().spec(), parts=tmp_path, vocabulary=tmp_path, seed=0)
    return [(options, UnitJob(item=str(i), unit=0, last=True, work=unit)) for i, unit in enumerate(units)]


def test_a_worker_that_is_killed_is_noticed(tmp_path: Path) -> None:
    with Workers(2) as workers, pytest.raises(BrokenProcessPool):
        list(workers.map(encode, jobs(tmp_path, Texts((b"a",), 1, "", 0), FailingUnit(kill=True))))


@pytest.mark.parametrize("count", [1, 2])
def test_a_fault_in_a_worker_arrives_as_the_same_error_and_leaves_no_part(tmp_path: Path, count: int) -> None:
    with Workers(count) as workers, pytest.raises(UserError, match=r"^file\.jsonl line 7 is not JSON$"):
        list(workers.map(encode, jobs(tmp_path, FailingUnit())))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_few_units_are_under_way(tmp_path: Path) -> None:
    started = 0

    def units() -> Iterator[Any]:
        nonlocal started
        for job in jobs(tmp_path, *(Texts((f"document {i}".encode(),), 1, "", 0) for i in range(60))):
            started += 1
            yield job

    with Workers(2) as workers:
        for finished, _ in enumerate(workers.map(encode, units())):
            assert started - finished <= 5
    assert started == 60
