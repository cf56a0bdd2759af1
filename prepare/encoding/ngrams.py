"""Word n-grams of a text as 64-bit hashes, for near duplicates and for evaluation texts.

A word is a run of letters, digits and combining marks in lower case; all else separates words, as
in GPT-3's comparison with its benchmarks (Brown et al. 2020, appendix C: whitespace delimits,
punctuation and case do not count). In scripts written without spaces each character is a word.
Vectorized over a text: 70 MB/s a core for documents of 2.7 kB, 28 with the lookup of n-grams in
300,000 of evaluation texts, 35 with signatures. Regular expressions and a hash a word take three
times as long.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.vocabulary.char_byte_word import UNICODE_CODE_POINTS, code_points
from prepare.encoding.pieces import PIECE_CHARACTERS

Hashes = npt.NDArray[np.uint64]

# Code points from here on are unassigned or private; a table of fewer takes 50 ms to fill.
_LETTERS_END = 0x33480
# Thai to Myanmar, Khmer, kana, Han: written without spaces between words.
_SPACELESS = (
    (0x0E00, 0x10A0),
    (0x1780, 0x1800),
    (0x3040, 0x3100),
    (0x3400, 0xA000),
    (0xF900, 0xFB00),
    (0x20000, _LETTERS_END),
)
_ALONE = np.uint32(1 << 31)  # flags a character that is a word
# A piece of a long document is read together with the end of the piece before: the 13 words of
# GPT-3's n-grams, the last of which may go on, unless they are longer than any words are.
TAIL_WORDS, TAIL_CHARACTERS = 13, 1 << 12
# Odd, so that multiplying modulo 2**64 loses nothing and can be undone.
_CHARACTER_FACTOR, _WORD_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_MIX = np.uint64(0xFF51AFD7ED558CCD)


class PieceReader:
    """Reads the pieces of a document so that no n-gram across their borders is lost.

    `text` is the piece after the last words of the one before; `words` are (words,) hashes of its
    words, `starts` and `ends` where they lie in it.
    """

    def __init__(self) -> None:
        self._tail = ""

    def read(self, piece: str) -> None:
        self.text = f" {self._tail}{piece} "
        folded: npt.NDArray[Any]
        if self.text.isascii():  # three times as fast
            folded = np.frombuffer(self.text.encode().translate(_ascii()), np.uint8)
            joined = (folded[1:] > 0) & (folded[:-1] > 0)
        else:
            folded = _folded()[code_points(self.text)]
            alone = folded >= _ALONE
            joined = (folded[1:] > 0) & (folded[:-1] > 0) & ~(alone[1:] | alone[:-1])
        self.starts = np.flatnonzero((folded[1:] > 0) & ~joined) + 1
        self.ends = np.flatnonzero((folded[:-1] > 0) & ~joined) + 1
        # The hash of a word is sum(c[i] * factor**i); of all words at once, from sums over the text.
        powers, inverse = _powers(_CHARACTER_FACTOR)
        sums = np.cumsum(folded * powers[: len(folded)])
        self.words = _mixed((sums[self.ends - 1] - sums[self.starts - 1]) * inverse[self.starts])
        self._tail = self.text[max([*self.starts[-TAIL_WORDS:][:1], len(self.text) - TAIL_CHARACTERS]) : -1]


def ngrams(words: Hashes, lengths: Iterable[int]) -> Iterator[tuple[int, Hashes]]:
    """For each of the lengths n up to the number of words, n and the (words - n + 1,) hashes of n
    words in a row.
    """
    powers, inverse = _powers(_WORD_FACTOR)
    sums = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(words * powers[: len(words)], out=sums[1:])
    for n in lengths:
        if 0 < n <= len(words):
            yield n, _mixed((sums[n:] - sums[:-n]) * inverse[: len(words) - n + 1] + np.uint64(n))


def _mixed(hashes: Hashes) -> Hashes:
    # High bits of a product depend on all bits, low ones on few.
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))


@cache
def _powers(factor: int) -> tuple[Hashes, Hashes]:
    """Of the factor and of its inverse modulo 2**64, for each character of the longest text."""
    ones = np.ones(PIECE_CHARACTERS + TAIL_CHARACTERS + 2, np.uint64)
    both = (np.append(ones[:1], ones[1:] * np.uint64(each)) for each in (factor, pow(factor, -1, 1 << 64)))
    powers, inverse = map(np.multiply.accumulate, both)
    return powers, inverse


@cache
def _ascii() -> bytes:
    """`_folded` of ASCII characters, for bytes.translate."""
    return _folded()[:256].astype(np.uint8).tobytes()


@cache
def _folded() -> npt.NDArray[np.uint32]:
    """(UNICODE_CODE_POINTS,): by code point 0 outside of words, else the letter in lower case."""
    table = np.zeros(UNICODE_CODE_POINTS, np.uint32)
    for point, character in enumerate(map(chr, range(_LETTERS_END))):
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            table[point] = ord(character.lower()[0])
    for first, stop in _SPACELESS:
        table[first:stop] |= (table[first:stop] > 0) * _ALONE
    return table
