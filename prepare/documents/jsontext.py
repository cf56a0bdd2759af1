"""JSON -> documents: values found in a stream of text, and the text field of each.

A value is held as a whole and may have 256 MB; a file of them may have any length.
"""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pipeline.errors import one_line
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG, text_of
from prepare.units import NOT_UTF8, Document, Refused, Unreadable, utf8

NOT_JSON = "not JSON"
# A number, a literal or an escape that ends this near to the end of what was read may continue
# after it.
LONGEST_TOKEN = 16
_SPACE = re.compile(r"[ \t\r\n]*")
# Accepts what orjson does not: NaN and Infinity, halves of surrogate pairs, and integers of more
# than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=float)

# Three times as fast as json, but not everywhere.
_orjson: Any = import_module("orjson") if find_spec("orjson") else None


def parse(content: bytes, text_field: str) -> Document:
    """The text of one JSON value: an object's field, or a string itself."""
    try:
        row = _orjson.loads(content) if _orjson else _DECODER.decode(content.decode())
    except (ValueError, RecursionError) as error:
        # Before the syntax: a byte that is not UTF-8 would be reported as a fault of the JSON.
        if isinstance(utf8(content), Refused):
            return Refused(NOT_UTF8, broken=True)
        try:
            # Files that were joined have marks inside, at the beginning of a line.
            row = _DECODER.decode(content.decode().removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return Refused(NOT_JSON, broken=True, detail=one_line(error))
    return text_of(row, text_field)


def each_value(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes | Refused]]:
    """The values of one array, or values that follow each other: the byte at which each begins, and
    its bytes.

    After a fault nothing tells where the next value begins, so the rest is one broken row.
    """
    text = _Window(blocks)
    try:
        if text.peek() != "[":
            while text.peek():
                yield text.value()
            return
        text.take("[")
        separator = text.take("]") if text.peek() == "]" else ","
        while separator == ",":
            yield text.value()
            separator = text.take(",]")
        if text.peek():
            raise text.malformed("Expecting nothing after the array", text.at)
    except Unreadable as fault:
        yield text.position, fault.refused


class _Window:
    """JSON text that arrives in blocks, as far as it is held; the next character is at `at`.

    Each byte is read as one character (latin-1), because outside of strings JSON is ASCII, so a
    value ends where it would end as UTF-8, and what is not UTF-8 stays as it is. Python's parser
    finds the end. Not ijson: its fast backend replaces lone surrogates by question marks, and stops
    at NaN and at the first byte that is not UTF-8.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._held, self.at, self._dropped, self._ended = "", 0, 0, False
        self._fault: Unreadable | None = None

    @property
    def position(self) -> int:
        """The byte of the next character."""
        return self._dropped + self.at

    def peek(self) -> str:
        """The next character that is not white space; an empty string at the end."""
        while True:
            found = _SPACE.match(self._held, self.at)
            assert found is not None  # the pattern matches nothing at all, too
            self.at = found.end()
            if self.at < len(self._held):
                return self._held[self.at]
            if self._fault:
                raise self._fault
            if self._ended:
                return ""
            self._read_on()

    def take(self, expected: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found or found not in expected:
            raise self.malformed(f"Expecting {' or '.join(map(repr, expected))}", self.at)
        self.at += 1
        return found

    def value(self) -> tuple[int, bytes | Refused]:
        self.peek()
        while True:
            fault = ""
            try:
                _, end = _DECODER.raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                fault, end = error.msg.removesuffix(" at"), error.pos
            except RecursionError:
                raise self.malformed("Too many brackets inside each other", self.at) from None
            # At the edge of the window an error may only mean that the rest has not been read yet,
            # and a number or literal that ends there may continue.
            cut = end > len(self._held) - LONGEST_TOKEN or fault.startswith("Unterminated string")
            if self._ended or not cut:
                break
            self._read_on()
        if fault:
            raise self.malformed(fault, end)
        begin, value = self.position, self._held[self.at : end]
        self.at = end
        return begin, TOO_LONG if len(value) > MOST_ROW_BYTES else value.encode("latin-1")

    def malformed(self, fault: str, at: int) -> Unreadable:
        # Text that is truncated is also malformed, and the first says more.
        return self._fault or Unreadable(NOT_JSON, f"{fault} at byte {self._dropped + at}")

    def _read_on(self) -> None:
        """Drop what was passed.

        What is left becomes twice as long at least, so that a value of n bytes costs 2 n to parse.
        """
        pieces = [self._held[self.at :]]
        self._dropped += self.at
        size = len(pieces[0])
        if size > MOST_ROW_BYTES:
            self._held, self.at = "", 0
            raise Unreadable(TOO_LONG.reason, TOO_LONG.detail)
        wanted = 2 * size
        while size <= wanted and not self._ended:
            try:
                block = next(self._blocks, b"")
            except Unreadable as fault:  # what was read before is still good
                self._fault, block = fault, b""
            self._ended = not block
            pieces.append(block.decode("latin-1"))
            size += len(block)
        self._held, self.at = "".join(pieces), 0
