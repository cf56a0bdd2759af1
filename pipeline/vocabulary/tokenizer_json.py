"""A Hugging Face tokenizer.json as a vocabulary."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes
from pipeline.vocabulary.merges import MOST_IDS, Merges, make_encoding, merges_in
from pipeline.vocabulary.tokenizer import (
    JSON_FILE,
    TokenIds,
    lone_surrogates_refused,
    piece_lengths,
    pieces_by_id,
    spec_of,
    token_dtype,
)


class JsonTokenizer:
    """A Hugging Face tokenizer.json. Text is text: special tokens in it are not looked for, and none are added.

    tiktoken encodes where it is proven to do the same, at several times the speed; Hugging Face's own library otherwise.
    """

    def __init__(self, name: str, content: bytes, end_of_text: int) -> None:
        self.name, self.content, self.end_of_text = name, content, end_of_text
        try:
            self.document: dict[str, Any] = json.loads(content)
            _check_added(self.document)
            _mark_special(self.document, end_of_text)
            self.vocab_size = _checked_size(self.vocabulary())
            self.merges = merges_in(self.document)
            if self.merges is None or end_of_text in self.merges.ids:
                self.merges = None
                self._engine = _library(self.document)
            else:
                self._read(self.merges)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises nothing more special, and a Rust panic is no Exception
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"{name} is not a tokenizer.json that can be read ({said}): save it again") from None
        if not 0 <= end_of_text < self.vocab_size:
            raise UserError(f"{name} has {self.vocab_size} ids, so end-of-text cannot be {end_of_text}")

    def _read(self, merges: Merges) -> None:
        self._engine = make_encoding(self.name, merges.pattern, merges.ranks)
        self._ids: TokenIds = merges.ids.astype(token_dtype(self.vocab_size))
        pieces = dict(zip(merges.ids.tolist(), merges.ranks, strict=True))
        added = {entry["id"]: entry["content"].encode() for entry in self.document.get("added_tokens", ())}
        self._pieces = pieces_by_id(self.vocab_size, pieces | added, self.end_of_text)

    def vocabulary(self) -> dict[str, int]:
        """Every token as the file writes it, with its id."""
        return vocabulary_in(self.document)

    def encode(self, text: str) -> TokenIds:
        with lone_surrogates_refused():
            if self.merges is not None:
                ids: TokenIds = np.take(self._ids, self._engine.encode_to_numpy(text, disallowed_special=()))
                return ids
            text.encode()
        return self._encode_by_library(text)

    def _encode_by_library(self, text: str) -> TokenIds:
        try:
            found = self._engine.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise ValueError(f"{self.name} gives up on the text ({type(error).__name__}: {error})") from None
        ids: TokenIds = np.array(found, dtype=token_dtype(self.vocab_size))
        if (ids == self.end_of_text).any():  # a model of whole words or Unigram may know no other way to write it
            raise ValueError(f"{self.name} cannot tell the end-of-text token in a text from the end of the text")
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        if self.merges is not None:
            return b"".join(map(self._pieces.__getitem__, ids))
        return str(self._engine.decode(ids, skip_special_tokens=False)).encode()

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        return piece_lengths(self._pieces, self.end_of_text) if self.merges is not None else None

    def spec(self) -> dict[str, Any]:
        return spec_of(self, fingerprint=json_fingerprint(self.content, self.end_of_text))

    def files(self) -> dict[str, bytes]:
        return {JSON_FILE: self.content}


def json_fingerprint(content: bytes, end_of_text: int) -> str:
    """What a spec calls a tokenizer.json with this end-of-text."""
    return hash_bytes(content + b"\n%d" % end_of_text)


def vocabulary_in(document: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json, as the file writes it, with its id."""
    return _model_vocabulary(document) | {entry["content"]: entry["id"] for entry in document.get("added_tokens", ())}


def _model_vocabulary(document: dict[str, Any]) -> dict[str, int]:
    tokens = document["model"]["vocab"]
    if isinstance(tokens, list):  # Unigram: (token, score), in the order of the ids
        return {token: number for number, (token, _) in enumerate(tokens)}
    return dict(tokens)


def _checked_size(vocabulary: dict[str, int]) -> int:
    ids = set(vocabulary.values())
    if not all(type(i) is int for i in ids):
        raise UserError("an id is no whole number: save the file again")
    if len(ids) < len(vocabulary) or min(ids) < 0 or max(ids) >= MOST_IDS:
        raise UserError(f"an id is there twice, or one is not in 0 .. {MOST_IDS - 1}: save the file again")
    return max(ids) + 1


def _check_added(document: dict[str, Any]) -> None:
    """The library numbers added tokens itself, behind the model's own, whatever id the file gives them."""
    tokens = _model_vocabulary(document)
    following = len(tokens)
    for entry in sorted(document.get("added_tokens", ()), key=lambda entry: entry["id"]):
        if (wanted := tokens.get(entry["content"], following)) != entry["id"]:
            raise UserError(
                f"the added token {entry['content']!r} has id {entry['id']}, where Hugging Face's library makes it {wanted}: "
                "save the file again with that library"
            )
        following += entry["content"] not in tokens


def _mark_special(document: dict[str, Any], end_of_text: int) -> None:
    """Some files hold end-of-text as an ordinary token, which the library would find in a text."""
    for entry in document.get("added_tokens", ()):
        entry["special"] = entry["special"] or entry["id"] == end_of_text


def _library(document: dict[str, Any]) -> Any:
    """Hugging Face's tokenizer of the whole text, always the same: not cut, not padded, without dropout."""
    import tokenizers

    document = document | {"truncation": None, "padding": None}
    if "dropout" in document["model"]:
        document["model"] = document["model"] | {"dropout": None}
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    library.encode_special_tokens = True
    return library
