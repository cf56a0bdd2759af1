"""A Hugging Face tokenizer.json as a vocabulary.

Text is text: special tokens written out in it are not looked for, and none are added.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes
from pipeline.vocabulary.merges import MAX_IDS, Merges, make_encoding, merges_in
from pipeline.vocabulary.tokenizer import JSON_FILE, TokenIds, TokenTable, refuse_surrogates, spec_of, token_dtype


class JsonTokenizer:
    """Encodes by tiktoken, several times faster, if `merges` proves that the ids are the same.

    `merges` is None without that proof; Hugging Face's library encodes then.
    """

    def __init__(self, name: str, content: bytes, end_of_text: int) -> None:
        self.name, self.content, self.end_of_text = name, content, end_of_text
        try:
            self.document: dict[str, Any] = json.loads(content)
            _check_added(self.document)
            _mark_special(self.document, end_of_text)
            self.vocab_size = _checked_size(self.vocabulary())
            self.merges = merges_in(self.document)
            if self.merges is not None and end_of_text in self.merges.ids:
                self.merges = None  # a text may give end-of-text then, which only `_Library` finds
            self._engine = _Library(self) if self.merges is None else _Ranks(self, self.merges)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # of the library: plain Exceptions and Rust panics
            found = f"{type(error).__name__}: {error}"
            raise UserError(f"{name} is not a valid tokenizer.json ({found}): save it again") from None
        if not 0 <= end_of_text < self.vocab_size:
            raise UserError(f"{name} has {self.vocab_size} ids, so the end-of-text token cannot be {end_of_text}")

    def vocabulary(self) -> dict[str, int]:
        """Every token, as the file writes it, and its id."""
        return vocabulary_in(self.document)

    def encode(self, text: str) -> TokenIds:
        with refuse_surrogates():
            return self._engine.encode(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self._engine.decode_bytes(ids)

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        return self._engine.token_bytes()

    def spec(self) -> dict[str, Any]:
        return spec_of(self, fingerprint=json_fingerprint(self.content, self.end_of_text))

    def files(self) -> dict[str, bytes]:
        return {JSON_FILE: self.content}


class _Ranks(TokenTable):
    """Encodes by tiktoken, with the file's merges as ranks."""

    def __init__(self, tokenizer: JsonTokenizer, merges: Merges) -> None:
        self._encoding = make_encoding(tokenizer.name, merges.pattern, merges.ranks)
        self._id_of_rank: TokenIds = merges.ids.astype(token_dtype(tokenizer.vocab_size))
        tokens = dict(zip(merges.ids.tolist(), merges.ranks, strict=True))
        added = {entry["id"]: entry["content"].encode() for entry in tokenizer.document.get("added_tokens", ())}
        super().__init__(tokens | added, tokenizer.vocab_size, tokenizer.end_of_text)

    def encode(self, text: str) -> TokenIds:
        ids: TokenIds = np.take(self._id_of_rank, self._encoding.encode_to_numpy(text, disallowed_special=()))
        return ids


class _Library:
    """Encodes and decodes by Hugging Face's library."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        import tokenizers

        # Always the ids of the whole text: not truncated, not padded, and the same each time.
        document = tokenizer.document | {"truncation": None, "padding": None}
        if "dropout" in document["model"]:
            document["model"] = document["model"] | {"dropout": None}
        self._library = tokenizers.Tokenizer.from_str(json.dumps(document))
        self._library.encode_special_tokens = True
        self._name, self._end_of_text = tokenizer.name, tokenizer.end_of_text
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, text: str) -> TokenIds:
        text.encode()  # a lone surrogate raises here; the library would replace it
        try:
            found = self._library.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # its Rust panics are BaseExceptions
            raise ValueError(f"{self._name} cannot encode the text ({type(error).__name__}: {error})") from None
        ids: TokenIds = np.array(found, dtype=self._dtype)
        # A model of whole words, or Unigram, may have no other token for the written-out
        # end-of-text.
        if (ids == self._end_of_text).any():
            raise ValueError(f"{self._name} cannot tell a written-out end-of-text token from the end of a text")
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        return str(self._library.decode(ids, skip_special_tokens=False)).encode()

    def token_bytes(self) -> None:
        return None


def json_fingerprint(content: bytes, end_of_text: int) -> str:
    """The fingerprint in the spec of a tokenizer.json with this end-of-text token."""
    return hash_bytes(content + b"\n%d" % end_of_text)


def vocabulary_in(document: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json, as the file writes it, and its id."""
    return _model_vocabulary(document) | {entry["content"]: entry["id"] for entry in document.get("added_tokens", ())}


def _model_vocabulary(document: dict[str, Any]) -> dict[str, int]:
    tokens = document["model"]["vocab"]
    if isinstance(tokens, list):  # Unigram: (token, score), in the order of the ids
        return {token: number for number, (token, _) in enumerate(tokens)}
    return dict(tokens)


def _checked_size(vocabulary: dict[str, int]) -> int:
    ids = set(vocabulary.values())
    if not all(type(i) is int for i in ids):
        raise UserError("an id is not an integer: save the file again")
    if len(ids) < len(vocabulary) or min(ids) < 0 or max(ids) >= MAX_IDS:
        raise UserError(f"an id occurs twice, or one is not in 0 .. {MAX_IDS - 1}: save the file again")
    return max(ids) + 1


def _check_added(document: dict[str, Any]) -> None:
    """Raises UserError if an added token does not have the id that Hugging Face's library gives it.

    The library numbers added tokens itself, after those of the model, whatever the file says.
    """
    tokens = _model_vocabulary(document)
    following = len(tokens)
    for entry in sorted(document.get("added_tokens", ()), key=lambda entry: entry["id"]):
        if (wanted := tokens.get(entry["content"], following)) != entry["id"]:
            raise UserError(
                f"the added token {entry['content']!r} has id {entry['id']}, but Hugging Face's library makes it {wanted}: "
                "save the file again with that library"
            )
        following += entry["content"] not in tokens


def _mark_special(document: dict[str, Any], end_of_text: int) -> None:
    """Some files have end-of-text as an ordinary token, which the library would find in a text."""
    for entry in document.get("added_tokens", ()):
        entry["special"] = entry["special"] or entry["id"] == end_of_text
