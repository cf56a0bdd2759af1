"""Sources: what is read, in which order, cut how; and each way they can be wrong."""

import pickle
from array import array
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from prepare.sources import corpus as corpora
from prepare.sources.corpus import Corpus, Snapshot, open_corpus
from prepare.sources.items import keyed_items
from prepare.sources.local import Files
from prepare.sources.names import default_name
from prepare.storage.files import StoredFile
from prepare.units import POSITION_BITS, Batch, Document, Reading, Refused, Unit


def opened(tmp_path: Path, *sources: object, field: str = "text") -> Corpus:
    return open_corpus([str(source) for source in sources], Reading(field), tmp_path / "dataset")


def units(corpus: Corpus) -> list[Unit]:
    """Every unit, sent to another process and back."""
    return [pickle.loads(pickle.dumps(unit)) for item in corpus.items() for unit in item.units()]  # noqa: S301


def whole(document: Document) -> str | None:
    """A document's text, read twice where it comes in blocks; None for one that is left out."""
    if isinstance(document, Refused):
        return None
    if isinstance(document, bytes):
        return document.decode()
    text = b"".join(document.blocks())
    assert text == b"".join(document.blocks())
    return text.decode()


def documents(tmp_path: Path, *sources: object, field: str = "text") -> list[str | None]:
    corpus = opened(tmp_path, *sources, field=field)
    return [whole(document) for unit in units(corpus) for _, document in unit.documents()]


def refused(tmp_path: Path, *sources: object, field: str = "text") -> list[tuple[str, str, str]]:
    """What is skipped: the reason, "broken" or "", and the position with the detail."""
    found = [(unit, *each) for unit in units(opened(tmp_path, *sources, field=field)) for each in unit.documents()]
    return [
        (document.reason, "broken" * document.broken, f"{unit.locate(at)}: {document.detail}")
        for unit, at, document in found
        if isinstance(document, Refused)
    ]


def write_jsonl(path: Path, texts: list[str | None], end: bytes = b"\n") -> Path:
    path.write_bytes(b"\n".join(orjson.dumps({"id": i, "text": text}) for i, text in enumerate(texts)) + end)
    return path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_units(monkeypatch, 64)


def cut_units(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(corpora, "unit_bytes", lambda corpus_bytes: size)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("één\r\nregel\n\n".encode())
    assert documents(tmp_path, tmp_path / "a.txt") == ["één\r\nregel\n\n"]


def test_several_sources_keep_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "a.py").write_text("a")
    lines = write_jsonl(tmp_path / "c.jsonl", ["c1", "c2"])
    assert documents(tmp_path, tmp_path / "b.md", lines, tmp_path / "a.py") == ["b", "c1", "c2", "a"]


def test_a_folder_is_walked_in_sorted_order_and_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in ("z.txt", "sub/b.TXT", "sub/a.md", "picture.png", ".git/c.txt", "sub/.hidden.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert documents(tmp_path, folder) == ["sub/a.md", "sub/b.TXT", "z.txt"]
    assert documents(tmp_path, folder / "**" / "*.[mt]*") == ["sub/a.md", "z.txt"]


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("length", [1, 20, 64, 300])
def test_units_of_a_jsonl_file_share_no_line_and_lose_none(
    tmp_path: Path, small_units: None, length: int, end: bytes
) -> None:
    texts: list[str | None] = [f"{i}:" + "é" * (length * (i % 3)) for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts, end)
    assert len(units(opened(tmp_path, path))) == -(-path.stat().st_size // 64)
    assert documents(tmp_path, path) == texts


@pytest.mark.parametrize("unit_bytes", range(1, 40))
def test_any_cut_of_a_jsonl_file_gives_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"one"}\n\n{"text":"two"}\r\n  \n{"text":null}\n{"text":"\\n"}')
    cut_units(monkeypatch, unit_bytes)
    assert documents(tmp_path, tmp_path / "a.jsonl") == ["one", "two", None, "\n"]


@pytest.mark.parametrize("row_group_size", [None, 7, 1])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_units_of_a_parquet_file_hold_each_row_once(
    tmp_path: Path, small_units: None, row_group_size: int | None, compression: str
) -> None:
    texts = [f"row {i} " + "x" * (i % 5 * 40) if i % 10 else None for i in range(60)]
    table = pa.table({"id": list(range(60)), "text": texts})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=row_group_size, compression=compression, use_dictionary=False)
    found = units(opened(tmp_path, path))
    assert len(found) > 20
    assert documents(tmp_path, path) == texts
    backwards = [whole(document) for unit in reversed(found) for _, document in reversed(list(unit.documents()))]
    assert backwards == texts[::-1]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_of_every_kind_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"body": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "a.parquet")
    assert documents(tmp_path, tmp_path / "a.parquet", field="body") == ["a", "b", "a"]


def test_a_big_row_group_of_equal_rows_is_still_cut(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["same"] * 100_000}), tmp_path / "a.parquet")
    (batch,) = opened(tmp_path, tmp_path / "a.parquet").items()
    assert [item.stop - item.start for item in batch.items] == [32_768, 32_768, 32_768, 1_696]


def test_stdlib_holds_the_standard_library_and_not_its_tests(tmp_path: Path) -> None:
    found = opened(tmp_path, "stdlib")
    names = [path.as_posix() for path in found.files()]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/site-packages/" in name or "/test/" in name or "/encodings/" in name for name in names)
    assert names == sorted(names)
    (entry,) = found.record(lambda path: path.name)
    assert entry["path"] == "stdlib"
    assert entry["files"] == len(names) > 300
    assert entry["bytes"] == sum(Path(name).stat().st_size for name in names)


def test_a_folder_of_thousands_of_files_is_recorded_as_one_entry_that_still_sees_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(1001):
        (folder / f"{i:04}.txt").write_text(str(i))
    found = opened(tmp_path, folder)
    (before,) = found.record(lambda path: path.read_text())
    (after,) = found.record(lambda path: path.read_text() if path.stem != "0500" else "changed")
    assert before["files"] == 1001
    assert before["hash"] != after["hash"]


def test_left_out_documents_say_why_and_where(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe9def")
    lines = [b'{"text":"a"}', b'{"text":"\xff"}', b'{"text":null}', b'{"text":"\\ud83d"}', b'{"text":""}']
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    binary = pa.array([b"good", b"ab\xff", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "c.parquet")
    corpus = opened(tmp_path, *(tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")))
    found = [(unit.locate(at), document) for unit in units(corpus) for at, document in unit.documents()]
    assert found == [
        (f"{tmp_path}/a.txt", Refused("not UTF-8", broken=True)),
        (f"{tmp_path}/b.jsonl at byte 0", b"a"),
        (f"{tmp_path}/b.jsonl at byte 13", Refused("not UTF-8", broken=True)),
        (f"{tmp_path}/b.jsonl at byte 26", Refused("null")),
        (f"{tmp_path}/b.jsonl at byte 40", Refused("lone surrogate", broken=True)),
        (f"{tmp_path}/b.jsonl at byte 58", b""),
        (f"{tmp_path}/c.parquet row 0", b"good"),
        (f"{tmp_path}/c.parquet row 1", Refused("not UTF-8", broken=True)),
        (f"{tmp_path}/c.parquet row 2", Refused("null")),
    ]


def test_what_python_writes_and_strict_json_forbids_in_another_field_harms_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"score": NaN, "text": "a"}\n{"title": "\\ud800", "text": "b"}\n')
    assert documents(tmp_path, tmp_path / "a.jsonl") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    text = "a" if name == "a.txt" else '{"text": "a"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert documents(tmp_path, tmp_path / name) == ["a"]


def test_small_files_share_units_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i:03}.txt").write_text(str(i))
        write_jsonl(tmp_path / "many" / f"{i:03}.jsonl", [f"line {i}"])
    (unit,) = units(opened(tmp_path, tmp_path / "many"))
    found = [(unit.locate(at), whole(document)) for at, document in unit.documents()]
    assert found[:2] == [(f"{tmp_path}/many/000.jsonl at byte 0", "line 0"), (f"{tmp_path}/many/000.txt", "0")]
    assert [text for _, text in found] == [text for i in range(300) for text in (f"line {i}", str(i))]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stdlib", "stdlib"),
        ("openwebtext", "openwebtext"),
        ("fineweb-edu:sample-100BT", "fineweb-edu-sample-100BT"),
        ("-", "stdin"),
        ("some/where.jsonl.gz", "where"),
        ("s3://bucket/folder/*.parquet", "folder"),
        ("https://user:key@host/a/b.json.zst?signature=c", "b"),
        ("s3://bucket", "bucket"),
        ("hf:Org/Some-Name:config@main", "some-name"),
        ("some where/My text (1).jsonl", "My-text-1"),
        ("shelf/*.txt", "shelf"),
        ("*.txt", "corpus"),
        ("corpora/v1.5/*.txt", "v1.5"),
    ],
)
def test_default_name(source: str, name: str) -> None:
    assert default_name(source) == name


def test_a_file_whose_name_looks_like_a_glob_gives_its_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes[1].txt").write_text("text")
    assert default_name("notes[1].txt") == "notes-1"


def _bad_json(folder: Path) -> list[str]:
    write_jsonl(folder / "a.jsonl", ["x" * 30] * 2, b"\n\nnot json\n")
    return ["a.jsonl"]


def _not_an_object(folder: Path) -> list[str]:
    (folder / "a.jsonl").write_text('{"text": "a"}\n["b"]\n')
    return ["a.jsonl"]


def _no_field(folder: Path) -> list[str]:
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"body": "b", "meta": {"url": "c"}}\n')
    return ["a.jsonl"]


def _field_is_number(folder: Path) -> list[str]:
    (folder / "a.jsonl").write_text('{"text": 7}\n')
    return ["a.jsonl"]


def _parquet_damaged_inside(folder: Path) -> list[str]:
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(1000)]}), folder / "a.parquet", compression="zstd")
    content = bytearray((folder / "a.parquet").read_bytes())
    content[100:200] = bytes(100)
    (folder / "a.parquet").write_bytes(content)
    return ["a.parquet"]


@pytest.mark.parametrize(
    ("make", "reason", "count", "words"),
    [
        (_bad_json, "not JSON", 1, ["a.jsonl at byte 99", "invalid literal"]),
        (_not_an_object, "not an object", 1, ["a.jsonl at byte 14", "got list"]),
        (_no_field, "missing", 1, ["a.jsonl at byte 14", "its fields are: body, meta.url"]),
        (_field_is_number, "not text", 1, ["a.jsonl at byte 0", "'text' holds int"]),
        (_parquet_damaged_inside, "damaged", 1000, ["a.parquet row 0"]),
    ],
)
@pytest.mark.parametrize("unit_bytes", [64, 1 << 20])
def test_a_broken_row_is_refused_with_its_position(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit_bytes: int,
    make: Callable[[Path], list[str]],
    reason: str,
    count: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cut_units(monkeypatch, unit_bytes)
    found = refused(tmp_path, *make(tmp_path))
    assert {each[:2] for each in found} == {(reason, "broken" * (reason != "missing"))}
    assert len(found) == count
    assert [word for word in words if word not in found[0][2]] == [], found[0]


def _not_parquet(folder: Path) -> list[str]:
    (folder / "a.parquet").write_text("no")
    return ["a.parquet"]


def _no_column(folder: Path) -> list[str]:
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), folder / "a.parquet")
    return ["a.parquet"]


def _column_twice(folder: Path) -> list[str]:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), folder / "a.parquet")
    return ["a.parquet"]


def _column_of_numbers(folder: Path) -> list[str]:
    pq.write_table(pa.table({"text": [1]}), folder / "a.parquet")
    return ["a.parquet"]


def _nothing_readable(folder: Path) -> list[str]:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.pdf").write_text("a")
    return ["sub"]


def _unknown_suffix(folder: Path) -> list[str]:
    (folder / "a.docx").write_text("a")
    return ["a.docx"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: [], ["no source", "stdlib"]),
        (lambda folder: ["a.txt", ""], ["no source given", "stdin"]),
        (lambda folder: ["-", "-"], ["stdin", "twice"]),
        (lambda folder: ["missing"], ["no source 'missing'", "folder", "openwebtext", "hf:ORG/NAME", "stdin"]),
        (lambda folder: ["Shakespear"], ["did you mean shakespeare?"]),
        (lambda folder: ["hf:nothing"], ["hf:nothing", "hf:ORG/NAME"]),
        (lambda folder: ["*.txt"], ["glob *.txt", "no files", ".jsonl"]),
        (_nothing_readable, ["folder sub", "only 1 unknown suffix .pdf (sub/a.pdf)", ".parquet"]),
        (_unknown_suffix, ["a.docx has no known suffix", ".jsonl"]),
        (_not_parquet, ["a.parquet", "cannot read", "Parquet"]),
        (_no_column, ["a.parquet", "no column 'text'", "body, url", "--text-field"]),
        (_column_twice, ["a.parquet", "several columns 'text'"]),
        (_column_of_numbers, ["a.parquet", "'text' holds int64", "expected text"]),
    ],
)
def test_what_is_wrong_with_a_source_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_units: None,
    make: Callable[[Path], list[str]],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        documents(tmp_path, *make(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.slow
def test_a_unit_of_very_small_files_has_a_position_for_each() -> None:
    """200,000 notes make a corpus; a position names the file and the byte in it, in one int64."""
    files = [StoredFile(f"{number}.txt", 1) for number in range(100_000)]
    batches = [item for _, item in keyed_items(files, Files(Reading(), []), 1 << 30)]
    assert sum(len(batch.items) for batch in batches if isinstance(batch, Batch)) == len(files)
    for batch in batches:
        assert isinstance(batch, Batch)
        last = len(batch.items) - 1
        position = array("q", [last << POSITION_BITS | (1 << POSITION_BITS) - 1])[0]
        assert batch.locate(position).startswith(batch.items[-1].locate(0).split()[0])


def test_the_text_that_is_to_come_is_not_overestimated_while_a_large_file_is_listed(tmp_path: Path) -> None:
    """Progress would go back to a tenth of what it showed."""
    (tmp_path / "a.txt").write_text("a small file before it")
    line = orjson.dumps({"text": "word " * 19}) + b"\n"
    (tmp_path / "b.jsonl").write_bytes(line * 10_000)
    snapshot = Snapshot(opened(tmp_path, tmp_path), 10_000, lambda file: file)
    total = sum(file.size for file in snapshot.files)
    assert total // 2 < snapshot.text_bytes() < 2 * total
    for _ in snapshot:
        assert total // 2 < snapshot.text_bytes() < 2 * total
