"""Byte-pair vocabularies as tiktoken publishes them: a rank table and the pattern that cuts text first."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import hash_bytes
from pipeline.vocabulary.merges import make_encoding, published_for, read_ranks
from pipeline.vocabulary.tokenizer import (
    RANKS_FILE,
    TokenIds,
    lone_surrogates_refused,
    piece_lengths,
    pieces_by_id,
    spec_of,
    token_dtype,
)

GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken"


class BytePairTokenizer:
    """A rank table as tiktoken publishes them. GPT-2's ships with the package; any other is `table`, a .tiktoken file."""

    def __init__(self, name: str, table: bytes | None = None) -> None:
        self.name, self.table = name, table
        self.encoding = _encoding(name, _gpt2_table() if table is None else table)
        published = published_for(name, self.ranks())
        self.vocab_size, self.end_of_text = published.vocab_size, published.end_of_text
        self._pieces = pieces_by_id(
            self.vocab_size, {rank: token for token, rank in self.ranks().items()}, self.end_of_text
        )

    def encode(self, text: str) -> TokenIds:
        with lone_surrogates_refused():
            ids: TokenIds = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(map(self._pieces.__getitem__, ids))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return piece_lengths(self._pieces, self.end_of_text)

    def ranks(self) -> dict[bytes, int]:
        """Each token's bytes and its id, special tokens left out; a lower id is an earlier merge."""
        return dict(self.encoding._mergeable_ranks)

    def pattern(self) -> str:
        """The regular expression that cuts text into the pieces inside which pairs are merged."""
        return str(self.encoding._pat_str)

    def spec(self) -> dict[str, Any]:
        tokens = self._pieces[: max(self.ranks().values()) + 1]
        listing = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        return spec_of(self, fingerprint=hash_bytes(listing + self.pattern().encode()))

    def files(self) -> dict[str, bytes]:
        return {} if self.table is None else {RANKS_FILE: self.table}


@cache
def _gpt2_table() -> bytes:
    return GPT2_RANKS.read_bytes()


@cache
def _encoding(name: str, table: bytes) -> Any:
    ranks = read_ranks(table)
    return make_encoding(name, published_for(name, ranks).pattern, ranks)
