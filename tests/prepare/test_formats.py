"""Tables, Arrow, web archives, encodings, nested fields and separators: what is read, and what is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_corpus import cut_units, documents, opened, refused, units, write_jsonl

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from prepare.documents import parquet, splitting, streams
from prepare.run import PrepareOptions, run
from prepare.sources.corpus import open_corpus
from prepare.units import Reading, Refused

TEXTS = ["plain", 'a "quoted" one', "two\nlines\r\nand \rmore", "comma, tab\t;", "", "nul \0 byte", "é🙂 日本", " "]


def separated(tmp_path: Path, path: Path, separator: str) -> list[str | None]:
    corpus = open_corpus([str(path)], Reading(document_separator=separator), tmp_path / "dataset")
    found = [each for unit in units(corpus) for _, each in unit.documents()]
    return [
        each.decode() if isinstance(each, bytes) else None if isinstance(each, Refused) else whole_of(each)
        for each in found
    ]


def whole_of(document: object) -> str:
    blocks: Callable[[], list[bytes]] = document.blocks  # type: ignore[attr-defined]
    assert b"".join(blocks()) == b"".join(blocks())
    return b"".join(blocks()).decode()


# ---- tables ----


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_a_table_gives_its_texts_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, delimiter: str, end: str, unit_bytes: int
) -> None:
    monkeypatch.setattr(streams, "UNIT_BYTES", unit_bytes)
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(["id", "text", "note"])
    writer.writerows([number, text, "x,\ty\n"] for number, text in enumerate(TEXTS))
    content = b"\xef\xbb\xbf" + file.getvalue().encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert documents(tmp_path, path) == TEXTS


@pytest.mark.parametrize(
    ("content", "texts", "fault"),
    [
        ("", [], ""),
        ("id,text\n", [], ""),
        ("text\ra\rb", ["a", "b"], ""),
        ("id,text\n1,a\n\n\n2,b", ["a", "b"], ""),
        ("id,text\n1,a\n2\n3,c\n", ["a", None, "c"], "line 3: expected 2 fields, got 1"),
        ("id,text\n1,a\n2,b,and more\n3,c\n", ["a", None, "c"], "line 3: expected 2 fields, got 3"),
        ('id,text\n1,"a\nb"\n2,"never closed\n3,c\n', ["a\nb", None], "line 4: unexpected end of data"),
        ('id,text\n1,"a"b\n3,c\n', [None, "c"], "line 2: ',' expected after '\"'"),
        ("text\n\udcff\nb\n", [None, "b"], "line 2: "),
        ("text\ta\n", None, "no column 'text', its columns are: text\ta"),
        ("text,id,text\na,1,b\n", None, "several columns 'text'"),
        ('"text', None, "the header of"),
    ],
)
def test_hostile_tables(tmp_path: Path, content: str, texts: list[str | None] | None, fault: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    if texts is None:
        with pytest.raises(UserError, match="a.csv") as caught:
            documents(tmp_path, path)
        assert fault in str(caught.value)
        return
    assert documents(tmp_path, path) == texts
    for _, broken, where in refused(tmp_path, path):
        assert broken
        assert f"a.csv {fault}" in where


def test_a_field_that_is_too_long_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prepare.documents.tables.MOST_ROW_BYTES", 1000)
    (tmp_path / "a.csv").write_text("text\nfirst\n" + '"' + "x y\n" * 400 + '"\nlast\n')
    # Inside a quoted field nothing tells a row from a line of its text, so the rest is not read.
    assert documents(tmp_path, tmp_path / "a.csv") == ["first", None]
    (tmp_path / "b.csv").write_text("text\nfirst\n" + "x" * 3000 + "\nlast\n")
    assert documents(tmp_path, tmp_path / "b.csv") == ["first", None]


# ---- Arrow and Parquet ----

ARROW_TEXTS = [f"text {i} " * (i % 5) if i % 7 else None for i in range(100)]


def write_arrow(path: Path, table: pa.Table, kind: str, rows: int, **options: str) -> None:
    write = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
    with write(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("unit_bytes", [1, 64, 1 << 20])
def test_arrow_files_and_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, unit_bytes: int
) -> None:
    monkeypatch.setattr(streams, "UNIT_BYTES", unit_bytes)
    table = pa.table({"id": list(range(100)), "meta": [{"content": text, "n": 1} for text in ARROW_TEXTS]})
    for compression in ("none", "zstd"):
        path = tmp_path / f"{compression}.arrow"
        write_arrow(path, table, kind, rows, **({} if compression == "none" else {"compression": compression}))
        assert documents(tmp_path, path, field="meta.content") == ARROW_TEXTS
        found = units(opened(tmp_path, path, field="meta.content"))
        backwards = [(unit.locate(at), each) for unit in reversed(found) for at, each in reversed([*unit.documents()])]
        assert [where.split()[-1] for where, _ in backwards] == [str(row) for row in range(100)][::-1]


def test_hostile_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"] * 50})
    write_arrow(tmp_path / "empty.arrow", table[:0], "stream", rows=10)
    write_arrow(tmp_path / "none.arrow", table[:0], "file", rows=10)
    assert documents(tmp_path, tmp_path / "empty.arrow", tmp_path / "none.arrow") == []
    write_arrow(tmp_path / "cut.arrow", table, "stream", rows=10)
    content = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    *read, last = documents(tmp_path, tmp_path / "cut.arrow")
    assert read == (["a", "b"] * 50)[: len(read)]
    assert last is None
    ((reason, broken, where),) = refused(tmp_path, tmp_path / "cut.arrow")
    assert (reason, broken) == ("damaged", "broken")
    assert f"cut.arrow row {len(read)}" in where
    for name, content in (("text.arrow", b"no Arrow at all"), ("magic.arrow", b"ARROW1\0\0"), ("zero.arrow", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"cannot read \S*{name} as Arrow"):
            documents(tmp_path, tmp_path / name)


def test_arrow_offsets_beyond_the_text_are_refused(tmp_path: Path) -> None:
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema({"text": pa.string()})) as writer:
        for texts in (["c"], ["abc", "defgh"], ["c"]):
            writer.write_batch(pa.record_batch({"text": texts}))
    offsets, beyond = np.array([0, 3, 8], "<i4").tobytes(), np.array([0, 3, 1 << 30], "<i4").tobytes()
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, beyond))
    assert documents(tmp_path, tmp_path / "a.arrow") == ["c", None, None, "c"]


TEXT_TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_of_every_type(tmp_path: Path, suffix: str, kind: pa.DataType) -> None:
    column = pa.array(["é", None, "", "c"]).cast(kind)
    table = pa.table({"text": column, "n": [1, 2, 3, 4]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        write_arrow(path, table, "file", rows=3)
    else:
        pq.write_table(table, path)
    assert documents(tmp_path, path) == ["é", None, "", "c"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bytes_that_are_not_utf8_and_a_column_of_nulls(tmp_path: Path, suffix: str) -> None:
    for name, column in (("a", pa.array([b"good", b"ab\xff"])), ("b", pa.nulls(2))):
        table = pa.table({"text": column, "n": [1, 2]})
        if suffix == "arrow":
            write_arrow(tmp_path / f"{name}.arrow", table, "file", rows=3)
        else:
            pq.write_table(table, tmp_path / f"{name}.parquet")
    found = refused(tmp_path, *(tmp_path / f"{name}.{suffix}" for name in "ab"))
    assert [each[:2] for each in found] == [("not UTF-8", "broken"), ("null", ""), ("null", "")]


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_rows_behind_a_damaged_page_are_lost_alike_for_any_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """pyarrow reads on behind the page, where it no longer knows the rows' numbers."""
    path, texts = (
        tmp_path / "a.parquet",
        [f"row {i} " + np.random.default_rng(i).bytes(20).hex() for i in range(20_000)],
    )
    options = {"compression": compression, "use_dictionary": False, "data_page_size": 10_000}
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10_000, **options)
    monkeypatch.setattr(parquet, "MOST_ROWS", 500)
    content = bytearray(path.read_bytes())
    at = len(content) // 4
    content[at : at + 200] = b"\xff" * 200
    path.write_bytes(content)
    verdicts = []
    for unit_bytes in (10_000, 100_000, 1 << 30):
        cut_units(monkeypatch, unit_bytes)
        verdicts.append(documents(tmp_path, path))
    assert verdicts[0] == verdicts[1] == verdicts[2]
    lost = verdicts[0].index(None)
    assert verdicts[0] == texts[:lost] + [None] * (10_000 - lost) + texts[10_000:]
    assert 3_000 < lost < 6_000


ROWS = [{"meta": {"content": "a", "more": {"deep": "x"}}}, {"meta": None}, {"meta": {"content": None, "more": None}}]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "json"])
def test_nested_fields(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    table = pa.Table.from_pylist(ROWS)
    write_table(path, table, "stream")
    assert documents(tmp_path, path, field="meta.content") == ["a", None, None]
    assert documents(tmp_path, path, field="meta.more.deep") == ["x", None, None]
    assert {reason for reason, _, _ in refused(tmp_path, path, field="meta.content")} == {"null"}
    nulls = pa.table({"meta": pa.nulls(2)}), pa.table({"meta": pa.array([{"more": None}] * 2)})
    for table, field in zip(nulls, ("meta.content", "meta.more.deep"), strict=True):
        write_table(tmp_path / f"nulls.{suffix}", table, "file")
        assert documents(tmp_path, tmp_path / f"nulls.{suffix}", field=field) == [None, None]
    if suffix in ("parquet", "arrow"):
        with pytest.raises(UserError, match=r"no column 'meta.text', its columns are: meta.content, meta.more.deep;"):
            documents(tmp_path, path, field="meta.text")
        with pytest.raises(UserError, match=r"column 'meta' holds struct"):
            documents(tmp_path, path, field="meta")


def write_table(path: Path, table: pa.Table, kind: str) -> None:
    """In the format of the path's suffix; `kind` is that of an Arrow file."""
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            write_arrow(path, table, kind, rows=2)
        case _:
            write_rows(path, table.to_pylist())


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    lines = [json.dumps(row) for row in rows]
    path.write_text("[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl"])
def test_a_field_with_a_dot_in_its_name_wins(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    table = pa.table({"meta": [{"content": "nested"}], "meta.content": ["literal"]})
    write_table(path, table, "file")
    assert documents(tmp_path, path, field="meta.content") == ["literal"]


@pytest.mark.slow
def test_a_wide_parquet_file_is_read_in_seconds(tmp_path: Path) -> None:
    """Its footer has 100,000 entries; parsed for each row group it took minutes."""
    numbers = {f"column {i}": np.arange(2000) for i in range(500)}
    texts = [f"row {i}" for i in range(2000)]
    pq.write_table(pa.table({"text": texts} | numbers), tmp_path / "a.parquet", row_group_size=10)
    started = time.process_time()
    assert documents(tmp_path, tmp_path / "a.parquet") == texts
    assert len(units(opened(tmp_path, tmp_path / "a.parquet"))) == 1, "small row groups share a unit"
    assert time.process_time() - started < 5


# ---- encodings ----


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "jsonl.gz"])
def test_text_in_utf16_is_read_with_a_mark_and_named_without_one(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = {"txt": "één 🙂 and more", "csv": "text\néén 🙂 and more\n"}.get(suffix, '{"text": "één 🙂 and more"}\n')
    path = tmp_path / f"a.{suffix}"
    for mark in ("\ufeff", ""):
        content = (mark * encoding.endswith(("le", "be")) + text).encode(encoding)
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        if mark or not encoding.endswith(("le", "be")):
            assert documents(tmp_path, path) == ["één 🙂 and more"]
        else:
            assert [each[:2] for each in refused(tmp_path, path)] == [("UTF-16 without a byte order mark", "broken")]


def test_utf16_that_is_truncated_is_one_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b'.encode("utf-16") + b"x")
    assert [each[0] for each in refused(tmp_path, tmp_path / "a.jsonl")] == ["not UTF-16"]
    assert documents(tmp_path, tmp_path / "a.jsonl") == ["a", None]


def test_a_mark_inside_a_file_of_lines_that_was_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n' * 2)
    assert documents(tmp_path, tmp_path / "a.jsonl") == ["a", "a"]


# ---- separators ----


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("separator", [b"\n", b"\n\n", b"<|end|>", b"aab", b"abab"])
def test_pieces_do_not_depend_on_the_blocks(block: int, separator: bytes) -> None:
    text = b"\n\n\none<|end|><|end|>two\n\n<|en<|end|>aaab ababab aabaab\n\n\n\n"
    blocks = (text[at : at + block] for at in range(0, len(text), block))
    pieces = text.split(separator)
    found = list(splitting.each_piece(blocks, 1000, separator))
    assert [piece for _, piece in found] == (pieces if pieces[-1] else pieces[:-1])
    assert all(text[begin:].startswith(piece) for begin, piece in found if isinstance(piece, bytes))
    blocks = (text[at : at + block] for at in range(0, len(text), block))
    ends = [end for _, end in splitting.each_piece(blocks, 3, separator)]
    assert ends == [begin + len(piece) if len(piece) > 3 else piece for begin, piece in found]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["txt", "md.gz"])
@pytest.mark.parametrize("most_bytes", [4, 1 << 20])
def test_a_text_file_is_split_at_a_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, most_bytes: int
) -> None:
    monkeypatch.setattr(streams, "MOST_TEXT_BYTES", most_bytes)
    content = "één\r\nverhaal<|endoftext|>\n \n<|endoftext|>second🙂\n<|endoftext|>\n".encode()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert separated(tmp_path, path, "<|endoftext|>") == ["één\r\nverhaal", "", "second🙂\n", ""]
    assert separated(tmp_path, path, "nowhere") == [content.decode()]
    assert separated(tmp_path, path, "\\r\\n") == ["één", content.decode().partition("\r\n")[2]]
    assert separated(tmp_path, path, "é\\u00e9n") == ["", content.decode()[3:]]


def test_a_separator_makes_a_dataset_and_belongs_to_its_options(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|end|>".join(f"story {i}" for i in range(100)))
    options = {"name": "a", "data_dir": str(tmp_path), "tokenizer": "byte", "workers": 1}
    folder = run(PrepareOptions([str(tmp_path / "a.txt")], document_separator="<|end|>", **options))  # type: ignore[arg-type]
    manifest = load_manifest(folder)
    assert sum(manifest.count(split, "documents") for split in ("train", "val")) == 100
    with pytest.raises(UserError, match="document_separator"):
        run(PrepareOptions([str(tmp_path / "a.txt")], **options))  # type: ignore[arg-type]
    for typed in ("", "\\x"):
        with pytest.raises(UserError, match="invalid --document-separator"):
            run(PrepareOptions([str(tmp_path / "a.txt")], document_separator=typed, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress, zstandard.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_stdin_tells_its_compression_and_encoding_by_its_first_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes], encoding: str
) -> None:
    (tmp_path / "dataset").mkdir()

    def read(text: str, separator: str | None = None) -> list[str]:
        stdin = io.BytesIO(pack(text.encode(encoding)))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin))
        corpus = open_corpus(["-"], Reading(document_separator=separator), tmp_path / "dataset")
        return [str(bytes(each).decode()) for unit in units(corpus) for _, each in unit.documents()]  # type: ignore[arg-type]

    assert read('{"text": "é"}\n{"text": "b"}\n') == ["é", "b"]
    assert read("é\nb\n") == ["é", "b"]
    assert read("é\n<|>b\n", separator="<|>") == ["é\n", "b\n"]


# ---- a field that no row has ----


def test_a_field_that_no_row_has_is_an_error_and_one_that_some_rows_lack_is_not(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("some text that is not a row")
    write_rows(tmp_path / "a.jsonl", [{"body": "a", "meta": {"url": "u"}}] * 3)
    options = {"data_dir": str(tmp_path), "tokenizer": "byte", "workers": 1}
    sources = [str(tmp_path / "readme.txt"), str(tmp_path / "a.jsonl")]
    with pytest.raises(UserError, match=r"no field 'text' in any row, as in \S*a.jsonl at byte 0: .*: body, meta.url;"):
        run(PrepareOptions(sources, name="all", **options))  # type: ignore[arg-type]
    write_jsonl(tmp_path / "b.jsonl", ["text of b"])
    folder = run(PrepareOptions([*sources, str(tmp_path / "b.jsonl")], name="some", **options))  # type: ignore[arg-type]
    assert load_manifest(folder).skipped["missing"]["count"] == 3


# ---- web archives ----


def record(kind: str, body: bytes, content_type: str = "text/plain") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a/\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(head: str, body: bytes) -> bytes:
    return record(
        "response", f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body, "application/http; msgtype=response"
    )


ARCHIVE = [
    record("warcinfo", b"software: x", "application/warc-fields"),
    record("conversion", "één\r\n\r\nWARC/1.0 is text".encode()),
    response("Content-Type: text/html", b"<html>"),
    response("Content-Type: text/plain; charset=ISO-8859-1", b"caf\xe9"),
    response("Content-Type: text/plain\r\nContent-Encoding: gzip", gzip.compress(b"packed")),
    response("Content-Type: text/plain\r\nTransfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
    record("resource", b"ab\xff"),
    record("conversion", b""),
]
ARCHIVE_TEXTS = [None, "één\r\n\r\nWARC/1.0 is text", None, "café", "packed", "hello", None, ""]


@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_web_archives_give_their_text_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    monkeypatch.setattr(streams, "UNIT_BYTES", unit_bytes)
    (tmp_path / "a.warc").write_bytes(b"".join(ARCHIVE))
    (tmp_path / "a.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, ARCHIVE)))
    for name in ("a.warc", "a.warc.wet.gz"):
        assert documents(tmp_path, tmp_path / name) == ARCHIVE_TEXTS
        found = [each[:2] for each in refused(tmp_path, tmp_path / name)]
        assert found == [("not a text record", ""), ("not a text record", ""), ("not UTF-8", "broken")]


@pytest.mark.parametrize("cut", [1, 5, 9, 40, 100])
def test_a_truncated_web_archive_ends_in_one_broken_row(tmp_path: Path, cut: int) -> None:
    content = b"".join([*ARCHIVE[:2], record("conversion", b"the last record")])
    (tmp_path / "a.wet").write_bytes(content[:-cut])
    found = documents(tmp_path, tmp_path / "a.wet")
    assert found[:2] == ARCHIVE_TEXTS[:2]
    assert found[2] == (None if cut > 4 else "the last record")
    reasons = [reason for reason, broken, _ in refused(tmp_path, tmp_path / "a.wet") if broken]
    assert reasons == ["not WARC"] * (cut > 4)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not an archive</html>",
        record("conversion", b"x").replace(b"Content-Length: 1", b"Content-Length: -5"),
        record("conversion", b"x").replace(b"Content-Length: 1\r\n", b"") + ARCHIVE[1],
        record("conversion", b"x").replace(b"Content-Length: 1", b"Content-Length: 999999999"),
    ],
)
def test_hostile_web_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.warc").write_bytes(ARCHIVE[1] + content)
    found = [each[:2] for each in refused(tmp_path, tmp_path / "a.warc")]
    assert found == [("not WARC", "broken")]
