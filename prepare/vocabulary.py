"""Shim until the vocabularies are merged."""

from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.tokenizer import TOKENIZER_NAMES, BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer


def learns_from_corpus(name: str) -> bool:
    return name == "char"


def check_name(name: str) -> None:
    if name not in TOKENIZER_NAMES:
        raise UserError(f"unknown tokenizer {name!r}: there are {', '.join(TOKENIZER_NAMES)}")


def open_vocabulary(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else BytePairTokenizer(name)


def learn_vocabulary(name: str, documents: Iterator[str]) -> Tokenizer:
    found: set[str] = set()
    for text in documents:
        found.update(text)
    return CharTokenizer("".join(sorted(found)))
