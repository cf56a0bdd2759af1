"""The quality page: statistics of texts made to have them, a sample that holds copies, languages, and its time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GPT2_END, prose, write_documents

from observe import quality, sample
from observe.inspect import run
from observe.quality import STATISTICS, Parts, Sampled, describe_quality
from observe.sample import NO_DOCUMENTS, documents_of, smallest
from pipeline.vocabulary.byte_pair import BytePairTokenizer

ENGLISH = "It was the best of times, and that is what we have to be with."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und niemand hat ihn gesehen."


def page(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    run(path, as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["quality"]
    return found


def value(name: str, text: str) -> float:
    return STATISTICS[name].of(Parts(text))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("words", ENGLISH, 15),
        ("mean word length", "a bb ccc", 2),
        ("symbols (# ...) per word", "#one ... two… three", 3 / 4),
        ("lines with a bullet", "- a\n\n  • b\nc\n* d", 3 / 4),
        ("lines ending in an ellipsis", "a...\nb…\nc.\nd", 1 / 2),
        ("words with a letter", "a1 22 -- d", 1 / 2),
        ("English stop words, of 8", "The cat And the dog have it", 3),
        ("lines ending in punctuation", 'One.\nTwo\n"Three"\nFour?  \n', 3 / 4),
        ("repeated lines", "a\nb\na\na", 1 / 2),
        ("repeated paragraphs", "a\nb\n\na\nb\n\nc", 1 / 3),
        ("characters in the top word pair", "ab cd ab cd x", 8 / 9),
    ],
)
def test_a_statistic_is_what_a_reader_counts(name: str, text: str, expected: float) -> None:
    assert value(name, text) == pytest.approx(expected)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("text", ["", "\n\n", "?", "\x00"])
def test_a_text_without_words_or_lines_has_every_statistic(name: str, text: str) -> None:
    assert 0 <= value(name, text) <= 1


def test_each_tail_has_its_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{ENGLISH} Number {at}." for at in range(50)] + ["# # # #", f"- {GERMAN}"]
    write_documents(tmp_path, {"train": [texts[:20], texts[20:]], "val": [["v"]]})
    found = page(tmp_path, capsys)
    assert (found["split"], found["sampled"], found["documents"]) == ("train", 52, 52)
    assert len(found["statistics"]) >= 10
    symbols = found["statistics"]["symbols (# ...) per word"]
    assert symbols["highest"]["text"] == "# # # #" and symbols["highest"]["file"] == "train_00001.bin"
    assert (symbols["min"], symbols["median"], symbols["max"], symbols["outside"]) == (0, 0, 1, 1 / 52)
    assert found["statistics"]["lines with a bullet"]["highest"]["text"].startswith("- Der schnelle")
    capsys.readouterr()
    run(tmp_path, as_json=False)
    out = capsys.readouterr().out
    assert out.index("val, document 1") < out.index("quality, of 52 of 52 documents of train")
    assert "lines with a bullet, highest (1; train_00001.bin at" in out and "exact duplicates: 0" in out


def test_rates_of_duplicates_are_those_of_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rensa")
    texts = [" ".join(f"word{at * 100 + each}" for each in range(60)) for at in range(40)]
    near = [f"{text} and one" for text in texts[:5]]
    write_documents(tmp_path, {"train": [[*texts, *texts[:10], *near]], "val": [["v"]]})
    found = page(tmp_path, capsys)
    assert found["exact_duplicates"] == 10 / 55 and found["near_duplicates"] == 15 / 55


def test_a_small_sample_holds_every_copy_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of 4,000 documents, half of which are copies: by position, a twentieth of them would seem to be."""
    monkeypatch.setattr(sample, "SAMPLE_DOCUMENTS", 400)
    chance = np.random.default_rng(0)
    documents = chance.integers(0, 50_000, (2000, 30)).astype(np.uint16)
    ids = np.concatenate([documents, documents[chance.permutation(2000)]]).ravel()
    starts = np.arange(0, ids.size, 30)
    lengths = np.full(len(starts), 30)
    taken = smallest(documents_of(0, ids, starts, lengths))
    assert len(taken) == 400 and len(set(taken["key"].tolist())) == 200
    halves = [documents_of(0, ids, starts[each], lengths[each]) for each in (slice(2000, None), slice(0, 2000))]
    assert (smallest(smallest(NO_DOCUMENTS, halves[0]), halves[1]) == taken).all()


def test_languages_are_told_apart() -> None:
    pytest.importorskip("py3langid")
    sampled = [Sampled("f", at, text * 3, at) for at, text in enumerate([ENGLISH, ENGLISH, GERMAN, "1 2 3 4"])]
    languages = describe_quality("train", sampled, 4)["languages"]
    assert languages["en"] == 0.5 and languages["de"] == 0.25


def test_without_the_packages_a_line_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    found = describe_quality("train", [Sampled("f", 0, ENGLISH, 0)], 1)
    assert found["languages"] == "needs the package py3langid: pip install 'gpt-pipeline[quality]'"
    assert found["near_duplicates"] == "needs the package rensa: pip install 'gpt-pipeline[quality]'"


@pytest.mark.slow
def test_a_bare_shard_and_an_empty_one_have_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [id for text in prose()[:5] for id in (*BytePairTokenizer("gpt2").encode(text[:500]), GPT2_END)]
    np.array(ids, "<u2").tofile(tmp_path / "part.bin")
    assert page(tmp_path / "part.bin", capsys)["sampled"] == 5
    np.array([GPT2_END] * 3, "<u2").tofile(tmp_path / "part.bin")
    found = page(tmp_path / "part.bin", capsys)
    assert found["sampled"] == 0 and found["languages"] == {} and found["near_duplicates"] == 0
