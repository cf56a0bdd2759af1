"""Cutting long documents, so that neither memory nor a tokenizer's patience depends on the longest one.

A document of more than `PIECE_CHARACTERS` is encoded piece by piece. Where a piece ends before a lone space, or after a
lone newline, GPT-2's pattern and its successors end a word too, so the ids are those of the whole document; tests compare
them. A stretch without such a place is cut all the same, and the document is counted as unusual.
"""

import codecs
import re
from collections.abc import Iterable, Iterator

# Half of what tiktoken's regular expressions were seen to bear: they give up on about a million spaces before a word.
PIECE_CHARACTERS = 1 << 17
# Most text has a space or a newline this near; looking further is only for text that is odd already.
NEAR_CHARACTERS = 1 << 10

_SAFE = re.compile(r"(?<=\S)(?:(?= \S)|\n(?=\S))")


def pieces(blocks: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    """A document's text in pieces, and for each whether it ends where a word does.

    What is cut where depends on the text alone and not on its `blocks`. Raises UnicodeDecodeError.
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
    # From the piece's second character, so that nothing before the piece counts; and with the one behind it.
    for earliest in (max(latest - NEAR_CHARACTERS, begin + 1), begin + 1):
        ends = [found.end() for found in _SAFE.finditer(text, earliest, latest + 1)]
        if ends:
            return ends[-1], True
    return latest, False
