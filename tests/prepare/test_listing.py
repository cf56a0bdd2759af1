"""What a source consists of: every file once, by whichever way it is reached, and everything else counted by reason."""

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import zstandard
from test_corpus import documents, opened

from pipeline.errors import UserError
from prepare.formats import format_of
from prepare.options import PrepareOptions
from prepare.run import check_before, run
from prepare.sources.corpus import open_corpus
from prepare.sources.listing import MOST_REASONS, OTHER_SUFFIXES
from prepare.storage import files as storage
from prepare.units import Reading


def write(root: Path, *names: str) -> Path:
    """A file for each name, which holds its name; the folder of all."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(Path(name).name))
    return root


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def passed_over(tmp_path: Path, *sources: object) -> dict[str, tuple[int, str]]:
    """By reason the count and the example, whose path begins below `tmp_path`."""
    found: dict[str, tuple[int, str]] = {}
    for source in opened(tmp_path, *sources).sources:
        for reason, entry in source.passed_over.items():
            assert set(entry) == {"count", "example"}
            found[reason] = (
                entry["count"] + found.get(reason, (0, ""))[0],
                entry["example"].removeprefix(f"{tmp_path}/"),
            )
    return found


def names(tmp_path: Path, *sources: object) -> list[str]:
    found = [Path(file.path) for source in opened(tmp_path, *sources).sources for file in source.stored()]
    return [path.relative_to(tmp_path).as_posix() for path in found]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- what is passed over is counted ----


def test_a_format_that_cannot_be_read_is_counted_by_its_suffix(tmp_path: Path) -> None:
    unknown = (
        "1.jsonl.lz4",
        "2.jsonl.lz4",
        "a.docx",
        "b.PDF",
        "c.tar",
        "d.zip",
        "e.7z",
        "Makefile",
        "f.txt~",
        "v1.a longer name",
    )
    folder = write(tmp_path / "c", "README.md", "A.JSONL", "x.parquet.gz", "y.tar.gz", *unknown)
    assert names(tmp_path, folder) == ["c/A.JSONL", "c/README.md"]
    assert passed_over(tmp_path, folder) == {
        "no suffix": (2, "c/Makefile"),
        "unknown suffix .7z": (1, "c/e.7z"),
        "unknown suffix .PDF": (1, "c/b.PDF"),
        "unknown suffix .docx": (1, "c/a.docx"),
        "unknown suffix .lz4": (2, "c/1.jsonl.lz4"),
        "unknown suffix .parquet.gz": (1, "c/x.parquet.gz"),
        "unknown suffix .tar": (1, "c/c.tar"),
        "unknown suffix .tar.gz": (1, "c/y.tar.gz"),
        "unknown suffix .txt~": (1, "c/f.txt~"),
        "unknown suffix .zip": (1, "c/d.zip"),
    }


def test_a_folder_of_as_many_suffixes_as_files_gives_few_reasons(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", ".hidden.txt", *(f"dump.{number}" for number in range(200)))
    found = passed_over(tmp_path, folder)
    assert len(found) <= MOST_REASONS + 2
    assert found["hidden file"] == (1, "c/.hidden.txt")
    assert found[OTHER_SUFFIXES][0] > 100
    assert sum(count for count, _ in found.values()) == 201


def test_hidden_things_pipes_sockets_and_links_to_nothing_are_counted(tmp_path: Path, here: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", ".git/b.txt", ".git/c.txt", "sub/.d.txt", "sub/.cache/deep/e.txt")
    link(folder / "gone.txt", "nowhere.txt")
    link(folder / "self.txt", "self.txt")
    link(folder / "below", "a.txt/x")
    os.mkfifo(folder / "pipe.txt")
    link(folder / "device.txt", "/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("c/socket.txt")
        assert names(tmp_path, folder) == ["c/a.txt"]
        assert passed_over(tmp_path, folder) == {
            "hidden file": (1, "c/sub/.d.txt"),
            "hidden folder": (2, "c/.git"),
            "link to nothing": (3, "c/below"),
            "not a regular file": (3, "c/pipe.txt"),
        }


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_an_empty_file_or_archive_is_counted(tmp_path: Path, kind: str, suffix: str) -> None:
    pack: Callable[[bytes], bytes] = {
        "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress,
    }[suffix]  # fmt: skip
    folder = write(tmp_path / "c", "a.txt")
    (folder / f"empty{kind}{suffix}").write_bytes(pack(b""))
    (folder / f"short{kind}{suffix}").write_bytes(pack(b'{"text": "x"}'))
    assert names(tmp_path, folder) == ["c/a.txt", f"c/short{kind}{suffix}"]
    assert passed_over(tmp_path, folder) == {"empty file": (1, f"c/empty{kind}{suffix}")}
    assert passed_over(tmp_path, folder / f"empty{kind}{suffix}", folder / "a.txt")["empty file"][0] == 1


def test_the_folders_that_stdlib_leaves_out_are_counted(tmp_path: Path) -> None:
    (found,) = opened(tmp_path, "stdlib").sources
    assert found.passed_over["left out of stdlib"]["count"] > 3


def test_what_a_prepared_dataset_in_the_folder_holds_is_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", "data/x/manifest.json", "data/x/train_00000.bin", "data/y/manifest.json")
    assert names(tmp_path, folder) == ["c/a.txt", "c/data/y/manifest.json"]
    assert passed_over(tmp_path, folder) == {"part of a prepared dataset": (2, "c/data/x/manifest.json")}
    write(folder, "data/z/unfinished/plan.json", "data/z/unfinished/hashes_0000.jsonl")
    assert passed_over(tmp_path, folder) == {"part of a prepared dataset": (3, "c/data/x/manifest.json")}


# ---- a folder that cannot be listed ----


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named `locked` refuse to be listed, also to root, who may list any."""
    real = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)


@pytest.mark.parametrize("below", ["", "**", "**/*.txt", "*/*/*.txt"])
def test_a_folder_that_cannot_be_listed_is_refused_as_a_file_is(tmp_path: Path, locked: None, below: str) -> None:
    folder = write(tmp_path / "c", "a.txt", "sub/locked/b.txt")
    with pytest.raises(UserError, match=r"cannot read .*/c/sub/locked: Permission denied$"):
        opened(tmp_path, folder / below)


def test_a_glob_lists_no_folder_that_it_does_not_name(tmp_path: Path, locked: None) -> None:
    folder = write(tmp_path / "c", "a.txt", "locked/b.txt", ".hidden/locked/c.txt")
    assert names(tmp_path, folder / "*.txt") == ["c/a.txt"]
    assert names(tmp_path, folder / "a*") == ["c/a.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list and read anything")
def test_what_the_system_refuses(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", "sub/b.txt")
    (folder / "sub").chmod(0)
    try:
        for source in (folder, folder / "sub", folder / "sub" / "b.txt"):
            with pytest.raises(UserError, match=r"cannot read .*/c/sub.*: Permission denied$"):
                opened(tmp_path, source)
    finally:
        (folder / "sub").chmod(0o755)


# ---- each file once ----


@pytest.mark.parametrize("below", ["", "**", "**/*.txt", "**/**/*.txt", "**/*"])
def test_links_to_folders_are_entered_once(tmp_path: Path, below: str) -> None:
    folder = write(tmp_path / "c", "a.txt", "sub/b.txt", "x/d.txt", "y/e.txt")
    write(tmp_path / "elsewhere", "f.txt", "deep/g.txt")
    link(folder / "sub" / "up", "..")
    link(folder / "self", ".")
    link(folder / "x" / "y", "../y")
    link(folder / "y" / "x", "../x")
    link(folder / "out", "../elsewhere")
    link(folder / "sub" / "out", "../../elsewhere/deep")
    real = ["c/a.txt", "c/out/deep/g.txt", "c/out/f.txt", "c/sub/b.txt", "c/x/d.txt", "c/y/e.txt"]
    found = names(tmp_path, folder / below)
    assert sorted(found) == found
    assert {os.path.realpath(tmp_path / name) for name in found} == {os.path.realpath(tmp_path / name) for name in real}
    assert len(found) == len(real)
    assert passed_over(tmp_path, folder / below)["already listed"][0] >= 4


def test_a_link_stands_behind_what_it_leads_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "z/b.txt", "z/c.txt")
    link(folder / "a.txt", "z/b.txt")
    link(folder / "also", "z")
    assert names(tmp_path, folder) == ["c/z/b.txt", "c/z/c.txt"]
    assert passed_over(tmp_path, folder) == {"already listed": (2, "c/a.txt")}


@pytest.mark.parametrize(
    ("sources", "repeated"),
    [
        (["c", "c/a.jsonl"], 1),
        (["c/a.jsonl", "c"], 1),
        (["c", "c"], 2),
        (["c/a.jsonl", "./c/../c/a.jsonl"], 1),
        (["c/*.jsonl", "c/a*"], 1),
        (["c/a.jsonl", "file://{here}/c/a.jsonl"], 1),
        (["{here}/c", "c/../c"], 2),
        (["c/a.jsonl", "local://{here}/c"], 1),
        (["c/a.jsonl", "link.jsonl", "folder/a.jsonl"], 2),
        (["folder", "c"], 2),
        (["c//a.jsonl", "c/./a.jsonl"], 1),
    ],
)
def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, here: Path, sources: list[str], repeated: int) -> None:
    write(tmp_path / "c", "a.jsonl", "b.jsonl")
    link(tmp_path / "link.jsonl", "c/a.jsonl")
    link(tmp_path / "folder", "c")
    sources = [source.format(here=tmp_path) for source in sources]
    corpus = opened(tmp_path, *sources)
    real = [os.path.realpath(path) for path in corpus.files()]
    assert len(real) == len(set(real))
    assert passed_over(tmp_path, *sources)["already listed"][0] == repeated
    assert [entry["path"] for entry in corpus.record(str)] == [str(path) for path in corpus.files()]


def test_named_corpora_are_read_once_too(tmp_path: Path) -> None:
    first, second = opened(tmp_path, "stdlib", "stdlib").sources
    assert second.passed_over["already listed"]["count"] == len(first.files())
    assert second.files() == []
    first, second = opened(tmp_path, "shakespeare", "shakespeare").sources
    assert (len(first.passed_over), second.passed_over["already listed"]["count"]) == (0, 1)
    assert (second.stored(), second.record(str)) == ([], [])


def test_copies_and_names_that_differ_in_case_are_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", "A.txt", "a.TXT")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    assert len(names(tmp_path, folder)) == len(list(folder.iterdir()))


# ---- globs ----


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.txt", ["a.txt"]),
        ("*/*.txt", ["s/b.txt"]),
        ("**/*.txt", ["a.txt", "s/b.txt", "s/t/c.txt"]),
        ("**", ["a.txt", "s/b.txt", "s/d.md", "s/t/c.txt"]),
        ("s/**/c.*", ["s/t/c.txt"]),
        ("**/t/**", ["s/t/c.txt"]),
        ("[ab].txt", ["a.txt"]),
        ("?/?.md", ["s/d.md"]),
        ("*/.hidden/*.txt", ["s/.hidden/e.txt"]),
        ("*/.*/*", ["s/.hidden/e.txt"]),
        ("s/[!b]*", ["s/d.md"]),
    ],
)
def test_globs_find_what_a_shell_finds(tmp_path: Path, here: Path, glob: str, found: list[str]) -> None:
    write(tmp_path / "c", "a.txt", "s/b.txt", "s/d.md", "s/t/c.txt", "s/.hidden/e.txt")
    assert names(tmp_path, tmp_path / "c" / glob) == [f"c/{name}" for name in found]
    assert [str(path) for path in opened(tmp_path, f"c/{glob}").files()] == [f"c/{name}" for name in found]


def test_a_folder_that_a_glob_names_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt", "s/b.txt", "part.jsonl/c.txt")
    assert names(tmp_path, folder / "*") == ["c/a.txt"]
    reason = "folder, where the glob asks for files"
    assert passed_over(tmp_path, folder / "*") == {reason: (2, "c/part.jsonl")}
    with pytest.raises(UserError, match=rf"found only 1 {reason} \(.*/part\.jsonl\)"):
        opened(tmp_path, folder / "*.jsonl")
    assert names(tmp_path, folder / "part.jsonl") == ["c/part.jsonl/c.txt"], "a folder, whatever its name"


# ---- names of every kind ----

HOSTILE = (
    b"caf\xe9.txt",
    b"new\nline.txt",
    b"tab\t \x1b[31m.txt",
    "emoji 🙂 é.txt".encode(),
    b" .txt",
    b"-x.txt",
    b"a;b&'\".txt",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_listed_recorded_and_shown_in_one_line(tmp_path: Path, name: bytes) -> None:
    folder = write(tmp_path / "c", "a.txt")
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))  # noqa: PTH118
    path.write_text("text")
    link(folder / "link.txt", path.name)
    for source in (folder, folder / "*.txt", path):
        found = opened(tmp_path, source)
        assert path in found.files()
        for entry in found.record(lambda path: "hash"):
            shown = entry["path"].encode().decode()
            assert shown.isprintable()
    path.unlink()
    with pytest.raises(UserError) as caught:
        found.file_bytes()
    assert str(caught.value).isprintable()
    assert "cannot read" in str(caught.value)
    link(path, "nowhere")
    assert passed_over(tmp_path, folder)["link to nothing"][1].isprintable()


def test_a_folder_of_names_that_are_not_utf8_is_recorded_as_one_entry(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write(folder, *(os.fsdecode(b"%d\xe9.txt" % number) for number in range(1001)))
    (entry,) = opened(tmp_path, folder).record(lambda path: "hash")
    assert entry["files"] == 1001
    assert json.loads(json.dumps(entry, ensure_ascii=False).encode()) == entry


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://", "s3:// is not a complete URL: expected"),
        ("https://", "https:// is not a complete URL"),
        ("file://", "file:// is not a complete URL"),
        ("https:///", "https:/// is not a complete URL"),
        ("http://[x/a.txt", "cannot read http://[x/a.txt: InvalidURL"),
        ("nosuch://x", "unknown file system 'nosuch'"),
        ("file:///no/such", "no source 'file:///no/such'"),
        ("no/such/*.txt", "the glob no/such/*.txt has no readable files, found no files"),
        ("[", "the glob [ has no readable files"),
        ("a.txt/*.txt", "the glob a.txt/*.txt has no readable files"),
        ("a.txt/b.txt", "no source 'a.txt/b.txt'"),
        ("x" * 5000, "no source 'xxxx"),
        ("x" * 300 + ".txt", "no source 'xxxx"),
        ("nul\0.txt", "no source 'nul"),
        ("new\nline", r"no source 'new\nline'"),
        ("caf\udce9.txt", r"no source 'caf\udce9.txt'"),
        ("pipe.txt", "pipe.txt is not a regular file: write its text to a file, or pipe it into prepare -"),
        ("/dev/null", "/dev/null is not a regular file"),
        ("loop.txt", "no source 'loop.txt'"),
        ("gone.txt", "no source 'gone.txt'"),
        ("empty", "the folder empty has no readable files, found no files: expected"),
    ],
)
def test_what_cannot_be_a_source_is_one_clear_line(
    tmp_path: Path, here: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", ())
    (tmp_path / "empty").mkdir()
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    link(tmp_path / "loop.txt", "loop.txt")
    link(tmp_path / "gone.txt", "nowhere")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, source)
    message = str(caught.value)
    assert words in message
    assert message.isprintable(), "in one line, and without what a terminal would obey"
    assert len(message) < 1000


def test_a_file_url_may_name_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "a.txt")
    assert documents(tmp_path, f"file://{folder}") == documents(tmp_path, f"file://{folder}/") == ["a.txt"]


# ---- other machines ----


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's file system in memory, which the program itself refuses as no other process sees it."""
    import fsspec

    system = fsspec.filesystem("memory")
    monkeypatch.setattr("prepare.sources.remote.filesystem", lambda url: (system, system._strip_protocol(url)))
    yield system
    system.rm("/", recursive=True)


def test_what_lies_elsewhere_is_counted_and_taken_once(tmp_path: Path, memory: Any) -> None:
    content = {"a.jsonl": b"{}", "b.docx": b"x", ".c.txt": b"x", ".d/e.txt": b"x", "s/f.txt": b"f", "s/g.jsonl": b""}
    memory.pipe({f"/c/{name}": content for name, content in content.items()})
    first, second, third = opened(tmp_path, "memory://c", "memory://c/a.jsonl", "memory://c/*").sources
    assert [file.path for file in first.stored()] == ["memory:///c/a.jsonl", "memory:///c/s/f.txt"]
    assert first.passed_over == {
        "empty file": {"count": 1, "example": "memory:///c/s/g.jsonl"},
        "hidden file": {"count": 2, "example": "memory:///c/.c.txt"},
        "unknown suffix .docx": {"count": 1, "example": "memory:///c/b.docx"},
    }
    assert second.passed_over == {"already listed": {"count": 1, "example": "memory:///c/a.jsonl"}}
    assert third.passed_over["already listed"]["count"] == 1
    assert third.passed_over["folder, where the glob asks for files"]["count"] == 1
    for source, count in ((first, 2), (second, 0), (third, 0)):
        assert len(source.record(str)) == count
    memory.pipe("/c/new.txt", b"x")
    found = opened(tmp_path, "memory://c")
    assert [file.path for file in found.sources[0].stored()][1:2] == ["memory:///c/new.txt"]


class NoLength(BaseHTTPRequestHandler):
    """A server that ends an answer by closing the connection, and tells no size."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"" if "empty" in self.path else b"text")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_file_of_a_size_that_is_not_told_is_not_taken_for_empty(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoLength) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        web = f"http://127.0.0.1:{server.server_port}"
        assert documents(tmp_path, f"{web}/a.txt", f"{web}/empty.txt", f"{web}/a.txt") == ["text"]
        assert passed_over(tmp_path, f"{web}/empty.txt") == {"empty file": (1, f"{web}/empty.txt")}
        server.shutdown()


# ---- folders that `datasets` saved, and splits ----


def saved(folder: Path, files: int = 2) -> Path:
    state = {"_data_files": [{"filename": f"data-{i:05}-of-{files:05}.arrow"} for i in range(files)], "_split": "train"}
    write(folder, "dataset_info.json", "cache-0123.arrow", *(each["filename"] for each in state["_data_files"]))
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets .arrow be a known format, so that the listing is what is tested here."""
    known = lambda name: format_of(name.removesuffix(".arrow") + ".txt" if name.endswith(".arrow") else name)  # noqa: E731
    monkeypatch.setattr("prepare.sources.listing.format_of", known)


def test_of_a_saved_dataset_only_its_data_files_are_read(tmp_path: Path, arrow: None) -> None:
    data = [f"c/data-0000{i}-of-00002.arrow" for i in range(2)]
    assert names(tmp_path, saved(tmp_path / "c")) == data
    assert passed_over(tmp_path, tmp_path / "c") == {
        "not a data file of a saved dataset": (3, "c/cache-0123.arrow"),
    }
    assert names(tmp_path, tmp_path / "c" / "*.arrow") == data
    write(tmp_path, "x/a.txt")
    (tmp_path / "c").rename(tmp_path / "x" / "c")
    assert names(tmp_path, tmp_path / "x") == ["x/a.txt", *(f"x/{name}" for name in data)], "also in a folder of others"
    (tmp_path / "x" / data[1]).unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing: save the dataset again"):
        opened(tmp_path, tmp_path / "x")
    for damaged in ("{", '{"_data_files": [{}]}', '{"_data_files": 1}'):
        (tmp_path / "x" / "c" / "state.json").write_text(damaged)
        with pytest.raises(UserError, match=r"state\.json is damaged: save the dataset again"):
            opened(tmp_path, tmp_path / "x")
    write(tmp_path, "y/dataset_dict.json")
    (tmp_path / "y" / "dataset_dict.json").write_text('{"splits": 1}')
    with pytest.raises(UserError, match=r"dataset_dict\.json is damaged"):
        opened(tmp_path, tmp_path / "y")


def test_a_split_of_a_saved_dataset_is_chosen(tmp_path: Path, arrow: None) -> None:
    write(tmp_path / "d", "dataset_dict.json")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        saved(tmp_path / "d" / split, files=1)

    def files(split: str) -> list[str]:
        corpus = open_corpus([str(tmp_path / "d")], Reading(split=split), tmp_path / "dataset")
        return [path.relative_to(tmp_path).as_posix() for path in corpus.files()]

    assert files("train") == ["d/train/data-00000-of-00001.arrow"]
    assert files("test") == ["d/test/data-00000-of-00001.arrow"]
    assert passed_over(tmp_path, tmp_path / "d")["not in the split train"] == (2, "d/dataset_dict.json")
    with pytest.raises(UserError, match=r"/d has no split 'dev', its splits are: train, test"):
        files("dev")


def test_a_split_without_a_source_that_has_splits_is_an_error(
    tmp_path: Path, arrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt")
    saved(tmp_path / "deep" / "d" / "test", files=1)
    (tmp_path / "deep" / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    monkeypatch.chdir(tmp_path)
    for sources in (["a.txt", "stdlib"], ["a.txt"], ["deep/d/test"]):
        options = PrepareOptions(sources, name="n", split="test")
        with pytest.raises(
            UserError, match=r"--split test has no effect: no source is a dataset of the Hub or a folder wi"
        ):
            run(options)
        with pytest.raises(UserError, match=r"--split test has no effect"):
            check_before(options, 1)
        check_before(replace(options, split="train"), 1)
    # Also where the folder that has splits lies below the one that was named, or is named by a glob.
    for source in ("deep/d", f"file://{tmp_path}/deep/d", "deep", "deep/**/*.arrow"):
        check_before(PrepareOptions(["a.txt", source], split="test"), 1)
    for source in ("tinystories", "hf:Org/Name"):  # which are not opened
        check_before(PrepareOptions(["a.txt", source], split="test"), 1)
