"""Text in blocks -> what lies between separators, such as lines."""

from collections.abc import Iterator

from prepare.units import Refused, Unreadable

NEWLINE = b"\n"


def each_piece(
    blocks: Iterator[bytes], most_bytes: int, separator: bytes = NEWLINE
) -> Iterator[tuple[int, bytes | int | Refused]]:
    """The pieces of a text, empty ones too, except after a separator at its end: the byte at which
    each begins, and its bytes.

    Of a piece above `most_bytes` only the byte at which it ends. If the blocks end in Unreadable,
    the piece that was begun is refused.
    """
    # Of the piece that was begun: the first byte, how many bytes are known not to be a separator,
    # their text unless it is too long, and the bytes after them, which may begin a separator.
    begin, passed, held, tail = 0, 0, bytearray(), b""
    try:
        for block in blocks:
            *ended, rest = (tail + block).split(separator)
            for end in ended:
                length = passed + len(end)
                # A bytearray grows in place: joining bytes would copy a piece of n blocks n times.
                text = bytes(held) + end if held else end
                yield begin, text if length <= most_bytes else begin + length
                begin, passed = begin + length + len(separator), 0
                held.clear()
            known = max(len(rest) - len(separator) + 1, 0)
            passed, tail = passed + known, rest[known:]
            held += rest[:known]
            if passed > most_bytes:
                held.clear()
    except Unreadable as fault:
        yield begin, fault.refused
        return
    if length := passed + len(tail):
        yield begin, bytes(held) + tail if length <= most_bytes else begin + length
