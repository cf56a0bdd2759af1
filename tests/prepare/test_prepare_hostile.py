"""Text that breaks other programs: it is kept as it is, or skipped, counted and reported with its position; never fatal."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from observe import verify
from pipeline.dataset.shards import load_manifest
from pipeline.vocabulary.specs import from_spec
from prepare.run import PrepareOptions, run

KEPT = {
    "a literal end of text": "before <|endoftext|> after<|endoftext|>",
    "only the literal": "<|endoftext|>",
    "NUL and other controls": "a\x00b\x01\x1b[31m\x7f",
    "mixed newlines": "unix\nmac\rdos\r\nboth\n\r\u2028line\u2029paragraph\x85next\x0bvertical\x0cpage",
    "one space": " ",
    "byte order marks": "\ufeffbegin\ufeffmiddle",
    "private, unassigned and last code points": "\ue000\U000e0000\U0010ffff\ufffe\uffff",
    "marks without letters": "\u0301" * 300,
    "every plane": "".join(chr(plane << 16 | 0x100) for plane in range(17) if plane),
    "right to left": "\u202eabc\u202c עברית العربية",
}
LEFT_OUT = [
    ('{"text": ""}', "empty"),
    ('{"text": null}', "null"),
    ('{"text": "\\ud800 alone"}', "lone surrogate"),
    ('{"text": "low \\udfff"}', "lone surrogate"),
]


def texts_in(folder: Path) -> list[str]:
    manifest = load_manifest(folder)
    tokenizer = from_spec(manifest.tokenizer, folder)
    found = []
    for path in sorted(folder.glob("*.bin")):
        ids = np.fromfile(path, manifest.dtype)
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        found += [tokenizer.decode_bytes(each[:-1].tolist()).decode() for each in np.split(ids, ends + 1)[:-1]]
    return found


def prepare(tmp_path: Path, source: Path, tokenizer: str = "gpt2", workers: int = 1) -> Path:
    options = PrepareOptions(
        [str(source)], name=tokenizer.replace(":", ""), data_dir=str(tmp_path), tokenizer=tokenizer, workers=workers
    )
    return run(options)


def broken(*places: str) -> dict[str, Any]:
    """What the manifest says of broken rows, next to their count."""
    return {"example": places[0], "broken": True, "first": list(places)}


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char", "bpe:300"])
def test_hostile_documents_are_kept_or_reported(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "hostile.jsonl"
    lines = [orjson.dumps({"text": text}) for text in KEPT.values()]
    lines += [line.encode() for line, _ in LEFT_OUT]
    lines.append(b'{"text": "not \xff UTF-8"}')
    lines.append(orjson.dumps({"text": "the last of them"}))
    ordinary = [f"{i}" for i in range(4000)]  # so many that the broken rows are few
    lines += [orjson.dumps({"text": text}) for text in ordinary]
    source.write_bytes(b"\r\n".join(lines) + b"\n\n  \n")
    folder = prepare(tmp_path, source, tokenizer)
    assert sorted(texts_in(folder)) == sorted([*KEPT.values(), *ordinary, "the last of them"])
    places = {line: f"{source} at byte {sum(len(each) + 2 for each in lines[:i])}" for i, line in enumerate(lines)}
    first = len(KEPT)
    assert load_manifest(folder).skipped == {
        "empty": {"count": 1, "example": places[lines[first]]},
        "lone surrogate": {"count": 2, **broken(places[lines[first + 2]], places[lines[first + 3]])},
        "not UTF-8": {"count": 1, **broken(places[b'{"text": "not \xff UTF-8"}'])},
        "null": {"count": 1, "example": places[lines[first + 1]]},
    }
    verify.run(folder)


@pytest.mark.slow
def test_documents_without_an_end_of_a_word(tmp_path: Path) -> None:
    """tiktoken alone overflows its stack on the spaces, and takes memory for minutes on the letters."""
    chance = random.Random(0)
    letters = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789+/", k=1_000_000)) * 10
    documents = [letters, " " * 3_000_000, "a" * 3_000_000, "\n" * 2_000_000 + "x", "東" * 500_000, "short"]
    source = tmp_path / "long.jsonl"
    source.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in documents))
    folder = prepare(tmp_path, source, workers=2)
    # Six documents of these lengths give val its share of the tokens only by their ends.
    joined = "".join(sorted("".join(texts_in(folder))))
    assert hash(joined) == hash("".join(sorted("".join(documents))))
    manifest = load_manifest(folder)
    assert manifest.count("train", "documents") + manifest.count("val", "documents") == 6
    assert manifest.skipped == {}
    assert manifest.unusual == {"cut inside a word": {"count": 5, "example": f"{source} at byte 0"}}


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    source = tmp_path / "empty.jsonl"
    source.write_text("".join(line + "\n" for line, _ in LEFT_OUT))
    with pytest.raises(Exception, match=r"corpus is empty.*\(1 empty, 2 lone surrogate, 1 null\)"):
        prepare(tmp_path, source)
