"""Sources behind URLs: an S3 server and web servers on this machine's loopback, read as the same files are locally."""

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT
from test_corpus import documents, opened, units, write_jsonl

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from prepare.run import PrepareOptions, run
from prepare.sources.corpus import open_corpus
from prepare.storage import files as storage
from prepare.storage.files import StoredFile
from prepare.units import Reading

TEXTS: list[str | None] = [f"text {i} " + "é" * (i * 37 % 500) for i in range(500)]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a real S3 server with an empty bucket."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A file system with the bucket `corpus`; the environment is what a user would set."""
    variables = {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("corpus")
    yield system
    system.rm("corpus", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def write_corpus(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), folder / "c.parquet", row_group_size=100)
    (folder / "d.txt").write_text("one text")
    (folder / "sub" / "e.json.zst").write_bytes(zstandard.compress(b'[{"text": "in an array"}]'))
    (folder / "sub" / "notes.pdf").write_text("not read")
    (folder / ".hidden.txt").write_text("not read")


@pytest.mark.slow
def test_what_lies_in_s3_is_read_as_what_lies_here(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    bucket.put(f"{tmp_path}/corpus", "corpus/", recursive=True)
    monkeypatch.setattr("prepare.sources.corpus.unit_bytes", lambda corpus_bytes: 10_000)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt", "sub/e.json.zst", "", "*.jsonl*", "**/*.[jt]*"):
        here = documents(tmp_path, tmp_path / "corpus" / name)
        assert documents(tmp_path, f"s3://corpus/corpus/{name}") == here, name
    assert len(units(opened(tmp_path, "s3://corpus/corpus/c.parquet"))) > 5


@pytest.mark.slow
def test_what_the_server_tells_is_recorded_and_what_changes_is_seen(tmp_path: Path, bucket: Any) -> None:
    bucket.pipe("corpus/a.txt", b"abc")
    found = opened(tmp_path, "s3://corpus/")
    (entry,) = found.record(lambda path: pytest.fail("a remote file is not hashed"))
    assert entry == {"path": "s3://corpus/a.txt", "bytes": 3, "etag": "900150983cd24fb0d6963f7d28e17f72"}
    assert found.stored == [[StoredFile("s3://corpus/a.txt", 3, "900150983cd24fb0d6963f7d28e17f72")]]
    assert found.file_bytes() == 3
    bucket.pipe("corpus/a.txt", b"abd")
    assert opened(tmp_path, "s3://corpus/").stored != found.stored
    again = open_corpus(["s3://corpus/"], Reading(), tmp_path, earlier=found)  # at the end of a preparation
    assert again.stored != found.stored


@pytest.mark.slow
def test_a_workers_process_reads_what_the_parent_planned(tmp_path: Path, bucket: Any) -> None:
    """A unit travels as bytes; the other process has only the environment."""
    import pickle

    bucket.pipe("corpus/a.jsonl", b'{"text": "far"}\n')
    (unit,) = units(opened(tmp_path, "s3://corpus/a.jsonl"))
    (tmp_path / "unit").write_bytes(pickle.dumps(unit))
    program = "import pickle, sys; print(list(pickle.load(open(sys.argv[1], 'rb')).documents()))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "unit")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "[(0, b'far')]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://nowhere/a.txt", ["s3://nowhere/a.txt"]),
        ("s3://corpus/missing.txt", ["s3://corpus/missing.txt", "no files"]),
        ("s3://corpus/*.pdf", ["s3://corpus/*.pdf", "only 1 unknown suffix .pdf (s3://corpus/a.pdf)", ".parquet"]),
        ("s3://corpus/bad.parquet", ["s3://corpus/bad.parquet", "Parquet"]),
        ("s3://corpus/bad.jsonl.gz", ["s3://corpus/bad.jsonl.gz at byte 0", "damaged"]),
        ("s3://corpus/bad.jsonl", ["s3://corpus/bad.jsonl at byte 14", "not JSON"]),
        ("nosuch://a/b.txt", ["nosuch://a/b.txt", "unknown file system", "s3://"]),
        ("memory://a/b.txt", ["memory://a/b.txt", "unknown file system"]),
    ],
)
def test_faults_name_the_address(tmp_path: Path, bucket: Any, source: str, words: list[str]) -> None:
    bucket.pipe({"corpus/a.pdf": b"a", "corpus/bad.parquet": b"no", "corpus/bad.jsonl": b'{"text": "a"}\n{\n'})
    bucket.pipe("corpus/bad.jsonl.gz", gzip.compress(b"abc" * 100)[:20])
    options = PrepareOptions([source], data_dir=str(tmp_path), tokenizer="byte", bad_rows="stop", workers=1)
    with pytest.raises(UserError) as caught:
        run(options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_fault_of_the_network_is_tried_again_and_then_one_line(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("corpus/a.txt", b"abc")
    (unit,) = units(opened(tmp_path, "s3://corpus/a.txt"))
    faults = iter([ConnectionResetError("reset"), None])
    system, _ = storage.filesystem("s3://corpus/a.txt")
    real = system.cat_file

    def sometimes(*arguments: Any, **options: Any) -> Any:
        if (fault := next(faults, ConnectionResetError("reset"))) is not None:
            raise fault
        return real(*arguments, **options)

    monkeypatch.setattr(system, "cat_file", sometimes)
    assert list(unit.documents()) == [(0, b"abc")]
    with pytest.raises(UserError, match=r"cannot read s3://corpus/a\.txt: .*reset; check the address"):
        list(unit.documents())


def test_without_s3fs_the_command_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    import fsspec.registry  # noqa: F401

    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"pip install 'gpt-pipeline\[s3\]'"):
        opened(tmp_path, "s3://bucket/a.txt")


class Handler(SimpleHTTPRequestHandler):
    """A web server that gives ranges, where `ranges` says so, as Python's own does not."""

    ranges = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.ranges else None
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        whole = path.read_bytes()
        content = whole[first : last + 1]
        self.send_response(206 if content else 416)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "ranges", request.param)
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "corpus"))) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_the_web(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    monkeypatch.setattr("prepare.sources.corpus.unit_bytes", lambda corpus_bytes: 10_000)
    (tmp_path / "corpus" / "empty.txt").touch()
    for name in ("a.jsonl", "b.jsonl.gz", "d.txt", "sub/e.json.zst", "empty.txt"):
        assert documents(tmp_path, f"{web}/{name}") == documents(tmp_path, tmp_path / "corpus" / name)
    assert documents(tmp_path, f"{web}/d.txt#top") == ["one text"]
    if Handler.ranges:
        assert documents(tmp_path, f"{web}/c.parquet") == TEXTS
    else:
        with pytest.raises(
            UserError, match=r"the server of http.*c\.parquet does not support range requests: download the file first"
        ):
            documents(tmp_path, f"{web}/c.parquet")
    with pytest.raises(UserError, match=r"cannot read http://127.*/missing\.txt: .*404"):
        opened(tmp_path, f"{web}/missing.txt")
    with pytest.raises(UserError, match=r"/sub/ has no known suffix: expected"):
        opened(tmp_path, f"{web}/sub/")


def test_keys_in_an_address_are_not_written_down(tmp_path: Path, web: str) -> None:
    write_corpus(tmp_path / "corpus")
    source = web.replace("//", "//user:word@") + "/d.txt?signature=secret"
    found = opened(tmp_path, source)
    assert documents(tmp_path, source) == ["one text"]
    assert documents(tmp_path, source, f"{source}#top", f"{web}/a.jsonl", source) == ["one text", *TEXTS]
    assert found.record(str)[0]["path"] == f"{web}/d.txt"
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "http://user:word@127.0.0.1:9/d.txt?signature=secret")
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert documents(tmp_path, f"file://{tmp_path}/a.txt") == ["a"]


@pytest.mark.slow
def test_a_bucket_is_prepared_as_the_same_files_are_here(tmp_path: Path, bucket: Any) -> None:
    """By worker processes, which find their way to the server by themselves."""
    write_corpus(tmp_path / "here")
    bucket.put(str(tmp_path / "here"), "corpus/there", recursive=True)
    made = []
    for name, source in (("local", str(tmp_path / "here")), ("remote", "s3://corpus/there/")):
        folder = run(PrepareOptions([source], name=name, data_dir=str(tmp_path / "data"), workers=2))
        made.append({path.name: path.read_bytes() for path in folder.glob("*.bin")})
    assert made[0] == made[1]
    assert all("etag" in entry and "hash" not in entry for entry in load_manifest(folder).sources)
