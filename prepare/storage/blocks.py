"""Blocks of bytes as a file, for libraries that read one."""

import io
from collections.abc import Iterator
from typing import Any


class BlockFile(io.RawIOBase):
    """What the blocks raise passes through."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
