"""JSON that is too large to hold: values are cut out of a stream, and a long string is decoded block by block.

What is short goes through orjson. A long value is walked here: its top level exactly, what nests below it by brackets
and strings alone, because only one field of it is wanted.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from pipeline.errors import UserError
from prepare.storage.files import blocks
from prepare.units import LONE_SURROGATE, LONG_BYTES, NOT_UTF8, NULL, Document, Refused, no_field, no_text, utf8

LONGEST_SCALAR = 1 << 16
MOST_NAMES_SHOWN = 20
DEEPEST_NESTING = 1000
_SPACE = re.compile(rb"[ \t\r\n]*+")
_IN_STRING = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
_OUTSIDE = re.compile(rb'[^"{}\[\]]*+')
_SCALAR = re.compile(rb"[-+.\w]*+")
_LONGEST_ESCAPE = 6
# Whole escapes only, and a surrogate pair only whole: orjson takes no half of one.
_DECODABLE = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)
_CLOSERS = {b"{": b"}", b"[": b"]"}


class Malformed(Exception):
    """Not JSON; the text says what was found and where."""


class Cursor:
    """Walks through JSON that arrives in blocks, and holds no more than it must; `at` is its place in the whole."""

    def __init__(self, content: Iterator[bytes], at: int = 0) -> None:
        self._content, self._begin = content, at
        self._buffer, self._next = b"", 0
        self._mark = 0
        self._keep: Callable[[bytes], None] = _drop

    @property
    def at(self) -> int:
        return self._begin + self._next

    def peek(self) -> bytes:
        """The next byte that is not white space; none at the end."""
        self._run(_SPACE)
        return self._buffer[self._next : self._next + 1]

    def take(self, *wanted: bytes) -> bytes:
        found = self.peek()
        if found not in wanted or not found:
            raise self.malformed(f"wanted {' or '.join(map(bytes.decode, wanted))}")
        self._next += 1
        return found

    def keeping(self, keep: Callable[[bytes], None], walk: Callable[[], Any]) -> Any:
        """What `walk` passes over is handed to `keep`, piece by piece."""
        self.peek()
        self._mark, self._keep = self._next, keep
        result = walk()
        self._hand_over()
        self._keep = _drop
        return result

    def string(self) -> tuple[int, int]:
        """Pass over a string; where its content lies."""
        self.take(b'"')
        begin = self.at
        while True:
            self._run(_IN_STRING)
            if self._buffer[self._next : self._next + 1] == b'"':
                self._next += 1
                return begin, self.at - 1
            if len(self._buffer) - self._next >= _LONGEST_ESCAPE or not self._refill():
                raise self.malformed("wanted a string's end, no control character and no unknown escape")

    def value(self) -> Any:
        """Pass over a value: where a string's content lies, a scalar itself, an empty list or dict for what nests."""
        first = self.peek()
        if first == b'"':
            return self.string()
        if first not in _CLOSERS:
            return self._scalar()
        self._nested()
        return {} if first == b"{" else []

    def drain(self) -> None:
        """Read the rest of the blocks, for what reading them may raise."""
        for _ in self._content:
            pass

    def malformed(self, what: str) -> Malformed:
        near = self._buffer[self._next : self._next + 20].decode(errors="replace") or "the end"
        return Malformed(f"{what}, found {near!r} at byte {self.at}")

    def _scalar(self) -> Any:
        while True:
            end = _end(_SCALAR, self._buffer, self._next)
            if end < len(self._buffer) or end - self._next > LONGEST_SCALAR or not self._refill():
                break
        token = self._buffer[self._next : end]
        try:
            # Python's own reader also knows NaN and Infinity, which its writer puts into many a file.
            scalar = json.loads(token)
        except ValueError:
            raise self.malformed("wanted a value") from None
        self._next = end
        return scalar

    def _nested(self) -> None:
        closers: list[bytes] = []
        while True:
            self._run(_OUTSIDE)
            found = self._buffer[self._next : self._next + 1]
            if found == b'"':
                self.string()
                continue
            if found in _CLOSERS:
                closers.append(_CLOSERS[found])
            elif not found or closers.pop() != found:
                raise self.malformed("wanted brackets that match")
            if len(closers) > DEEPEST_NESTING:
                raise self.malformed(f"wanted at most {DEEPEST_NESTING} brackets inside each other")
            self._next += 1
            if not closers:
                return

    def _run(self, pattern: re.Pattern[bytes]) -> None:
        while True:
            self._next = _end(pattern, self._buffer, self._next)
            if self._next < len(self._buffer) or not self._refill():
                return

    def _refill(self) -> bool:
        block = next(self._content, b"")
        self._hand_over()
        self._begin += self._next
        self._buffer = self._buffer[self._next :] + block
        self._next = self._mark = 0
        return bool(block)

    def _hand_over(self) -> None:
        self._keep(self._buffer[self._mark : self._next])
        self._mark = self._next


def _drop(content: bytes) -> None:
    pass


def _end(pattern: re.Pattern[bytes], content: bytes, begin: int) -> int:
    found = pattern.match(content, begin)
    assert found is not None  # each of the patterns matches nothing at all, too
    return found.end()


def each_value(cursor: Cursor) -> Iterator[bytes]:
    """Stops the cursor before each value of one array, or of values that follow each other; gives its first byte."""
    array = cursor.peek() == b"["
    if array:
        cursor.take(b"[")
        if cursor.peek() == b"]":
            cursor.take(b"]")
            array = False
    while array or cursor.peek():
        yield cursor.peek()
        if array and cursor.take(b",", b"]") == b"]":
            array = False
            if cursor.peek():
                raise cursor.malformed("wanted nothing behind the array")


def parse(content: bytes, text_field: str, place: Callable[[], str]) -> Document:
    """The text of one JSON value: an object's field, or a string itself. `place` makes words where they are needed."""
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        if isinstance(utf8(content), Refused):
            return Refused(NOT_UTF8)
        try:
            # Knows what orjson does not: halves of surrogate pairs, which may stand in another field, and NaN.
            row = json.loads(content.decode())
        except (ValueError, RecursionError):
            raise not_json(place(), text_field, str(error)) from None
    return _text_of(row, content, text_field, place)


def _text_of(row: Any, content: bytes, text_field: str, place: Callable[[], str]) -> Document:
    if isinstance(row, dict):
        if text_field not in row:
            raise UserError(no_field(place(), text_field, row))
        row = row[text_field]
        if row is not None and not isinstance(row, str):
            raise UserError(no_text(place(), text_field, row))
    if row is None:
        return Refused(NULL)
    if not isinstance(row, str):
        raise _not_an_object(place(), content)
    try:
        return row.encode()
    except UnicodeEncodeError:
        return Refused(LONE_SURROGATE)


def not_json(place: str, text_field: str, what: str) -> UserError:
    return UserError(f'{place} is not JSON ({what}): wanted objects such as {{"{text_field}": "..."}}')


def _not_an_object(place: str, content: bytes) -> UserError:
    text = content.decode().strip()
    found = text if len(text) <= 40 else text[:40] + "..."
    return UserError(f"{place} is not a JSON object but {found}: wanted objects with a field of text")


@dataclass(frozen=True)
class JsonText:
    """The string whose content, still escaped, lies in bytes [begin, end) of a file."""

    path: str
    begin: int
    end: int

    def blocks(self) -> Iterator[bytes]:
        """Raises orjson.JSONDecodeError for half a surrogate pair."""
        left = b""
        for block in blocks(self.path, self.begin, self.end):
            left += block
            cut = _whole_characters(left, _end(_DECODABLE, left, 0))
            if cut:
                yield _decoded(left[:cut])
            left = left[cut:]
            if len(left) > 2 * _LONGEST_ESCAPE:  # more than any whole pair
                _decoded(left)
        if left:
            yield _decoded(left)


def _decoded(content: bytes) -> bytes:
    text: str = orjson.loads(b'"' + content + b'"')
    return text.encode()


def _whole_characters(content: bytes, end: int) -> int:
    """Where the last whole UTF-8 character before `end` ends."""
    for back in range(1, min(4, end) + 1):
        byte = content[end - back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end if length <= back else end - back
    return end


def parse_long(path: str, begin: int, end: int, text_field: str, place: Callable[[], str]) -> Document:
    """`parse` of the bytes [begin, end) of a file, without holding them."""
    content = _checked(blocks(path, begin, end))
    try:
        found = _text_place(Cursor(content, begin), text_field, place)
    except UnicodeDecodeError:
        return Refused(NOT_UTF8)
    if found is None:
        return Refused(NULL)
    text = JsonText(path, *found)
    try:
        if text.end - text.begin <= LONG_BYTES:
            return b"".join(text.blocks())
        for _ in text.blocks():  # read through once, so that whoever takes it meets no fault in its middle
            pass
    except orjson.JSONDecodeError:
        return Refused(LONE_SURROGATE)
    return text


def _text_place(cursor: Cursor, text_field: str, place: Callable[[], str]) -> tuple[int, int] | None:
    try:
        found = cursor.string() if cursor.peek() == b'"' else _field(cursor, text_field, place)
        if cursor.peek():
            raise cursor.malformed("wanted nothing behind the value")
    except Malformed as error:
        cursor.drain()  # where bytes further on are not UTF-8, that is why they are no JSON
        raise not_json(place(), text_field, str(error)) from None
    return found


def _field(cursor: Cursor, text_field: str, place: Callable[[], str]) -> tuple[int, int] | None:
    """Where the text of an object lies, of which the cursor passes over the whole; None for null."""
    names: dict[str, None] = {}
    found: Any = names  # what no value is
    separator = cursor.take(b"{")
    if cursor.peek() == b"}":
        separator = cursor.take(b"}")
    while separator != b"}":
        name = _name(cursor)
        cursor.take(b":")
        value = cursor.value()
        if name == text_field:
            found = value  # the last of several, as every reader of JSON has it
        elif len(names) < MOST_NAMES_SHOWN:
            names[name] = None
        separator = cursor.take(b",", b"}")
    if found is names:
        raise UserError(no_field(place(), text_field, names))
    if found is not None and not isinstance(found, tuple):
        raise UserError(no_text(place(), text_field, found))
    return found


def _name(cursor: Cursor) -> str:
    head = bytearray()

    def keep(piece: bytes) -> None:
        head.extend(piece[: max(LONGEST_SCALAR - len(head), 0)])

    begin, end = cursor.keeping(keep, cursor.string)
    return str(json.loads(head.decode())) if end - begin + 2 == len(head) else head[:40].decode(errors="replace")


def _checked(content: Iterator[bytes]) -> Iterator[bytes]:
    """Raises UnicodeDecodeError where the bytes are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in content:
        decoder.decode(block)
        yield block
    decoder.decode(b"", final=True)
