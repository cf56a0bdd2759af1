"""Which documents, or which ends of documents, are in val; the rest is in train.

A document is chosen by a hash of its content. In a corpus of a few documents, or of very unequal
ones, that may give val far more or fewer tokens than asked for. Then the threshold of the hash moves
first; if that is not enough, the end of each long document goes to val and its beginning to train.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer, token_dtype
from prepare.unfinished.parts import Part

HASH_BITS = 64
# A threshold that is moved is a multiple of 2**48: with 65,536 bins of hashes it is found in one
# pass and 512 kB, whatever the size of the corpus.
BIN_BITS = 16
# Both splits get between half and twice the tokens asked for. With 100 documents of equal length
# and a fraction of 0.1 the hash alone misses that for one seed in forty, with 1,000 for none.
MOST_UNEVEN = 2.0
# Documents up to this length are not cut, unless nothing else gives the splits their tokens: a part
# of a note says little about a model. One of two tokens, with end-of-text, cannot be cut.
SHORTEST_CUT_TOKENS = 256
SHORTEST_TOKENS = 2
INSIDE_CHARACTER = ("\ufffd".encode(), *(bytes([byte]) for byte in range(0x80, 0xC0)))
# Tokens copied, hashed and counted at a time: 2 to 4 MB, which stay in the processor's cache from
# one step to the next.
COPY_TOKENS = 1 << 20

Flags = npt.NDArray[np.bool_]
Sizes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentRange:
    """Documents [first, stop) of a part whose document 0 is document `number` of the corpus."""

    part: str
    number: int
    first: int
    stop: int


@dataclass(frozen=True)
class SplitByHash:
    """val has the documents whose hash (the high half of XXH3-128, seeded) is below `threshold`.

    The rule looks at nothing but the content: exact duplicates stay together, and added documents
    move no others. A threshold of 0 gives val nothing.
    """

    fraction: float
    threshold: int

    def heads(self, part: Part, documents: DocumentRange) -> Sizes:
        """(documents, 2): how many of each document's tokens and bytes of text are in train.

        Tokens include end-of-text, so that of a document as a whole is its length.
        """
        in_train = part.hashes[documents.first : documents.stop, 0] >= np.uint64(self.threshold)
        return in_train[:, None] * sizes(part, documents)

    def record(self) -> dict[str, Any]:
        """The rule as the manifest describes it."""
        described = {"kind": "hash", "fraction": self.fraction, "threshold": self.threshold}
        return {**described, "hash": "xxh3_128, high half, seeded"}


@dataclass(frozen=True)
class SplitByPosition(SplitByHash):
    """val has the ends of the first `cut_documents` documents of more than `cut_above` tokens, and
    others by their hash.

    Both halves of a document end with end-of-text, as documents do. `path` is the file of all heads,
    16 bytes per document of the corpus.
    """

    cut_above: int
    cut_documents: int
    path: Path

    def heads(self, part: Part, documents: DocumentRange) -> Sizes:
        first, count = documents.number + documents.first, documents.stop - documents.first
        if count == 0:  # mmap(2) refuses an empty range
            return np.zeros((0, 2), np.int64)
        return np.memmap(self.path, np.int64, "r", offset=16 * first, shape=(count, 2))

    def record(self) -> dict[str, Any]:
        described = {"kind": "position", "cut_above": self.cut_above, "cut_documents": self.cut_documents}
        return super().record() | described


def sizes(part: Part, documents: DocumentRange) -> Sizes:
    """(documents, 2): tokens, with end-of-text, and bytes of text of each document."""
    here = slice(documents.first, documents.stop)
    return np.stack([part.lengths[here], part.text_bytes[here]], axis=1)


def dropped(duplicates: Path | None, start: int, stop: int) -> Flags:
    """(stop - start,): which of the corpus's documents [start, stop) are left out as duplicates."""
    if duplicates is None or start == stop:
        return np.zeros(stop - start, np.bool_)
    return np.memmap(duplicates, np.bool_, "r", offset=start, shape=(stop - start,))


def numbered_parts(parts: list[Path], dtype: np.dtype[Any]) -> Iterator[tuple[Part, DocumentRange]]:
    """Each part, and all its documents as a range of the corpus."""
    number = 0
    for path in parts:
        part = Part(path, dtype)
        yield part, DocumentRange(path.name, number, 0, part.summary.documents)
        number += part.summary.documents


@dataclass(frozen=True)
class Fit:
    """A split that was tried: val's share of all tokens, and by which factor a split misses its own.

    `uneven` is infinite if a split is empty.
    """

    cut_above: int
    threshold: int = 0
    cut_documents: int = 0
    share: float = 0.0
    uneven: float = math.inf


class SplitFinder:
    """Finds the rule that gives val about a `fraction` of the corpus's tokens."""

    def __init__(self, parts: list[Path], tokenizer: Tokenizer, fraction: float, duplicates: Path | None) -> None:
        self.parts, self.tokenizer, self.fraction, self.duplicates = parts, tokenizer, fraction, duplicates
        self.asked = int(fraction * (1 << HASH_BITS))

    def find(self, path: Path) -> SplitByHash:
        """The rule; that of documents which are cut keeps their heads in the file `path`.

        Raises UserError for a corpus that cannot be split.
        """
        if self.fraction == 0:
            return SplitByHash(0, threshold=0)
        tokens = sum(int(lengths.sum()) for _, lengths in self._documents())
        smaller = min(self.fraction, 1 - self.fraction)
        # A longer document has at least a token for each split.
        shortest = max(SHORTEST_CUT_TOKENS, int(min(1 / smaller, tokens)))
        best = Fit(tokens)
        # No document is cut; then those of more than a quarter of the smaller split, without which
        # the threshold finds its share; then every one that is long enough.
        for cut_above in (tokens, max(int(tokens * smaller / 4), shortest), shortest):
            if best.uneven > MOST_UNEVEN:
                best = min(best, self._fit(cut_above), key=lambda fit: fit.uneven)
        # Such as thousands of times the same sentence.
        if best.uneven == math.inf or (best.uneven > MOST_UNEVEN and tokens * smaller > SHORTEST_CUT_TOKENS):
            best = min(best, self._fit_short(tokens), key=lambda fit: fit.uneven)
        if best.uneven == math.inf:
            raise UserError(
                "every document of the corpus is the same single token: expected enough text for a train and a val split, "
                "or --val-fraction 0"
            )
        self._log(best)
        if not best.cut_documents:
            return SplitByHash(self.fraction, best.threshold)
        self._write_heads(best, path)
        return SplitByPosition(
            self.fraction, best.threshold, cut_above=best.cut_above, cut_documents=best.cut_documents, path=path
        )

    def _documents(self) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        """High halves of the hashes, and lengths in tokens, of each part's documents."""
        for part, documents in numbered_parts(self.parts, token_dtype(self.tokenizer.vocab_size)):
            kept = ~dropped(self.duplicates, documents.number, documents.number + documents.stop)
            yield part.hashes[kept, 0].astype(np.uint64), part.lengths[kept]

    def _fit(self, cut_above: int) -> Fit:
        """The best threshold for the documents that are not cut: the one asked for, if it will do."""
        bins = np.zeros(1 << BIN_BITS)
        below = beginnings = ends = cut_documents = 0
        for hashes, lengths in self._documents():
            cut = lengths > cut_above
            ids = lengths[cut] - 1
            heads = _latest_position(ids, self.fraction)
            beginnings += int((heads + 1).sum())
            ends += int((ids - heads + 1).sum())
            cut_documents += len(ids)
            hashes, lengths = hashes[~cut], lengths[~cut]
            below += int(lengths[hashes < np.uint64(self.asked)].sum())
            bins += np.bincount((hashes >> np.uint64(HASH_BITS - BIN_BITS)).astype(np.int64), lengths, len(bins))
        total = bins.sum() + beginnings + ends
        # Val's share with the threshold asked for, then with one at the lower end of each bin.
        shares = (np.concatenate([[below], np.cumsum(bins) - bins]) + ends) / total
        uneven = self._uneven(shares)
        best = 0 if uneven[0] <= MOST_UNEVEN else int(uneven.argmin())
        threshold = (best - 1) << (HASH_BITS - BIN_BITS) if best else self.asked
        return Fit(cut_above, threshold, cut_documents, share=float(shares[best]), uneven=float(uneven[best]))

    def _fit_short(self, tokens: int) -> Fit:
        """Cuts short documents too, in the corpus's order, until val has its tokens."""
        ends = cut_documents = 0
        for _, lengths in self._documents():
            ids = lengths[lengths > SHORTEST_TOKENS] - 1
            upto = ends + np.cumsum(ids - _latest_position(ids, self.fraction) + 1)
            taken = min(int(np.searchsorted(upto, self.fraction * tokens)) + 1, len(ids))
            if taken and ends < self.fraction * tokens:
                ends, cut_documents = int(upto[taken - 1]), cut_documents + taken
        share = ends / (tokens + cut_documents)
        return Fit(SHORTEST_TOKENS, 0, cut_documents, share=share, uneven=float(self._uneven(np.array(share))))

    def _uneven(self, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """By which factor the split that misses its tokens most does, for each of val's shares."""
        ratios = np.array([shares / self.fraction, (1 - shares) / (1 - self.fraction)])
        with np.errstate(divide="ignore"):
            uneven: npt.NDArray[np.float64] = np.maximum(ratios, 1 / ratios).max(axis=0)
        return uneven

    def _write_heads(self, fit: Fit, path: Path) -> None:
        by_hash = SplitByHash(self.fraction, fit.threshold)
        token_bytes, left = self.tokenizer.token_bytes(), fit.cut_documents
        with path.open("wb") as file:
            for part, documents in numbered_parts(self.parts, token_dtype(self.tokenizer.vocab_size)):
                heads, ends = by_hash.heads(part, documents), np.cumsum(part.lengths)
                kept = ~dropped(self.duplicates, documents.number, documents.number + documents.stop)
                cut = np.flatnonzero(kept & (part.lengths > fit.cut_above))[:left].tolist()
                left -= len(cut)
                for number in cut:
                    length, text_bytes = int(part.lengths[number]), int(part.text_bytes[number])
                    ids = part.tokens[int(ends[number]) - length : int(ends[number]) - 1]
                    head = split_position(ids, self.tokenizer, self.fraction)
                    if token_bytes is not None:
                        text_bytes = _count_bytes(part, ids[:head], token_bytes)
                    else:  # what a token stands for depends on its neighbours: in proportion
                        text_bytes = text_bytes * head // len(ids)
                    heads[number] = head, text_bytes
                file.write(heads.tobytes())

    def _log(self, fit: Fit) -> None:
        if fit.cut_documents:
            how = (
                "no choice of complete documents comes near, so val has the ends of %s documents of more than %s tokens"
            )
            how = how % (f"{fit.cut_documents:,}", f"{fit.cut_above:,}")
        elif fit.threshold != self.asked:
            how = "the documents that the hash chooses are too many or too few, so they are chosen by tokens"
        else:
            return
        near = "" if fit.uneven <= MOST_UNEVEN else "; the corpus is too small for a nearer split"
        logger.info("val: %.4g of the tokens, asked for %.4g: %s%s", fit.share, self.fraction, how, near)


def _latest_position(tokens: Any, fraction: float) -> Any:
    """Where to divide documents of so many tokens, without a look at their characters."""
    return np.clip((tokens * (1 - fraction)).astype(np.int64), 1, tokens - 1)


def split_position(ids: TokenIds, tokenizer: Tokenizer, fraction: float) -> int:
    """Where to divide a document: before a token that begins a character, neither half empty."""
    latest = int(_latest_position(np.array(len(ids)), fraction))
    # A character has up to four bytes, and all but its first are 0b10xxxxxx. Some libraries decode
    # an incomplete one to U+FFFD, and a space at the beginning to nothing.
    texts = ((at, tokenizer.decode_bytes([int(ids[at])])) for at in range(latest, max(latest - 4, 0), -1))
    begins = (at for at, text in texts if not text.startswith(INSIDE_CHARACTER))
    return next(begins, latest)


def _count_bytes(part: Part, ids: TokenIds, token_bytes: npt.NDArray[np.int64]) -> int:
    size = 0
    for at in range(0, len(ids), COPY_TOKENS):
        size += int(token_bytes.take(ids[at : at + COPY_TOKENS]).sum())
        part.release_memory()  # else one long document would be in memory as a whole
    return size
