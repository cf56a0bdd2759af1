"""The dataset's folder: what else lies in it, damaged manifests, odd names and odd file systems."""

import errno
import logging
import os
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import die_at
from test_prepare_resume import changed, contents, options_for, pipeline

from observe import verify
from pipeline.dataset.shards import MANIFEST_NAME, load_manifest
from pipeline.errors import UserError
from prepare.run import merge, run
from prepare.unfinished.publishing import RECORD_NAME

LLM_C_SHARD = struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + b"\1\0" * 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": f"number {number} of them"}) + b"\n" for number in range(200)))
    return path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", [LLM_C_SHARD, b"\1\0\2\0"], ids=["llm.c", "bare"])
def test_shards_of_another_program_are_in_the_way(tmp_path: Path, source: Path, force: bool, content: bytes) -> None:
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    for name in ("train_00000.bin", "val_00000.bin", "train.bin"):
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"mine/(train|val)_00000\.bin is in the way and was not written by"):
        run(options_for(tmp_path, source, "mine", force=force))
    assert all((folder / name).read_bytes() == content for name in ("train_00000.bin", "val_00000.bin", "train.bin"))


def test_a_shard_with_another_programs_header_is_kept_even_if_the_manifest_lists_it(
    tmp_path: Path, source: Path
) -> None:
    folder = run(options_for(tmp_path, source, "mine"))
    (folder / "train_00000.bin").write_bytes(LLM_C_SHARD)
    with pytest.raises(UserError, match=r"train_00000\.bin is in the way"):
        run(options_for(tmp_path, source, "mine", force=True))
    assert (folder / "train_00000.bin").read_bytes() == LLM_C_SHARD


MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"tokenizer": {"name": "gpt2"',
    "list": b"[1, 2]",
    "number": b"7",
    "not utf-8": b"\xff\xfe",
    "old": b'{"format": 1, "splits": {"train": [{"file": "train_00000.bin"}]}}',
    "another program's": b'{"name": "my web app", "icons": []}',
    "no tokenizer": b'{"format": 2, "tokenizer": null, "splits": {"train": [], "val": []}}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_force_repairs_a_manifest_and_without_it_one_line_says_so(tmp_path: Path, source: Path, content: bytes) -> None:
    options = options_for(tmp_path, source, "mine", tokenizer="bpe:300", shard_tokens=500)
    folder = run(options)
    wanted = contents(folder)
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        run(options)
    run(changed(options, force=True))
    assert contents(folder) == wanted
    verify.run(folder)


def test_a_manifest_of_another_program_is_kept_aside(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text('{"name": "my web app"}')
    with pytest.raises(UserError, match="--force"):
        run(options_for(tmp_path, source, "mine"))
    run(options_for(tmp_path, source, "mine", force=True))
    load_manifest(folder)
    assert (folder / f"{MANIFEST_NAME}.replaced").read_text() == '{"name": "my web app"}'


def test_a_manifest_without_the_new_keys_is_read(tmp_path: Path, source: Path) -> None:
    folder = run(options_for(tmp_path, source, "mine"))
    document = orjson.loads((folder / MANIFEST_NAME).read_bytes())
    del document["read"], document["passed_over"]
    (folder / MANIFEST_NAME).write_bytes(orjson.dumps(document))
    (folder / RECORD_NAME).unlink()
    run(options_for(tmp_path, source, "mine"))


def test_force_with_fewer_shards_removes_the_others(tmp_path: Path, source: Path) -> None:
    folder = run(options_for(tmp_path, source, "mine", shard_tokens=300))
    assert len(list(folder.glob("*.bin"))) > 4
    run(options_for(tmp_path, source, "mine", force=True))
    assert sorted(path.name for path in folder.glob("*.bin")) == ["train_00000.bin", "val_00000.bin"]


def test_what_an_earlier_process_of_this_number_left_behind_is_removed(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "data" / "mine"
    for leftover in (f".unfinished.{os.uname().nodename}.{os.getpid()}", "unfinished"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / "0.part").write_text("x")
    (folder / "unfinished" / "old.part.1234.partial").write_text("x")
    run(options_for(tmp_path, source, "mine", force=True))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", RECORD_NAME, MANIFEST_NAME, "train_00000.bin", "val_00000.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS])
def test_a_file_system_without_hard_links(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for task in (0, 1):
        run(options_for(tmp_path, source, "mine", tasks=2, task_id=task))
    load_manifest(tmp_path / "data" / "mine")


@pytest.mark.slow
def test_names_that_are_not_utf_8(tmp_path: Path, source: Path) -> None:
    corpus = tmp_path / os.fsdecode(b"corp\xfcs")
    corpus.mkdir()
    for number, name in enumerate((b"caf\xe9.jsonl", b"th\xe9.txt", b"\xff\xfe.jsonl")):
        (corpus / os.fsdecode(name)).write_bytes(source.read_bytes().replace(b"of them", b"of %d" % number))
    with (corpus / os.fsdecode(b"caf\xe9.jsonl")).open("ab") as file:
        file.write(b'{"text": ""}\n')
    options = options_for(tmp_path, corpus, "mine")
    assert not die_at(25, lambda: run(options))
    folder = run(options)
    assert (folder / MANIFEST_NAME).read_bytes().decode()
    manifest = load_manifest(folder)
    assert [Path(entry["path"]).name for entry in manifest.sources] == [
        "caf\\xe9.jsonl",
        "th\\xe9.txt",
        "\\xff\\xfe.jsonl",
    ]
    assert "caf\\xe9.jsonl at byte" in manifest.skipped["empty"]["example"]
    run(options)
    (corpus / os.fsdecode(b"caf\xe9.jsonl")).unlink()
    with pytest.raises(UserError, match="the sources differ"):
        run(options)
    for task in (0, 1):
        run(options_for(tmp_path, corpus, "shared", tasks=2, task_id=task))
    merge(tmp_path / "data" / "shared")


def test_a_tokenizer_whose_name_is_not_utf_8(tmp_path: Path, source: Path) -> None:
    learned = run(options_for(tmp_path, source, "learned", tokenizer="bpe:300"))
    file = tmp_path / os.fsdecode(b"caf\xe9.json")
    file.write_bytes((learned / "tokenizer.json").read_bytes())
    for _ in range(2):
        folder = run(options_for(tmp_path, source, "mine", tokenizer=str(file)))
    assert load_manifest(folder).tokenizer["name"] == "caf\\xe9.json"
    verify.run(folder)


@pytest.mark.slow
def test_names_that_are_not_utf_8_on_the_command_line(tmp_path: Path, source: Path) -> None:
    corpus = tmp_path / os.fsdecode(b"corp\xfcs")
    corpus.mkdir()
    (corpus / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(source.read_bytes())
    arguments = ("prepare", str(corpus), "--data-dir", str(tmp_path / "data"))
    for words in ("prepared", "already prepared"):
        result = pipeline(*arguments)
        assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
        assert words in result.stderr
    (corpus / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b"[")
    result = pipeline(*arguments)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr


def test_what_is_passed_over_is_in_the_manifest(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.pdf", "b.pdf"):
        (source.parent / name).touch()
    found = {"unknown suffix .pdf": {"count": 2, "example": str(source.parent / "a.pdf")}}
    with caplog.at_level(logging.INFO, "pipeline"):
        folder = run(options_for(tmp_path, source.parent, "mine"))
    assert load_manifest(folder).passed_over == found
    assert f"not read: unknown suffix .pdf: 2 (such as {source.parent / 'a.pdf'})" in caplog.text
