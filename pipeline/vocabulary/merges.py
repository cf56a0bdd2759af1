"""Byte-pair vocabularies as they are published: rank tables, lists of merges, patterns for words.

tiktoken merges the pair whose result has the lowest rank; a tokenizer.json lists the pairs to
merge, in order. The two give the same ids if the ranks lead to each token by the pair that the list
has for it, which `merges_of` finds out.
"""

import base64
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

# Ids and ranks are below this: eighty times the largest vocabulary in use, and few enough for a
# list of tokens in memory.
MAX_IDS = 1 << 24
# `merges_of` takes 0.25 us per squared byte of a token: ten minutes for one token of 64 kB. The
# squares of GPT-2's tokens add up to 2.5 million, those of o200k_base to 12.8 million; the longest
# token of either has 128 bytes.
MAX_SQUARED_BYTES = 1 << 26


@dataclass(frozen=True)
class Published:
    """What belongs to one of OpenAI's rank tables (published.toml).

    `pattern` is tiktoken's; `plain` finds the same words in the regular expressions of Hugging
    Face's library too, where {1,3}+ repeats the group and $ matches at the end of a line.
    """

    ranks: int
    pattern: str
    plain: str
    end_of_text: int
    vocab_size: int


PUBLISHED = {
    name: Published(**fields)
    for name, fields in tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8")).items()
}

# In tokenizer.json files since Llama 3. At the end of a text it splits a newline from the spaces
# after it, unlike cl100k_base.
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# The patterns of tokenizer.json files that mean the same to tiktoken; tests compare the words that
# both libraries find.
SAME_IN_BOTH = frozenset({LLAMA3_PATTERN, *(published.plain for published in PUBLISHED.values())})


def published_for(name: str, ranks: dict[bytes, int]) -> Published:
    """What belongs to a rank table: found by its name, then by its number of ranks, else assumed.

    A table does not say how text was split into words. Tables made since GPT-4, such as Llama 3's,
    mostly split as cl100k_base does.
    """
    for known, published in PUBLISHED.items():
        if name == known or (name not in PUBLISHED and len(ranks) == published.ranks):
            return published
    cl100k, end_of_text = PUBLISHED["cl100k_base"], max(ranks.values()) + 1
    return Published(len(ranks), cl100k.pattern, cl100k.plain, end_of_text, vocab_size=end_of_text + 1)


def read_ranks(table: bytes) -> dict[bytes, int]:
    """The tokens of a .tiktoken file and their ranks, in the order of the ranks.

    Raises UserError for a damaged table, and for one that lacks a byte and so cannot encode every
    text.
    """
    ranks: dict[bytes, int] = {}
    lines = [line for line in table.splitlines() if line]
    for line in lines:
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            text = line[:40].decode(errors="replace")
            raise UserError(f"the .tiktoken file has the line {text!r}: expected a base64 token and its rank") from None
    ids = set(ranks.values())
    if len(ids) != len(lines) or min(ids, default=0) < 0 or max(ids, default=0) >= MAX_IDS:
        raise UserError(f"the .tiktoken file has a token or rank twice, or a rank that is not in 0 .. {MAX_IDS - 1}")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise UserError(f"the .tiktoken file has no token for byte 0x{absent[0]:02x}: expected one for each of the 256")
    if _are_too_long(ranks):
        raise UserError(f"the .tiktoken file has tokens of up to {max(map(len, ranks)):,} bytes: expected shorter ones")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    """The .tiktoken file that `read_ranks` reads."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def make_encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> Any:
    """tiktoken's encoder.

    A literal <|endoftext|> is ordinary text to `encode_to_numpy(text, disallowed_special=())`.
    """
    import tiktoken

    # Without any special token, tiktoken 0.14 looks for one at each character, and is a third
    # slower.
    unused = {"<|endoftext|>": max(ranks.values(), default=0) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused)


def _are_too_long(tokens: Iterable[bytes | str]) -> bool:
    """Whether `merges_of` would take minutes: no training gives such tokens, but a file may."""
    return sum(len(token) ** 2 for token in tokens) > MAX_SQUARED_BYTES


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token of two or more bytes, in rank order, for those that have one.

    A rank table has only the results. Merging the bytes of a token by rank, up to the last step,
    leads to its pair.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, MAX_IDS) for left, right in pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == MAX_IDS:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@dataclass(frozen=True)
class Merges:
    """A byte-level tokenizer.json for tiktoken: the order of its merges gives their ranks.

    `ids` is (ranks,): the id of each rank's token.
    """

    ranks: dict[bytes, int]
    ids: npt.NDArray[np.int64]
    pattern: str


def merges_in(document: dict[str, Any]) -> Merges | None:
    """The merges of a tokenizer.json if tiktoken gives the same ids with them, else None.

    Ranks choose a merge by its result, the file by its pair. They agree on every text if merging
    the bytes of each token by rank ends with the file's pair for it. Suppose they first differed
    where the ranks join two neighbours and the file does not: the bytes of the resulting token
    alone would have led to the same two neighbours, so they are the file's pair.
    """
    model, pattern = document["model"], _pattern_of(document.get("pre_tokenizer"))
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    plain = document.get("normalizer") is None and all(added["special"] for added in document.get("added_tokens", ()))
    if model.get("type") != "BPE" or any(model.get(key) for key in others) or pattern is None or not plain:
        return None
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = [*byte_symbols().values(), *(left + right for left, right in pairs)]
    if model.get("ignore_merges"):  # a word that is a token is taken, whether or not merges make it
        tokens += sorted(model["vocab"].keys() - set(tokens), key=model["vocab"].__getitem__)
    if _are_too_long(tokens):
        return None
    try:
        ids = np.array([model["vocab"][token] for token in tokens])
        ranks = {symbol_bytes(token): rank for rank, token in enumerate(tokens)}
        wanted = [(symbol_bytes(left), symbol_bytes(right)) for left, right in pairs]
    except KeyError:
        return None
    return Merges(ranks, ids, pattern) if len(ranks) == len(tokens) and merges_of(ranks) == wanted else None


def _pattern_of(pre_tokenizer: Any) -> str | None:
    """tiktoken's pattern for a pre-tokenizer, None for an unknown one: none is translated."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            return PUBLISHED["gpt2"].pattern
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": plain}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return plain if plain in SAME_IN_BOTH else None
    return None


@cache
def byte_symbols() -> dict[int, str]:
    """GPT-2's symbol for each byte: its code point if printable, else the next one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def _symbol_values() -> dict[str, int]:
    return {symbol: byte for byte, symbol in byte_symbols().items()}


def symbols(token: bytes) -> str:
    """A token as a byte-level tokenizer.json writes it."""
    return "".join(map(byte_symbols().__getitem__, token))


def symbol_bytes(token: str) -> bytes:
    """The bytes of a token written in `symbols`. Raises KeyError for another character."""
    return bytes(map(_symbol_values().__getitem__, token))
