"""One large document is encoded by all workers: the bytes, counts and faults are those of one process."""

import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from pipeline.dataset.shards import load_manifest
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from prepare.encoding import encode as encode_module
from prepare.encoding import work
from prepare.encoding.encode import EncodingOptions, UnitEncoder, UnitJob
from prepare.run import PrepareOptions, run
from prepare.units import Texts
from prepare.workers import Workers

LINE = "The quick brown fox, it's said, jumps over {} lazy dogs; naïve 東京 🙂\n"
TEXT = "".join(LINE.format(number) for number in range(16_000)).encode()  # larger than the smallest unit
PARENT = os.getpid()

# A package of the name gigatoken, which worker processes import before the real one.
FAKE = """
import os, time
from pathlib import Path
from pipeline.vocabulary.byte_pair import BytePairTokenizer

seen = 0
class Tokenizer:
    @classmethod
    def from_tiktoken(cls, path, pretokenizer):
        return cls()

    def encode(self, content):
        global seen
        seen += 1
        right = BytePairTokenizer("gpt2").encode(content.decode()).astype("uint32")
        {}
        return right
"""
MEET = """Path("{folder}", str(os.getpid())).touch()
        for _ in range(600):
            if len(os.listdir("{folder}")) > 1:
                break
            time.sleep(0.1)"""
FAULTS = {
    "differs from tiktoken": "right = right[::-1].copy() if len(content) > 10_000 else right",
    "lost or added text": "right = right[:-1] if seen > 20 else right",
    "out of luck": "if len(content) > 10_000: raise RuntimeError('out of luck')",
    "may have killed a worker": "os._exit(139) if seen > 3 else None",
}


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Documents above 1 MB are shared, in small pieces and groups; the names of those that were."""
    monkeypatch.setattr(work, "SHARED_BYTES", 1 << 20)
    monkeypatch.setattr(encode_module, "GROUP_BYTES", 1 << 16)
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 20_000)
    found: list[str] = []
    plain = UnitEncoder.encode

    def noted(encoder: UnitEncoder, job: UnitJob) -> Any:
        if encoder._workers is not None:
            found.append(job.work.locate(0))
        return plain(encoder, job)

    monkeypatch.setattr(UnitEncoder, "encode", noted)
    return found


def prepared(tmp_path: Path, name: str, *sources: Path, workers: int, **options: Any) -> dict[str, bytes]:
    """Every file of the dataset, the manifest among them."""
    chosen = PrepareOptions(
        [str(each) for each in sources], name=name, data_dir=str(tmp_path / "data"), workers=workers, **options
    )
    return {path.name: path.read_bytes() for path in run(chosen).iterdir() if path.name != ".lock"}


def write_large(folder: Path, content: bytes = TEXT, suffix: str = ".txt") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"large{suffix}"
    path.write_bytes(gzip.compress(content, 0) if suffix.endswith(".gz") else content)
    return path


def replace_gigatoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "gigatoken.py").write_text(FAKE.format(line))
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setattr(work, "fast_libraries", lambda name, distrusted: {"gigatoken"} - distrusted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".txt", {}),
        (".md", {"tokenizer": "byte"}),
        (".txt.gz", {"tokenizer": "word"}),
        (".txt", {"tokenizer": "char", "limit_docs": 51}),
    ],
)
def test_the_bytes_are_those_of_one_process(
    tmp_path: Path, shared: list[str], suffix: str, options: dict[str, Any]
) -> None:
    large = write_large(tmp_path / "corpus", suffix=suffix)
    before = write_jsonl(tmp_path / "corpus", [f"before {number}" for number in range(50)])
    (tmp_path / "corpus" / "z.txt").write_text("after")
    one = prepared(tmp_path, "one", before, large, tmp_path / "corpus" / "z.txt", workers=1, **options)
    assert shared == []
    for workers in (2, 4):
        several = prepared(
            tmp_path, f"of_{workers}", before, large, tmp_path / "corpus" / "z.txt", workers=workers, **options
        )
        assert several == one
    assert len(shared) == 2


@pytest.mark.slow
def test_a_large_document_between_separators_is_shared(
    tmp_path: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOST_TEXT_BYTES", "UNIT_BYTES"):
        monkeypatch.setattr(f"prepare.documents.streams.{name}", 1 << 20)
    large = write_large(tmp_path, b"small<|endoftext|>" + TEXT + b"<|endoftext|>small too")
    datasets = [
        prepared(tmp_path, f"of_{workers}", large, workers=workers, document_separator="<|endoftext|>")
        for workers in (1, 2)
    ]
    assert datasets[0] == datasets[1]
    assert len(shared) == 1


@pytest.mark.slow
def test_documents_that_keep_all_workers_busy_are_not_shared(tmp_path: Path, shared: list[str]) -> None:
    for number in range(4):
        write_large(tmp_path / "corpus", TEXT + bytes([48 + number]), suffix=f"{number}.txt")
    prepared(tmp_path, "several", tmp_path / "corpus", workers=2)
    assert shared == []


@pytest.mark.slow
def test_more_than_one_process_encodes(tmp_path: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "processes").mkdir()
    replace_gigatoken(tmp_path, monkeypatch, MEET.format(folder=tmp_path / "processes"))
    several = prepared(tmp_path, "several", write_large(tmp_path), workers=2)
    pids = {int(path.name) for path in (tmp_path / "processes").iterdir()}
    assert len(pids) == 2 and PARENT not in pids
    monkeypatch.setattr(work, "fast_libraries", lambda name, distrusted: [])
    assert several == prepared(tmp_path, "one", tmp_path / "large.txt", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_in_a_worker_starts_over_without_the_library(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    replace_gigatoken(tmp_path, monkeypatch, FAULTS[words])
    several = prepared(tmp_path, "several", write_large(tmp_path), workers=2)
    lines = [record.getMessage() for record in caplog.records if "starting over" in record.getMessage()]
    assert len(lines) == 1 and words in lines[0]
    monkeypatch.setattr(work, "fast_libraries", lambda name, distrusted: [])
    assert several == prepared(tmp_path, "one", tmp_path / "large.txt", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".txt", lambda text: text[:600_000] + b"\xff" + text[600_000:], "not UTF-8"),
        (".txt", lambda text: text + "é".encode()[:1], "not UTF-8"),
        (".txt.gz", None, "damaged"),
    ],
)
def test_a_damaged_document_is_skipped_as_one(
    tmp_path: Path, shared: list[str], suffix: str, damage: Callable[[bytes], bytes] | None, reason: str
) -> None:
    large = write_large(tmp_path, damage(TEXT) if damage else TEXT, suffix)
    if damage is None:
        large.write_bytes(large.read_bytes()[:-100])
    notes = write_jsonl(tmp_path, [f"note {number}" for number in range(50)])
    options = {"bad_rows": "skip"}
    one = prepared(tmp_path, "one", notes, large, workers=1, **options)
    assert prepared(tmp_path, "several", notes, large, workers=2, **options) == one
    assert shared == [str(large)]
    manifest = load_manifest(tmp_path / "data" / "several")
    assert sum(shard.documents for shards in manifest.splits.values() for shard in shards) == 50
    ((found, entry),) = manifest.skipped.items()
    assert reason in found and entry["count"] == 1 and entry["example"].startswith(str(large))


class ReadsAhead(Workers):
    """Reads all arguments before the first call."""

    def map(self, call: Callable[[Any], Any], arguments: Iterable[Any], *, in_order: bool = False) -> Iterator[Any]:
        assert in_order
        return map(call, list(arguments))


@pytest.mark.parametrize("text", [b"bad \xff", b"much bad text\xff", b"\xff bad"])
def test_the_first_fault_of_a_document_counts(tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenizer: ByteTokenizer, text: str) -> Any:
        if "bad" in text:
            raise ValueError("stack overflow")
        return plain(tokenizer, text)

    plain = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", refuse)
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 4)
    options = EncodingOptions(tokenizer=ByteTokenizer().spec(), parts=tmp_path, vocabulary=tmp_path, seed=5)

    class Blocks:
        def blocks(self) -> Iterator[bytes]:
            yield from (bytes([each]) for each in text)

    job = UnitJob(item="key", unit=0, last=True, work=Texts((Blocks(), b"good"), 1, "corpus", 0))
    expected = UnitEncoder(options).encode(job)
    assert UnitEncoder(options, ReadsAhead(2)).encode(job) == expected
    assert expected.documents == 1


def test_results_come_in_the_order_of_the_arguments_also_within_another_map() -> None:
    with Workers(2) as workers:

        def arguments() -> Iterator[int]:
            for number in range(-8, 0):
                assert list(workers.map(abs, range(number, 0), in_order=True)) == list(range(-number, 0, -1))
                yield number

        assert sorted(workers.map(abs, arguments())) == list(range(1, 9))
