"""Pieces: slices of a long document, for bounded memory and within the limits of tokenizers.

A document of more than `PIECE_CHARACTERS` is encoded piece by piece. A piece that ends before a
single space, or after a single newline, ends where GPT-2's pattern and its successors end a word
too, so the ids are those of the document encoded in one go; tests compare them. A stretch without
such a position is split all the same, and the document is reported as unusual.
"""

import codecs
import re
from collections.abc import Iterable, Iterator

from prepare.units import LongDocument

# Half of what tiktoken's regular expressions were seen to take: about a million spaces before a
# word overflow its stack.
PIECE_CHARACTERS = 1 << 17
# Almost all text has a space or a newline this near to its end; the rest of the piece is searched
# only if not.
NEAR_CHARACTERS = 1 << 10

_SAFE = re.compile(r"(?<=\S)(?:(?= \S)|\n(?=\S))")


def blocks_of(document: bytes | LongDocument) -> Iterator[bytes]:
    """The UTF-8 bytes of a document, in blocks that may end anywhere."""
    return iter([document]) if isinstance(document, bytes) else document.blocks()


def pieces(blocks: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and for each whether it ends where a word ends.

    The pieces depend on the text alone, not on how it is divided into `blocks`. Raises
    UnicodeDecodeError.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for block in blocks:
        text += decoder.decode(block)
        begin = 0
        while len(text) - begin > PIECE_CHARACTERS:
            end, safe = _end_of_piece(text, begin)
            yield text[begin:end], safe
            begin = end
        text = text[begin:]
    text += decoder.decode(b"", final=True)
    if text:
        yield text, True


def _end_of_piece(text: str, begin: int) -> tuple[int, bool]:
    latest = begin + PIECE_CHARACTERS
    # The pattern looks one character back and one ahead. Starting at the piece's second character
    # keeps what stands before the piece from mattering; one character beyond its end lets a word
    # end exactly there.
    for earliest in (max(latest - NEAR_CHARACTERS, begin + 1), begin + 1):
        ends = [found.end() for found in _SAFE.finditer(text, earliest, latest + 1)]
        if ends:
            return ends[-1], True
    return latest, False
