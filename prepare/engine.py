"""A faster encoder for GPT-2's vocabulary, gigatoken, that is never trusted: tiktoken says what is right.

gigatoken is about ten times as fast, and young. What is known to differ goes to tiktoken: text so long that tiktoken may
refuse it, and characters that only one of the two knows. Of the rest tiktoken encodes a slice too, and the byte count
of every document has to come out. The first fault ends its use for the whole dataset, so what is written depends on
tiktoken alone, and nothing written names the engine.
"""

from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.tokenizer import (
    GPT2_RANKS,
    UNICODE_CODE_POINTS,
    BytePairTokenizer,
    TokenIds,
    Tokenizer,
    code_points,
    token_dtype,
)

# tiktoken refuses whitespace from about 1 M characters on; gigatoken refuses nothing.
MOST_CHARACTERS = 500_000
# Beside each unit's first document, one in so many, by its hash, is encoded by both: about a fifth of the time.
CHECK_ONE_IN = 64
# gigatoken keeps every piece it ever saw: 1 to 5 MB for each MB of new words. Building it anew takes 45 ms.
REBUILD_BYTES = 32 << 20
# Letters are added to Unicode year by year, in these planes; the engines need not know the same year's.
PLANES_WITH_LETTERS = 0x40000
BLOCK = 512


class EngineFault(Exception):
    """gigatoken did something else than tiktoken; the text says what. Raised in a worker, it reaches the parent."""


def can_be_faster(tokenizer: Tokenizer) -> bool:
    return tokenizer.name == "gpt2" and find_spec("gigatoken") is not None


class Gigatoken(BytePairTokenizer):
    """GPT-2's vocabulary as its parent encodes it, faster. Raises EngineFault where that cannot be kept."""

    def __init__(self) -> None:
        super().__init__("gpt2")
        self._fast: Any = None
        self._encoded_bytes = 0
        self._check_next = True

    def begin_unit(self) -> None:
        """Check the next document; forget what gigatoken remembers, from time to time."""
        self._check_next = True
        if self._encoded_bytes >= REBUILD_BYTES:
            self._fast, self._encoded_bytes = None, 0

    def encode(self, text: str) -> TokenIds:
        if len(text) > MOST_CHARACTERS or (not text.isascii() and self._disputed[code_points(text)].any()):
            return super().encode(text)
        content = text.encode()
        ids = self._encode_fast(content)
        if self._check_next or xxhash.xxh3_64_intdigest(content) % CHECK_ONE_IN == 0:
            self._check_next = False
            if not np.array_equal(ids, super().encode(text)):
                raise EngineFault("differs from tiktoken")
        return ids

    def _encode_fast(self, content: bytes) -> TokenIds:
        self._encoded_bytes += len(content)
        try:
            self._fast = self._fast or _build()
            ids = self._fast.encode(content)
            whole = int(self._byte_counts[ids].sum()) == len(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise EngineFault(f"raised {type(error).__name__} ({error})") from None
        if not whole:
            raise EngineFault("lost or added text")
        narrow: TokenIds = ids.astype(token_dtype(self.vocab_size))
        return narrow

    @cached_property
    def _byte_counts(self) -> npt.NDArray[np.int64]:
        """The length of each token; nothing for end-of-text, which no text gives."""
        return np.array([*map(len, self.ranks()), 0])

    @cached_property
    def _disputed(self) -> npt.NDArray[np.bool_]:
        """By code point, the characters that the engines class differently: gigatoken 0.10 knows a later Unicode."""
        characters = "".join(map(chr, [*range(0xD800), *range(0xE000, PLANES_WITH_LETTERS)]))
        blocks = (characters[at : at + BLOCK] for at in range(0, len(characters), BLOCK))
        found = "".join(c for block in blocks if self._differ(block) for c in block if self._differ(c))
        table = np.zeros(UNICODE_CODE_POINTS, dtype=np.bool_)
        table[code_points(found)] = True
        return table

    def _differ(self, characters: str) -> bool:
        """A letter or digit leaves the 's behind it whole; any other character takes the quote with it."""
        probe = "".join(f"{character}'s" for character in characters)
        return not np.array_equal(self._encode_fast(probe.encode()), super().encode(probe))


def _build() -> Any:
    import gigatoken

    # Without special tokens: a literal <|endoftext|> is ordinary text.
    return gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="gpt2")
