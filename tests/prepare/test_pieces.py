"""Cutting long documents: the ids are those of the whole, and where they may not be it is told."""

import random

import numpy as np
import pytest

from pipeline.vocabulary.byte_pair import BytePairTokenizer
from prepare.encoding import pieces as module
from prepare.encoding.pieces import pieces

GPT2 = BytePairTokenizer("gpt2")
PARTS = [
    "the",
    " cat",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "'s",
    "'ll",
    "'",
    " 12",
    "345",
    "!",
    "。",
    "東京",
    "é",
    "🙂",
]
PARTS += ["\u00a0", "\u2028", "\u3000", "\x1c", "\x85", "<|endoftext|>", "x" * 30]


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices(PARTS, k=chance.randint(1, 60)))


@pytest.mark.parametrize("size", [9, 17, 64])
def test_pieces_give_the_ids_of_the_whole_where_every_one_ends_with_a_word(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(module, "NEAR_CHARACTERS", 3)
    chance = random.Random(size)
    compared = 0
    for _ in range(3000):
        text = random_text(chance)
        found = list(pieces([text.encode()]))
        assert "".join(piece for piece, _ in found) == text
        assert all(0 < len(piece) <= size for piece, _ in found)
        if len(found) > 1 and all(safe for _, safe in found):
            compared += 1
            ids = np.concatenate([GPT2.encode(piece) for piece, _ in found])
            np.testing.assert_array_equal(ids, GPT2.encode(text))
    assert compared > 20


def test_where_it_is_cut_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20)
    chance = random.Random(1)
    for _ in range(500):
        content = random_text(chance).encode()
        size = chance.randint(1, 50)
        blocks = [content[at : at + size] for at in range(0, len(content), size)]
        assert list(pieces(blocks)) == list(pieces([content]))


def test_a_stretch_without_a_word_s_end_is_cut_at_the_limit_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 4)
    assert list(pieces([b"abcdefgh ij"])) == [("abcd", False), ("efgh", False), (" ij", True)]
    assert list(pieces(["é\n東\né東京x".encode()])) == [("é\n東\n", True), ("é東京x", True)]


def test_bytes_that_are_not_utf_8_are_found_across_blocks() -> None:
    assert list(pieces([b"a\xc3", b"\xa9"])) == [("aé", True)]
    for content in (b"a\xff", b"cut \xc3"):
        with pytest.raises(UnicodeDecodeError):
            list(pieces([content]))
    assert list(pieces([])) == list(pieces([b""])) == []


@pytest.mark.slow
@pytest.mark.parametrize("filler", [" ", "\n", "a", "東", "'", "1", "\x00"])
def test_tiktoken_bears_every_piece(filler: str) -> None:
    """Of a whole million of spaces before a word it says that its stack overflowed."""
    text = filler * 1_500_000 + "x"
    ids = [GPT2.encode(piece) for piece, _ in pieces([text.encode()])]
    assert GPT2.decode_bytes(np.concatenate(ids).tolist()) == text.encode()
