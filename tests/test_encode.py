"""Encoding: the split rule, the survey before it, exact limits, and results that no number of workers changes."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import xxhash

from pipeline.errors import UserError
from pipeline.tokenizer import BytePairTokenizer, ByteTokenizer
from prepare.encode import Encoded, SplitRule, encode_corpus, encode_unit, survey, texts
from prepare.readers import Texts

EVERYTHING_TRAIN = SplitRule("hash", 0.1, 0, 0)


def units_of(documents: list[str | None], at_once: int = 3) -> list[Texts]:
    return [Texts(tuple(documents[i : i + at_once]), 1) for i in range(0, len(documents), at_once)]


def decoded(results: list[Encoded], split: str = "train") -> list[str]:
    """The documents of a split, read back by their lengths."""
    found = []
    for encoded in results:
        part = encoded.splits[split]
        for ids in np.split(part.tokens, np.cumsum(part.lengths)[:-1]) if len(part.lengths) else []:
            assert ids[-1] == 256
            found.append(bytes(ids[:-1].astype(np.uint8)).decode())
    return found


def test_a_document_is_val_by_the_hash_of_its_text_alone() -> None:
    documents = [f"document {i % 50}" for i in range(100)]  # each one twice
    rule = SplitRule("hash", 0.3, int(0.3 * 2**64), 5)
    encoded = encode_unit(Texts(tuple(documents), 1), ByteTokenizer(), rule, None)
    val = {text for text in documents if xxhash.xxh3_64_intdigest(text.encode(), 5) / 2**64 < 0.3}
    assert 5 < len(val) < 25
    assert decoded([encoded], "val") == [text for text in documents if text in val]
    assert decoded([encoded], "train") == [text for text in documents if text not in val]


def test_the_seed_moves_documents() -> None:
    documents = iter(f"document {i}" for i in range(100))
    hashes = {seed: xxhash.xxh3_64_intdigest(b"document 1", seed) for seed in (0, 1)}
    assert hashes[0] != hashes[1]
    assert survey(documents, 0.5, 1).seed == 1


def test_a_position_rule_cuts_by_characters_and_counts_bytes() -> None:
    encoded = encode_unit(Texts(("é" * 10,), 1), ByteTokenizer(), SplitRule("position", 0.3, 0, 0), None)
    assert decoded([encoded], "train") == ["é" * 7]
    assert decoded([encoded], "val") == ["é" * 3]
    assert [int(encoded.splits[split].text_bytes[0]) for split in ("train", "val")] == [14, 6]


@pytest.mark.parametrize("fraction", [1e-18, 0.5, 0.999999])
def test_a_document_of_two_characters_still_gives_both_splits(fraction: float) -> None:
    parts = SplitRule("position", fraction, 0, 0).assign("ab", b"ab")
    assert parts == [("train", "a", 1), ("val", "b", 1)]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_small_corpus_has_both_splits_and_only_the_nearest_document_moves(fraction: float, count: int) -> None:
    documents = [f"document {i}" for i in range(count)]
    rule = survey(iter(documents), fraction, 0)
    by_split = {"train": [], "val": []}  # type: dict[str, list[str]]
    for text in documents:
        by_split[rule.assign(text, text.encode())[0][0]].append(text)
    ranked = sorted(documents, key=lambda text: xxhash.xxh3_64_intdigest(text.encode(), 0))
    assert by_split["val" if fraction < 0.5 else "train"] == ([ranked[0]] if fraction < 0.5 else [ranked[-1]])
    assert rule.record()["fraction"] == fraction


def test_the_survey_of_a_big_corpus_stops_early_and_keeps_the_threshold() -> None:
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for i in range(100_000):
            read += 1
            yield f"document {i}"

    assert survey(documents(), 0.01, 0).threshold == int(0.01 * 2**64)
    assert 2 <= read < 2000


@pytest.mark.parametrize(
    ("documents", "words"), [([], "empty"), (["same"] * 3, "all 3 documents"), (["x"], "single character")]
)
def test_a_corpus_that_cannot_be_split_is_refused(documents: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        survey(iter(documents), 0.1, 0)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6, 7, 100])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_takes_exactly_the_first_documents(limit: int, workers: int) -> None:
    documents = ["a", "", "b", "c", None, "d", "e", "f", "", "g", "h"]
    wanted = [text for text in documents if text][:limit]
    units = units_of(documents)
    results = list(encode_corpus(units, ByteTokenizer(), EVERYTHING_TRAIN, workers, limit))
    assert decoded(results) == wanted == list(texts(units, limit))
    upto = documents.index(wanted[-1]) if limit < 8 else len(documents)
    skipped = sum(sum(encoded.skipped.values()) for encoded in results)
    assert skipped == sum(1 for text in documents[:upto] if not text)


def test_empty_documents_are_counted_by_reason() -> None:
    encoded = encode_unit(Texts(("", None, " ", ""), 1), ByteTokenizer(), EVERYTHING_TRAIN, None)
    assert encoded.skipped == {"empty": 2, "null": 1}
    assert decoded([encoded]) == [" "]


def test_a_document_tiktoken_gives_up_on_is_skipped_and_counted() -> None:
    hostile = " " * 2_000_000 + "x"
    with pytest.raises(ValueError, match="stack"):
        BytePairTokenizer("gpt2").encode(hostile)
    encoded = encode_unit(Texts(("a", hostile, "b"), 1), BytePairTokenizer("gpt2"), EVERYTHING_TRAIN, None)
    assert encoded.skipped == {"refused by the tokenizer": 1}
    assert encoded.documents == len(encoded.splits["train"].lengths) == 2


@dataclass(frozen=True)
class FailingUnit:
    size: int = 1
    kill: bool = False

    def documents(self) -> Iterator[str | None]:
        yield "before"
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("file.jsonl line 7 is not JSON")


def test_a_worker_that_is_killed_is_one_line() -> None:
    units = [*units_of(["a", "b", "c"], 1), FailingUnit(kill=True)]
    with pytest.raises(UserError, match=r"killed.*memory.*fewer --workers"):
        list(encode_corpus(units, ByteTokenizer(), EVERYTHING_TRAIN, 2, None))


def test_a_fault_in_a_worker_arrives_as_the_same_error_after_what_came_before_it() -> None:
    units = [*units_of(["a", "b", "c"], 1), FailingUnit(), *units_of(["d"] * 9, 1)]
    results = encode_corpus(units, ByteTokenizer(), EVERYTHING_TRAIN, 2, None)
    assert decoded([next(results) for _ in range(3)]) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^file\.jsonl line 7 is not JSON$"):
        next(results)


def test_few_units_are_in_flight() -> None:
    started = 0

    def units() -> Iterator[Texts]:
        nonlocal started
        for i in range(100):
            started += 1
            yield Texts((f"document {i}",), 1)

    for finished, _ in enumerate(encode_corpus(units(), ByteTokenizer(), EVERYTHING_TRAIN, 2, None)):
        assert started - finished <= 8
    assert started == 100
