"""Word n-grams of a text as 64-bit hashes, for near duplicates and for evaluation texts.

A word is a run of letters, digits and combining marks in lower case; all else separates words, as
in GPT-3's comparison with its benchmarks (Brown et al. 2020, appendix C: whitespace delimits,
punctuation and case do not count). In scripts written without spaces each character is a word.
Vectorized over a text: 60 to 100 MB/s, where hashing word by word in Python gives 25.
"""

import unicodedata
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.vocabulary.char_byte_word import UNICODE_CODE_POINTS, code_points
from prepare.encoding.pieces import PIECE_CHARACTERS

Hashes = npt.NDArray[np.uint64]

# Code points from here on are unassigned or private; a table of fewer takes 50 ms to fill.
_LETTERS_END = 0x33480
# Thai to Myanmar, Khmer, kana, Han: written without spaces between words.
_SPACELESS = (
    (0x0E00, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, _LETTERS_END),
)  # fmt: skip
_ALONE = np.uint32(1 << 31)  # flags a character that is a word
# A piece of a long document is read together with the end of the piece before: 12 words of GPT-3's
# 13, unless they are longer than any words are.
TAIL_WORDS, TAIL_CHARACTERS = 12, 1 << 12
_MOST_CHARACTERS = PIECE_CHARACTERS + TAIL_CHARACTERS
# Odd, so that multiplying modulo 2**64 loses nothing and can be undone.
_CHARACTER_FACTOR = 0x9E3779B97F4A7C15
_WORD_FACTOR, _MIX = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xFF51AFD7ED558CCD)


class Words(NamedTuple):
    """(words,) each: the hashes, and where in the text the words begin and end, in characters."""

    hashes: Hashes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def words_of(text: str) -> Words:
    """The words of up to `_MOST_CHARACTERS` characters."""
    powers, inverse_powers = _powers()
    ascii_only = text.isascii()
    points: Any = np.frombuffer(text.encode(), np.uint8) if ascii_only else code_points(text)
    folded = _folded()[points]
    inside = np.zeros(len(folded) + 1, np.bool_)
    np.not_equal(folded, 0, out=inside[:-1])
    # A word begins where the character before is outside, and ends before one that is.
    begins, ends = inside[:-1].copy(), inside[:-1].copy()
    begins[1:] &= ~inside[:-2]
    ends &= ~inside[1:]
    if not ascii_only and (alone := folded >= _ALONE).any():
        begins |= alone
        begins[1:] |= alone[:-1] & inside[1:-1]
        ends |= alone
        ends[:-1] |= alone[1:] & inside[:-2]
    starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    # The hash of a word is sum(c[i] * factor**i); of all words at once, from prefix sums.
    sums = np.zeros(len(folded) + 1, np.uint64)
    np.cumsum(folded * powers[: len(folded)], out=sums[1:])
    return Words(_mixed((sums[stops] - sums[starts]) * inverse_powers[starts]), starts, stops)


class PieceReader:
    """Reads the pieces of a document so that no n-gram across their borders is lost."""

    def __init__(self) -> None:
        self._tail = ""

    def read(self, piece: str) -> tuple[str, Words]:
        """The piece after the last `TAIL_WORDS` words of the one before, and the words in both."""
        text = self._tail + piece
        words = words_of(text)
        first = int(words.starts[-TAIL_WORDS:][0]) if len(words.starts) else len(text)
        self._tail = text[max(first, len(text) - TAIL_CHARACTERS) :]
        return text, words


def ngrams(words: Hashes, lengths: Collection[int]) -> Iterator[tuple[int, Hashes]]:
    """For each of the ascending lengths n, n and the hash of each n words that follow each other:
    (words - n + 1,).
    """
    hashes = words[:0]
    for n in range(1, min(max(lengths, default=0), len(words)) + 1):
        # The n-gram that begins at a word is its (n - 1)-gram and one word more.
        hashes = hashes[: len(words) - n + 1] * _WORD_FACTOR + words[n - 1 :] if n > 1 else words
        if n in lengths:
            yield n, _mixed(hashes + np.uint64(n))


def _mixed(hashes: Hashes) -> Hashes:
    # High bits of a product depend on all bits, low ones on few.
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """(_MOST_CHARACTERS,) each: powers of the factor, and of its inverse modulo 2**64."""
    factors = (_CHARACTER_FACTOR, pow(_CHARACTER_FACTOR, -1, 1 << 64))
    powers = [np.full(_MOST_CHARACTERS, factor, np.uint64) for factor in factors]
    for each in powers:
        each[0] = 1
        np.multiply.accumulate(each, out=each)
    return powers[0], powers[1]


@cache
def _folded() -> npt.NDArray[np.uint32]:
    """(UNICODE_CODE_POINTS,): by code point 0 outside of words, else the letter in lower case."""
    table = np.zeros(UNICODE_CODE_POINTS, np.uint32)
    for point, character in enumerate(map(chr, range(_LETTERS_END))):
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            lower = character.lower()
            table[point] = ord(lower) if len(lower) == 1 else point
    for first, stop in _SPACELESS:
        table[first:stop] |= np.where(table[first:stop] > 0, _ALONE, np.uint32(0))
    return table
