"""Who encodes: the tokenizer itself, or for GPT-2's vocabulary gigatoken, which is never trusted.

gigatoken is about ten times as fast as tiktoken, and young; tiktoken says what is right. Characters that the two class
differently go to tiktoken. Of the rest tiktoken encodes a slice too, and the byte count has to come out.
The first fault ends gigatoken's use for the whole dataset, so what is written depends on tiktoken alone.
"""

import os
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
from pipeline.vocabulary.char_byte_word import UNICODE_CODE_POINTS, code_points
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer

# Beside each unit's first documents, one in so many, by its hash, is encoded by both: a twentieth of the time.
CHECK_ONE_IN = 256
CHECK_FIRST = 2
# gigatoken remembers every piece it ever saw: 1 MB for each MB of ordinary text, up to 9 for text of random letters. It
# is built anew, in 20 to 50 ms, when it has grown by so much; where its size is not told, after so much text.
MOST_GROWTH_BYTES = 100 << 20
MOST_TEXT_BYTES = 16 << 20
# Tokens are counted back into bytes so much text at a time: document by document takes four times as long.
BYTES_AT_ONCE = 1 << 18
NO_IDS = np.zeros(0, np.uint32)
BLOCK = 512
ASCII = bytes(range(128))
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class EngineFault(Exception):
    """gigatoken did something else than tiktoken; the text says what. Raised in a worker, it reaches the parent."""


class Engine(Protocol):
    name: str

    def begin_unit(self) -> None: ...

    def encode(self, content: bytes) -> TokenIds:
        """Ids of a text given as UTF-8. Raises ValueError where the tokenizer refuses it."""
        ...

    def end_unit(self) -> None:
        """Vouch for every id since `begin_unit`."""
        ...


def can_be_faster(name: str) -> bool:
    """Whether gigatoken has the tokenizer of this name."""
    return name == "gpt2" and find_spec("gigatoken") is not None


class Plain:
    """The tokenizer itself."""

    name = "plain"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def begin_unit(self) -> None: ...

    def end_unit(self) -> None: ...

    def encode(self, content: bytes) -> TokenIds:
        try:
            return self._tokenizer.encode(content.decode())
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of Rust, and no Exception
                raise ValueError(str(error)) from None
            raise


class Gigatoken:
    """GPT-2's vocabulary as tiktoken encodes it, faster. Raises EngineFault where that cannot be kept."""

    name = "gigatoken"

    def __init__(self) -> None:
        tokenizer = BytePairTokenizer("gpt2")
        self._reference = Plain(tokenizer)
        # The length of each token; nothing for end-of-text, which no text gives.
        self._byte_counts = np.array([*map(len, tokenizer.ranks()), 0])
        self._uncounted: list[TokenIds] = []
        self._uncounted_bytes = 0
        self._build()
        self._to_check = CHECK_FIRST

    def begin_unit(self) -> None:
        """Check the next documents."""
        self._to_check = CHECK_FIRST

    def _forget(self) -> None:
        """What gigatoken remembers, when it has become too much: also in the midst of a long document."""
        if _STATM.exists() and self._encoded_bytes:
            if _resident_bytes() - self._built_at > MOST_GROWTH_BYTES:
                self._build()
        elif self._encoded_bytes > MOST_TEXT_BYTES:
            self._build()

    def encode(self, content: bytes) -> TokenIds:
        if not content.isascii() and self._is_disputed(content):
            return self._reference.encode(content)
        ids = self._encode_fast(content)
        if self._to_check or xxhash.xxh3_64_intdigest(content) % CHECK_ONE_IN == 0:
            self._to_check = max(self._to_check - 1, 0)
            if not np.array_equal(ids, self._reference.encode(content)):
                raise EngineFault("differs from tiktoken")
        return ids

    def end_unit(self) -> None:
        """Every byte that went in has to be in the tokens that came out."""
        self._count_bytes()

    def _encode_fast(self, content: bytes) -> TokenIds:
        self._encoded_bytes += len(content)
        self._uncounted_bytes += len(content)
        try:
            ids: TokenIds = self._fast.encode(content)
        except BaseException as error:
            raise _fault(error) from None
        self._uncounted.append(ids)
        if self._uncounted_bytes >= BYTES_AT_ONCE:
            self._count_bytes()
        return ids

    def _count_bytes(self) -> None:
        ids = np.concatenate([*self._uncounted, NO_IDS])
        there = int(self._byte_counts.take(ids, mode="clip").sum())
        if there != self._uncounted_bytes or (ids.size and ids.max() >= len(self._byte_counts)):
            raise EngineFault("lost or added text")
        self._uncounted, self._uncounted_bytes = [], 0
        self._forget()

    def _build(self) -> None:
        self._fast: Any = None  # before the next one is there, so that they never stand side by side
        try:
            self._fast = _new_gigatoken()
        except BaseException as error:
            raise _fault(error) from None
        self._encoded_bytes = 0
        self._built_at = _resident_bytes() if _STATM.exists() else 0

    def _is_disputed(self, content: bytes) -> bool:
        points = code_points(content.translate(None, ASCII).decode())
        if not self._probed[points // BLOCK].all():
            for block in np.unique(points[~self._probed[points // BLOCK]] // BLOCK).tolist():
                self._probe(block)
        return bool(self._disputed[points].any())

    @cached_property
    def _probed(self) -> npt.NDArray[np.bool_]:
        """The blocks of code points of which `_disputed` knows; the surrogates are in no text."""
        return np.zeros(UNICODE_CODE_POINTS // BLOCK, dtype=np.bool_)

    @cached_property
    def _disputed(self) -> npt.NDArray[np.bool_]:
        """By code point, the characters that the engines class differently: gigatoken 0.10 knows a later Unicode."""
        return np.zeros(UNICODE_CODE_POINTS, dtype=np.bool_)

    def _probe(self, block: int) -> None:
        characters = [chr(point) for point in range(block * BLOCK, (block + 1) * BLOCK)]
        characters = [character for character in characters if not "\ud800" <= character <= "\udfff"]
        if self._differ("".join(characters)):
            self._disputed[[ord(character) for character in characters if self._differ(character)]] = True
        self._probed[block] = True

    def _differ(self, characters: str) -> bool:
        """A letter or digit leaves the 's behind it whole; any other character takes the quote with it."""
        probe = "".join(f"{character}'s" for character in characters).encode()
        return not np.array_equal(self._encode_fast(probe), self._reference.encode(probe))


def _fault(error: BaseException) -> BaseException:
    """What gigatoken raised, as an EngineFault: a Rust panic is no Exception. An interrupt stays one."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    return EngineFault(f"raised {type(error).__name__} ({error})")


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


def _new_gigatoken() -> Any:
    import gigatoken

    # Without special tokens: a literal <|endoftext|> is ordinary text.
    return gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="gpt2")
