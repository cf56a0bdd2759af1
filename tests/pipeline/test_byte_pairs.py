"""Rank tables, merges and patterns: what tiktoken and Hugging Face's library make of the same vocabulary is the same."""

import base64
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from conftest import ALPHABET
from tokenizers import Regex, pre_tokenizers

from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import GPT2_RANKS
from pipeline.vocabulary.merges import (
    PUBLISHED,
    SAME_IN_BOTH,
    merges_of,
    published_for,
    read_ranks,
    symbol_bytes,
    symbols,
    write_ranks,
)

BYTES = {bytes([byte]): byte for byte in range(256)}


def texts() -> Iterator[str]:
    """Real source, random strings, and every character of the planes that have letters before an 's."""
    chance = random.Random(0)
    yield from (
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    )
    yield from ("".join(chance.choices(ALPHABET, k=chance.randrange(60))) for _ in range(5000))
    yield from (f"{chr(code)}'s" for code in range(0x40000) if not 0xD800 <= code < 0xE000)


def assert_cut_alike(hugging_face: str, tiktokens: str) -> None:
    """With a table that holds each piece whole, tiktoken's tokens are its pieces."""
    split = pre_tokenizers.Split(Regex(hugging_face), "isolated")
    cut = {text: [piece for piece, _ in split.pre_tokenize_str(text)] for text in texts()}
    pieces = {
        piece.encode(): 256 + i for i, piece in enumerate({piece: 0 for found in cut.values() for piece in found})
    }
    encoding = tiktoken.Encoding("pieces", pat_str=tiktokens, mergeable_ranks=pieces | BYTES, special_tokens={})
    for text, wanted in cut.items():
        found = encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
        assert found == [piece.encode() for piece in wanted], repr(text[:80])


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plain_pattern_cuts_as_tiktokens_does(name: str) -> None:
    assert_cut_alike(PUBLISHED[name].plain, PUBLISHED[name].pattern)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", sorted(SAME_IN_BOTH))
def test_a_pattern_of_a_tokenizer_json_means_the_same_to_both_libraries(pattern: str) -> None:
    assert_cut_alike(pattern, pattern)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_what_is_published_is_what_tiktoken_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs, ours = getattr(openai_public, name)(), PUBLISHED[name]
    assert ours.pattern == theirs["pat_str"]
    assert ours.end_of_text == theirs["special_tokens"]["<|endoftext|>"]
    assert ours.vocab_size == max(theirs["special_tokens"].values()) + 1


def test_a_table_is_known_by_its_name_or_its_size() -> None:
    own = {bytes([i // 256, i % 256]): i for i in range(1000)}
    gpt2 = read_ranks(GPT2_RANKS.read_bytes())
    assert published_for("gpt2", gpt2) is published_for("r50k_base.tiktoken", gpt2) is PUBLISHED["gpt2"]
    assert published_for("cl100k_base", own) is PUBLISHED["cl100k_base"]
    mine = published_for("mine.tiktoken", own)
    assert (mine.pattern, mine.end_of_text, mine.vocab_size) == (PUBLISHED["cl100k_base"].pattern, 1000, 1001)


def test_merges_rebuild_the_published_order() -> None:
    merges = merges_of(read_ranks(GPT2_RANKS.read_bytes()))
    assert len(merges) == 50_000
    assert merges[:3] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e")]


def test_a_token_that_no_pair_makes_has_no_merge() -> None:
    assert merges_of({**BYTES, b"ab": 256, b"xyz": 257, b"abc": 258}) == [(b"a", b"b"), (b"ab", b"c")]


def test_ranks_survive_their_file_in_whatever_order_it_is() -> None:
    table = GPT2_RANKS.read_bytes()
    assert write_ranks(read_ranks(table)) == table
    lines = table.splitlines()
    random.Random(0).shuffle(lines)
    assert list(read_ranks(b"\r\n".join(lines)).items()) == list(read_ranks(table).items())


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (b"no base64! 3\n", "has the line 'no base64! 3': expected a base64 token and its rank"),
        (line(b"ab", "x"), "expected a base64 token and its rank"),
        (b"\xff\xfe\n", "expected a base64 token"),
        (line(b"ab", 7), "a token or rank twice"),
        (line(b"a", 256), "a token or rank twice"),
        (line(b"ab", -1), r"a rank that is not in 0 \.\. 16777215"),
        (line(b"ab", 1 << 32), r"a rank that is not in 0 \.\. 16777215"),
    ],
)
def test_a_damaged_table_is_one_line(extra: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_ranks(write_ranks(BYTES) + extra)


def test_a_table_that_cannot_write_every_text_is_refused() -> None:
    with pytest.raises(UserError, match="no token for byte 0x07: expected one for each of the 256"):
        read_ranks(write_ranks({token: rank for token, rank in BYTES.items() if rank != 7}))
    with pytest.raises(UserError, match="no token for byte 0x00"):
        read_ranks(b"")


def test_a_table_of_tokens_too_long_to_find_their_merges_is_refused() -> None:
    with pytest.raises(UserError, match="tokens of up to 65,536 bytes: expected shorter ones"):
        read_ranks(write_ranks({**BYTES, b"a" * 65536: 256}))


def test_every_byte_has_a_printable_symbol() -> None:
    token = bytes(range(256))
    assert len(set(symbols(token))) == 256 and symbols(token).isprintable()
    assert symbol_bytes(symbols(token)) == token
