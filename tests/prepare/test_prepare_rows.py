"""Rows that are counted: broken ones and their bound, what each source gave, the first N of a corpus."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from test_prepare_resume import changed, contents, options_for

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from prepare import units
from prepare.run import run


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)


def write(path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Rows of which some are not UTF-8."""
    lines = [b'{"text": "number %d of the rows"}\n' % number for number in range(count)]
    for number in broken:
        lines[number] = b'{"text": "number %d is \xff"}\n' % number
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_broken_rows_are_skipped_up_to_one_in_a_thousand(tmp_path: Path, workers: int) -> None:
    source = write(tmp_path / "c.jsonl", 2000, broken=(700, 1500))
    manifest = load_manifest(run(options_for(tmp_path, source, "few", workers=workers)))
    (entry,) = manifest.skipped.values()
    assert (entry["count"], entry["broken"], len(entry["first"])) == (2, True, 2)
    write(source, 1999, broken=(3, 700, 1500, 1600))
    options = options_for(tmp_path, source, "many", workers=workers)
    with pytest.raises(UserError) as caught:
        run(options)
    first = ", ".join(
        f"{source} at byte {source.read_bytes().index(b'number %d ' % row) - 10}" for row in (3, 700, 1500)
    )
    assert f"4 of 1,999 rows are broken, more than 0.1%: 4 not UTF-8 (such as {first})" in str(caught.value)
    assert "--bad-rows skip" in str(caught.value)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data/many/unfinished").glob("*.part")}
    folder = run(changed(options, bad_rows="skip"))
    assert before  # and none of them was encoded again: the folder is gone, but its content was the same
    assert load_manifest(folder).skipped["not UTF-8"]["count"] == 4
    run(options_for(tmp_path, source, "skip", bad_rows="skip"))
    assert contents(folder) == contents(tmp_path / "data" / "skip")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_stop_ends_at_the_first_broken_row_of_the_corpus(tmp_path: Path, workers: int) -> None:
    source = write(tmp_path / "c.jsonl", 2000, broken=(700, 1500))
    where = source.read_bytes().index(b"number 700 ") - 10
    options = options_for(tmp_path, source, "stop", workers=workers, bad_rows="stop")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"c\.jsonl at byte {where}: not UTF-8; --bad-rows stop"):
            run(options)
    assert load_manifest(run(changed(options, bad_rows=None))).skipped["not UTF-8"]["count"] == 2
    source.write_text('{"text": "sound"}\n{"text": 7}\n')
    with pytest.raises(UserError, match=r"c\.jsonl at byte 18 \(the field 'text' holds int\): .*; --bad-rows stop"):
        run(options_for(tmp_path, source, "typed", bad_rows="stop"))
    with pytest.raises(UserError, match="invalid --bad-rows 'never': expected skip or stop"):
        run(changed(options, bad_rows="never"))


def test_each_source_has_its_own_count(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 300), ("b", 50))]
    (tmp_path / "b.jsonl").open("ab").write(b'{"text": ""}\n')
    options = changed(options_for(tmp_path, sources[0], "two"), sources=list(map(str, sources)))
    manifest = load_manifest(run(options))
    assert [list(entry.values())[:3] for entry in manifest.read] == [
        [str(sources[0]), 300, 300],
        [str(sources[1]), 51, 50],
    ]
    for split in ("documents", "bytes"):
        total = sum(manifest.count(name, split) for name in manifest.splits)
        assert total == sum(entry["documents" if split == "documents" else "text_bytes"] for entry in manifest.read)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("limit", [1, 7, 90, 250, 400])
def test_a_limit_counts_documents_that_are_left_by_dedup(tmp_path: Path, limit: int, workers: int) -> None:
    source = tmp_path / "c.jsonl"
    texts = [f"number {number // 3} of the rows" for number in range(900)]
    source.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    fixed: dict[str, Any] = {"workers": workers, "tokenizer": "byte", "val_fraction": 0.5}
    folder = run(options_for(tmp_path, source, "limited", limit_docs=limit, dedup=True, **fixed))
    manifest = load_manifest(folder)
    documents = sum(shard.documents or 0 for shard in manifest.shards)
    wanted = min(limit, 300)
    if limit > 1:  # a single document is divided between the splits
        assert documents == wanted
    first = tmp_path / "first.jsonl"
    first.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in dict.fromkeys(texts[: wanted * 3])))
    other = load_manifest(run(options_for(tmp_path, first, "first", **fixed)))
    assert manifest.fingerprint == other.fingerprint


@pytest.mark.slow
def test_the_limit_moves_when_an_earlier_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in "abc":
        write(corpus / f"{name}.jsonl", 300)
    options = options_for(tmp_path, corpus, "limited", limit_docs=450)
    with monkeypatch.context() as patch:
        patch.setitem(run.__globals__, "finish", lambda *_, **__: pytest.fail("cut off"))
        with pytest.raises(pytest.fail.Exception):
            run(options)
    write(corpus / "a.jsonl", 100)
    folder = run(options)
    assert sum(shard.documents or 0 for shard in load_manifest(folder).shards) == 450
    run(changed(options, name="afresh"))
    assert contents(folder) == contents(tmp_path / "data" / "afresh")


def test_a_char_vocabulary_has_the_characters_of_all_that_a_limit_reaches(tmp_path: Path) -> None:
    texts = [f"row {chr(0x400 + number // 2)}" for number in range(100)]
    source = tmp_path / "c.jsonl"
    source.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    folder = run(options_for(tmp_path, source, "limited", tokenizer="char", dedup=True, limit_docs=40))
    assert sum(shard.documents or 0 for shard in load_manifest(folder).shards) == 40


def test_a_limit_with_near_dedup_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", 10)
    with pytest.raises(UserError, match="--limit-docs cannot be combined with --near-dedup"):
        run(options_for(tmp_path, source, "limited", near_dedup=True, limit_docs=5))
