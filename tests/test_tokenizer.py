"""Tokenizers: GPT-2's ids against an independent construction, round trips, and specs that cannot lie."""

import base64
import hashlib
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

import pipeline.tokenizer
from pipeline.errors import UserError
from pipeline.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_spec,
    token_dtype,
)

RANK_FILE = Path(pipeline.tokenizer.__file__).parent / "gpt2.tiktoken"
# As tiktoken records it for the file it downloads (tiktoken_ext.openai_public, r50k_base).
RANK_FILE_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# As in OpenAI's release of GPT-2: src/encoder.py.
ORIGINAL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

TEXTS = [
    "",
    "Hello, world!",
    "I'll say they've gone, you're, I'm; it's 'the' dog's we'd've'T 'S ''re",
    "runs   of    spaces     and\ttabs\t\t end   ",
    "\n\nlines\n \n  indented\r\n\r\nlast\n",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2}  # \\n\n",
    "3.14159 1,000,000 ½ ² Ⅷ ٣٤٥",
    "naïve café Straße ΣΊΣΥΦΟΣ ǅ",
    "東京都は日本の首都です。汉字 한국어",
    "😀👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\u00a0\u3000\ufeff",
    "<|endoftext|> is text",
    "a" * 300 + " " * 300 + "\n" * 300,
]
ALPHABET = "abE '\"’sdmtlvre019½ \t\n\r\u00a0\u2003.,-_(){}<|>éßñΩж中日한😀\u200d\u0301\x00\x1f"


def tokenizers() -> list[Tokenizer]:
    return [BytePairTokenizer("gpt2"), CharTokenizer(ALPHABET), ByteTokenizer()]


TOKENIZERS = pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda tokenizer: tokenizer.name)


@cache
def ranks() -> dict[bytes, int]:
    lines = (line.split(" ") for line in RANK_FILE.read_text(encoding="ascii").splitlines())
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


@cache
def independent_gpt2() -> tiktoken.Encoding:
    return tiktoken.Encoding("independent", pat_str=ORIGINAL_PATTERN, mergeable_ranks=ranks(), special_tokens={})


def random_texts(count: int) -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices(ALPHABET, k=source.randrange(60))) for _ in range(count)]


# ---- GPT-2 ----


def test_the_shipped_rank_file_is_openais() -> None:
    assert hashlib.sha256(RANK_FILE.read_bytes()).hexdigest() == RANK_FILE_SHA256
    assert list(ranks().values()) == list(range(50_256))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_gpt2_ids_are_those_of_the_original_pattern(text: str) -> None:
    assert BytePairTokenizer("gpt2").encode(text).tolist() == independent_gpt2().encode_ordinary(text)


def test_gpt2_ids_of_random_strings_are_those_of_the_original_pattern() -> None:
    tokenizer = BytePairTokenizer("gpt2")
    for text in random_texts(500):
        assert tokenizer.encode(text).tolist() == independent_gpt2().encode_ordinary(text), repr(text)


def test_gpt2_has_the_published_ids() -> None:
    tokenizer = BytePairTokenizer("gpt2")
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode_bytes([31373, 50256]) == b"hello<|endoftext|>"


def test_gpt2_gives_out_the_table_and_the_pattern_it_was_made_from() -> None:
    tokenizer = BytePairTokenizer("gpt2")
    assert tokenizer.ranks() == ranks()
    rebuilt = tiktoken.Encoding("again", pat_str=tokenizer.pattern(), mergeable_ranks=ranks(), special_tokens={})
    assert rebuilt.encode_ordinary(TEXTS[4]) == tokenizer.encode(TEXTS[4]).tolist()


# ---- all of them ----


@TOKENIZERS
def test_text_round_trips_through_ids_below_the_vocabularys_size(tokenizer: Tokenizer) -> None:
    for text in random_texts(200):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert ids.dtype == token_dtype(tokenizer.vocab_size)
        assert not ids.size or ids.max() < tokenizer.vocab_size


@TOKENIZERS
def test_every_id_below_the_vocabularys_size_decodes(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    assert len(set(pieces)) == tokenizer.vocab_size


@TOKENIZERS
def test_a_literal_end_of_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    if tokenizer.name == "char":
        tokenizer = CharTokenizer("<|endoftext|>")
    ids = tokenizer.encode("<|endoftext|>").tolist()
    assert len(ids) > 1
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode_bytes(ids) == b"<|endoftext|>" == tokenizer.decode_bytes([tokenizer.end_of_text])


@TOKENIZERS
def test_text_that_no_utf8_can_hold_is_the_users_to_mend(tokenizer: Tokenizer) -> None:
    """A prompt on the command line that is not UTF-8 reaches us with lone surrogates."""
    with pytest.raises(UserError):
        tokenizer.encode("a\udcffb")


# ---- char and byte ----


def test_a_char_vocabulary_is_in_code_point_order_whatever_the_texts() -> None:
    tokenizer = CharTokenizer("b😀aéa\nb")
    assert tokenizer.characters == "\nabé😀"
    assert tokenizer.encode("\nabé😀").tolist() == [0, 1, 2, 3, 4]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (5, 6)
    assert tokenizer.spec() == CharTokenizer("\n😀éab").spec()


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab").encode("abécé")
    assert str(caught.value) == (
        "character 'é' (U+00E9, at position 2) is not among the 2 characters of this char vocabulary: "
        "leave it out, or prepare with --tokenizer byte"
    )


def test_byte_ids_are_the_utf8_bytes_and_may_be_cut_inside_a_character() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé😀").tolist() == [0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80]
    assert (
        tokenizer.decode_bytes([0xF0, 0x9F]) + tokenizer.decode_bytes([0x98, 0x80, 256]) == "😀<|endoftext|>".encode()
    )
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


@pytest.mark.parametrize(("vocab_size", "name"), [(257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_two_bytes_while_every_one_fits(vocab_size: int, name: str) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype.name == name
    assert vocab_size - 1 <= np.iinfo(dtype).max
    assert np.array([1], dtype).tobytes()[0] == 1  # little-endian


# ---- specs ----


@TOKENIZERS
def test_a_spec_builds_the_same_tokenizer_again(tokenizer: Tokenizer) -> None:
    again = from_spec(tokenizer.spec())
    assert again.spec() == tokenizer.spec()
    assert again.encode("ab 019é").tolist() == tokenizer.encode("ab 019é").tolist()


def test_a_fingerprint_tells_vocabularies_apart() -> None:
    specs = [*(tokenizer.spec() for tokenizer in tokenizers()), CharTokenizer("ab").spec(), CharTokenizer("ac").spec()]
    assert len({spec["fingerprint"] for spec in specs}) == len(specs)


@TOKENIZERS
@pytest.mark.parametrize(
    "tamper",
    [
        lambda spec: spec | {"fingerprint": "0" * 32},
        lambda spec: spec | {"vocab_size": spec["vocab_size"] + 1},
        lambda spec: spec | {"end_of_text": 0},
        lambda spec: spec | {"characters": "xyz"},
        lambda spec: {key: value for key, value in spec.items() if key != "fingerprint"},
    ],
    ids=["fingerprint", "vocab_size", "end_of_text", "characters", "no fingerprint"],
)
def test_a_spec_that_does_not_match_its_vocabulary_is_refused(
    tokenizer: Tokenizer, tamper: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=f"the {tokenizer.name} vocabulary does not match its description"):
        from_spec(tamper(tokenizer.spec()))


@pytest.mark.parametrize("name", ["gpt3", None, ""])
def test_an_unknown_tokenizer_is_answered_with_the_names_there_are(name: str | None) -> None:
    with pytest.raises(UserError) as caught:
        from_spec({"name": name})
    assert str(caught.value) == f"unknown tokenizer {name!r}: there are gpt2, cl100k_base, o200k_base, char, byte"


def test_a_vocabulary_that_cannot_be_fetched_is_one_line_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError(f"no route to {name}\nat all")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError) as caught:
        BytePairTokenizer("cl100k_base")
    assert str(caught.value) == (
        "the vocabulary of cl100k_base could not be fetched (ConnectionError): connect once, or point "
        "TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's cached file, or use --tokenizer gpt2, which ships here"
    )
