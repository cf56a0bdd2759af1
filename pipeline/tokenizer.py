"""Text <-> token ids, for every vocabulary a dataset can be made with.

A tokenizer is described by a small JSON object, its spec: the manifest carries it from `prepare` to `train`, the
checkpoint from `train` to `sample`, so a vocabulary is chosen once and never repeated. A vocabulary that does not ship
with the package lies in a file beside the spec, whose fingerprint names its content.
Literal "<|endoftext|>" in a text is ordinary text; only `prepare` writes the end-of-text id, after each document.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.byte_pairs import MOST_IDS, Merges, make_encoding, merges_in, published_for, read_ranks
from pipeline.errors import UserError
from pipeline.files import hash_bytes, read_limited

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
PATHS = "a path to a tokenizer.json or .tiktoken file"
TOKENIZER_NAMES = (*TIKTOKEN_NAMES, "char", "byte", "word", "bpe:N", PATHS)
UNICODE_CODE_POINTS = 0x110000
GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken"

MOST_VOCABULARY_BYTES = 1 << 26  # of a file that is read whole; twice the largest tokenizer.json in use
RANKS_FILE, JSON_FILE, WORDS_FILE = "vocabulary.tiktoken", "tokenizer.json", "vocabulary.json"
# A word, a line's end, or any other character that is no space. Marks belong to the letters they stand on.
WORD_PATTERN = r"[\p{L}\p{M}\p{N}_]+|\n|[^\s\p{L}\p{M}\p{N}_]"
NO_SPACE_BEFORE = frozenset(",.:;?!)]}%'’\n")
NO_SPACE_AFTER = frozenset("([{'’\n")

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


class BytePairTokenizer:
    """A rank table as tiktoken publishes them. GPT-2's ships with the package; any other is `table`, a .tiktoken file."""

    def __init__(self, name: str, table: bytes | None = None) -> None:
        self.name, self.table = name, table
        self.encoding = _encoding(name, _gpt2_table() if table is None else table)
        published = published_for(name, self.ranks())
        self.vocab_size, self.end_of_text = published.vocab_size, published.end_of_text
        self._pieces = _pieces(self.vocab_size, {rank: token for token, rank in self.ranks().items()}, self.end_of_text)

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
            ids: TokenIds = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(map(self._pieces.__getitem__, ids))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return _lengths(self._pieces, self.end_of_text)

    def ranks(self) -> dict[bytes, int]:
        """Each token's bytes and its id, special tokens left out; a lower id is an earlier merge."""
        return dict(self.encoding._mergeable_ranks)

    def pattern(self) -> str:
        """The regular expression that cuts text into the pieces inside which pairs are merged."""
        return str(self.encoding._pat_str)

    def spec(self) -> dict[str, Any]:
        tokens = self._pieces[: max(self.ranks().values()) + 1]
        listing = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        return _spec(self, fingerprint=hash_bytes(listing + self.pattern().encode()))

    def files(self) -> dict[str, bytes]:
        return {} if self.table is None else {RANKS_FILE: self.table}


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
        self._pieces = _pieces(self.vocab_size, pieces | added, self.end_of_text)

    def vocabulary(self) -> dict[str, int]:
        """Every token as the file writes it, with its id."""
        return vocabulary_in(self.document)

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
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
        return _lengths(self._pieces, self.end_of_text) if self.merges is not None else None

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=json_fingerprint(self.content, self.end_of_text))

    def files(self) -> dict[str, bytes]:
        return {JSON_FILE: self.content}


def json_fingerprint(content: bytes, end_of_text: int) -> str:
    """What a spec calls a tokenizer.json with this end-of-text."""
    return hash_bytes(content + b"\n%d" % end_of_text)


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

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return np.array([*(len(character.encode()) for character in self.characters), 0])

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=hash_bytes(self.characters.encode()), characters=self.characters)

    def files(self) -> dict[str, bytes]:
        return {}


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

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return np.array([1] * 256 + [0])

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=hash_bytes(b"byte"))

    def files(self) -> dict[str, bytes]:
        return {}


class WordTokenizer:
    """Words, single punctuation marks and line ends; a word outside the vocabulary is <|unk|>. For teaching.

    The spaces of a text are not kept: decoding puts one between words and none where print has none, so a text comes back
    legible, not exactly.
    """

    name = "word"

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.unknown, self.end_of_text = len(words), len(words) + 1
        self.vocab_size = len(words) + 2
        self._id_of = {word: number for number, word in enumerate(words)}
        self._texts = [*words, UNKNOWN, END_OF_TEXT]

    def encode(self, text: str) -> TokenIds:
        with _lone_surrogates_refused():
            text.encode()
        # One word at a time: all words of a long document as strings would take forty times its size.
        ids = (self._id_of.get(found[0], self.unknown) for found in _word_pattern().finditer(text))
        return np.fromiter(ids, dtype=token_dtype(self.vocab_size))

    def decode_bytes(self, ids: list[int]) -> bytes:
        text, before = "", "\n"
        for word in map(self._texts.__getitem__, ids):
            text += word if before in NO_SPACE_AFTER or word in NO_SPACE_BEFORE else f" {word}"
            before = word
        return text.encode()

    def token_bytes(self) -> None:
        return None

    def spec(self) -> dict[str, Any]:
        return _spec(self, fingerprint=hash_bytes(self._content()))

    def files(self) -> dict[str, bytes]:
        return {WORDS_FILE: self._content()}

    def _content(self) -> bytes:
        return json.dumps(self.words, ensure_ascii=False).encode()


def split_words(text: str) -> list[str]:
    """The words, punctuation marks and line ends of a text."""
    return list(_word_pattern().findall(text))


def from_spec(spec: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer a spec describes, with its file from `folder`. Raises UserError where that is missing or another."""
    name = str(spec.get("name"))
    file = vocabulary_file(name)
    if file is None:
        return rebuild(spec, {})
    if not (folder / file).is_file():
        raise UserError(f"{folder} has no {file}, which holds the vocabulary {name}: restore it beside what needs it")
    return rebuild(spec, {file: read_limited(folder / file, MOST_VOCABULARY_BYTES)})


def rebuild(spec: dict[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of which `spec` and `files` were taken. Raises UserError where it is another one."""
    name = str(spec.get("name"))
    tokenizer = _build(name, spec, files.get(vocabulary_file(name) or "", b""))
    if tokenizer.spec() != spec:
        raise UserError(
            f"the {name} vocabulary does not match its description: vocab_size {spec.get('vocab_size')} and fingerprint "
            f"{spec.get('fingerprint')} were recorded, found {tokenizer.vocab_size} and {tokenizer.spec()['fingerprint']}"
        )
    return tokenizer


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text to go on from. Raises UserError where there are none."""
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except ValueError as error:
        raise UserError(f"the tokenizer refuses the prompt ({error}): give another") from None
    if not ids:
        raise UserError("the prompt has no tokens: give some text, or no prompt to start a new document")
    return ids


def vocabulary_file(name: str) -> str | None:
    """The file beside the spec that a vocabulary of this name needs."""
    if name.endswith(".tiktoken") or (name in TIKTOKEN_NAMES and name != "gpt2"):
        return RANKS_FILE
    if name.endswith(".json") or name.startswith("bpe:"):
        return JSON_FILE
    return WORDS_FILE if name == "word" else None


def _build(name: str, spec: dict[str, Any], content: bytes) -> Tokenizer:
    if name == "gpt2":
        return BytePairTokenizer(name)
    if name == "char":
        return CharTokenizer(str(spec.get("characters", "")))
    if name == "byte":
        return ByteTokenizer()
    match vocabulary_file(name):
        case "vocabulary.tiktoken":
            return BytePairTokenizer(name, content)
        case "tokenizer.json":
            return JsonTokenizer(name, content, int(spec.get("end_of_text", -1)))
        case "vocabulary.json":
            return WordTokenizer(_read_words(content))
    raise UserError(unknown_name(name))


def unknown_name(name: str) -> str:
    return f"unknown tokenizer {name!r}: there are {', '.join(TOKENIZER_NAMES)}"


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


def _pieces(vocab_size: int, tokens: Mapping[int, bytes], end_of_text: int) -> list[bytes]:
    """The bytes of every id."""
    named = {end_of_text: END_OF_TEXT.encode(), **tokens}
    return [named.get(i, b"") for i in range(vocab_size)]


def _lengths(pieces: list[bytes], end_of_text: int) -> npt.NDArray[np.int64]:
    lengths = np.array([len(piece) for piece in pieces])
    lengths[end_of_text] = 0
    return lengths


@cache
def _gpt2_table() -> bytes:
    return GPT2_RANKS.read_bytes()


@cache
def _encoding(name: str, table: bytes) -> Any:
    ranks = read_ranks(table)
    return make_encoding(name, published_for(name, ranks).pattern, ranks)


@cache
def _word_pattern() -> Any:
    import regex

    return regex.compile(WORD_PATTERN)


def _read_words(content: bytes) -> list[str]:
    try:
        words = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{WORDS_FILE} is not JSON ({error}): restore it") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{WORDS_FILE} is not a list of words: restore it")
    return words


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
