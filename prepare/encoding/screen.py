"""What is looked for in the words of each document while it is encoded."""

from dataclasses import dataclass
from pathlib import Path

from prepare.encoding.contamination import Contaminated, Contamination
from prepare.encoding.ngrams import PieceReader
from prepare.encoding.signatures import Signature


@dataclass(frozen=True)
class Screening:
    """Whether documents get signatures, and the file of evaluation n-grams to look for."""

    signatures: bool = False
    evaluation: Path | None = None


class Screen:
    """Reads one document after another in pieces, until a piece is contaminated."""

    def __init__(self, screening: Screening) -> None:
        self._screening = screening
        self._contamination = Contamination(screening.evaluation) if screening.evaluation else None

    def begin(self, piece: str) -> Contaminated | None:
        """Read the first piece of a document, which may be all of it."""
        self._reader = PieceReader()
        self._signature = Signature() if self._screening.signatures else None
        return self.go_on(piece)

    def go_on(self, piece: str) -> Contaminated | None:
        text, words = self._reader.read(piece)
        if self._signature:
            self._signature.add(words.hashes)
        return self._contamination.find(text, words) if self._contamination else None

    def signature(self) -> bytes:
        """Of all that was read; empty if documents get none."""
        return self._signature.digest() if self._signature else b""
