"""A tokenizer's name or spec -> the tokenizer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import check_types, read_limited
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import WORDS_FILE, ByteTokenizer, CharTokenizer, WordTokenizer, read_words
from pipeline.vocabulary.tokenizer import JSON_FILE, MAX_VOCABULARY_BYTES, RANKS_FILE, Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer

TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
TOKENIZER_NAMES = (*TIKTOKEN_NAMES, "char", "byte", "word", "bpe:N", "a path to a tokenizer.json or .tiktoken file")
_SPEC_TYPES = {"name": str, "vocab_size": int, "end_of_text": int, "fingerprint": str}


def check_spec(spec: dict[str, Any]) -> None:
    """Raises KeyError or TypeError for what is no tokenizer's spec; its content is not checked."""
    check_types({name: spec[name] for name in _SPEC_TYPES}, _SPEC_TYPES)


def from_spec(spec: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a spec, with its file from `folder`.

    Raises UserError if they do not make the tokenizer described.
    """
    name = str(spec.get("name"))
    file = vocabulary_file(name)
    if file and not (folder / file).is_file():
        raise UserError(f"{folder} has no {file}, which holds the vocabulary {name}: restore it")
    tokenizer = _build(name, spec, read_limited(folder / file, MAX_VOCABULARY_BYTES) if file else b"")
    if tokenizer.spec() != spec:
        raise UserError(
            f"{folder}: the {name} vocabulary does not match its description: found vocab_size {tokenizer.vocab_size} and "
            f"fingerprint {tokenizer.spec()['fingerprint']}, expected {spec.get('vocab_size')} and {spec.get('fingerprint')}"
        )
    return tokenizer


def check_same_vocabulary(
    dataset: Path | str, spec: dict[str, Any], *, of: Path, expected: dict[str, Any], fingerprints: Collection[str] = ()
) -> None:
    """Raises UserError unless an id means the same token in a dataset as in `of`, another dataset
    or a checkpoint.

    `spec`, `expected`: their tokenizers' specifications. `fingerprints`: others by which that of a
    checkpoint is known.
    """
    if spec == expected or spec["fingerprint"] in fingerprints:
        return
    found, wanted = (
        f"{each['name']} ({each['vocab_size']:,} tokens, end-of-text token {each['end_of_text']})"
        for each in (spec, expected)
    )
    # A vocabulary that was learned, or read from a file, is in the folder; its name alone would not
    # find it.
    name = expected["name"] if expected["name"] in ("gpt2", "byte") else of
    raise UserError(f"{dataset} has the vocabulary {found}, but {of} has {wanted}: prepare with --tokenizer {name}")


def vocabulary_file(name: str) -> str | None:
    """The file that a vocabulary of this name needs next to its spec."""
    if name.endswith(".tiktoken") or (name in TIKTOKEN_NAMES and name != "gpt2"):
        return RANKS_FILE
    if name.endswith(".json") or name.startswith("bpe:"):
        return JSON_FILE
    return WORDS_FILE if name == "word" else None


def unknown_name(name: str) -> str:
    return f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZER_NAMES)}"


def _build(name: str, spec: dict[str, Any], content: bytes) -> Tokenizer:
    file = vocabulary_file(name)
    if file == RANKS_FILE:
        return BytePairTokenizer(name, content)
    if file == JSON_FILE:
        return JsonTokenizer(name, content, int(spec.get("end_of_text", -1)))
    if file == WORDS_FILE:
        return WordTokenizer(read_words(content))
    if name == "gpt2":
        return BytePairTokenizer(name)
    if name == "char":
        return CharTokenizer(str(spec.get("characters", "")))
    if name == "byte":
        return ByteTokenizer()
    raise UserError(unknown_name(name))
