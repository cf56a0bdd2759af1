"""--near-dedup: a document is left out if an earlier one is near, whatever the workers, tasks, kills and hash seeds."""

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ROOT, die_at, write_jsonl
from test_prepare_resume import contents, options_for

from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.errors import UserError
from prepare import units
from prepare.assembly import duplicates
from prepare.assembly.near_duplicates import THRESHOLD, mark_near_duplicates
from prepare.encoding.ngrams import PieceReader, ngrams
from prepare.encoding.pieces import pieces
from prepare.encoding.screen import SHINGLE_WORDS, SIGNATURE_VALUES, Screen
from prepare.run import PrepareOptions, run
from prepare.unfinished.parts import PartWriter, Summary, part_name

pytest.importorskip("rensa")

VOCABULARY = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "st", "lo", "mi")]


def make_words(count: int, chance: random.Random) -> list[str]:
    return chance.choices(VOCABULARY, k=count)


def edited(words: list[str], edits: int, chance: random.Random) -> list[str]:
    found = list(words)
    for at in chance.sample(range(len(words)), edits):
        found[at] = "edited"
    return found


def make_texts(originals: int, seed: int = 0) -> tuple[list[str], int]:
    """Documents of 200 words, a copy with one word changed (similarity 0.95) of every fifth, and one with 60 changed
    (below 0.3) of every other fifth; and how many copies are near.
    """
    chance = random.Random(seed)
    found = [make_words(200, chance) for _ in range(originals)]
    near = [edited(words, 1, chance) for words in found[::5]]
    far = [edited(words, 60, chance) for words in found[1::5]]
    return [" ".join(words) for words in [*found, *near, *far]], len(near)


def jaccard(a: str, b: str) -> float:
    """Of the sets of shingles, as a plain loop finds them."""
    sets = []
    for text in (a, b):
        words = re.findall(r"[^\W_]+", text.lower())
        sets.append({tuple(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def signature(text: str) -> np.ndarray[Any, Any]:
    screen = Screen(True, None)
    for number, (piece, _) in enumerate(pieces([text.encode()])):
        assert (screen.go_on(piece) if number else screen.begin(piece)) is None
    return np.frombuffer(screen.signature(), "<u4")


def kept_texts(folder: Path) -> list[str]:
    """Documents of a dataset of bytes, in both splits."""
    manifest = load_manifest(folder)
    ids = [TokenReader(folder, manifest, split).read(0, manifest.count(split, "tokens")) for split in ("train", "val")]
    return (
        bytes(np.where(np.concatenate(ids) == 256, 0, np.concatenate(ids)).astype(np.uint8)).decode().split("\0")[:-1]
    )


def prepare(tmp_path: Path, texts: list[str], name: str = "x", **more: Any) -> dict[str, Any]:
    """The manifest of a dataset of bytes."""
    run(options_for(tmp_path, write_jsonl(tmp_path, texts), name, tokenizer="byte", near_dedup=True, **more))
    return orjson.loads((tmp_path / "data" / name / "manifest.json").read_bytes())  # type: ignore[no-any-return]


# ---- words and signatures ----


def test_words_are_those_of_a_plain_loop_over_any_text() -> None:
    text = "Hello, WORLD! don't_stop x\u0301y हिन्दी Ünïcode 123-45\n\nends."
    reader = PieceReader()
    reader.read(text)
    assert [reader.text[a:b].lower() for a, b in zip(reader.starts, reader.ends, strict=True)] == [
        "hello", "world", "don", "t", "stop", "x\u0301y", "हिन्दी", "ünïcode", "123", "45", "ends",
    ]  # fmt: skip
    assert len(set(reader.words.tolist())) == 11
    reader.read("東京タワーabc")
    assert [reader.text[a:b] for a, b in zip(reader.starts, reader.ends, strict=True)][-6:] == [*"東京タワー", "abc"]
    for empty in ("", "... !", "\n"):
        fresh = PieceReader()
        fresh.read(empty)
        assert len(fresh.words) == 0 and list(ngrams(fresh.words, [1, 5])) == []


@pytest.mark.slow
def test_ngrams_do_not_depend_on_case_punctuation_or_where_a_text_is_divided() -> None:
    chance = random.Random(3)
    words = make_words(60_000, chance)
    hashes = {}
    for name, text in (("plain", " ".join(words)), ("other", ", ".join(words).upper()), ("odd", ",  ".join(words))):
        reader, found = PieceReader(), set()
        for piece, _ in pieces([text.encode()]):
            reader.read(piece)
            found |= {(n, value) for n, each in ngrams(reader.words, {5, 13}) for value in each.tolist()}
        hashes[name] = found
    assert hashes["plain"] == hashes["other"]
    # Where no piece can end between two words, parts of words are found besides.
    assert hashes["plain"] < hashes["odd"] and len(hashes["odd"]) < len(hashes["plain"]) + 20
    distinct = {(n, tuple(words[at : at + n])) for n in (5, 13) for at in range(len(words) - n + 1)}
    assert len(hashes["plain"]) == len(distinct)


def test_an_estimate_is_near_the_similarity() -> None:
    chance = random.Random(0)
    for edits in (0, 2, 8, 30):
        words = make_words(400, chance)
        a, b = " ".join(words), " ".join(edited(words, edits, chance))
        assert (signature(a) == signature(b)).mean() == pytest.approx(jaccard(a, b), abs=0.15)
    assert len(signature(a)) == SIGNATURE_VALUES
    assert (signature("...") != signature("!!!")).any() and (signature("a b") == signature("A, b")).all()


@pytest.mark.slow
def test_a_signature_does_not_depend_on_the_process() -> None:
    text = " ".join(make_words(300, random.Random(1)))
    script = (
        "import sys\nfrom prepare.encoding.screen import Screen\n"
        "s = Screen(True, None)\ns.begin(sys.argv[1])\nprint(s.signature().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script, text], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, text=True,
            capture_output=True, check=True,
        ).stdout.strip()
        for seed in "012"
    }  # fmt: skip
    assert found == {signature(text).tobytes().hex()}


# ---- which documents are left out ----


def test_near_documents_are_left_out_and_others_are_kept(tmp_path: Path) -> None:
    texts, near = make_texts(200)
    manifest = prepare(tmp_path, texts)
    assert manifest["skipped"]["near duplicate"]["count"] == near
    assert sorted(kept_texts(tmp_path / "data" / "x")) == sorted(texts[:200] + texts[200 + near :])
    clusters = manifest["statistics"]["near_duplicates"]
    begins = beginnings(tmp_path / "c.jsonl")
    assert len(clusters) == 3
    for kept, left_out in clusters:
        assert jaccard(begins[kept], begins[left_out]) > THRESHOLD
    assert manifest["skipped"]["near duplicate"]["example"] == f"{clusters[0][1]}, near {clusters[0][0]}"


def beginnings(path: Path) -> dict[str, str]:
    """The text of each line by its place."""
    lines = path.read_bytes().splitlines(keepends=True)
    return {
        f"{path} at byte {sum(map(len, lines[:at]))} (line {at + 1})": orjson.loads(line)["text"]
        for at, line in enumerate(lines)
    }


def test_of_a_large_cluster_the_first_is_kept(tmp_path: Path) -> None:
    chance = random.Random(5)
    words = make_words(300, chance)
    texts = [
        " ".join(words),
        *(" ".join(edited(words, 1, chance)) for _ in range(300)),
        "another text of its kind " * 9,
    ]
    manifest = prepare(tmp_path, texts)
    assert manifest["skipped"]["near duplicate"]["count"] == 300
    assert sorted(kept_texts(tmp_path / "data" / "x")) == sorted([texts[0], texts[-1]])


def test_exact_duplicates_are_counted_as_such_with_both_options(tmp_path: Path) -> None:
    texts, near = make_texts(50)
    manifest = prepare(tmp_path, [*texts, *texts[:7]], dedup=True)
    counts = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
    assert counts == {"duplicate": 7, "near duplicate": near}
    assert prepare(tmp_path, [*texts, *texts[:7]], name="y")["skipped"]["near duplicate"]["count"] == near + 7


def test_documents_without_words_are_near_to_their_equals_alone(tmp_path: Path) -> None:
    manifest = prepare(tmp_path, ["...", "!!!", "...", "one", "One!", "two", "a b c d", "A, b c. d"])
    assert manifest["skipped"]["near duplicate"]["count"] == 3


def test_long_documents_are_compared_over_their_pieces(tmp_path: Path) -> None:
    chance = random.Random(2)
    words = make_words(80_000, chance)
    texts = [
        " ".join(words),
        " ".join(["before", *edited(words, 200, chance)]),
        " ".join(make_words(80_000, chance)),
        "x",
    ]
    manifest = prepare(tmp_path, texts)
    assert manifest["skipped"]["near duplicate"]["count"] == 1
    kept_bytes = sum(shard["bytes"] for shards in manifest["splits"].values() for shard in shards)
    assert kept_bytes == sum(map(len, [texts[0], *texts[2:]]))


# ---- always the same bytes ----


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 1 << 13)
    return write_jsonl(tmp_path, make_texts(60)[0])


def near_options(tmp_path: Path, corpus: Path, name: str, **more: Any) -> PrepareOptions:
    return options_for(tmp_path, corpus, name, tokenizer="byte", near_dedup=True, **more)


def test_several_files_of_bands_mark_the_same(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(near_options(tmp_path, corpus, "one"))
    monkeypatch.setattr(duplicates, "RECORDS_PER_FILE", 100)
    run(near_options(tmp_path, corpus, "many"))
    assert contents(tmp_path / "data" / "one") == contents(tmp_path / "data" / "many")


def test_tasks_give_the_bytes_of_one_process(tmp_path: Path, corpus: Path) -> None:
    run(near_options(tmp_path, corpus, "one", dedup=True))
    for task in (2, 0, 1):
        run(near_options(tmp_path, corpus, "tasks", dedup=True, task_id=task, tasks=3))
    assert contents(tmp_path / "data" / "one") == contents(tmp_path / "data" / "tasks")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_give_the_bytes_of_one_process(tmp_path: Path, corpus: Path, workers: int) -> None:
    run(near_options(tmp_path, corpus, "one"))
    run(near_options(tmp_path, corpus, "workers", workers=workers))
    assert contents(tmp_path / "data" / "one") == contents(tmp_path / "data" / "workers")


def visible(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


@pytest.mark.slow
def test_killed_before_a_change_on_disk_it_ends_with_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    evaluation = tmp_path / "questions.txt"
    evaluation.write_text(" ".join(make_words(20, random.Random(9))))
    with corpus.open("ab") as file:
        file.write(orjson.dumps({"text": evaluation.read_text()}) + b"\n")
    both: dict[str, Any] = {"decontaminate": (str(evaluation),)}
    run(near_options(tmp_path, corpus, "undisturbed", **both))
    wanted = visible(tmp_path / "data" / "undisturbed")
    for operation in itertools.count(1, 11):
        shutil.rmtree(tmp_path / "data" / "killed", ignore_errors=True)
        ended = die_at(operation, lambda: run(near_options(tmp_path, corpus, "killed", **both)))
        run(near_options(tmp_path, corpus, "killed", **both))
        assert visible(tmp_path / "data" / "killed") == wanted
        if ended:
            break
    assert operation > 30 and b"questions.txt" in wanted["decontaminated.jsonl"]


def test_a_resume_with_or_without_it_is_refused(tmp_path: Path, corpus: Path) -> None:
    run(near_options(tmp_path, corpus, "x"))
    run(near_options(tmp_path, corpus, "x"))
    with pytest.raises(UserError, match="near_dedup was True and is now None"):
        run(options_for(tmp_path, corpus, "x", tokenizer="byte"))


def test_an_older_dataset_without_the_option_is_prepared(tmp_path: Path, corpus: Path) -> None:
    run(options_for(tmp_path, corpus, "x", tokenizer="byte"))
    path = tmp_path / "data" / "x" / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    del manifest["options"]["near_dedup"], manifest["options"]["decontaminate"]
    path.write_bytes(orjson.dumps(manifest))
    run(options_for(tmp_path, corpus, "x", tokenizer="byte"))


def test_without_the_package_one_line_says_how_to_get_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prepare.options.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--near-dedup requires the package rensa: pip install 'gpt-pipeline\[dedup\]'"
    ):
        run(near_options(tmp_path, corpus, "x"))


@pytest.mark.slow
def test_memory_does_not_follow_the_corpus(tmp_path: Path) -> None:
    """200,000 documents have 100 MB of signatures and 77 MB of records."""
    import tracemalloc

    values = np.random.default_rng(0).integers(0, 1 << 32, (200_000, SIGNATURE_VALUES), np.uint32)
    values[1000::1000] = values[0]
    for part in range(4):
        writer = PartWriter(tmp_path / part_name(f"{part:032x}", 0), np.dtype("<u2"), 0)
        for row in values[part::4]:
            writer.begin_document(0)
            writer.end_document(1, bytes(16), row.tobytes())
        writer.close(Summary(item=f"{part:032x}", unit=0, last=True, engine="plain", size=0))
    tracemalloc.start()
    marked = mark_near_duplicates(sorted(tmp_path.glob("*.part")), np.dtype("<u2"), tmp_path, None)
    assert tracemalloc.get_traced_memory()[1] < 400e6
    assert marked.count == 199 and marked.clusters == [[0, 250, 500, 750]]
    assert not list(tmp_path.glob("*.partial"))
