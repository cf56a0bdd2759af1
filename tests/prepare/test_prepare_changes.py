"""Sources that change: while a preparation is unfinished, while it reads them, and once it is done."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
from conftest import die_at
from test_prepare_resume import changed, contents, make_texts, options_for, unfinished_parts

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from prepare import preparation, units
from prepare.documents import streams
from prepare.run import PrepareOptions, merge, run
from prepare.sources.corpus import Snapshot, open_corpus
from prepare.units import Reading


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)


def write(path: Path, texts: list[str]) -> None:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of four files of some units each."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, name in enumerate("abcd"):
        write(corpus / f"{name}.jsonl", make_texts(40, seed=number))
    return corpus


def encode_only(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation that ends before it makes the dataset: all its parts are there."""
    with monkeypatch.context() as patch:
        patch.setitem(run.__globals__, "finish", lambda *_, **__: pytest.fail("cut off"))
        with pytest.raises(pytest.fail.Exception):
            run(options)


def parts(options: PrepareOptions) -> dict[str, int]:
    unfinished = Path(options.data_dir) / options.name / "unfinished"
    return {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.part")}


def correct(corpus: Path) -> None:
    write(corpus / "b.jsonl", make_texts(41, seed=9))


def add(corpus: Path) -> None:
    write(corpus / "bb.jsonl", make_texts(30, seed=8))


def remove(corpus: Path) -> None:
    (corpus / "b.jsonl").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "line", "lost"),
    [(correct, "b.jsonl changed", True), (add, "bb.jsonl is new", False), (remove, "b.jsonl was removed", True)],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_in_between_is_encoded_again_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None], line: str, lost: bool, workers: int,
) -> None:  # fmt: skip
    options = options_for(tmp_path, folder, "half", workers=workers)
    encode_only(options, monkeypatch)
    before = parts(options)
    change(folder)
    caplog.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        encode_only(options, monkeypatch)
    kept = {name for name, written in parts(options).items() if before.get(name) == written}
    assert (len(before) - len(kept) > 0) == lost
    assert len(kept) >= 3 * len(before) // 4 - 1
    (logged,) = [record.getMessage() for record in caplog.records if line in record.getMessage()]
    assert f"{len(before) - len(kept)} finished units" in logged
    assert f"{len(kept)} are kept" in logged
    run(options)
    run(changed(options, name="afresh"))
    assert contents(tmp_path / "data" / "half") == contents(tmp_path / "data" / "afresh")


def test_small_files_share_batches_that_one_of_them_does_not_move(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(400):
        (corpus / f"{number:04d}.txt").write_text(f"text {number} " * (number % 20 + 1))

    def keys() -> set[str]:
        snapshot = Snapshot(open_corpus([str(corpus)], Reading(), tmp_path), 8192, lambda file: file)
        assert all(item.size <= 2 * 8192 for _, item in snapshot)
        return {key for key, _ in snapshot.keys}

    before = keys()
    assert 6 < len(before) < 40
    (corpus / "0100.txt").write_text("another text")
    assert len(keys() - before) <= 2
    (corpus / "0100.txt").unlink()
    assert len(keys() - before) <= 2
    (corpus / "0200b.txt").write_text("one more")
    assert len(keys() - before) <= 4


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_a_learned_vocabulary_is_part_of_the_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tokenizer: str
) -> None:
    options = options_for(tmp_path, folder, "half", tokenizer=tokenizer)
    encode_only(options, monkeypatch)
    before = parts(options)
    (folder / "e.txt").write_text("the cat sat the cat")  # nothing but what is there
    with caplog.at_level(logging.INFO, "pipeline"):
        encode_only(options, monkeypatch)
    same = tokenizer == "char"  # the order of `word` follows from counts, so it may be another
    if same:
        assert before.items() <= parts(options).items()
    (folder / "f.txt").write_text("Ж ")
    caplog.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        run(options)
    assert "f.txt is new: the vocabulary learned from the sources changes, all is encoded again" in caplog.text
    run(changed(options, name="afresh"))
    assert contents(tmp_path / "data" / "half") == contents(tmp_path / "data" / "afresh")


@pytest.mark.slow
@pytest.mark.parametrize("change", [correct, add, remove])
def test_what_changes_while_it_is_read_is_encoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
) -> None:  # fmt: skip
    encode = run.__globals__["encode_items"]
    changes = [change]

    def encode_and_change(*arguments: Any, **named: Any) -> None:
        encode(*arguments, **named)
        if changes:
            changes.pop()(folder)

    monkeypatch.setitem(run.__globals__, "encode_items", encode_and_change)
    with caplog.at_level(logging.INFO, "pipeline"):
        run(options_for(tmp_path, folder, "moving"))
    assert "are encoded again" in caplog.text
    run(options_for(tmp_path, folder, "afresh"))
    assert contents(tmp_path / "data" / "moving") == contents(tmp_path / "data" / "afresh")


def test_a_source_that_never_stops_changing_is_one_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = run.__globals__["encode_items"]

    def encode_and_change(*arguments: Any, **named: Any) -> None:
        encode(*arguments, **named)
        with (folder / "c.jsonl").open("ab") as file:
            file.write(b'{"text": "one more"}\n')

    with monkeypatch.context() as patch:
        patch.setitem(run.__globals__, "encode_items", encode_and_change)
        with pytest.raises(UserError, match="the sources changed 5 times while"):
            run(options_for(tmp_path, folder, "moving"))
    run(options_for(tmp_path, folder, "moving"))


def test_a_file_truncated_while_it_is_read_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = run.__globals__["encode_items"]
    once = [True]

    def fail_once(*arguments: Any, **named: Any) -> None:
        if once.pop() if once else False:
            write(folder / "c.jsonl", make_texts(20))
            raise UserError("c.jsonl line 21 is not JSON")
        encode(*arguments, **named)

    monkeypatch.setitem(run.__globals__, "encode_items", fail_once)
    run(options_for(tmp_path, folder, "moving"))


def test_a_constant_of_the_program_that_changed_is_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(tmp_path, folder, "half")
    encode_only(options, monkeypatch)
    for module, name in ((units, "SMALLEST_UNIT_BYTES"), (streams, "UNIT_BYTES")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 4096)
            with pytest.raises(UserError, match=rf"half prepared.*program changed: .*{name} was \d+ and is now 4096"):
                run(options)
    run(options)


class NoRanges(SimpleHTTPRequestHandler):
    """A web server that sends files as a whole, as Python's does."""

    def log_message(self, *_: Any) -> None: ...


class Ranges(NoRanges):
    def do_GET(self) -> None:
        content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        found = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(found) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)


def test_a_web_file_that_is_read_otherwise_at_the_second_start_is_cut_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(NoRanges, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    web = f"http://127.0.0.1:{server.server_port}"
    fixed: dict[str, Any] = {"data_dir": str(tmp_path / "data"), "workers": 1}
    options = PrepareOptions([f"{web}/a.jsonl", str(folder / "b.jsonl")], name="half", **fixed)
    encode_only(options, monkeypatch)
    before = parts(options)
    server.RequestHandlerClass = partial(Ranges, directory=str(folder))  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "pipeline"):
        run(options)
    assert f"{web}/a.jsonl changed: 1 finished units" in caplog.text
    assert f"{len(before) - 1} are kept" in caplog.text
    run(PrepareOptions([str(folder / "a.jsonl"), str(folder / "b.jsonl")], name="local", **fixed))
    server.shutdown()
    web_made, local = (load_manifest(tmp_path / "data" / name) for name in ("half", "local"))
    assert web_made.fingerprint == local.fingerprint


# ---- of a finished dataset -------------------------------------------------------------------------------------------


def test_already_prepared_is_answered_without_reading_the_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_for(tmp_path, folder, "done")
    run(options)
    hashed: list[Path] = []
    original = preparation.hash_file
    monkeypatch.setattr(preparation, "hash_file", lambda path: (hashed.append(path), original(path))[1])
    with caplog.at_level(logging.INFO, "pipeline"):
        run(options)
    assert "already prepared" in caplog.text
    assert not hashed
    os.utime(folder / "b.jsonl", ns=(1, 1))
    run(options)  # the same content
    assert hashed == [folder / "b.jsonl"]
    correct(folder)
    with pytest.raises(UserError, match=r"sources differ \(.*b\.jsonl\).*another --name.*data\.mixture.*--force"):
        run(options)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_file_that_changes_between_two_tasks_is_encoded_again_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(tmp_path, folder, "shared", tasks=2)
    run(changed(options, task_id=0))
    before = parts(options)
    correct(folder)
    run(changed(options, task_id=1))
    assert not (tmp_path / "data" / "shared" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"not complete.*--task-id 0 of --tasks 2"):
        merge(tmp_path / "data" / "shared")
    kept = before.items() & parts(options).items()
    assert len(kept) >= len(before) - 4
    run(changed(options, task_id=0))
    run(options_for(tmp_path, folder, "alone"))
    assert contents(tmp_path / "data" / "shared") == contents(tmp_path / "data" / "alone")


def test_a_task_of_another_number_of_tasks_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    options = options_for(tmp_path, folder, "shared", tasks=2)
    run(changed(options, task_id=0))
    with pytest.raises(UserError, match=r"half prepared.*tasks was 2 and is now 3"):
        run(changed(options, task_id=1, tasks=3))
    with pytest.raises(UserError, match=r"half prepared.*tasks was 2 and is now 1"):
        run(changed(options, task_id=None, tasks=None))
    run(changed(options, task_id=1))


def test_merge_says_that_the_folder_of_the_tasks_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    run(options_for(tmp_path, folder, "shared", tasks=2, task_id=0))
    monkeypatch.chdir(tmp_path)
    there.rmdir()
    with pytest.raises(UserError, match=r"there, in which the tasks ran, no longer exists"):
        merge(Path("data/shared"))


def test_merge_of_a_damaged_plan_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        merge(tmp_path)


def test_a_working_folder_that_was_removed_is_one_line(tmp_path: Path, folder: Path) -> None:
    def removed() -> None:
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(UserError, match="working folder was removed"):
            run(options_for(tmp_path, folder, "x"))
        with pytest.raises(UserError, match="working folder was removed"):
            merge(Path("x"))

    (tmp_path / "gone").mkdir()
    assert die_at(1_000_000, removed)
    assert unfinished_parts(options_for(tmp_path, folder, "x")) == 0
    shutil.rmtree(folder)
