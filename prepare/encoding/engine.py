"""What encodes: the tokenizer itself or, for GPT-2's vocabulary, a faster library under constant
checks.

On one core gigatoken encodes about ten times as fast as tiktoken and fastokens two to four times,
but tiktoken defines what is right. Texts with characters that the two classify differently go to
tiktoken. Of the rest, tiktoken encodes a sample too, and all bytes of the text have to be in the
tokens. The first fault ends the use of the library for the whole dataset, so the bytes written
depend on tiktoken alone.
"""

import os
from collections.abc import Callable, Set
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xxhash

from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
from pipeline.vocabulary.char_byte_word import UNICODE_CODE_POINTS, code_points
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer

# Both libraries encode the first documents of each process, and of the others one in so many,
# chosen by its hash so that the choice follows from the text: a thirtieth of the run time.
CHECK_ONE_IN = 256
CHECK_FIRST = 2
# A library may cache every word it has seen; of gigatoken that is 1 MB per MB of ordinary text, up to 9 MB per MB of random
# letters. It is rebuilt, in 20 to 50 ms, once the process has grown by so much or, where /proc does
# not tell, after so much text.
MAX_GROWTH_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20
# Text per check that its tokens have as many bytes: a check per document takes four times as long.
CHECK_BYTES = 1 << 20
NO_IDS = np.zeros(0, np.uint32)
PLAIN = "plain"
# Characters are compared in blocks of this many code points, when the first of a block is met.
BLOCK = 512
ASCII = bytes(range(128))
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


Encode = Callable[[bytes], TokenIds]


class EngineFault(Exception):
    """A faster library differed from tiktoken; the message says how.

    Raised in a worker, it reaches the parent process.
    """


def fast_libraries(name: str, distrusted: Set[str]) -> list[str]:
    """The libraries that are installed, have this tokenizer and were not at fault: the fastest
    first.
    """
    return [each for each in _BUILDERS if name == "gpt2" and each not in distrusted and find_spec(each) is not None]


class Plain:
    """The tokenizer itself."""

    name = PLAIN

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def end_unit(self) -> None: ...

    def encode(self, content: bytes) -> TokenIds:
        """The ids of a UTF-8 text. Raises ValueError if the tokenizer refuses it."""
        try:
            return self._tokenizer.encode(content.decode())
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # a Rust panic derives from BaseException
                raise ValueError(str(error)) from None
            raise


class Checked:
    """GPT-2's vocabulary as tiktoken encodes it, by a faster library.

    Raises EngineFault at the first sign of a difference.
    """

    def __init__(self, library: str) -> None:
        self.name = library
        tokenizer = BytePairTokenizer("gpt2")
        self._reference = Plain(tokenizer)
        # The longest has 128 bytes; a table of int64 takes half as long again to look up.
        self._byte_counts = tokenizer.token_bytes().astype(np.uint8)
        self._uncounted: list[TokenIds] = []
        self._uncounted_bytes = 0
        # By code point, the characters that the two classify differently, as each library follows
        # a Unicode version of its own; and the blocks of code points for which that is known.
        self._disputed = np.zeros(UNICODE_CODE_POINTS, np.bool_)
        self._probed = np.zeros(UNICODE_CODE_POINTS // BLOCK, np.bool_)
        self._to_check = CHECK_FIRST
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
        """Raise EngineFault unless the tokens have as many bytes as the text."""
        self._count_bytes()

    def _encode_fast(self, content: bytes) -> TokenIds:
        self._encoded_bytes += len(content)
        self._uncounted_bytes += len(content)
        try:
            ids = self._fast(content)
        except BaseException as error:
            raise _fault(error) from None
        self._uncounted.append(ids)
        if self._uncounted_bytes >= CHECK_BYTES:
            self._count_bytes()
        return ids

    def _count_bytes(self) -> None:
        ids = np.concatenate([*self._uncounted, NO_IDS])
        token_bytes = int(self._byte_counts.take(ids, mode="clip").sum(dtype=np.int64))
        if token_bytes != self._uncounted_bytes or (ids.size and ids.max() >= len(self._byte_counts)):
            raise EngineFault("lost or added text")
        self._uncounted, self._uncounted_bytes = [], 0
        self._limit_cache()

    def _limit_cache(self) -> None:
        """Rebuild the library once its cache is too large, also in the middle of a long document."""
        if _STATM.exists() and self._encoded_bytes:
            if _resident_bytes() - self._built_at > MAX_GROWTH_BYTES:
                self._build()
        elif self._encoded_bytes > MAX_TEXT_BYTES:
            self._build()

    def _build(self) -> None:
        self._fast: Encode = self._reference.encode  # frees the library: there are never two in memory
        try:
            self._fast = _BUILDERS[self.name]()
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

    def _probe(self, block: int) -> None:
        characters = [chr(point) for point in range(block * BLOCK, (block + 1) * BLOCK)]
        # Surrogates are in no UTF-8 text.
        characters = [character for character in characters if not "\ud800" <= character <= "\udfff"]
        if self._differ("".join(characters)):
            self._disputed[[ord(character) for character in characters if self._differ(character)]] = True
        self._probed[block] = True

    def _differ(self, characters: str) -> bool:
        """Whether the two classify any of the characters differently."""
        # After a letter or digit 's is a word; any other character takes the quote into its word.
        probe = "".join(f"{character}'s" for character in characters).encode()
        return not np.array_equal(self._encode_fast(probe), self._reference.encode(probe))


Engine = Plain | Checked


def _fault(error: BaseException) -> BaseException:
    """What a library raised as an EngineFault, Rust panics (BaseException) among them.

    An interrupt is left as it is.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    return EngineFault(f"raised {type(error).__name__} ({error})")


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


def _gigatoken() -> Encode:
    import gigatoken

    # Without special tokens: a literal <|endoftext|> is ordinary text.
    encode: Encode = gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="gpt2").encode
    return encode


def _fastokens() -> Encode:
    from fastokens import Tokenizer

    pattern = BytePairTokenizer("gpt2").pattern()
    encode_batch = Tokenizer.from_tiktoken(str(GPT2_RANKS), pattern=pattern, special_tokens={}).encode_batch_flat
    # The ids arrive as little-endian bytes: a list of Python integers takes twice the time.
    return lambda content: np.frombuffer(encode_batch([content.decode()])[0], "<u4")


_BUILDERS: dict[str, Callable[[], Encode]] = {"gigatoken": _gigatoken, "fastokens": _fastokens}
