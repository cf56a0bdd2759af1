"""What a document, a line or a claim may cost in memory: a text as much as a block, a JSON value a few times its size."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT
from test_corpus import documents, opened, units, whole

from pipeline.errors import UserError
from prepare.documents import columns, parquet
from prepare.units import Refused

MEGABYTES = 200
# Reads everything in a fresh process, as a worker would and the parent does; prints the text's bytes and the memory's
# growth in MB. Linux hands a parent's ru_maxrss down to its children, so its own peak is asked for; macOS does not.
READ_ALL = """
import resource, sys
from pathlib import Path
from prepare.sources.corpus import open_corpus
from prepare.units import Reading
import orjson, zstandard, prepare.documents.parquet, pyarrow.parquet, pyarrow.compute
def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) / 1e3 for line in status.open() if line.startswith("VmHWM"))
before, size = peak(), 0
for item in open_corpus([sys.argv[1]], Reading(), Path(sys.argv[2])).items():
    for unit in item.units():
        for _, document in unit.documents():
            for block in [document] if isinstance(document, bytes) else document.blocks():
                size += len(block)
print(size, peak() - before)
"""


def long_document(path: Path) -> int:
    """One document of 200 MB in the form that the name says, in JSON between two short ones; the bytes of all text."""
    random = Random(0)
    # Sixteen different symbols, so that it shrinks as text does; escapes and characters of two bytes all over.
    text = [f"{random.randbytes(499_950).hex()}é🙂\n" for _ in range(10)]
    kind = path.name.split(".")[1]
    before, between, after = {
        "txt": ("", "", ""),
        "jsonl": ('{"text": "a"}\n', '{"title": [1, {"text": 5}], "text": "', '"}\n{"text": "b"}\n'),
        "json": ('[{"text": "a"},\n', '{"title": [1, {"text": 5}], "text": "', '"}, "b"]'),
    }[kind]
    opener: Any = {".gz": partial(gzip.open, compresslevel=1), ".zst": zstandard.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write((before + between).encode())
        for number in range(MEGABYTES):
            part = text[number % 10] if number % 10 else text[0][::-1]
            file.write((part if kind == "txt" else json.dumps(part)[1:-1]).encode())
        file.write(after.encode())
    return sum(len((text[n % 10] if n % 10 else text[0][::-1]).encode()) for n in range(MEGABYTES)) + 2 * (
        kind != "txt"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.zst"),
        # What decompresses knows no format, so that all pairs need not be tried each time.
        *(pytest.param(name, marks=pytest.mark.campaign) for name in ("a.txt.zst", "a.jsonl.gz", "a.json.zst")),
    ],
)
def test_a_document_of_200_mb_costs_no_memory_as_text_and_a_few_times_its_size_in_json(
    tmp_path: Path, name: str
) -> None:
    size = long_document(tmp_path / name)
    found, grown = read_all(tmp_path / name)
    assert found == size
    # A JSON value is held: its bytes, the text they stand for (4 bytes a character, for the emoji), and that as UTF-8.
    assert grown < (100 if ".txt" in name else MEGABYTES * 9)


def read_all(path: Path) -> tuple[int, float]:
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path), str(path.parent / "dataset")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    size, grown = result.stdout.split()
    return int(size), float(grown)


@pytest.mark.slow
def test_many_short_documents_are_never_held_together(tmp_path: Path) -> None:
    """200 MB in an array of JSON, in 200,000 pieces."""
    text = Random(0).randbytes(499).hex()
    with (tmp_path / "a.json").open("w") as file:
        file.write('[{"text": "a"}')
        for number in range(200_000):
            file.write(f',\n{{"text": "{number} {text}"}}')
        file.write("]")
    found, grown = read_all(tmp_path / "a.json")
    assert found == 1 + sum(len(f"{number} ") + 998 for number in range(200_000))
    assert grown < 100


@pytest.mark.slow
@pytest.mark.parametrize("use_dictionary", [False, True])
def test_a_long_value_of_parquet_is_held_by_arrow_alone(tmp_path: Path, use_dictionary: bool) -> None:
    """Arrow holds the packed page, the unpacked one, its dictionary and the value copied out; no str comes on top."""
    text = Random(0).randbytes(MEGABYTES * 500_000).hex()
    pq.write_table(pa.table({"text": ["a", text, "b"]}), tmp_path / "a.parquet", use_dictionary=use_dictionary)
    found, grown = read_all(tmp_path / "a.parquet")
    assert found == MEGABYTES * 1_000_000 + 2
    assert grown < MEGABYTES * (4.5 if use_dictionary else 3.5)


# ---- Parquet that claims or repeats too much ----


@pytest.mark.parametrize("looked_at", [1 << 20, 1000])
def test_a_value_that_a_dictionary_repeats_is_unfolded_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    monkeypatch.setattr(parquet, "STEP_BYTES", 100_000)
    monkeypatch.setattr(parquet, "DICTIONARY_BYTES", looked_at)
    texts = [f"{i % 3}" * 40_000 for i in range(100)]
    options = {"dictionary_pagesize_limit": 1 << 30, "compression": "none"}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    assert documents(tmp_path, tmp_path / "a.parquet") == texts
    group = parquet._row_group(str(tmp_path / "a.parquet"), "text", 0, 8192)
    assert {len(rows) for rows in group.read(0, 100)} == {2 if looked_at > 1000 else 1}
    chunk = parquet._chunk(str(tmp_path / "a.parquet"), pq.ParquetFile(tmp_path / "a.parquet"), group=0, column="text")
    assert parquet._dictionary_bytes(str(tmp_path / "a.parquet"), chunk) == 3 * (40_000 + 4)


def test_a_dictionary_bomb_meets_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred KB repeated over and over: 2 GB out of a few hundred bytes."""
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(parquet, "STEP_BYTES", 1 << 20)
    indices = pa.array([0] * 20_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * 100_000]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(
        UserError, match=r"a\.parquet row group 0 looks like a decompression bomb: it expands to [12],\d+,\d+ bytes"
    ):
        documents(tmp_path, tmp_path / "a.parquet")


def test_pages_that_shrank_too_well_meet_the_limit_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 20)
    pq.write_table(pa.table({"text": ["a" * 30_000_000]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(
        UserError, match=r"a\.parquet row group 0 looks like a decompression bomb: it expands to 3\d,\d+,\d+ bytes"
    ):
        opened(tmp_path, tmp_path / "a.parquet").items()


class Claims:
    """A file's metadata, of which one number is a claim."""

    def __init__(self, real: Any, **claims: int) -> None:
        self._real, self._claims = real, claims

    def __getattr__(self, name: str) -> Any:
        if name in self._claims:
            return self._claims[name]
        found = getattr(self._real, name)
        if name in ("metadata", "row_group", "column"):
            return (lambda i: Claims(found(i), **self._claims)) if callable(found) else Claims(found, **self._claims)
        return found

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *rest: object) -> None:
        self._real.close()


@pytest.mark.parametrize(
    "claim",
    [{"num_rows": 1 << 40}, {"num_rows": -1}, {"total_compressed_size": 1 << 50}, {"total_uncompressed_size": -5}],
)
def test_absurd_claims_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: dict[str, int]
) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    real = parquet._parquet_file
    monkeypatch.setattr(parquet, "_parquet_file", lambda path: Claims(real(path), **claim))
    with pytest.raises(
        UserError, match=r"a\.parquet row group 0 is damaged: it claims .* rows and .* compressed bytes in a file"
    ):
        opened(tmp_path, tmp_path / "a.parquet").items()


def test_a_row_group_with_fewer_rows_than_promised(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (unit,) = units(opened(tmp_path, tmp_path / "a.parquet"))
    _, _, (row, lost) = replace(unit, stop=3).documents()
    assert (row, lost) == (2, Refused("damaged", broken=True))
    assert isinstance(lost, Refused)
    assert "a.parquet row group 0 ends after 2 rows, fewer than its footer claims" in lost.detail


def test_long_values_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LONG_BYTES", 10)
    monkeypatch.setattr(columns, "BLOCK_BYTES", 3)
    texts = ["short", None, "é" * 20, "", "x" * 11]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (unit,) = units(opened(tmp_path, tmp_path / "a.parquet"))
    found = [document for _, document in unit.documents()]
    assert [whole(document) for document in found] == texts
    assert [type(document) for document in found] == [bytes, Refused, columns.LongValue, bytes, columns.LongValue]
