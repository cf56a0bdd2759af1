"""Text <-> token ids, for every vocabulary a dataset can be made with.

A tokenizer is described by a small JSON object, its spec: the manifest carries it from `prepare` to `train`, the
checkpoint from `train` to `sample`, so a vocabulary is chosen once and never repeated. All ids below `vocab_size` decode.
Literal "<|endoftext|>" in a text is ordinary text; only `prepare` writes the end-of-text id, after each document.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes

END_OF_TEXT = "<|endoftext|>"
TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
TOKENIZER_NAMES = (*TIKTOKEN_NAMES, "char", "byte")
UNICODE_CODE_POINTS = 0x110000

# GPT-2's pre-tokenizer (Radford et al. 2019) with possessive quantifiers: the same pieces, found faster; as in tiktoken.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken"

TokenIds = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> TokenIds:
        """Ids of `text` alone, without end-of-text. Raises UserError for a character outside the vocabulary."""
        ...

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes of `ids`; a sequence cut inside a character gives a cut character."""
        ...

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build this tokenizer again; its `fingerprint` names the vocabulary's content."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class BytePairTokenizer:
    """tiktoken's byte-pair encodings. GPT-2's table ships with the package; the larger two are tiktoken's to fetch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encoding = _gpt2_encoding() if name == "gpt2" else _tiktoken_encoding(name)
        self.vocab_size = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
            ids: TokenIds = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(self.encoding.decode_bytes(ids))

    def ranks(self) -> dict[bytes, int]:
        """Each token's bytes and its id, special tokens left out; a lower id is an earlier merge."""
        return dict(self.encoding._mergeable_ranks)

    def pattern(self) -> str:
        """The regular expression that cuts text into the pieces inside which pairs are merged."""
        return str(self.encoding._pat_str)

    def spec(self) -> dict[str, Any]:
        table = b"".join(len(token).to_bytes(4, "little") + token for token in self.ranks())
        return _spec(self, fingerprint=hash_bytes(table + self.pattern().encode()))


class CharTokenizer:
    """One id per Unicode character of the corpus, in code point order; end-of-text is the last id."""

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.end_of_text = len(self.characters)
        self.vocab_size = self.end_of_text + 1
        # One row per code point makes encoding a single numpy look-up; unknown characters hold vocab_size.
        self._id_of = np.full(UNICODE_CODE_POINTS, self.vocab_size, dtype=np.uint32)
        self._id_of[code_points(self.characters)] = np.arange(self.end_of_text)

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
            ids = self._id_of[code_points(text)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if unknown.size:
            at = int(unknown[0])
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}, at position {at}) is not among the {self.end_of_text} "
                "characters of this char vocabulary: leave it out, or prepare with --tokenizer byte"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return "".join(END_OF_TEXT if i == self.end_of_text else self.characters[i] for i in ids).encode()

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=hash_bytes(self.characters.encode()), characters=self.characters)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; end-of-text is 256."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=hash_bytes(b"byte"))


def from_spec(spec: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """The tokenizer a spec describes. Raises UserError where this program's vocabulary of that name is another one."""
    name = spec.get("name")
    tokenizer: Tokenizer
    if name in TIKTOKEN_NAMES:
        tokenizer = BytePairTokenizer(str(name))
    elif name == "char":
        tokenizer = CharTokenizer(str(spec.get("characters", "")))
    elif name == "byte":
        tokenizer = ByteTokenizer()
    else:
        raise UserError(f"unknown tokenizer {name!r}: there are {', '.join(TOKENIZER_NAMES)}")
    if tokenizer.spec() != spec:
        raise UserError(
            f"the {name} vocabulary does not match its description: vocab_size {spec.get('vocab_size')} and fingerprint "
            f"{spec.get('fingerprint')} were recorded, found {tokenizer.vocab_size} and {tokenizer.spec()['fingerprint']}"
        )
    return tokenizer


def _spec(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    fixed = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    return {**fixed, **more}


@contextmanager
def _lone_surrogates_refused() -> Iterator[None]:
    """Python holds bytes that are not UTF-8, such as a mistyped argument's, as lone surrogates; no vocabulary has those."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at position {error.start}: wanted UTF-8") from None


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The characters of a text as numbers, in one step."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@cache
def _gpt2_encoding() -> Any:
    import tiktoken

    lines = (line.split() for line in GPT2_RANKS.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    end_of_text = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=end_of_text)


@cache
def _tiktoken_encoding(name: str) -> Any:
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets the network library's own exceptions through
        raise UserError(
            f"the vocabulary of {name} could not be fetched ({type(error).__name__}): connect once, or point "
            "TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's cached file, or use --tokenizer gpt2, which ships here"
        ) from None
