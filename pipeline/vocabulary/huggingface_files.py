"""The tokenizer files of a Hugging Face folder, tokenizer.json and others, read and written."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import read_limited
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import UNKNOWN, WORD_PATTERN, ByteTokenizer, CharTokenizer, WordTokenizer
from pipeline.vocabulary.merges import PUBLISHED, Merges, merges_of, published_for, symbols
from pipeline.vocabulary.tokenizer import END_OF_TEXT, JSON_FILE, MAX_VOCABULARY_BYTES, Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer, json_fingerprint, vocabulary_in

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"  # GPT-2's two files, older than tokenizer.json
Json = dict[str, Any]
# End-of-text tokens to look for if the folder names none, those meant for whole documents first.
END_OF_TEXT_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


# ---- reading ----


def open_folder(folder: Path) -> JsonTokenizer | None:
    """The vocabulary of a Hugging Face folder, None if it has none.

    Raises UserError for one that cannot be used.
    """
    return open_json(folder / JSON_FILE) if has_vocabulary(folder) else None


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has the files that `open_folder` reads."""
    return (folder / JSON_FILE).is_file() or all((folder / name).is_file() for name in (VOCAB_FILE, MERGES_FILE))


def open_json(path: Path) -> JsonTokenizer:
    """The vocabulary in a tokenizer.json, or in the two older files if there is none.

    Raises UserError if the file is damaged, or no token ends a text.
    """
    content = _content(path)
    try:
        document = json.loads(content)
        vocabulary = vocabulary_in(document)
        content = _unadorned(document, content)
    except Exception:  # JsonTokenizer reports what is wrong with the file
        vocabulary = {}
    wanted = [*_named_ends(path), *END_OF_TEXT_TOKENS]
    end_of_text = next((token for token in wanted if token in vocabulary), None)
    try:
        tokenizer = JsonTokenizer(path.name, content, 0 if end_of_text is None else vocabulary[end_of_text])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if end_of_text is None:
        raise UserError(
            f"{path} has no end-of-text token: expected one of {', '.join(wanted)}; "
            f"name it as eos_token in a {TOKENIZER_CONFIG} next to it"
        )
    return tokenizer


def is_gpt2(tokenizer: JsonTokenizer) -> bool:
    """Whether it is GPT-2's under another name: the same tokens, ids and order of merges."""
    merges, gpt2 = tokenizer.merges, PUBLISHED["gpt2"]
    sizes = (tokenizer.vocab_size, tokenizer.end_of_text) == (gpt2.vocab_size, gpt2.end_of_text)
    return sizes and merges is not None and merges.pattern == gpt2.pattern and _ids(merges) == _gpt2_ranks()


def fingerprints(folder: Path, tokenizer: Tokenizer) -> set[str]:
    """The fingerprints of this folder's vocabulary in datasets, however those were prepared."""
    found = {tokenizer.spec()["fingerprint"]}
    if isinstance(tokenizer, JsonTokenizer) and is_gpt2(tokenizer):
        found.add(BytePairTokenizer("gpt2").spec()["fingerprint"])
    from_file = open_folder(folder)
    if from_file is not None and from_file.end_of_text == tokenizer.end_of_text:
        found.add(from_file.spec()["fingerprint"])
        # The oldest datasets have the fingerprint of the file with its post-processor; their ids
        # are the same.
        found.add(json_fingerprint(_content(folder / JSON_FILE), tokenizer.end_of_text))
    return found


def _content(path: Path) -> bytes:
    return read_limited(path, MAX_VOCABULARY_BYTES) if path.is_file() else _document_of_pairs(path.parent)


def _unadorned(document: dict[str, Any], content: bytes) -> bytes:
    """A tokenizer.json without the tokens it adds around a text.

    Llama 3's adds <|begin_of_text|>, for one. No document of a dataset has them, so no other
    program should add them to a prompt. GPT-2's ByteLevel adds nothing.
    """
    match document.get("post_processor"):
        case None | {"type": "ByteLevel"}:
            return content
    return json.dumps(document | {"post_processor": None}, ensure_ascii=False).encode()


def _named_ends(path: Path) -> list[str]:
    """The end-of-text tokens that the files next to a tokenizer.json name."""
    tokens = [_next_to(path, name).get("eos_token") for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)]
    tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [token for token in tokens if isinstance(token, str)]


def _ids(merges: Merges) -> dict[bytes, int]:
    """The id of each token.

    Empty if the ids do not rise with the ranks, since the merges then have another order.
    """
    if (np.diff(merges.ids[256:]) <= 0).any():
        return {}
    return dict(zip(merges.ranks, merges.ids.tolist(), strict=True))


@cache
def _gpt2_ranks() -> dict[bytes, int]:
    return BytePairTokenizer("gpt2").ranks()


def _next_to(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` next to `path`; empty if there is no such file."""
    if not path.with_name(name).is_file():
        return {}
    try:
        document = json.loads(read_limited(path.with_name(name), MAX_VOCABULARY_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.with_name(name)} is not JSON ({error}): fix it, or remove it") from None
    return document if isinstance(document, dict) else {}


def _document_of_pairs(folder: Path) -> bytes:
    """A tokenizer.json from a vocab.json, a merges.txt and what they leave to GPT-2's tokenizer."""
    vocab, config = _next_to(folder / JSON_FILE, VOCAB_FILE), _next_to(folder / JSON_FILE, TOKENIZER_CONFIG)
    lines = read_limited(folder / MERGES_FILE, MAX_VOCABULARY_BYTES).decode(errors="replace").split("\n")
    pairs = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    special = {token: i for token, i in vocab.items() if token in (*END_OF_TEXT_TOKENS, config.get("eos_token"))}
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    pre_tokenizer = _byte_level(True) | {"add_prefix_space": bool(config.get("add_prefix_space", False))}
    return _tokenizer_json(special, model, pre_tokenizer, _byte_level(True))


# ---- writing ----


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """File name -> content, for `AutoTokenizer.from_pretrained`: text gives the same ids there, and
    a warning where it is longer than the model's `block_size`.

    Two things differ in transformers: it finds a special token written out in a text, and joins the
    words of `word` by other rules.
    """
    end_of_text = tokenizer.decode_bytes([tokenizer.end_of_text]).decode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "bos_token": end_of_text, "eos_token": end_of_text, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if not isinstance(tokenizer, JsonTokenizer):  # transformers would add an unknown token that its file does not have
        config["unk_token"] = UNKNOWN if isinstance(tokenizer, WordTokenizer) else END_OF_TEXT
    return {JSON_FILE: tokenizer_json(tokenizer), TOKENIZER_CONFIG: json.dumps(config).encode()}


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as Hugging Face's tokenizer.json."""
    match tokenizer:
        case JsonTokenizer():
            return tokenizer.content
        case BytePairTokenizer():
            return _byte_pair_json(tokenizer)
        case ByteTokenizer():
            return _byte_level_json(tokenizer, _byte_level(False), {bytes([byte]): byte for byte in range(256)})
        case CharTokenizer():
            return _char_json(tokenizer)
        case WordTokenizer():
            return _word_json(tokenizer)
        case _:
            raise AssertionError(f"{tokenizer.name} cannot be written as a tokenizer.json")


@cache  # finding the merges of 100,256 ranks takes a second, and every checkpoint needs them
def _byte_pair_json(tokenizer: BytePairTokenizer) -> bytes:
    ranks = tokenizer.ranks()
    published = published_for(tokenizer.name, ranks)
    if published is PUBLISHED["gpt2"]:
        return _byte_level_json(tokenizer, _byte_level(True), ranks)
    split = {"type": "Split", "pattern": {"Regex": published.plain}, "behavior": "Isolated", "invert": False}
    return _byte_level_json(tokenizer, {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}, ranks)


def _byte_level_json(tokenizer: Tokenizer, pre_tokenizer: dict[str, Any], ranks: dict[bytes, int]) -> bytes:
    merges = merges_of(ranks)
    model = {
        "type": "BPE",
        # tiktoken takes a word that is a token as it is, which makes a difference only for tokens
        # that no merge makes.
        "ignore_merges": len(merges) + 256 < len(ranks),
        "vocab": {**{symbols(token): rank for token, rank in ranks.items()}, END_OF_TEXT: tokenizer.end_of_text},
        "merges": [[symbols(left), symbols(right)] for left, right in merges],
    }
    return _tokenizer_json({END_OF_TEXT: tokenizer.end_of_text}, model, pre_tokenizer, _byte_level(True))


def _char_json(tokenizer: CharTokenizer) -> bytes:
    vocabulary = {character: i for i, character in enumerate((*tokenizer.characters, END_OF_TEXT))}
    # The unknown token is not in the vocabulary, so that unknown characters are refused.
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return _tokenizer_json({END_OF_TEXT: tokenizer.end_of_text}, model, split, {"type": "Fuse"})


def _word_json(tokenizer: WordTokenizer) -> bytes:
    vocabulary = {word: i for i, word in enumerate((*tokenizer.words, UNKNOWN, END_OF_TEXT))}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN}
    # Inverted, what the pattern matches is kept, and the spaces between are removed.
    split = {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Removed", "invert": True}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return _tokenizer_json({END_OF_TEXT: tokenizer.end_of_text}, model, split, decoder)


def _tokenizer_json(special: dict[str, int], model: Json, pre_tokenizer: Json, decoder: Json) -> bytes:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "special": True, **flags} for token, i in special.items()]
    parts = {"added_tokens": added, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return json.dumps({"version": "1.0", **parts}).encode()


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
