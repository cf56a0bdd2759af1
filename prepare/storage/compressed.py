"""Compressed files, read to their last member or frame, with a limit on how far they may expand."""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

from pipeline.errors import UserError, one_line
from prepare.formats import compression_of
from prepare.storage.files import name_of, open_bytes, reading, shown
from prepare.units import BLOCK_BYTES, Unreadable

# English compresses to a third, logs to a twentieth, zeros to a thousandth: beyond this ratio a
# file is a bomb.
MOST_EXPANSION, FREE_BYTES = 250, 64 << 20
# zstd expands 32,768-fold at most and takes no limit on its output, so that a step of a bomb gives
# 67 MB.
STEP_BYTES = 2048
# What `zstd` accepts without --long=28 and more; xz -9 needs 65 MB.
ZSTD_WINDOW_BYTES, XZ_MEMORY_BYTES = 1 << 27, 1 << 28
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF8, UTF16, UTF32 = "utf-8", "utf-16", "utf-32"
UNMARKED = "UTF-16 without a byte order mark"
DAMAGED = "damaged"
# As much of a file as tells its encoding, and the share of NUL in it that means UTF-16: of text in
# ASCII every other byte. More than that is a hole of NUL bytes.
HEAD_BYTES = 4096
LEAST_NUL, MOST_NUL = 0.4, 0.8
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\x00", ".bz2": b"BZh"}


def text_blocks(path: str) -> Iterator[bytes]:
    """A file's text in UTF-8, decompressed, without a byte order mark, in blocks that are never
    empty.

    Raises UserError for a file that cannot be read at all and for a decompression bomb, and
    Unreadable where the rest is damaged or missing.
    """
    with reading(path), open_bytes(path) as file:
        yield from _as_utf8(_content(file.read, shown(path), compression_of(name_of(path))))


def recognized_blocks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """As `text_blocks`, of a stream without a suffix: its first bytes tell how it is compressed."""
    head = file.read(HEAD_BYTES)
    compression = next((name for name, magic in MAGIC.items() if head.startswith(magic)), "")
    unread = iter((head,))
    yield from _as_utf8(_content(lambda size: next(unread, b"") or file.read(size), name, compression))


def _content(read: Callable[[int], bytes], name: str, compression: str) -> Iterator[bytes]:
    return _decompressed(read, name, compression) if compression else iter(partial(read, BLOCK_BYTES), b"")


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a file tell; `UNMARKED` where they only look like it."""
    # UTF-32 first: in little-endian order its mark begins as that of UTF-16 does.
    for name, marks in ((UTF32, (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)), (UTF16, (codecs.BOM_LE, codecs.BOM_BE))):
        if head.startswith(marks):
            return name
    share = head[:HEAD_BYTES].count(0) / max(len(head[:HEAD_BYTES]), 1)
    return UNMARKED if len(head) >= 4 and LEAST_NUL <= share <= MOST_NUL else UTF8


def _as_utf8(content: Iterator[bytes]) -> Iterator[bytes]:
    head = next(content, b"")
    encoding = encoding_of(head)
    if encoding == UNMARKED:
        raise Unreadable(UNMARKED, "NUL bytes between all others: convert it with iconv -t UTF-8")
    if encoding == UTF8:
        yield from filter(None, chain((head.removeprefix(BYTE_ORDER_MARK),), content))
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in chain((head,), content):
            if text := decoder.decode(block):
                yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise Unreadable(f"not {encoding.upper()}", one_line(error)) from None


def _decompressed(read_bytes: Callable[[int], bytes], name: str, compression: str) -> Iterator[bytes]:
    begin, limit = _decompressor(name, compression)
    read = partial(read_bytes, 32 * STEP_BYTES if limit else STEP_BYTES)
    unused, held, taken, size = b"", bytearray(), 0, 0
    fault, recognized = "", False
    while not fault and (unused or (unused := read())):
        if not (unused := unused.lstrip(b"\0")):  # tapes and some copying programs pad with zeros
            continue
        recognized = recognized or unused.startswith(MAGIC[compression])
        member = begin()
        while not member.eof:
            if not unused and getattr(member, "needs_input", True) and not (unused := read()):
                fault = f"{name} is truncated"
                break
            try:
                block = member.decompress(unused, *limit)
            except Exception as error:  # each library raises its own kinds
                fault = f"{name} is damaged ({one_line(error)})"
                break
            rest = member.unused_data if member.eof else getattr(member, "unconsumed_tail", b"")
            taken, size, unused = taken + len(unused) - len(rest), size + len(block), rest
            if size > max(FREE_BYTES, MOST_EXPANSION * taken):
                raise UserError(
                    f"{name} looks like a decompression bomb: {taken:,} bytes of it expand to {size:,}, the limit is "
                    f"{MOST_EXPANSION} times as many; if that is intended, decompress it first"
                )
            held += block
            if len(held) >= BLOCK_BYTES:
                yield bytes(held)
                held.clear()
    if held:  # also what stands before the damage
        yield bytes(held)
    if fault and not recognized:
        raise UserError(f"{fault}: download or compress it again")
    if fault:
        raise Unreadable(DAMAGED, f"{fault} after {size:,} bytes of text: download or compress it again")


def _decompressor(name: str, compression: str) -> tuple[Callable[[], Any], tuple[int, ...]]:
    """What begins a member or frame, and the limit on the output of a step where the library takes
    one.
    """
    limited: dict[str, Callable[[], Any]] = {
        ".gz": partial(zlib.decompressobj, wbits=31),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": partial(lzma.LZMADecompressor, memlimit=XZ_MEMORY_BYTES),
    }
    if compression in limited:
        return limited[compression], (BLOCK_BYTES,)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {name} needs a package that is not installed: pip install zstandard") from None
    # Frame by frame, because its stream_reader takes a truncated file for a complete one.
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj, ()
