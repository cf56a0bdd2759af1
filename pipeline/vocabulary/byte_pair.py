"""Byte-pair vocabularies as tiktoken has them: a rank table, and a pattern that finds the words."""

from functools import cache
from pathlib import Path
from typing import Any

from pipeline.files import hash_bytes
from pipeline.vocabulary.merges import make_encoding, published_for, read_ranks
from pipeline.vocabulary.tokenizer import RANKS_FILE, TokenIds, TokenTable, refuse_surrogates, spec_of, token_dtype

GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken"


class BytePairTokenizer(TokenTable):
    """GPT-2's vocabulary, which is part of this package, or that of `table`, a .tiktoken file."""

    def __init__(self, name: str, table: bytes | None = None) -> None:
        self.name, self.table = name, table
        self._ranks = _ranks(table)
        published = published_for(name, self._ranks)
        tokens = {rank: token for token, rank in self._ranks.items()}
        super().__init__(tokens, published.vocab_size, published.end_of_text)

    @property
    def encoding(self) -> Any:
        """tiktoken's encoder."""
        return _encoding(self.name, self.table)

    def encode(self, text: str) -> TokenIds:
        with refuse_surrogates():
            ids: TokenIds = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(token_dtype(self.vocab_size))

    def ranks(self) -> dict[bytes, int]:
        """Each token's bytes and its id, in the order of the ids, without special tokens.

        A lower id is merged first.
        """
        return dict(self._ranks)

    def pattern(self) -> str:
        """The regular expression whose matches are the words inside which pairs are merged."""
        return published_for(self.name, self._ranks).pattern

    def spec(self) -> dict[str, Any]:
        # Each token with its length before it, so that no two tables have the same listing.
        tokens = self.tokens[: max(self._ranks.values()) + 1]
        listing = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        return spec_of(self, fingerprint=hash_bytes(listing + self.pattern().encode()))

    def files(self) -> dict[str, bytes]:
        return {} if self.table is None else {RANKS_FILE: self.table}


# Both are cached, and made when they are needed: each takes 0.1 s for GPT-2's table.
@cache
def _ranks(table: bytes | None) -> dict[bytes, int]:
    return read_ranks(GPT2_RANKS.read_bytes() if table is None else table)


@cache
def _encoding(name: str, table: bytes | None) -> Any:
    ranks = _ranks(table)
    return make_encoding(name, published_for(name, ranks).pattern, ranks)
