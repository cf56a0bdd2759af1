"""The quality page of `pipeline inspect`: what a sample of documents says about a corpus.

The statistics are those by which Gopher (Rae et al. 2021, table A1) and C4 (Raffel et al. 2020)
filter web text; their limits are shown next to what was found, and nothing is left out by them.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from observe.tables import cell, plain_table

# Characters of an example, and of a text whose language is identified: 0.2 ms.
EXAMPLE_CHARACTERS, LANGUAGE_CHARACTERS = 120, 1000
# Below it a text may be code, numbers, or several languages.
LANGUAGE_CONFIDENCE, LANGUAGES = 0.5, 8
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}
# As `prepare --near-dedup`: MinHash of 5-word shingles.
SHINGLE_WORDS, SIGNATURE_VALUES, NEAR = 5, 128, 0.8
NEEDS = "needs the package {}: pip install 'gpt-pipeline[quality]'"
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_WORD, _LETTER = re.compile(r"\w+"), re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Sampled:
    """A document of the sample: its position, its text (the beginning, if it is long), and a key
    that equal documents share.
    """

    file: str
    position: int
    text: str
    key: int


@dataclass(frozen=True)
class Statistic:
    """A figure of one document, and the limits between which the filters keep it."""

    of: Callable[["Parts"], float]
    least: float = 0.0
    most: float = float("inf")


class Parts:
    """A document's text, lines, paragraphs and words."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.paragraphs = [each.strip() for each in text.split("\n\n") if each.strip()]
        self.words = text.split()

    def lines_with(self, *, start: tuple[str, ...] = (), end: tuple[str, ...] = ()) -> float:
        return _share(sum(line.startswith(start) or line.endswith(end) for line in self.lines), self.lines)

    def pair_share(self) -> float:
        """Of all characters of words, those in the most frequent pair of neighbours."""
        pairs = Counter(pairwise(self.words))
        pair, count = max(pairs.items(), key=lambda entry: entry[1], default=(("", ""), 0))
        return len("".join(pair)) * count / max(sum(map(len, self.words)), 1) if count > 1 else 0.0


def _share(count: int, among: list[str]) -> float:
    return count / max(len(among), 1)


def _repeated(texts: list[str]) -> float:
    return _share(len(texts) - len(set(texts)), texts)


STATISTICS = {
    "words": Statistic(lambda d: len(d.words), 50, 100_000),
    "mean word length": Statistic(lambda d: sum(map(len, d.words)) / max(len(d.words), 1), 3, 10),
    "symbols (# ...) per word": Statistic(lambda d: _share(len(re.findall(r"#|\.\.\.|…", d.text)), d.words), most=0.1),
    "lines with a bullet": Statistic(lambda d: d.lines_with(start=tuple("•‣*-–●")), most=0.9),
    "lines ending in an ellipsis": Statistic(lambda d: d.lines_with(end=("...", "…")), most=0.3),
    "words with a letter": Statistic(lambda d: _share(sum(map(bool, map(_LETTER.search, d.words))), d.words), 0.8),
    "English stop words, of 8": Statistic(lambda d: len(STOP_WORDS & {word.lower() for word in d.words}), 2),
    "lines ending in punctuation": Statistic(lambda d: d.lines_with(end=(".", "!", "?", '"', "”"))),
    "repeated lines": Statistic(lambda d: _repeated(d.lines), most=0.3),
    "repeated paragraphs": Statistic(lambda d: _repeated(d.paragraphs), most=0.3),
    "characters in the top word pair": Statistic(Parts.pair_share, most=0.2),
}


def describe_quality(split: str, sample: list[Sampled], documents: int) -> dict[str, Any]:
    """The page of a sample of the `documents` of a split."""
    parts = [Parts(each.text) for each in sample]
    described: dict[str, Any] = {"split": split, "sampled": len(sample), "documents": documents}
    described["statistics"] = {
        name: _describe(statistic, np.array([statistic.of(each) for each in parts], float), sample)
        for name, statistic in STATISTICS.items()
        if sample
    }
    described["languages"] = _languages(sample)
    repeated = len(sample) - len({(each.key, each.text) for each in sample})
    return described | {"exact_duplicates": repeated / max(len(sample), 1), "near_duplicates": _near_duplicates(sample)}


def _describe(statistic: Statistic, values: Any, sample: list[Sampled]) -> dict[str, Any]:
    outside = (values < statistic.least) | (values > statistic.most)
    lowest, highest = int(values.argmin()), int(values.argmax())
    return {
        "min": float(values[lowest]),
        **{name: float(np.quantile(values, share)) for name, share in QUANTILES.items()},
        "max": float(values[highest]),
        "least": statistic.least,
        "most": statistic.most if np.isfinite(statistic.most) else None,
        "outside": float(outside.mean()),
        "lowest": _example(sample[lowest]),
        "highest": _example(sample[highest]),
    }


def _example(document: Sampled) -> dict[str, Any]:
    return {"file": document.file, "position": document.position, "text": document.text[:EXAMPLE_CHARACTERS]}


def _languages(sample: list[Sampled]) -> dict[str, float] | str:
    """Shares of ISO 639 codes, by py3langid, whose model is part of its package; or what is missing."""
    if find_spec("py3langid") is None:
        return NEEDS.format("py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found = (identifier.classify(each.text[:LANGUAGE_CHARACTERS]) for each in sample)
    counts = Counter(code if confidence >= LANGUAGE_CONFIDENCE else "unclear" for code, confidence in found)
    return {code: count / len(sample) for code, count in counts.most_common(LANGUAGES)}


def _near_duplicates(sample: list[Sampled]) -> float | str:
    """The share of documents that are near to one before them in the sample, equal ones included."""
    if find_spec("rensa") is None:
        return NEEDS.format("rensa")
    from rensa import RMinHash

    shingles = [_shingles(each.text) for each in sample]
    sketches = RMinHash.from_token_sets(shingles, SIGNATURE_VALUES, 1)
    values = np.array([sketch.digest() for sketch in sketches], np.uint32)
    near = sum(bool(((values[:at] == values[at]).mean(axis=1) >= NEAR).any()) for at in range(1, len(values)))
    return near / max(len(sample), 1)


def _shingles(text: str) -> list[str]:
    """A text of fewer words is one shingle, as is one without words."""
    words = _WORD.findall(text.lower()) or [text]
    return [" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(len(words) - SHINGLE_WORDS + 1, 1))]


# ---- on the terminal ----


def show_quality(console: Console, quality: dict[str, Any]) -> None:
    """The statistics as a table, then an example at each tail, then the other rates."""
    among = f"{quality['sampled']:,} of {quality['documents']:,} documents of {quality['split']}"
    console.print(Text(f"\nquality, of {among}"))
    columns = ("min", *QUANTILES, "max", "least", "most", "outside")
    table = plain_table("", *columns[:5], "at least", "at most", "outside")
    for name, figures in quality["statistics"].items():
        table.add_row(name, *(cell("" if figures[each] is None else figures[each]) for each in columns))
    console.print(table)
    for name, figures in quality["statistics"].items():
        for tail, value in (("lowest", "min"), ("highest", "max")) if figures["min"] < figures["max"] else ():
            example = figures[tail]
            where = f"{name}, {tail} ({figures[value]:,.4g}; {example['file']} at {example['position']:,}): "
            console.print(Text(where), cell(example["text"]), sep="")
    for name in ("languages", "exact_duplicates", "near_duplicates"):
        console.print(Text(f"{name.replace('_', ' ')}: "), cell(quality[name]), sep="")
