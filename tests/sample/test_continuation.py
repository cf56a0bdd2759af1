"""Text that grows: whole characters only, up to a stop string wherever tokens are cut, and why it ended."""

import itertools
from pathlib import Path

import pytest
from conftest import tokenizer_named

from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from prepare.encoding.vocabulary import open_vocabulary
from sample.continuation import Continuation, grow, overlap
from sample.generate import Tokens

TEXT = "The first weekday, isn't it?\nof the (month) and year"
BYTES = ByteTokenizer()


def grown(
    tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None, stops: list[str] | None = None
) -> Continuation:
    text = Continuation(tokenizer, context or [], stops or [])
    for token in ids:
        text.add(token)
    text.end("length")
    return text


class Cut:
    """A vocabulary of the given pieces of text: their numbers are the ids."""

    name, end_of_text = "cut", -1

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode_bytes(self, ids: list[int]) -> bytes:
        return "".join(self.pieces[i] for i in ids).encode()


def cut_up(pieces: list[str], stops: list[str]) -> Continuation:
    return grown(Cut(pieces), list(range(len(pieces))), stops=stops)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["word", "unigram.json", "bpe:512", "char", "gpt2"])
def test_text_that_grows_token_by_token_is_the_text_of_all_tokens(name: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(TEXT).tolist()
    assert grown(tokenizer, ids).text.encode() == tokenizer.decode_bytes(ids)
    for start in (1, 3):
        added = grown(tokenizer, ids[start:], context=ids[:start]).text.encode()
        assert tokenizer.decode_bytes(ids[:start]) + added == tokenizer.decode_bytes(ids)


@pytest.mark.parametrize("name", ["gpt2", "byte", "bpe:512", "unigram.json", "char"])
def test_no_piece_has_half_a_character(name: str) -> None:
    tokenizer = tokenizer_named(name)
    text = "naïve café, 東京 와 한국; 😀"
    whole = grown(tokenizer, tokenizer.encode(text).tolist())
    assert whole.text.strip() == text
    assert all("\ufffd" not in piece for piece in whole.pieces)
    if name == "byte":
        assert [piece for piece in whole.pieces if piece] == list(text)


def test_a_character_of_several_tokens_waits_for_its_last(tmp_path: Path) -> None:
    """As byte fallback has it: each byte of a rare character is a token, and its decoder gives U+FFFD for a part."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    tokens = {"a": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    library = Library(models.BPE(tokens, [], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = open_vocabulary(str(tmp_path))
    ids = tokenizer.encode("a😀a").tolist()
    assert len(ids) == 6
    assert [piece for piece in grown(tokenizer, ids).pieces if piece] == ["a", "😀", "a"]
    assert grown(tokenizer, ids[:3]).text == "a\ufffd\ufffd"


def test_what_the_end_cuts_off_is_a_replacement_character() -> None:
    assert grown(BYTES, [*b"a", 0xF0, 0x9F]).text == "a\ufffd"
    assert grown(BYTES, [*b"a", 0xC3, BYTES.end_of_text]).text == "a\ufffd"
    assert grown(BYTES, [0xFF, *b"a"]).text == "\ufffda"


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (["month"], "The first weekday, isn't it?\nof the ("),
        (["\n"], "The first weekday, isn't it?"),
        (["never", "the ", "day"], "The first week"),
        (["The"], ""),
        (["first", "first week"], "The "),
        (["irst w", "first wx"], "The f"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "byte", "bpe:512"])
def test_a_text_ends_before_a_stop_string_however_tokens_are_cut(name: str, stops: list[str], wanted: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(TEXT).tolist()
    text = grown(tokenizer, ids, stops=stops)
    assert (text.text, text.finish_reason) == (wanted, "stop")
    assert text.token_ids == ids[: len(text.token_ids)]
    until_stop = tokenizer.decode_bytes(text.token_ids).decode()
    assert any(stop in until_stop for stop in stops), "the ids reach to the end of the stop string"
    assert not any(stop in tokenizer.decode_bytes(text.token_ids[:-1]).decode() for stop in stops)


def test_every_cut_gives_the_same_text() -> None:
    """Also of stop strings that overlap each other and themselves: the one that is complete first counts."""
    text, stops = "ababcabd", ["abab", "babc", "abd", "bcab"]
    for marks in itertools.product((False, True), repeat=len(text) - 1):
        pieces = [text[0]]
        for character, new in zip(text[1:], marks, strict=True):
            pieces[len(pieces) - (not new) :] = [character] if new else [pieces[-1] + character]
        for chosen in ([stops[1]], [stops[2]], stops[1:], stops):
            first = min((text.find(stop) + len(stop), text.find(stop)) for stop in chosen)
            assert cut_up(pieces, chosen).text == text[: first[1]]


def test_a_stop_string_may_end_inside_a_character_of_several_tokens() -> None:
    text = grown(BYTES, list("naïve 東京 x".encode()), stops=["東京"])
    assert (text.text, text.finish_reason) == ("naïve ", "stop")


def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not() -> None:
    text = Continuation(BYTES, [], ["END."])
    shown = []
    for byte in b"a EN EEND":
        text.add(byte)
        shown.append(text.text)
    assert shown == ["a", "a ", "a ", "a ", "a EN ", "a EN ", "a EN E", "a EN E", "a EN E"]
    text.end("length")
    assert (text.text, text.finish_reason) == ("a EN EEND", "length")


def test_the_prompt_is_not_searched() -> None:
    prompt = list(b"one STOP two ST")
    assert grown(BYTES, list(b"OP three"), context=prompt, stops=["STOP"]).text == "OP three"


def test_what_comes_after_the_end_changes_nothing() -> None:
    text = grown(BYTES, [*b"Hi", BYTES.end_of_text, *b"there"])
    text.end("length")
    assert (text.text, text.finish_reason, text.token_ids) == ("Hi", "end_of_text", [*b"Hi"])


@pytest.mark.parametrize(
    ("text", "waits"), [("xab", 2), ("xa", 1), ("aba", 1), ("abab", 2), ("x", 0), ("", 0), ("ababa", 3)]
)
def test_overlap_is_the_longest_beginning_of_a_stop_string(text: str, waits: int) -> None:
    assert overlap(text, "abac" if text == "ababa" else "abc") == waits


def test_samples_end_one_by_one_and_the_steps_with_the_last() -> None:
    first, second = (Continuation(BYTES, [], ["."]) for _ in range(2))
    steps = iter(
        [Tokens([97, 98], [-1.0, -2.0]), Tokens([46, 99], [-3, -4]), Tokens([97, 256], [-5, -6]), Tokens([0, 0], [])]
    )
    assert len(list(grow([first, second], steps))) == 3
    assert next(steps).ids == [0, 0], "nobody asked for it"
    assert (first.text, first.finish_reason, first.token_ids, first.log_probabilities) == (
        "a",
        "stop",
        [97, 46],
        [-1, -3],
    )
    assert (second.text, second.finish_reason, second.log_probabilities) == ("bc", "end_of_text", [-2, -4])


def test_samples_without_an_end_of_their_own_end_with_the_steps() -> None:
    texts = [Continuation(BYTES, []) for _ in range(2)]
    list(grow(texts, iter([Tokens([97, 256], []), Tokens([98, 97], [])])))
    assert [(text.text, text.finish_reason) for text in texts] == [("ab", "length"), ("", "end_of_text")]
    assert texts[0].log_probabilities == []
