"""Tokenizers: GPT-2's ids against an independent construction, round trips, and specs that cannot lie."""

import base64
import hashlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from conftest import ALPHABET, TOKENIZERS, prose, tokenizer_named, unigram_json
from tokenizers import Tokenizer as Library

from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer, WordTokenizer, split_words
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer, token_dtype
from pipeline.vocabulary.tokenizer_json import JsonTokenizer

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
LOSSY = ("word", "unigram.json")


@pytest.fixture
def tokenizer(name: str) -> Tokenizer:
    return tokenizer_named(name)


every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
every_lossless_tokenizer = pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in LOSSY])


@cache
def ranks() -> dict[bytes, int]:
    lines = (line.split(" ") for line in GPT2_RANKS.read_text(encoding="ascii").splitlines())
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


@cache
def independent_gpt2() -> tiktoken.Encoding:
    return tiktoken.Encoding("independent", pat_str=ORIGINAL_PATTERN, mergeable_ranks=ranks(), special_tokens={})


def random_texts(count: int) -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices(ALPHABET, k=source.randrange(60))) for _ in range(count)]


# ---- GPT-2 ----


def test_the_shipped_rank_file_is_openais() -> None:
    assert hashlib.sha256(GPT2_RANKS.read_bytes()).hexdigest() == RANK_FILE_SHA256
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


@every_lossless_tokenizer
def test_text_round_trips_through_ids_below_the_vocabularys_size(tokenizer: Tokenizer) -> None:
    for text in (*random_texts(200), *prose()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert ids.dtype == token_dtype(tokenizer.vocab_size)
        assert not ids.size or ids.max() < tokenizer.vocab_size


@every_tokenizer
def test_every_id_below_the_vocabularys_size_decodes_and_no_two_alike(tokenizer: Tokenizer) -> None:
    if tokenizer_named("unigram.json") is tokenizer:
        return  # its decoder leaves out the space that a text begins with
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    there = [piece for piece in pieces if piece]
    assert len(set(there)) == len(there)
    holes = {"cl100k_base": 100_277 - 50_257, "o200k_base": 200_019 - 50_257}
    assert tokenizer.vocab_size - len(there) == holes.get(
        tokenizer.name, 88 if tokenizer.name == "tokenizer.json" else 0
    )


@every_tokenizer
def test_a_literal_end_of_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    literal = tokenizer.decode_bytes([tokenizer.end_of_text]).decode()
    if tokenizer is tokenizer_named("unigram.json"):  # its model knows no other way to write the token's text
        with pytest.raises(ValueError, match="cannot tell a written-out end-of-text token from the end"):
            tokenizer.encode(f"a {literal} b")
        return
    ids = tokenizer.encode(f"a{literal}b").tolist()
    assert len(ids) > 3
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode_bytes(ids).decode().replace(" ", "") == f"a{literal}b"


@every_tokenizer
def test_text_that_no_utf8_can_hold_is_the_users_to_mend(tokenizer: Tokenizer) -> None:
    """A prompt on the command line that is not UTF-8 reaches us with lone surrogates."""
    with pytest.raises(UserError, match="not valid Unicode at position 1"):
        tokenizer.encode("a\udcffb")


@every_tokenizer
def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    counts = tokenizer.token_bytes()
    if counts is None:
        assert tokenizer is tokenizer_named("word") or tokenizer is tokenizer_named("unigram.json")
        return
    assert counts.shape == (tokenizer.vocab_size,) and counts[tokenizer.end_of_text] == 0
    for text in (*random_texts(50), *prose()):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


# ---- tokenizer.json ----


@pytest.mark.parametrize("name", ["bpe:512", "merges.json"])
def test_a_byte_level_tokenizer_json_gives_the_ids_of_hugging_faces_library(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.merges is not None
    library = Library.from_str(tokenizer.content.decode())
    library.encode_special_tokens = True
    for text in (*TEXTS, *random_texts(2000), *prose()):
        assert tokenizer.encode(text).tolist() == library.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
    ],
)
def test_a_tokenizer_json_that_works_otherwise_is_left_to_hugging_faces_library(change: dict[str, Any]) -> None:
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"]) | change
    tokenizer = JsonTokenizer("own.json", json.dumps(document).encode(), 511)
    library = Library.from_str(json.dumps(document))
    library.encode_special_tokens = True
    assert tokenizer.token_bytes() is None
    for text in ("e\u0301  <|endoftext|> x", "the cat"):
        assert tokenizer.encode(text).tolist() == library.encode(text).ids


def test_an_ordinary_added_token_is_found_and_one_that_ends_texts_is_not() -> None:
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    spaces = document["added_tokens"][0] | {"id": 512, "content": "    ", "special": False}
    document["added_tokens"][0]["special"] = False
    document["added_tokens"].append(spaces)
    tokenizer = JsonTokenizer("own.json", json.dumps(document).encode(), 511)
    ids = tokenizer.encode("a    b<|endoftext|>").tolist()
    assert 512 in ids and 511 not in ids
    assert tokenizer.decode_bytes(ids) == b"a    b<|endoftext|>"


def test_tokens_too_long_to_prove_are_left_to_hugging_faces_library() -> None:
    """Of 8 kB one takes 15 s, of 64 kB ten minutes; the longest in use have 128 bytes."""
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    document["model"]["vocab"]["<|endoftext|>"] = 511
    for length in (2**power for power in range(13)):
        document["model"]["vocab"]["Q" * length * 2] = len(document["model"]["vocab"])
        document["model"]["merges"].append(["Q" * length] * 2)
    tokenizer = JsonTokenizer("own.json", json.dumps(document).encode(), 511)
    assert tokenizer.merges is None
    ids = tokenizer.encode("a" + "Q" * 8195)
    assert len(ids) == 4 and tokenizer.decode_bytes(ids.tolist()) == b"a" + b"Q" * 8195


def test_merges_that_ranks_cannot_stand_for_are_left_to_hugging_faces_library() -> None:
    """`abc` by (a, bc) where ranks would join (ab, c): the file's own order has to be kept."""
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    vocabulary = {token: i for token, i in document["model"]["vocab"].items() if i < 256}
    document["model"]["vocab"] = vocabulary | {"ab": 256, "bc": 257, "abc": 258}
    document["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    document["added_tokens"][0]["id"] = 259
    tokenizer = JsonTokenizer("own.json", json.dumps(document).encode(), 259)
    assert tokenizer.encode("abc").tolist() == [256, vocabulary["c"]]
    assert tokenizer.token_bytes() is None


def test_a_file_that_cuts_or_pads_texts_does_neither_here() -> None:
    content, end_of_text = unigram_json()
    tokenizer = JsonTokenizer("own.json", content, end_of_text)
    assert json.loads(content)["truncation"]["max_length"] == 5
    text = "the day of the week and the year " * 50
    assert tokenizer.decode_bytes(tokenizer.encode(text).tolist()).decode().split() == text.split()


def test_dropout_is_left_out() -> None:
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    document["model"]["dropout"] = 0.9
    tokenizer = JsonTokenizer("own.json", json.dumps(document).encode(), 511)
    assert (
        tokenizer.encode("return the calendar").tolist()
        == tokenizer_named("bpe:512").encode("return the calendar").tolist()
    )


def test_an_added_token_with_an_id_of_its_own_is_refused() -> None:
    """Hugging Face's library would number it 511, and transformers with it."""
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    document["added_tokens"][0]["id"] = 600
    assert Library.from_str(json.dumps(document)).token_to_id("<|endoftext|>") == 511
    with pytest.raises(
        UserError, match=r"^own.json: the added token '<|endoftext|>' has id 600, .* makes it 511: save"
    ):
        JsonTokenizer("own.json", json.dumps(document).encode(), 600)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError: 'model'"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "an id occurs twice"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 1000000000000}, "merges": []}}', "one is not in 0 .. 16777215"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "Exception"),
    ],
)
def test_a_tokenizer_json_that_is_none_is_one_line(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        JsonTokenizer("own.json", content, 0)


def test_what_the_library_gives_up_on_is_a_value_error() -> None:
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    document["model"] = {"type": "WordLevel", "vocab": {"a": 0, "end": 1}, "unk_token": "missing"}
    tokenizer = JsonTokenizer("own.json", json.dumps(document | {"added_tokens": []}).encode(), 1)
    with pytest.raises(ValueError, match="cannot encode the text"):
        tokenizer.encode("b")


# ---- word ----


def test_words_are_words_marks_and_line_ends() -> None:
    tokenizer = WordTokenizer(["a", ",", "\n", "naïve", "हिन्दी", "x_1"])
    assert tokenizer.encode("a,  a\t\n\nnaïve हिन्दी x_1").tolist() == [0, 1, 0, 2, 2, 3, 4, 5]
    assert (tokenizer.unknown, tokenizer.end_of_text, tokenizer.vocab_size) == (6, 7, 8)
    assert tokenizer.encode("b <|unk|> a").tolist() == [6] * 6 + [0]


@pytest.mark.parametrize(
    "text", ["It's the last of (three) words, isn't it?\nYes: 50%; no!\n", "", "a", "\n\n", "one two"]
)
def test_plain_prose_comes_back_from_its_words(text: str) -> None:
    tokenizer = WordTokenizer(sorted(set(split_words(text))))
    assert tokenizer.decode_bytes(tokenizer.encode(text).tolist()) == text.encode()


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
        "character 'é' (U+00E9) at position 2 is not in this char vocabulary of 2 characters: "
        "remove it, or prepare with --tokenizer byte"
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


def put(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """A tokenizer's files in a folder; returns the spec that goes with them."""
    for file, content in tokenizer.files().items():
        (folder / file).write_bytes(content)
    return tokenizer.spec()


@every_tokenizer
def test_a_spec_and_its_file_build_the_same_tokenizer_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = from_spec(json.loads(json.dumps(put(tokenizer, tmp_path))), tmp_path)
    assert again.spec() == tokenizer.spec() and again.files() == tokenizer.files()
    for text in random_texts(20):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@every_tokenizer
def test_a_spec_is_small(tokenizer: Tokenizer) -> None:
    assert len(json.dumps(tokenizer.spec())) < 1000


def test_gpt2s_spec_is_the_one_that_datasets_carry_since_the_first_version() -> None:
    assert BytePairTokenizer("gpt2").spec()["fingerprint"] == "557b21f5ffbe86dcb38c1ca79ff2cb3d"
    assert ByteTokenizer().spec()["fingerprint"] == "6c5b15b3e83b9cfd1d4c02b7c53ff6a5"
    assert CharTokenizer("abc").spec()["fingerprint"] == "06b05ab6733a618578af5f94892f3950"


def test_a_fingerprint_tells_vocabularies_apart() -> None:
    others = [CharTokenizer("ab"), CharTokenizer("ac"), WordTokenizer(["a"]), WordTokenizer(["b"])]
    specs = [tokenizer.spec() for tokenizer in (*map(tokenizer_named, TOKENIZERS), *others)]
    assert len({spec["fingerprint"] for spec in specs}) == len(specs)


@every_tokenizer
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
    tokenizer: Tokenizer, tamper: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"the {tokenizer.name} vocabulary does not match its description"):
        from_spec(tamper(put(tokenizer, tmp_path)), tmp_path)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("gpt2", "char", "byte")])
def test_a_missing_or_changed_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = put(tokenizer, tmp_path)
    ((file, content),) = tokenizer.files().items()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        from_spec(spec, tmp_path)
    other = {"vocabulary.tiktoken": "own.tiktoken", "vocabulary.json": "", "tokenizer.json": "bpe:512"}[file]
    if other and other != name_of(tokenizer):
        put(tokenizer_named(other), tmp_path)
        with pytest.raises(UserError, match="does not match its description"):
            from_spec(spec, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"has no {file}, which holds the vocabulary {tokenizer.name}: restore it"):
        from_spec(spec, tmp_path)


def name_of(tokenizer: Tokenizer) -> str:
    return next(name for name in TOKENIZERS if tokenizer_named(name) is tokenizer)


@pytest.mark.parametrize("name", ["gpt3", None, ""])
def test_an_unknown_tokenizer_is_answered_with_the_names_there_are(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        from_spec({"name": name}, tmp_path)
    assert str(caught.value) == (
        f"unknown tokenizer {str(name)!r}: expected one of gpt2, cl100k_base, o200k_base, char, byte, word, bpe:N, "
        "a path to a tokenizer.json or .tiktoken file"
    )
