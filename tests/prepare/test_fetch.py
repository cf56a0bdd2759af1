"""`pipeline fetch` against a stand-in for the Hub: what it brings is what `prepare` then reads without a network."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs

import huggingface_hub.constants
import pytest
from conftest import run_program
from test_corpus import documents, opened
from test_hub import COMMIT, without_pauses, write, write_parquet
from test_sources_remote import Handler

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.vocabulary.byte_pair import GPT2_RANKS
from prepare import fetch
from prepare.run import PrepareOptions, run
from prepare.sources import local
from prepare.storage import files as storage


class OneDataset(BaseHTTPRequestHandler):
    """As much of the Hub as `datasets` and huggingface_hub ask for: a revision, the tree of its files, and each of them."""

    folder: Path
    asked: ClassVar[list[str]] = []
    breaks_off_at = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if found := re.fullmatch(r"/api/datasets/Org/Far/tree/[^/]+(/.*)?", path):
            self.answer_tree((found[1] or "").strip("/"))
        elif path.startswith("/api/datasets/Org/Far"):
            files = [{"rfilename": name} for name in self.names()]
            self.answer(json.dumps({"id": "Org/Far", "sha": COMMIT, "siblings": files}).encode())
        elif found := re.fullmatch(r"/datasets/Org/Far/resolve/[^/]+/(.+)", path):
            self.answer_file(found[1])
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.asked.append(self.path)
        found = [name for name in self.names() if any(name == each or name.startswith(f"{each}/") for each in paths)]
        self.answer(json.dumps([self.entry(name) for name in found]).encode())

    def answer_tree(self, below: str) -> None:
        """The files and folders in a folder, or all files below it."""
        folder = self.folder / below
        if not folder.is_dir():
            self.send_error(404)
            return
        found = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
        names = sorted(path.relative_to(self.folder).as_posix() for path in found)
        self.answer(json.dumps([self.entry(name) for name in names]).encode())

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def entry(self, name: str) -> dict[str, Any]:
        if (self.folder / name).is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        content = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer_file(self, name: str) -> None:
        if not (self.folder / name).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == self.breaks_off_at and self.command == "GET":
            self.close_connection = True
        else:
            self.answer((self.folder / name).read_bytes())

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        about = {
            "Content-Length": len(content),
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
        }
        for name, value in about.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A repository of two Parquet files, and the environment in which the program finds it."""
    monkeypatch.setattr(OneDataset, "folder", tmp_path / "served", raising=False)
    monkeypatch.setattr(OneDataset, "asked", [])
    for number in range(2):
        write_parquet(tmp_path / "served" / "data" / f"train-{number}.parquet", [f"{number} a", f"{number} b"] * 20)
    write_parquet(tmp_path / "served" / "data" / "test-0.parquet", ["not for training"])
    write(tmp_path / "served" / "README.md", "# Far\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), OneDataset) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        server.shutdown()


def paths_asked() -> list[str]:
    return [Path(path).name for path in OneDataset.asked if path.endswith(".parquet")]


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_fetched_once_and_read_without_the_hub(
    tmp_path: Path, far: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = run_program("fetch", "hf:Org/Far", cwd=tmp_path, **far)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout == f"export HF_HOME={tmp_path}/home\nexport HF_HUB_OFFLINE=1\n"
    assert set(paths_asked()) == {"train-0.parquet", "train-1.parquet"}, "and not the split that is not read"
    OneDataset.asked.clear()
    assert run_program("fetch", f"hf:Org/Far@{COMMIT}", cwd=tmp_path, **far).returncode == 0
    assert not [path for path in OneDataset.asked if "Org/Far" in path], (
        "a commit that is in the cache needs no network"
    )
    elsewhere = {**far, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    arguments = ("prepare", "hf:Org/Far", "--name", "a", "--tokenizer", "byte")
    prepared = run_program(*arguments, cwd=tmp_path, **elsewhere)
    assert prepared.returncode == 0, prepared.stderr
    # What these variables set, in this process: the other names need no program of their own.
    for name, value in (("HUB_CACHE", f"{tmp_path}/home/hub"), ("ASSETS_CACHE", f"{tmp_path}/home/assets")):
        monkeypatch.setattr(huggingface_hub.constants, f"HF_{name}", value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hashes = []
    for name, source in (("a", "hf:Org/Far"), ("b", f"hf:Org/Far:default@{COMMIT}"), ("c", "hf:Org/Far@main")):
        run(PrepareOptions([source], name=name, data_dir=str(tmp_path / "data"), tokenizer="byte", workers=1))
        manifest = load_manifest(tmp_path / "data" / name)
        about = {(entry["repository"], entry["config"], entry["revision"]) for entry in manifest.sources}
        assert about == {("Org/Far", "default", COMMIT)}
        assert [entry["path"] for entry in manifest.sources] == ["data/train-0.parquet", "data/train-1.parquet"]
        hashes.append([shard.hash for shards in manifest.splits.values() for shard in shards])
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.slow
def test_each_split_is_fetched_and_known_by_itself(tmp_path: Path, far: dict[str, str]) -> None:
    assert run_program("fetch", "hf:Org/Far", "--split", "test", cwd=tmp_path, **far).returncode == 0
    assert set(paths_asked()) == {"test-0.parquet"}
    arguments = ("prepare", "hf:Org/Far", "--tokenizer", "byte")
    offline = {**far, "HF_HUB_OFFLINE": "1"}
    prepared = run_program(*arguments, "--split", "test", "--name", "a", cwd=tmp_path, **offline)
    assert prepared.returncode == 0, prepared.stderr
    assert [entry["path"] for entry in load_manifest(tmp_path / "data" / "a").sources] == ["data/test-0.parquet"]
    assert load_manifest(tmp_path / "data" / "a").options["split"] == "test"
    unknown = run_program(*arguments, "--split", "dev", cwd=tmp_path, **far)
    assert unknown.returncode == 2
    assert "dataset Org/Far has no split 'dev', its splits are: train, test; choose with --split" in unknown.stderr


@pytest.mark.slow
def test_half_a_dataset_is_completed_with_a_network_and_refused_without_one(
    tmp_path: Path, far: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneDataset, "breaks_off_at", "data/train-1.parquet")
    broken = run_program("fetch", "hf:Org/Far", cwd=tmp_path, **far, **without_pauses(tmp_path))
    assert broken.returncode == 2
    assert "train-1.parquet of dataset Org/Far is not in the cache and could not be downloaded" in broken.stderr
    arguments = ("prepare", "hf:Org/Far", "--tokenizer", "byte")
    offline = run_program(*arguments, cwd=tmp_path, **far, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert f"run pipeline fetch hf:Org/Far:default@{COMMIT} on a machine with a network" in offline.stderr
    monkeypatch.setattr(OneDataset, "breaks_off_at", "")
    OneDataset.asked.clear()
    online = run_program(*arguments, cwd=tmp_path, **far)
    assert online.returncode == 0, online.stderr
    assert set(paths_asked()) == {"train-1.parquet"}, "what is complete is not downloaded again"


@pytest.mark.slow
def test_a_dataset_that_is_not_parquet_is_fetched_as_the_complete_repository(
    tmp_path: Path, far: dict[str, str]
) -> None:
    for path in (tmp_path / "served" / "data").iterdir():
        path.unlink()
    write(tmp_path / "served" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n' * 30)
    fetched = run_program("fetch", "hf:Org/Far", cwd=tmp_path, **far)
    assert fetched.returncode == 0, fetched.stderr
    prepared = run_program("prepare", "hf:Org/Far", "--tokenizer", "byte", cwd=tmp_path, **far, HF_HUB_OFFLINE="1")
    assert prepared.returncode == 0, prepared.stderr
    (entry,) = load_manifest(tmp_path / "data" / "far").sources
    about = {"repository": "Org/Far", "config": "default", "revision": COMMIT, "path": "train.jsonl", "bytes": 840}
    assert entry == {**about, "hash": hash_file(tmp_path / "served" / "train.jsonl")}


@pytest.mark.slow
def test_a_script_is_never_run(tmp_path: Path, far: dict[str, str]) -> None:
    for path in (tmp_path / "served" / "data").iterdir():
        path.unlink()
    write(tmp_path / "served" / "Far.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = run_program("prepare", "hf:Org/Far", cwd=tmp_path, **far)
    assert result.returncode == 2
    assert "dataset Org/Far comes as a script, and scripts from the Hub are never run" in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "gpt-pipeline"


def test_shakespeare_is_known_by_its_content(tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "input.txt").write_text(text)
    monkeypatch.setattr(storage, "PAUSES_S", ())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(local, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        with pytest.raises(UserError, match=r"input\.txt changed: its SHA-256 is \w+, expected 86c4e6aa"):
            documents(tmp_path, "shakespeare")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setattr(local, "SHAKESPEARE_SHA256", sha256)
        fetch.run("shakespeare", "gpt2")
        server.shutdown()
    assert documents(tmp_path, "shakespeare") == [text]
    assert opened(tmp_path, "shakespeare").record(str)[0]["sha256"] == sha256
    (assets / "shakespeare" / "input.txt").write_text("Second Citizen:")
    with pytest.raises(UserError, match=r"cannot read http://127.*input\.txt"):
        documents(tmp_path, "shakespeare")


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
        ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
    ],
)
def test_a_vocabulary_lies_in_the_cache_where_tiktoken_looks_for_it(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch, name: str, cached: str
) -> None:
    import tiktoken.load

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda content, wanted: True)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    table = GPT2_RANKS.read_bytes()
    asked: list[str] = []
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: asked.append(url) or table)
    monkeypatch.setattr(fetch, "fetch_hub", lambda source, split: None)
    for _ in range(2):
        fetch.run("openwebtext", name)
        tiktoken.registry.ENCODINGS.clear()
    assert [path.name for path in (assets / "tiktoken").iterdir()] == [cached]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("stdlib", "'stdlib' needs no fetching"),
        ("-", "'-' needs no fetching"),
        ("a.txt", "'a.txt' needs no fetching"),
        (
            "https://me:key@host/a.txt?sign=key",
            "https://host/a.txt is not a dataset of the Hub: download it with any tool",
        ),
    ],
)
def test_what_is_not_fetched(source: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        fetch.run(source, "gpt2")
    with pytest.raises(UserError, match="unknown tokenizer 'nothing'"):
        fetch.run("openwebtext", "nothing")
