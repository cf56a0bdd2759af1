"""The small vocabularies: characters, bytes and words."""

import json
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes
from pipeline.vocabulary.tokenizer import END_OF_TEXT, TokenIds, TokenTable, refuse_surrogates, spec_of, token_dtype

UNKNOWN = "<|unk|>"
WORDS_FILE = "vocabulary.json"
UNICODE_CODE_POINTS = 0x110000
# A word with its combining marks (\p{M}), a newline, or any other character but a space.
WORD_PATTERN = r"[\p{L}\p{M}\p{N}_]+|\n|[^\s\p{L}\p{M}\p{N}_]"
# Where print has no space, for the text that is made of words again.
NO_SPACE_BEFORE = frozenset(",.:;?!)]}%'’\n")
NO_SPACE_AFTER = frozenset("([{'’\n")


class CharTokenizer(TokenTable):
    """One id per Unicode character of the corpus, in code point order.

    End-of-text is the last id.
    """

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        tokens = dict(enumerate(character.encode() for character in self.characters))
        super().__init__(tokens, len(tokens) + 1, len(tokens))
        # (code points,): encoding is a single lookup in numpy. Characters outside the vocabulary
        # have the id vocab_size.
        self._id_of = np.full(UNICODE_CODE_POINTS, self.vocab_size, dtype=np.uint32)
        self._id_of[code_points(self.characters)] = np.arange(self.end_of_text)

    def encode(self, text: str) -> TokenIds:
        with refuse_surrogates():
            ids = self._id_of[code_points(text)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if unknown.size:
            at = int(unknown[0])
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not in this char vocabulary of "
                f"{self.end_of_text} characters: remove it, or prepare with --tokenizer byte"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def spec(self) -> dict[str, Any]:
        return spec_of(self, fingerprint=hash_bytes(self.characters.encode()), characters=self.characters)


class ByteTokenizer(TokenTable):
    """The UTF-8 bytes are the ids 0..255; end-of-text is 256."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256

    def __init__(self) -> None:
        super().__init__({byte: bytes([byte]) for byte in range(256)}, self.vocab_size, self.end_of_text)

    def encode(self, text: str) -> TokenIds:
        with refuse_surrogates():
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def spec(self) -> dict[str, Any]:
        return spec_of(self, fingerprint=hash_bytes(b"byte"))


class WordTokenizer:
    """Words, punctuation marks and newlines, for teaching; a word it does not know is <|unk|>.

    Spaces are not kept: decoding puts one between words, and none where print has none, so text
    comes back readable but not exactly as it was.
    """

    name = "word"

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.unknown, self.end_of_text = len(words), len(words) + 1
        self.vocab_size = len(words) + 2
        self._id_of = {word: number for number, word in enumerate(words)}
        self._texts = [*words, UNKNOWN, END_OF_TEXT]

    def encode(self, text: str) -> TokenIds:
        with refuse_surrogates():
            text.encode()
        # An iterator: a list of all words of a long document would take forty times its size.
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
        return spec_of(self, fingerprint=hash_bytes(self._content()))

    def files(self) -> dict[str, bytes]:
        return {WORDS_FILE: self._content()}

    def _content(self) -> bytes:
        return json.dumps(self.words, ensure_ascii=False).encode()


def split_words(text: str) -> list[str]:
    """The words, punctuation marks and newlines of a text."""
    return list(_word_pattern().findall(text))


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """(characters,) code points of a text. Raises UnicodeEncodeError for lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def read_words(content: bytes) -> list[str]:
    try:
        words = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{WORDS_FILE} is not JSON ({error}): restore it") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{WORDS_FILE} is not a list of words: restore it")
    return words


@cache
def _word_pattern() -> Any:
    import regex

    return regex.compile(WORD_PATTERN)
