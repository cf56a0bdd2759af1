"""Documents that share long word n-grams with evaluation texts (`--decontaminate`).

The rule of GPT-3 (Brown et al. 2020, appendix C): 13 words in a row, without case and punctuation;
an evaluation text of 8 to 12 words counts as one n-gram, and shorter ones occur by chance.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes, write_atomic
from pipeline.log import logger
from prepare.encoding.evaluation_texts import evaluation_texts
from prepare.encoding.ngrams import TAIL_WORDS, Hashes, PieceReader, Words, ngrams
from prepare.encoding.pieces import pieces
from prepare.units import Refused

MOST_WORDS, LEAST_WORDS = TAIL_WORDS + 1, 8
CONTAMINATED = "contaminated"
NGRAMS_FILE = "evaluation.npz"  # in the folder of parts, written with the plan
# Characters of a shared n-gram in the list of documents that were left out.
SHOWN_CHARACTERS = 500
# Slots of the first lookup for each n-gram, of which one in so many is taken.
SPARSITY = 16
# Up to 64 MB.
MOST_FILTER_BITS = 26


@dataclass(frozen=True)
class Contaminated(Refused):
    """A document that is left out, the evaluation text, and the words that it shares with it."""

    evaluation_text: str
    words: str


@dataclass(frozen=True)
class EvaluationNgrams:
    """(n-grams,) arrays: sorted hashes, and for each the number of its source in `names` and of the
    text there.
    """

    names: list[str]
    lengths: list[int]
    hashes: Hashes
    sources: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]

    def record(self) -> dict[str, str]:
        """For the options: a hash of the n-grams of each source by its name."""
        return {name: hash_bytes(self.hashes[self.sources == at].tobytes()) for at, name in enumerate(self.names)}

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer, names=self.names, lengths=self.lengths, hashes=self.hashes, sources=self.sources, rows=self.rows
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())


class Contamination:
    """Looks for evaluation texts in documents, at 60 to 160 MB/s: one lookup for almost all
    n-grams.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as saved:
            self._ngrams = EvaluationNgrams(saved["names"].tolist(), saved["lengths"].tolist(), *(
                saved[name] for name in ("hashes", "sources", "rows")
            ))  # fmt: skip
        hashes = self._ngrams.hashes
        bits = min(max(len(hashes) * SPARSITY, 1 << 16).bit_length(), MOST_FILTER_BITS)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[hashes >> self._shift] = True

    def find(self, text: str, words: Words) -> Contaminated | None:
        """The first n-gram of the text that is in an evaluation text."""
        for n, hashes in ngrams(words.hashes, self._ngrams.lengths):
            hits = np.flatnonzero(self._filter[hashes >> self._shift])
            at = np.searchsorted(self._ngrams.hashes, hashes[hits])
            found = np.flatnonzero(self._ngrams.hashes.take(at, mode="clip") == hashes[hits])
            if len(found):
                first = int(hits[found[0]])
                return self._contaminated(int(at[found[0]]), text[words.starts[first] : words.ends[first + n - 1]])
        return None

    def _contaminated(self, number: int, shared: str) -> Contaminated:
        where = f"{self._ngrams.names[self._ngrams.sources[number]]} row {self._ngrams.rows[number]}"
        return Contaminated(CONTAMINATED, where, " ".join(shared.split())[:SHOWN_CHARACTERS])


@cache
def evaluation_ngrams(names: tuple[str, ...]) -> EvaluationNgrams:
    """The n-grams of evaluation tasks and files. Raises UserError for one without long texts."""
    hashes, sources, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    lengths = set()
    for source, name in enumerate(names):
        texts = short = 0
        for row, text in evaluation_texts(name):
            texts += 1
            found = list(_ngrams_of(text))
            short += not found
            for n, each in found:
                lengths.add(n)
                hashes.append(each)
                sources.append(np.full(len(each), source, np.int32))
                rows.append(np.full(len(each), row, np.int32))
        if short == texts:
            raise UserError(f"--decontaminate {name}: none of its {texts:,} texts has {LEAST_WORDS} words or more")
        logger.info("%s: %s texts to keep out, %s shorter than %d words", name, f"{texts:,}", f"{short:,}", LEAST_WORDS)
    # Of equal n-grams the first text is named.
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    chosen = (np.concatenate(each)[first] for each in (sources, rows))
    return EvaluationNgrams(list(names), sorted(lengths), unique, *chosen)


def _ngrams_of(text: str) -> Iterator[tuple[int, Hashes]]:
    reader, total = PieceReader(), 0
    for piece, _ in pieces([text.encode(errors="replace")]):
        _, words = reader.read(piece)
        total = max(total, len(words.hashes))
        if total >= LEAST_WORDS:
            yield from ngrams(words.hashes, [min(total, MOST_WORDS)])
