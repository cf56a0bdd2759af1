"""What .gz and .zst hold, unpacked block by block to their end: all members, all frames, and never without a limit."""

import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError
from prepare.storage.files import name_of, open_bytes, reading, shown
from prepare.units import BLOCK_BYTES

COMPRESSIONS = (".gz", ".zst")
# A file that unfolds to more than this is a bomb: English shrinks to a third, logs to a twentieth, zeros to a thousandth.
MOST_UNFOLDING = 250
FREE_BYTES = 64 << 20
# English shrinks to about a third: for progress, and to share the work.
USUAL_UNFOLDING = 3
# Fed in so small steps, a zstd bomb (32,768-fold at most) unfolds to 67 MB in one of them.
ZSTD_STEP_BYTES = 2048
# What `zstd` itself allows without --long=28 and more.
ZSTD_WINDOW_BYTES = 1 << 27
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def compression(name: str) -> str:
    """The suffix that says how a file is packed, or nothing."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def text_blocks(path: str) -> Iterator[bytes]:
    """A file's text from its beginning, unpacked, without a byte order mark."""
    content = unpacked(path)
    head = b""
    for block in content:
        head += block
        if len(head) >= len(BYTE_ORDER_MARK):
            break
    if head := head.removeprefix(BYTE_ORDER_MARK):
        yield head
    yield from content


def unpacked(path: str) -> Iterator[bytes]:
    """A file's bytes, unpacked, in blocks that are never empty. Raises UserError for damage, with its place."""
    packing = compression(name_of(path))
    with reading(path), open_bytes(path) as file:
        if not packing:
            while block := file.read(BLOCK_BYTES):
                yield block
            return
        source = _Source(path, file)
        steps = _gzip(source) if packing == ".gz" else _zstd(source)
        size = 0
        for block in steps:
            size += len(block)
            # By what was taken from the file so far, which at its end is all of it.
            if size > FREE_BYTES and size > MOST_UNFOLDING * source.taken:
                raise UserError(
                    f"{shown(path)} unfolds like a bomb: {source.taken:,} bytes of it gave {size:,}, the limit is "
                    f"{MOST_UNFOLDING} times as many; unpack it yourself if it is meant"
                )
            if block:
                yield block


class _Source:
    """A packed file, read in order, which knows its place for the words of an error."""

    def __init__(self, path: str, file: Any) -> None:
        self.path, self._file, self.taken = path, file, 0

    def take(self, count: int) -> bytes:
        content: bytes = self._file.read(count)
        self.taken += len(content)
        return content

    def damaged(self, what: str, unused: int = 0) -> UserError:
        kind = compression(name_of(self.path))
        return UserError(
            f"{shown(self.path)} is damaged near byte {self.taken - unused:,} of the {kind} file: {what}; "
            "fetch or pack it again"
        )


def _gzip(source: _Source) -> Iterator[bytes]:
    content = source.take(BLOCK_BYTES)
    while content:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not content and not (content := source.take(BLOCK_BYTES)):
                raise source.damaged("it ends in the middle (truncated)")
            try:
                yield member.decompress(content, BLOCK_BYTES)
            except zlib.error as error:
                raise source.damaged(str(error), len(content)) from None
            content = member.unconsumed_tail if not member.eof else member.unused_data
        # Tapes and some copiers pad with zeros behind the last member.
        while not (content := content.lstrip(b"\0")) and (content := source.take(BLOCK_BYTES)):
            pass
        if content and not content.startswith(b"\x1f"):
            raise source.damaged("what follows is not gzip", len(content))


def _zstd(source: _Source) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{shown(source.path)} needs the package zstandard: pip install zstandard") from None

    unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    content = source.take(ZSTD_STEP_BYTES)
    while content:
        frame = unpacker.decompressobj()
        while not frame.eof:
            if not content and not (content := source.take(ZSTD_STEP_BYTES)):
                raise source.damaged("it ends in the middle (truncated)")
            try:
                yield frame.decompress(content)
            except zstandard.ZstdError as error:
                raise source.damaged(str(error), len(content)) from None
            content = frame.unused_data if frame.eof else b""
        content = content or source.take(ZSTD_STEP_BYTES)
