"""JSON -> documents: values found in a stream of text, and the text field of each.

A value is held as a whole and may have 256 MB; a file of them may have any length.
"""

import json
import re
from collections.abc import Callable, Iterator

import orjson

from pipeline.errors import UserError, one_line
from prepare.units import NOT_UTF8, NULL, Document, Refused, encoded, no_field, no_text, utf8

MOST_VALUE_BYTES = 256 << 20
# A number, a literal or an escape that ends this near to the end of what was read may continue
# after it.
LONGEST_TOKEN = 16
_SPACE = re.compile(r"[ \t\r\n]*")
# Accepts what orjson does not: NaN and Infinity, halves of surrogate pairs, and integers of more
# than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=float)


def parse(content: bytes, text_field: str, where: Callable[[], str]) -> Document:
    """The text of one JSON value: an object's field, or a string itself.

    `where` describes its position in an error.
    """
    try:
        row = orjson.loads(content)  # three times as fast as json
    except (ValueError, RecursionError) as error:
        # Before the syntax: bytes that are not UTF-8 are a fault of one document, which is counted,
        # not of the file.
        if isinstance(utf8(content), Refused):
            return Refused(NOT_UTF8)
        try:
            row = _DECODER.decode(content.decode())
        except (ValueError, RecursionError):
            raise not_json(where(), text_field, one_line(error)) from None
    if isinstance(row, dict) and text_field not in row:
        raise UserError(no_field(where(), text_field, row))
    text = row[text_field] if isinstance(row, dict) else row
    if text is None:
        return Refused(NULL)
    if isinstance(text, str):
        return encoded(text)
    if isinstance(row, dict):
        raise UserError(no_text(where(), text_field, text))
    found = content.decode().strip()
    shortened = found if len(found) <= 40 else f"{found[:40]}..."
    raise UserError(f"{where()} is not a JSON object but {shortened}: expected one with the field {text_field!r}")


def each_value(blocks: Iterator[bytes], name: str, text_field: str) -> Iterator[tuple[int, bytes]]:
    """The values of one array, or values that follow each other: the byte at which each begins, and
    its bytes.
    """
    text = _Window(blocks, name, text_field)
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


def not_json(where: str, text_field: str, fault: str) -> UserError:
    return UserError(f'{where} is not JSON ({fault}): expected objects such as {{"{text_field}": "..."}}')


def too_long(where: str) -> UserError:
    most = f"{MOST_VALUE_BYTES >> 20} MB"
    return UserError(f"{where} holds a JSON value of more than {most}: split it, or put its text into a .txt file")


class _Window:
    """JSON text that arrives in blocks, as far as it is held; the next character is at `at`.

    Each byte is read as one character (latin-1), because outside of strings JSON is ASCII, so a
    value ends where it would end as UTF-8, and what is not UTF-8 stays as it is. Python's parser
    finds the end. Not ijson: its fast backend replaces lone surrogates by question marks, and stops
    at NaN and at the first byte that is not UTF-8.
    """

    def __init__(self, blocks: Iterator[bytes], name: str, text_field: str) -> None:
        self._blocks, self._name, self._text_field = blocks, name, text_field
        self._held, self.at, self._dropped, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is not white space; an empty string at the end."""
        while True:
            found = _SPACE.match(self._held, self.at)
            assert found is not None  # the pattern matches nothing at all, too
            self.at = found.end()
            if self.at < len(self._held) or self._ended:
                return self._held[self.at : self.at + 1]
            self._read_on()

    def take(self, expected: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found or found not in expected:
            raise self.malformed(f"Expecting {' or '.join(map(repr, expected))}", self.at)
        self.at += 1
        return found

    def value(self) -> tuple[int, bytes]:
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
        if end - self.at > MOST_VALUE_BYTES:
            raise too_long(f"{self._name} at byte {self._dropped + self.at}")
        found = self._dropped + self.at, self._held[self.at : end].encode("latin-1")
        self.at = end
        return found

    def malformed(self, fault: str, at: int) -> UserError:
        return not_json(self._name, self._text_field, f"{fault} at byte {self._dropped + at}")

    def _read_on(self) -> None:
        """Drop what was passed.

        What is left becomes twice as long at least, so that a value of n bytes costs 2 n to parse.
        """
        pieces = [self._held[self.at :]]
        self._dropped += self.at
        size = len(pieces[0])
        if size > MOST_VALUE_BYTES:
            raise too_long(f"{self._name} at byte {self._dropped}")
        wanted = 2 * size
        while size <= wanted and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            pieces.append(block.decode("latin-1"))
            size += len(block)
        self._held, self.at = "".join(pieces), 0
