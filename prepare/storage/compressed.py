"""Compressed files, read to their last member or frame, with a limit on how far they may expand."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

from pipeline.errors import UserError, one_line
from prepare.formats import compression_of
from prepare.storage.files import name_of, open_bytes, reading, shown
from prepare.units import BLOCK_BYTES

# English compresses to a third, logs to a twentieth, zeros to a thousandth: beyond this ratio a
# file is a bomb.
MOST_EXPANSION, FREE_BYTES = 250, 64 << 20
# zstd expands 32,768-fold at most and takes no limit on its output, so that a step of a bomb gives
# 67 MB.
STEP_BYTES = 2048
# What `zstd` accepts without --long=28 and more; xz -9 needs 65 MB.
ZSTD_WINDOW_BYTES, XZ_MEMORY_BYTES = 1 << 27, 1 << 28
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def text_blocks(path: str) -> Iterator[bytes]:
    """A file's text, decompressed, without a byte order mark, in blocks that are never empty.

    Raises UserError for a damaged or truncated file, and for a decompression bomb.
    """
    with reading(path), open_bytes(path) as file:
        content = iter(lambda: file.read(BLOCK_BYTES), b"")
        if compression := compression_of(name_of(path)):
            content = _decompressed(file, shown(path), compression)
        if head := next(content, b"").removeprefix(BYTE_ORDER_MARK):
            yield head
        yield from content


def _decompressed(file: BinaryIO, name: str, compression: str) -> Iterator[bytes]:
    begin, limit = _decompressor(name, compression)
    read = partial(file.read, 32 * STEP_BYTES if limit else STEP_BYTES)
    unused, held, taken, size = b"", bytearray(), 0, 0
    while unused or (unused := read()):
        if not (unused := unused.lstrip(b"\0")):  # tapes and some copying programs pad with zeros
            continue
        member = begin()
        while not member.eof:
            if not unused and getattr(member, "needs_input", True) and not (unused := read()):
                raise UserError(f"{name} is truncated: download or compress it again")
            try:
                block = member.decompress(unused, *limit)
            except Exception as error:  # each library raises its own kinds
                raise UserError(f"{name} is damaged ({one_line(error)}): download or compress it again") from None
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
    if held:
        yield bytes(held)


def _decompressor(name: str, compression: str) -> tuple[Callable[[], Any], tuple[int, ...]]:
    """What begins a member or frame, and the limit on the output of a step where the library takes
    one.
    """
    if compression == ".gz":
        return lambda: zlib.decompressobj(wbits=31), (BLOCK_BYTES,)
    if compression == ".bz2":
        return bz2.BZ2Decompressor, (BLOCK_BYTES,)
    if compression == ".xz":
        return lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES), (BLOCK_BYTES,)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {name} needs a package that is not installed: pip install zstandard") from None
    # Frame by frame, because its stream_reader takes a truncated file for a complete one.
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj, ()
