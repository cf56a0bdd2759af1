"""Text <-> token ids: what every vocabulary has in common.

A tokenizer is described by a small JSON object, its spec: the manifest carries it from `prepare` to
`train`, the checkpoint from `train` to `sample`, so a vocabulary is chosen once. A vocabulary that
is not part of this package is in a file next to the spec, and the spec has its fingerprint.
A literal "<|endoftext|>" in a text is ordinary text; only `prepare` writes the end-of-text token,
after each document.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# Of a file that is read into memory: twice the largest tokenizer.json in use.
MAX_VOCABULARY_BYTES = 1 << 26
RANKS_FILE, JSON_FILE = "vocabulary.tiktoken", "tokenizer.json"

TokenIds = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> TokenIds:
        """(tokens,) ids of `text`, without end-of-text, in the dtype `token_dtype(vocab_size)`.

        Raises UserError for a character outside the vocabulary, ValueError for a text that the
        underlying library rejects.
        """

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end inside a character.

        Every id below vocab_size decodes; an id that no text gives decodes to nothing.
        """

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """(vocab_size,) bytes of text per id, 0 for end-of-text.

        None if that depends on the neighbouring ids.
        """

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build this tokenizer again.

        `fingerprint` identifies the vocabulary's content.
        """

    def files(self) -> dict[str, bytes]:
        """Name -> content of the file that belongs next to the spec.

        Empty if the spec is enough.
        """


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text to continue. Raises UserError if there are none."""
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except ValueError as error:
        raise UserError(f"the tokenizer cannot encode the prompt ({error}): try another one") from None
    if not ids:
        raise UserError("the prompt has no tokens: give some text, or no prompt to start a new document")
    return ids


# ---- for the tokenizers of this package ----


def spec_of(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    fixed = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    return {**fixed, **more}


@contextmanager
def refuse_surrogates() -> Iterator[None]:
    """Makes a UserError of lone surrogates, Python's form of an argument that is not UTF-8."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at position {error.start}: expected UTF-8") from None


class TokenTable:
    """The decoding half of a tokenizer whose ids stand for the same bytes wherever they are.

    Some may stand for none.
    """

    def __init__(self, tokens: Mapping[int, bytes], vocab_size: int, end_of_text: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, end_of_text
        named = {end_of_text: END_OF_TEXT.encode(), **tokens}
        self.tokens = [named.get(i, b"") for i in range(vocab_size)]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(map(self.tokens.__getitem__, ids))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        lengths = np.array([len(token) for token in self.tokens])
        lengths[self.end_of_text] = 0
        return lengths

    def files(self) -> dict[str, bytes]:
        return {}
