"""Text <-> token ids, for every vocabulary a dataset can be made with.

A tokenizer is described by a small JSON object, its spec: the manifest carries it from `prepare` to `train`, the
checkpoint from `train` to `sample`, so a vocabulary is chosen once and never repeated. A vocabulary that does not ship
with the package lies in a file beside the spec, whose fingerprint names its content.
Literal "<|endoftext|>" in a text is ordinary text; only `prepare` writes the end-of-text id, after each document.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

MOST_VOCABULARY_BYTES = 1 << 26  # of a file that is read whole; twice the largest tokenizer.json in use
RANKS_FILE, JSON_FILE, WORDS_FILE = "vocabulary.tiktoken", "tokenizer.json", "vocabulary.json"

TokenIds = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> TokenIds:
        """Ids of `text` alone, without end-of-text. Raises UserError for a character outside the vocabulary, ValueError
        for a text that the library underneath gives up on.
        """
        ...

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes of `ids`; a sequence cut inside a character gives a cut character. Every id below vocab_size
        decodes, one that no text gives to nothing.
        """
        ...

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """How many bytes of text each id stands for, 0 for end-of-text; None where that depends on its neighbours."""
        ...

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build this tokenizer again; its `fingerprint` names the vocabulary's content."""
        ...

    def files(self) -> dict[str, bytes]:
        """Name and content of the file that has to lie beside the spec; empty where the spec says it all."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text to go on from. Raises UserError where there are none."""
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except ValueError as error:
        raise UserError(f"the tokenizer refuses the prompt ({error}): give another") from None
    if not ids:
        raise UserError("the prompt has no tokens: give some text, or no prompt to start a new document")
    return ids


def spec_of(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    fixed = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    return {**fixed, **more}


@contextmanager
def lone_surrogates_refused() -> Iterator[None]:
    """Python holds bytes that are not UTF-8, such as a mistyped argument's, as lone surrogates; no vocabulary has those."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at position {error.start}: wanted UTF-8") from None


def pieces_by_id(vocab_size: int, tokens: Mapping[int, bytes], end_of_text: int) -> list[bytes]:
    """The bytes of every id."""
    named = {end_of_text: END_OF_TEXT.encode(), **tokens}
    return [named.get(i, b"") for i in range(vocab_size)]


def piece_lengths(pieces: list[bytes], end_of_text: int) -> npt.NDArray[np.int64]:
    lengths = np.array([len(piece) for piece in pieces])
    lengths[end_of_text] = 0
    return lengths
