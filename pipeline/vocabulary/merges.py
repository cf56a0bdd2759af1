"""Byte-pair vocabularies as they are published: rank tables, lists of merges, and the patterns that cut text first.

tiktoken merges the pair whose result has the lowest rank; a tokenizer.json lists the pairs to merge, in order. Where each
token has one way of coming about the two are the same, and `merges_of` tells whether it has.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

# Ids and ranks are below it: eighty times the largest vocabulary in use, and what a list of tokens can be held for.
MOST_IDS = 1 << 24
# `merges_of` takes a quarter of a microsecond for each squared byte of a token, so one of 64 kB would take it ten minutes.
# All of GPT-2's tokens have 2.5 million of them, o200k_base's 12.8 million, each with a longest token of 128 bytes.
MOST_SQUARED_BYTES = 1 << 26


@dataclass(frozen=True)
class Published:
    """What belongs to a rank table of OpenAI's. `pattern` is tiktoken's; `plain` cuts the same pieces in Hugging Face's
    regular expressions too, where {1,3}+ repeats and $ stands for the end of a line.
    """

    ranks: int
    pattern: str
    plain: str
    end_of_text: int
    vocab_size: int


_O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# vocab_size counts ids that no text gives, as tiktoken's n_vocab does: cl100k_base and o200k_base have holes there.
PUBLISHED = {
    "gpt2": Published(
        50_256,
        # Radford et al. 2019, possessive: the same pieces, found faster.
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        end_of_text=50_256,
        vocab_size=50_257,
    ),
    "cl100k_base": Published(
        100_256,
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s+\z|\s*[\r\n]|\s+(?!\S)|\s""",
        end_of_text=100_257,
        vocab_size=100_277,
    ),
    "o200k_base": Published(
        199_998,
        _O200K,
        _O200K,
        end_of_text=199_999,
        vocab_size=200_019,
    ),
}

# As tokenizer.json files have it since Llama 3. At the end of a text it cuts a line's end from the spaces behind it, which
# cl100k_base does not.
_LLAMA3 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# The patterns of tokenizer.json files that tiktoken's regular expressions are tested to read in the same way.
SAME_IN_BOTH = frozenset({_LLAMA3, *(published.plain for published in PUBLISHED.values())})


def published_for(name: str, ranks: dict[bytes, int]) -> Published:
    """What belongs to the rank table `name`, else to one of as many ranks, else to one of the user's own.

    A table does not say how text was cut. Those made since GPT-4, Llama 3's for one, mostly cut as cl100k_base does.
    """
    for known, published in PUBLISHED.items():
        if name == known or (name not in PUBLISHED and len(ranks) == published.ranks):
            return published
    cl100k, end_of_text = PUBLISHED["cl100k_base"], max(ranks.values()) + 1
    return Published(len(ranks), cl100k.pattern, cl100k.plain, end_of_text, vocab_size=end_of_text + 1)


def read_ranks(table: bytes) -> dict[bytes, int]:
    """A .tiktoken file's tokens and ranks, by rank. Raises UserError unless every text can be made of them."""
    ranks: dict[bytes, int] = {}
    lines = [line for line in table.splitlines() if line]
    for line in lines:
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise UserError(f"the .tiktoken file has the line {shown!r}: wanted a base64 token and its rank") from None
    ids = set(ranks.values())
    if len(ids) != len(lines) or min(ids, default=0) < 0 or max(ids, default=0) >= MOST_IDS:
        raise UserError("the .tiktoken file gives a token or a rank twice, or one out of range: wanted each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"the .tiktoken file has no token for byte 0x{missing[0]:02x}: wanted all 256, for any text")
    if _are_too_long(ranks):
        raise UserError(f"the .tiktoken file has tokens of up to {max(map(len, ranks)):,} bytes: wanted shorter ones")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    """The .tiktoken file that `read_ranks` reads."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def make_encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> Any:
    """tiktoken's encoder. A literal <|endoftext|> is ordinary text to `encode_to_numpy(text, disallowed_special=())`.

    It is named as special all the same: without any, tiktoken 0.14 looks for one at each character, and is a third slower.
    """
    import tiktoken

    unused = {"<|endoftext|>": max(ranks.values(), default=0) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused)


def _are_too_long(tokens: Iterable[bytes | str]) -> bool:
    """Whether `merges_of` would take minutes for them: nobody learns such tokens, but a file may hold them."""
    return sum(len(token) ** 2 for token in tokens) > MOST_SQUARED_BYTES


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that made each token of two bytes or more, in rank order; none for a token that no pair makes.

    A rank table keeps only results. Merging a token's bytes by rank comes by the two halves that its own merge joined.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, MOST_IDS) for left, right in pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == MOST_IDS:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@dataclass(frozen=True)
class Merges:
    """A byte-level tokenizer.json as tiktoken can apply it: merges in order give ranks, `ids` has the id of each."""

    ranks: dict[bytes, int]
    ids: npt.NDArray[np.int64]
    pattern: str


def merges_in(document: dict[str, Any]) -> Merges | None:
    """The merges of a tokenizer.json that tiktoken would apply to the same effect, None where it would not.

    Ranks merge by what a pair gives, the file by the pair. They agree on every text if each token's own bytes, merged by
    rank, come about by the pair in the file. Suppose they first part where ranks join two neighbours and the file does
    not: the token's own bytes would have come to the same two neighbours, and that is the file's pair.
    """
    model, pattern = document["model"], _pattern_of(document.get("pre_tokenizer"))
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    plain = document.get("normalizer") is None and all(added["special"] for added in document.get("added_tokens", ()))
    if model.get("type") != "BPE" or any(model.get(key) for key in others) or pattern is None or not plain:
        return None
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = [*byte_symbols().values(), *(left + right for left, right in pairs)]
    if model.get("ignore_merges"):  # a piece that is a token is taken whole, however it would come about
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
    """tiktoken's pattern for a tokenizer.json's pre-tokenizer; patterns are known or not, none is translated."""
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
    """GPT-2's printable stand-in for each byte: itself where printable, else the code points from 256 on, in order."""
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
