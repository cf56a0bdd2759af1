"""Documents that share long word n-grams with evaluation texts (`--decontaminate`).

The rule of GPT-3 (Brown et al. 2020, appendix C): 13 words in a row, without case and punctuation;
an evaluation text of 8 to 12 words is one n-gram, and shorter ones occur by chance. Unlike there,
n-grams that are frequent in the corpus count too: one pass does not know them.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.files import hash_bytes
from pipeline.log import logger
from prepare.encoding.evaluation import evaluation_texts
from prepare.encoding.ngrams import TAIL_WORDS, PieceReader, ngrams
from prepare.encoding.pieces import pieces
from prepare.units import Refused

CONTAMINATED = "contaminated"
NGRAMS_FILE = "evaluation_ngrams"  # in the folder of parts, written with the plan
MOST_WORDS, LEAST_WORDS = TAIL_WORDS, 8
# Characters of a shared n-gram in the list of documents that were left out.
SHOWN_CHARACTERS = 500
# The first lookup is in 16 slots or more for each n-gram, up to 64 MB.
SPARSITY, MOST_FILTER_BITS = 16, 26
_NGRAM = np.dtype([("hash", "<u8"), ("source", "<i4"), ("row", "<i4"), ("words", "<i4")])


@dataclass(frozen=True)
class Contaminated(Refused):
    """A document that is left out, the evaluation text, and the words that it shares with it."""

    evaluation_text: str = ""
    words: str = ""


class Contamination:
    """Looks up n-grams of documents among those of evaluation texts, which `names` are the sources
    of.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self._names, self._ngrams = names, np.fromfile(path, _NGRAM)
        self._hashes = np.ascontiguousarray(self._ngrams["hash"])
        self._lengths = np.unique(self._ngrams["words"]).tolist()
        bits = min(max(len(self._hashes) * SPARSITY, 1 << 16).bit_length(), MOST_FILTER_BITS)
        self._shift, self._filter = np.uint64(64 - bits), np.zeros(1 << bits, np.bool_)
        self._filter[self._hashes >> self._shift] = True

    def find(self, document: PieceReader) -> Contaminated | None:
        """The first n-gram of what was read that is in an evaluation text."""
        for n, hashes in ngrams(document.words, self._lengths):
            # One lookup in a table for almost all n-grams, and a binary search for the rest.
            hits = np.flatnonzero(self._filter[hashes >> self._shift])
            at = np.searchsorted(self._hashes, hashes[hits])
            for hit in np.flatnonzero(self._hashes.take(at, mode="clip") == hashes[hits])[:1].tolist():
                first, found = int(hits[hit]), self._ngrams[at[hit]]
                shared = document.text[document.starts[first] : document.ends[first + n - 1]]
                text = f"{self._names[found['source']]} row {found['row']}"
                return Contaminated(
                    CONTAMINATED, evaluation_text=text, words=" ".join(shared.split())[:SHOWN_CHARACTERS]
                )
        return None


@cache
def evaluation_ngrams(names: tuple[str, ...]) -> npt.NDArray[Any]:
    """The n-grams of tasks and files, sorted by hash, those of two texts as the first one's.

    Raises UserError for a source without texts that are long enough.
    """
    found = [np.zeros(0, _NGRAM)]
    for source, name in enumerate(dict.fromkeys(names)):
        texts = short = 0
        for row, text in evaluation_texts(name):
            reader, count = PieceReader(), 0
            for piece, _ in pieces([text.encode(errors="replace")]):
                reader.read(piece)
                count = max(count, len(reader.words))
                for n, hashes in ngrams(reader.words, [min(count, MOST_WORDS)] if count >= LEAST_WORDS else []):
                    found.append(np.empty(len(hashes), _NGRAM))
                    for field, value in zip(_NGRAM.names or (), (hashes, source, row, n), strict=True):
                        found[-1][field] = value
            texts, short = texts + 1, short + (count < LEAST_WORDS)
        if short == texts:
            raise UserError(f"--decontaminate {name}: none of its {texts:,} texts has {LEAST_WORDS} words or more")
        logger.info("%s: %s texts, %s of them shorter than %d words", name, f"{texts:,}", f"{short:,}", LEAST_WORDS)
    everything = np.concatenate(found)
    return everything[np.unique(everything["hash"], return_index=True)[1]]


def evaluation_record(names: tuple[str, ...]) -> dict[str, str]:
    """For the options: a hash of the n-grams of each source."""
    records = evaluation_ngrams(names) if names else np.zeros(0, _NGRAM)
    return {
        name: hash_bytes(records[records["source"] == at].tobytes()) for at, name in enumerate(dict.fromkeys(names))
    }
