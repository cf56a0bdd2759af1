"""Compressed files and JSON: read to their end, split anywhere, damaged anywhere, and never without a limit."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import zstandard
from test_corpus import documents, opened, refused, units, whole

from pipeline.errors import UserError
from prepare import units as readers
from prepare.documents import jsontext, lines, streams
from prepare.storage import compressed
from prepare.storage import files as storage

TEXTS = [f"text {i} " + 'é🙂 \n\t"\\' * (i % 7) for i in range(200)]
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
Pack = Callable[[bytes], bytes]


def two_members(content: bytes) -> bytes:
    return gzip.compress(content[:1000]) + gzip.compress(b"") + gzip.compress(content[1000:]) + bytes(100)


def two_streams(content: bytes) -> bytes:
    return lzma.compress(content[:1000]) + bytes(8) + lzma.compress(content[1000:])


def two_blocks(content: bytes) -> bytes:
    """As pbzip2 writes them."""
    return bz2.compress(content[:1000]) + bz2.compress(content[1000:])


def zstd(content: bytes) -> bytes:
    return zstandard.compress(content)


def two_frames(content: bytes) -> bytes:
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    streamed = zstandard.ZstdCompressor().compressobj()  # a frame that does not tell its size
    return zstd(content[:1000]) + skippable + streamed.compress(content[1000:]) + streamed.flush()


packings = pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".gz", two_members),
        (".zst", zstd),
        (".zst", two_frames),
        (".xz", lzma.compress),
        (".xz", two_streams),
        (".bz2", bz2.compress),
        (".bz2", two_blocks),
    ],
)


@pytest.fixture(params=[16, 100, 1 << 20])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks so small that everything is split somewhere, and so small a limit that many lines are long."""
    size: int = request.param
    for module in (compressed, storage):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
    monkeypatch.setattr(compressed, "STEP_BYTES", size)
    monkeypatch.setattr(lines, "LONG_BYTES", size)
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    return size


@packings
def test_packed_jsonl_is_what_was_packed(tmp_path: Path, block_bytes: int, suffix: str, pack: Pack) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(JSONL))
    assert documents(tmp_path, path) == TEXTS
    assert documents(tmp_path, path) == TEXTS, "the same units, every time"


@packings
def test_a_packed_text_is_one_document(tmp_path: Path, block_bytes: int, suffix: str, pack: Pack) -> None:
    for name in ("a.txt", "b.PY", "c.md"):
        (tmp_path / f"{name}{suffix}").write_bytes(pack(JSONL))
    assert documents(tmp_path, *sorted(tmp_path.glob("*.*"))) == [JSONL.decode()] * 3


def test_a_question_mark_in_a_files_name_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "what?.jsonl.gz").write_bytes(gzip.compress(JSONL))
    assert documents(tmp_path, tmp_path / "what?.jsonl.gz") == TEXTS


@pytest.mark.parametrize("blank", ["", " \r\n\t"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_json_is_an_array_or_values_on_end(tmp_path: Path, block_bytes: int, packing: str, blank: str) -> None:
    rows = [
        {"nested": {"text": ["]}", {"text": 1}]}, "text": text, "more": [[], {}, None, 1e5, '\\"']} for text in TEXTS
    ]
    forms = {
        "array": blank + "[" + f"{blank},{blank}".join(json.dumps(row) for row in rows) + blank + "]" + blank,
        "strings": json.dumps(TEXTS, ensure_ascii=False),
        "pretty": json.dumps(rows, indent=2),
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "on_end": blank.join(json.dumps(row, indent=1) for row in rows),
    }
    for name, content in forms.items():
        path = tmp_path / f"{name}.json{packing}"
        path.write_bytes(gzip.compress(content.encode()) if packing else content.encode())
        assert documents(tmp_path, path) == TEXTS, name


@pytest.mark.parametrize(
    ("content", "texts"),
    [("[]", []), ("", []), (" ", []), ('{"text": "a"}', ["a"]), ('["a", null]', ["a", None])],
)
def test_small_json(tmp_path: Path, block_bytes: int, content: str, texts: list[str | None]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert documents(tmp_path, tmp_path / "a.json") == texts


def test_long_lines_of_a_plain_file(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL.replace(b"\n", b"\r\n").removesuffix(b"\n"))
    for unit_bytes in (50, 333, 1 << 20):
        monkeypatch.setattr("prepare.sources.corpus.unit_bytes", lambda corpus_bytes, size=unit_bytes: size)
        assert documents(tmp_path, path) == TEXTS


FAULTY_ROWS: list[tuple[str, str]] = [
    ('{"text": null}', "null"),
    ('{"text": "\\ud83d"}', "lone surrogate"),
    ('{"text": "\\ud83d\\u0041"}', "lone surrogate"),
    ('{"text": "\\udc00 and more"}', "lone surrogate"),
    ('{"text": "\udcff"}', "not UTF-8"),
    ('{"other": "\udcff", "text": "a"}', "not UTF-8"),
    ('{"other" "a", "text": "\udcff"}', "not UTF-8"),
    ('{"a": NaN, "text": "early", "text": "\\\\ud83d\\ud83d\\ude42"}', "\\ud83d🙂"),
    ('{"t\\u0065xt": "a", "other": "\\ud800"}', "a"),
    ('{"other": "a", "more": [{}]}', "missing"),
    ("{}", "missing"),
    ('{"text": [1, "a"]}', "not text"),
    ('{"text": {"a": 1}}', "not text"),
    ('{"text": 1.5}', "not text"),
    ('{"text": true}', "not text"),
    ('{"text": "a"', "not JSON"),
    ('{"text": "a}', "not JSON"),
    ('{"text" "a"}', "not JSON"),
    ('{"text": "a",}', "not JSON"),
    ('{"text": "\\x"}', "not JSON"),
    ('{"text": "a\tb"}', "not JSON"),
    ('{"text": "a"} 1', "not JSON"),
    ('{"text": "a", "b": [}}', "not JSON"),
    ('{"text": "a", "b": tru}', "not JSON"),
    ('{"text": "a", "b": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("row", "words"), FAULTY_ROWS, ids=[row[:40] for row, _ in FAULTY_ROWS])
@pytest.mark.parametrize("name", ["short.jsonl", "long.jsonl", "long.jsonl.gz"])
def test_a_long_line_is_judged_as_a_short_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: str, words: str
) -> None:
    """The row is made long by white space, which changes nothing of what it says."""
    if name.startswith("long"):
        monkeypatch.setattr(lines, "LONG_BYTES", 64)
        monkeypatch.setattr(streams, "UNIT_BYTES", 64)
        monkeypatch.setattr(compressed, "BLOCK_BYTES", 64)
        row = row[:1] + " " * 100 + row[1:]
    content = b'{"text": "first"}\n' + row.encode(errors="surrogateescape") + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    _, document = [each for unit in units(opened(tmp_path, tmp_path / name)) for _, each in unit.documents()]
    if isinstance(document, readers.Refused):
        assert document.broken == (words not in ("null", "missing"))
        assert "\n" not in document.detail
        assert document.reason == words
    else:
        assert whole(document) == words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}', "Expecting ',' or ']' at byte 14"),
        ('[{"text": "a"} {"text": "b"}]', "Expecting ',' or ']' at byte 15"),
        ('[{"text": "a"},]', "Expecting value at byte 15"),
        ('[{"text": "a"}] 5', "Expecting nothing after the array at byte 16"),
        ('{"text": "a"}}', "Expecting value at byte 13"),
        ('{"text": ["a"}', "Expecting ',' delimiter at byte 13"),
        ("[" * 200_000, "at byte 1"),
        ("hello", "Expecting value at byte 0"),
    ],
)
def test_the_rest_of_a_broken_json_file_is_one_broken_row(
    tmp_path: Path, block_bytes: int, content: str, words: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    ((reason, broken, where),) = refused(tmp_path, tmp_path / "a.json")
    assert (reason, broken) == ("not JSON", "broken")
    assert re.search(rf"a\.json at byte \d+ of its text: .*{re.escape(words)}", where), where
    assert documents(tmp_path, tmp_path / "a.json")[:-1] in ([], ["a"])


def test_a_wrong_element_of_an_array_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, 7, "b"]')
    assert documents(tmp_path, tmp_path / "a.json") == ["a", None, "b"]
    ((reason, _, where),) = refused(tmp_path, tmp_path / "a.json")
    assert reason == "not an object"
    assert "a.json at byte 16 of its text: expected an object, got int" in where


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_value_that_is_too_long_to_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packing: str
) -> None:
    for module in (lines, jsontext, streams):
        monkeypatch.setattr(module, "MOST_ROW_BYTES", 2000)
    monkeypatch.setattr(lines, "LONG_BYTES", 100)
    for module in (compressed, storage):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(compressed, "STEP_BYTES", 64)
    most = "a" * 1900
    for text, is_kept in ((most, True), (most * 10, False)):
        content = "".join(json.dumps({"text": each}) + "\n" for each in ["first", text, "last"]).encode()
        path = tmp_path / f"{name}{packing}"
        path.write_bytes(gzip.compress(content) if packing else content)
        if is_kept:
            assert documents(tmp_path, path) == ["first", text, "last"]
            continue
        ((reason, broken, where),) = refused(tmp_path, path)
        assert (reason, broken) == ("too long", "broken")
        assert f"{path} at byte 18" in where
        # Where the value of an array ends is unknown, the end of a line is not.
        assert documents(tmp_path, path) == ["first", None, "last"][: 2 if name == "a.json" else 3]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", ["a"]),
        ('{"text": "a", "text": "b"}', ["b"]),
        ('{"text": "a", "score": [NaN, Infinity, -Infinity, 1e999]}', ["a"]),
        ('{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        ('{"text": "a"}{"text": "b"} "c"', ["a", "b", "c"]),
        (" \r\n\t", []),
        ('{"text": "\\ud83d\\u0041"}', [None]),
        ('{"text": "a", "deep": ' + "[" * 400 + "]" * 400 + "}", ["a"]),
        ('{"text": "\u007f\u0080\u2028"}', ["\u007f\u0080\u2028"]),
    ],
)
def test_json_that_other_readers_stumble_over(
    tmp_path: Path, block_bytes: int, content: str, texts: list[str | None]
) -> None:
    (tmp_path / "a.json").write_bytes(content.encode())
    assert documents(tmp_path, tmp_path / "a.json") == texts


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 8]) + content[middle + 8 :]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
@packings
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "truncated"),
        (flipped, "is damaged"),
        (lambda content: content + b"rest", "is damaged"),
        (lambda content: b"plain text", "is damaged"),
    ],
)
def test_damage_names_the_file_and_the_place(
    tmp_path: Path, name: str, suffix: str, pack: Pack, damage: Pack, words: str
) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(damage(pack(JSONL)))
    try:
        found, ((reason, broken, where),) = documents(tmp_path, path), refused(tmp_path, path)
    except UserError as error:
        where = str(error)
        assert path.read_bytes() == b"plain text"
    else:
        # What was read before the damage is kept, but never a part of a text.
        assert (reason, broken) == ("damaged", "broken")
        assert found[:-1] == TEXTS[: len(found) - 1]
        assert found[-1] is None
    assert str(path) in where
    assert words in where
    assert "\n" not in where


def test_a_bad_checksum_is_not_taken_for_an_end(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(JSONL))
    content[-8] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    ((reason, _, where),) = refused(tmp_path, tmp_path / "a.jsonl.gz")
    assert reason == "damaged"
    assert re.search(r"a\.jsonl\.gz is damaged .*incorrect data check", where)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_bomb_meets_the_limit(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    packer = {
        ".gz": lambda: zlib.compressobj(9, wbits=31),
        ".zst": lambda: zstandard.ZstdCompressor().compressobj(),
        ".xz": lzma.LZMACompressor,
        ".bz2": bz2.BZ2Compressor,
    }[suffix]()
    path.write_bytes(b"".join([packer.compress(b" " * (1 << 20)) for _ in range(80)]) + packer.flush())
    with pytest.raises(
        UserError, match=r"a decompression bomb: [\d,]+ bytes of it expand to [68]\d,\d+,\d+, the limit is 250 times"
    ):
        documents(tmp_path, path)


def test_what_shrinks_well_but_is_small_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 30_000_000))
    (document,) = documents(tmp_path, tmp_path / "a.txt.gz")
    assert document == "a" * 30_000_000


def test_packed_parquet_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(
        UserError,
        match=r"\.parquet\.gz has no known suffix: expected one of .* all but Parquet and Arrow also compressed",
    ):
        opened(tmp_path, tmp_path / "a.parquet.gz")


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    assert documents(tmp_path, tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.gz") == TEXTS


def outcome(document: readers.Document) -> str | None:
    """A text, or why there is none; None for what is not JSON, or not an object with a text."""
    if isinstance(document, readers.Refused) and document.reason not in ("null", "not UTF-8", "lone surrogate"):
        return None
    return f"({document.reason})" if isinstance(document, readers.Refused) else whole(document)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_damaged_json_is_judged_alike_in_a_line_and_in_an_array(block: int) -> None:
    """Random damage: whatever a line gives, an array that is split anywhere gives too."""
    random = Random(block)
    row = '{"id": 1.5, "text": "a\\n\\u00e9\\ud83d\\ude42\\\\ 日本🙂", "more": [null, {"a": "}"}]}'.encode()
    spoiled = [b'"', b"\\", b"\xff", b"\xc3", b"\0", b"\\ud83d", b"\\ude42", b"{", b"]", b",", b"text", b"\n", b"1"]
    texts = 0
    for _ in range(1500):
        content = bytearray(row)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(content))
            content[at : at + random.randint(0, 3)] = random.choice([b"", *spoiled])
        array = b"[" + content + b" , null]"

        def in_array(array: bytes = array) -> readers.Document:
            blocks: Iterator[bytes] = (array[at : at + block] for at in range(0, len(array), block))
            (_, first), *rest = jsontext.each_value(blocks)
            if isinstance(first, readers.Refused):
                return first
            if [each for _, each in rest] != [b"null"]:
                return readers.Refused("the array ends elsewhere")
            return jsontext.parse(first, "text")

        line = outcome(jsontext.parse(bytes(content), "text"))
        texts += line is not None
        assert outcome(in_array()) == line or line == "(not UTF-8)", content
    assert 100 < texts < 1400
