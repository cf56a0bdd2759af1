"""`pipeline fetch`: what it brings is what `prepare` then reads without a network, and nothing is fetched twice."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import run_program
from test_corpus import documents, opened, write_jsonl
from test_hub import write_parquet
from test_sources_remote import Handler

from pipeline.errors import UserError
from prepare.sources import fetch, pinned
from prepare.sources import hub as hub_reader
from prepare.storage import files as storage

COMMIT = "0123456789" * 4
VARIABLE = "PIPELINE_HUB_DIR"


class CountingHandler(Handler):
    """Notes each request for content, and tells the content's version."""

    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:  # noqa: N802
        if self.headers.get("Range") != "bytes=0-0":  # how a file is asked after
            self.asked.append((self.path, self.headers.get("Range")))
        super().do_GET()

    def end_headers(self) -> None:
        if Path(self.translate_path(self.path)).is_file():
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        super().end_headers()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "far").mkdir()
    monkeypatch.setattr(CountingHandler, "asked", [])
    monkeypatch.setattr(storage, "PAUSES_S", ())
    handler = partial(CountingHandler, directory=str(tmp_path / "far"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_fetched_once_and_read_offline(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "far" / "a.jsonl", ["a", "b"])
    source = f"{web}/a.jsonl"
    online = opened(tmp_path, source)
    assert fetch.run(source, tmp_path / "near", "gpt2") == {VARIABLE: str(tmp_path / "near")}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "near"))
    before = list(CountingHandler.asked)
    assert documents(tmp_path, source) == ["a", "b"]
    fetched = opened(tmp_path, source)
    assert fetched.stamps() == online.stamps()
    assert fetched.record(str) == online.record(str), "one dataset, wherever its text was read"
    fetch.run(source, tmp_path / "near", "gpt2")
    assert CountingHandler.asked == before
    (copy,) = (tmp_path / "near").rglob("a.jsonl")
    copy.write_text("shorter")
    with pytest.raises(UserError, match=r"a\.jsonl has 7 bytes, wanted \d+: pipeline fetch http"):
        opened(tmp_path, source)


def test_what_changed_on_the_server_is_fetched_again(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one", "two"):
        (tmp_path / "far" / "a.txt").write_text(text)
        fetch.run(f"{web}/a.txt", tmp_path / "near", "gpt2")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "near"))
    assert documents(tmp_path, f"{web}/a.txt") == ["two"]


def test_a_fetch_that_was_cut_off_goes_on_where_it_stood(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(65, 91)) * 1000
    (tmp_path / "far" / "a.txt").write_bytes(content)
    monkeypatch.setattr(storage, "REQUEST_BYTES", 10_000)
    monkeypatch.setattr("prepare.sources.download.BLOCK_BYTES", 10_000)
    real = storage._web_range

    def breaks_off(url: str) -> Any:
        fetch_range = real(url)

        def once(begin: int, end: int) -> bytes:
            if begin >= 20_000:
                raise ConnectionResetError("reset")
            return fetch_range(begin, end)

        return once

    monkeypatch.setattr(storage, "_web_range", breaks_off)
    with pytest.raises(UserError, match=r"cannot read http.*a\.txt: .*reset"):
        fetch.run(f"{web}/a.txt", tmp_path / "near", "gpt2")
    assert not list((tmp_path / "near").rglob("a.txt"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "near"))
    monkeypatch.setattr(storage, "_web_range", real)
    CountingHandler.asked.clear()
    fetch.run(f"{web}/a.txt", tmp_path / "near", "gpt2")
    assert [wanted for _, wanted in CountingHandler.asked] == ["bytes=20000-25999"]
    assert documents(tmp_path, f"{web}/a.txt") == [content.decode()]
    assert not list((tmp_path / "near").rglob("*.partial"))


def test_half_a_copy_is_not_read(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "a.txt").write_text("a")
    fetch.run(f"{web}/a.txt", tmp_path / "near", "gpt2")
    (record,) = (tmp_path / "near" / "fetched").glob("*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "whole": False}))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "near"))
    with pytest.raises(UserError, match=r"the copy of http.* is not whole: pipeline fetch it again"):
        opened(tmp_path, f"{web}/a.txt")


def test_shakespeare_is_known_by_its_content(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "far" / "input.txt").write_text(text)
    monkeypatch.setattr(pinned, "SHAKESPEARE_URL", f"{web}/input.txt")
    with pytest.raises(UserError, match=r"input\.txt has other content than is pinned: SHA-256 \w+, wanted 86c4e6aa"):
        documents(tmp_path, "shakespeare")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(pinned, "SHAKESPEARE_SHA256", sha256)
    monkeypatch.setattr(fetch, "SHAKESPEARE_SHA256", sha256)
    assert documents(tmp_path, "shakespeare") == [text]
    fetch.run("shakespeare", tmp_path / "near", "gpt2")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "near"))
    CountingHandler.asked.clear()
    assert documents(tmp_path, "shakespeare") == [text]
    fetch.run("shakespeare", tmp_path / "near", "gpt2")
    assert CountingHandler.asked == []
    assert opened(tmp_path, "shakespeare").record(str)[0]["sha256"] == sha256
    (tmp_path / "near" / "shakespeare" / "input.txt").write_text("Second Citizen:")
    with pytest.raises(UserError, match=r"is not tiny Shakespeare: SHA-256"):
        documents(tmp_path, "shakespeare")


@pytest.fixture
def far_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The network's edge is replaced: a builder of Hub URLs, and huggingface_hub's two calls. Gives what was asked for."""
    import huggingface_hub

    files = ["data/train-0.parquet", "data/train-1.parquet"]
    for number, file in enumerate(files):
        write_parquet(tmp_path / "far" / file, [f"{number} a", f"{number} b"])
    asked: list[str] = []

    def load_builder(path: str, name: str | None, revision: str | None) -> Any:
        urls = [f"hf://datasets/Org/Far@{revision or COMMIT}/{file}" for file in files]
        return SimpleNamespace(config=SimpleNamespace(name=name or "default", data_files={"train": urls}))

    def paths_info(self: Any, repository: str, paths: list[str], **options: Any) -> list[Any]:
        content = (tmp_path / "far" / paths[0]).read_bytes()
        return [SimpleNamespace(size=len(content), lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()))]

    def bring(repository: str, file: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        asked.append(f"{revision[:4]} {file}")
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / file).write_bytes((tmp_path / "far" / file).read_bytes()[: 5 if "cut off" in asked else None])
        return str(local_dir / file)

    monkeypatch.setattr(hub_reader._datasets(), "load_dataset_builder", load_builder)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", paths_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", bring)
    return asked


def test_a_hub_dataset_is_fetched_once_and_read_without_the_hub(
    tmp_path: Path, far_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = tmp_path / "near"
    fetch.run("hf:Org/Far", near, "gpt2")
    assert far_hub == ["0123 data/train-0.parquet", "0123 data/train-1.parquet"]
    (near / "Org" / "Far" / "data" / "train-1.parquet").unlink()
    fetch.run(f"hf:Org/Far@{COMMIT}", near, "gpt2")
    assert far_hub[2:] == ["0123 data/train-1.parquet"], "what is whole is not fetched again"
    monkeypatch.setenv(VARIABLE, str(near))
    monkeypatch.setattr(hub_reader, "_load_builder", lambda *arguments: pytest.fail("the Hub is asked"))
    for source in ("hf:Org/Far", f"hf:Org/Far@{COMMIT}", "hf:Org/Far:default@main"):
        assert documents(tmp_path, source) == ["0 a", "0 b", "1 a", "1 b"]
    for entry in opened(tmp_path, "hf:Org/Far").record(lambda path: "hash"):
        assert (entry["repository"], entry["config"], entry["revision"]) == ("Org/Far", "default", COMMIT)
    with pytest.raises(
        UserError, match=rf"near is revision {COMMIT}, wanted {'a' * 40}: fetch that into another folder"
    ):
        opened(tmp_path, f"hf:Org/Far@{'a' * 40}")
    with pytest.raises(UserError, match=r"near holds the configs default; wanted config other"):
        opened(tmp_path, "hf:Org/Far:other")
    (near / "Org" / "Far" / "data" / "train-0.parquet").unlink()
    with pytest.raises(
        UserError, match=r"train-0\.parquet is not there, wanted [\d,]+: pipeline fetch hf:Org/Far:default@"
    ):
        opened(tmp_path, "hf:Org/Far")


def test_another_revision_is_not_mixed_in(tmp_path: Path, far_hub: list[str]) -> None:
    fetch.run("hf:Org/Far", tmp_path / "near", "gpt2")
    with pytest.raises(UserError, match=rf"holds revision {COMMIT}, wanted {'a' * 40}: choose another folder"):
        fetch.run(f"hf:Org/Far@{'a' * 40}", tmp_path / "near", "gpt2")


def test_a_damaged_file_of_the_hub_is_not_kept(tmp_path: Path, far_hub: list[str]) -> None:
    far_hub.append("cut off")
    with pytest.raises(UserError, match=r"data/train-0\.parquet of Org/Far came damaged: fetch it again"):
        fetch.run("hf:Org/Far", tmp_path / "near", "gpt2")
    assert not list((tmp_path / "near").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
        ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
    ],
)
def test_a_vocabulary_lies_where_tiktoken_looks_for_it(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch, name: str, cached: str
) -> None:
    import tiktoken.load

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda content, wanted: True)
    asked: list[str] = []
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: asked.append(url) or b"IQ== 0\n")
    (tmp_path / "far" / "a.txt").write_text("a")
    for _ in range(2):
        found = fetch.run(f"{web}/a.txt", tmp_path / "near", name)
    assert found == {VARIABLE: str(tmp_path / "near"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "near" / "tiktoken")}
    assert [path.name for path in (tmp_path / "near" / "tiktoken").iterdir()] == [cached]
    assert len(asked) == 1
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("source", ["stdlib", "-", "a.txt"])
def test_what_is_here_needs_no_fetching(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(repr(source))} needs no fetching"):
        fetch.run(source, tmp_path / "near", "gpt2")


def test_the_command_prints_what_to_set(tmp_path: Path, web: str) -> None:
    (tmp_path / "far" / "a.txt").write_text("a")
    result = run_program("fetch", f"{web}/a.txt", "near folder", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"export PIPELINE_HUB_DIR='{tmp_path}/near folder'\n"
    result = run_program("fetch", f"{web}/a.txt", "near", "--tokenizer", "nothing", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown tokenizer 'nothing'" in result.stderr
