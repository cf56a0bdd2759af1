"""From a tokenizer's name or spec to the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import read_limited
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer, WordTokenizer, read_words
from pipeline.vocabulary.tokenizer import JSON_FILE, MOST_VOCABULARY_BYTES, RANKS_FILE, WORDS_FILE, Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer

TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
PATHS = "a path to a tokenizer.json or .tiktoken file"
TOKENIZER_NAMES = (*TIKTOKEN_NAMES, "char", "byte", "word", "bpe:N", PATHS)


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
            return WordTokenizer(read_words(content))
    raise UserError(unknown_name(name))


def unknown_name(name: str) -> str:
    return f"unknown tokenizer {name!r}: there are {', '.join(TOKENIZER_NAMES)}"
