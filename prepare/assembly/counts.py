"""How often each token, and each pair of neighbouring tokens, occurs."""

from pathlib import Path

import numpy as np

from pipeline.files import write_atomic
from pipeline.vocabulary.tokenizer import TokenIds

# Pairs are counted for vocabularies up to this size, whose table takes 8 MB. For GPT-2's it would
# take 20 GB, and most of its pairs occur too rarely for their counts to mean anything.
MAX_BIGRAM_VOCAB = 1024


class Counts:
    """int64 counts: `unigrams` (vocab_size,), and `bigrams` (vocab_size, vocab_size) or empty.

    With a `vocab_size` of 0 nothing is counted.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigrams = np.zeros(vocab_size, np.int64)
        small = vocab_size if vocab_size <= MAX_BIGRAM_VOCAB else 0
        self.bigrams = np.zeros((small, small), np.int64)
        # The last token of the ids before, which makes a pair with the first of the next.
        self._last = np.zeros(0, np.int64)

    def add(self, ids: TokenIds) -> None:
        if self.vocab_size:
            self.unigrams += np.bincount(ids, minlength=self.vocab_size)
        if len(self.bigrams):
            row = np.concatenate([self._last, ids.astype(np.int64)])
            pairs = np.bincount(row[:-1] * self.vocab_size + row[1:], minlength=self.bigrams.size)
            self.bigrams += pairs.reshape(self.bigrams.shape)
            self._last = row[-1:]

    def save(self, path: Path) -> None:
        write_atomic(path, np.concatenate([self.unigrams, self.bigrams.ravel()]).astype("<i8").tobytes())

    def load(self, path: Path) -> None:
        """Add the counts that `save` wrote."""
        saved = np.fromfile(path, dtype="<i8")
        self.unigrams += saved[: self.vocab_size]
        self.bigrams += saved[self.vocab_size :].reshape(self.bigrams.shape)
