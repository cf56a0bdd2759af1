"""Whole preparations: shards read back with np.memmap and compared with tiktoken on sources read independently."""

import fcntl
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import xxhash
import zstandard
from conftest import run_program, write_gz, write_jsonl, write_text_files

from observe.verify import run as verify
from pipeline.dataset.shards import MANIFEST_NAME, load_manifest
from pipeline.errors import UserError
from pipeline.vocabulary.merges import write_ranks
from pipeline.vocabulary.specs import from_spec
from prepare import units
from prepare.options import default_fraction
from prepare.run import PrepareOptions, run

ROOT = Path(__file__).parents[2]
END = 50256


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of mixed lengths and scripts, a few of them twice, one with the literal end-of-text."""
    chance = random.Random(seed)
    words = [
        "the",
        " cat",
        " sat",
        "\n\n",
        "  ",
        "naïve",
        " 東京",
        "🙂",
        " 1234",
        "def f(x):\n    return x",
        "'ll",
        "\t",
    ]
    found = ["".join(chance.choices(words, k=chance.randint(1, 120))) for _ in range(count)]
    found[3] = "before <|endoftext|> after"
    found[count // 2] = found[1]
    return found


@pytest.fixture
def documents() -> list[str]:
    return make_documents(200)


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in documents))
    return path


def prepare(tmp_path: Path, *sources: object, **options: Any) -> Path:
    options = {"data_dir": str(tmp_path / "data"), "workers": 1, **options}
    return run(PrepareOptions([str(source) for source in sources], **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def read_split(folder: Path, split: str, end: int = END, dtype: type = np.uint16) -> list[list[int]]:
    """The documents of a split, by nothing but the bytes on disk and the place of end-of-text."""
    found = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        ids = np.memmap(path, dtype=dtype, mode="r")
        assert ids[-1] == end
        found += [piece[:-1].tolist() for piece in np.split(ids, np.flatnonzero(ids == end) + 1) if len(piece)]
    return found


def is_val(text: str, fraction: float, seed: int = 0) -> bool:
    return (xxhash.xxh3_128_intdigest(text.encode(), seed) >> 64) < int(fraction * 2**64)


def test_shards_hold_what_tiktoken_makes_of_each_document_in_order(
    tmp_path: Path, jsonl: Path, documents: list[str]
) -> None:
    folder = prepare(tmp_path, jsonl, val_fraction=0.2, shard_tokens=2000)
    ours = from_spec(load_manifest(folder).tokenizer, folder)
    with_specials = tiktoken.Encoding(
        "reference", pat_str=ours.pattern(), mergeable_ranks=ours.ranks(), special_tokens={"<|endoftext|>": END}
    )
    for split in ("train", "val"):
        wanted = [with_specials.encode_ordinary(text) for text in documents if is_val(text, 0.2) == (split == "val")]
        assert read_split(folder, split) == wanted
    assert len(list(folder.glob("train_*.bin"))) > 3


def test_the_manifest_counts_what_is_in_the_files(tmp_path: Path, jsonl: Path, documents: list[str]) -> None:
    folder = prepare(tmp_path, jsonl, val_fraction=0.2, shard_tokens=2000, seed=3)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for split in ("train", "val"):
        texts = [text for text in documents if is_val(text, 0.2, seed=3) == (split == "val")]
        shards = manifest["splits"][split]
        assert sum(shard["documents"] for shard in shards) == len(texts)
        assert sum(shard["bytes"] for shard in shards) == sum(len(text.encode()) for text in texts)
        for shard in shards:
            content = (folder / shard["file"]).read_bytes()
            ids = np.frombuffer(content, dtype=manifest["dtype"])
            assert (shard["tokens"], shard["documents"]) == (len(ids), int((ids == END).sum()))
            assert shard["hash"] == xxhash.xxh3_128_hexdigest(content)
    content = jsonl.read_bytes()
    assert manifest["sources"] == [
        {"path": str(jsonl), "bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
    ]
    assert manifest["options"]["seed"] == 3
    assert manifest["val_rule"] == {
        "kind": "hash",
        "fraction": 0.2,
        "threshold": int(0.2 * 2**64),
        "hash": "xxh3_128, high half, seeded",
    }


def _as_one_row_group(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", use_dictionary=False)
    return folder / "c.parquet"


def _as_row_groups(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=30)
    return folder / "c.parquet"


def _as_zst(folder: Path, texts: list[str]) -> Path:
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(write_jsonl(folder, texts).read_bytes()))
    return folder / "c.jsonl.zst"


def _as_json(folder: Path, texts: list[str]) -> Path:
    (folder / "c.json").write_bytes(orjson.dumps([{"text": text} for text in texts]))
    return folder / "c.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [write_jsonl, _as_one_row_group, _as_row_groups, write_text_files, write_gz, _as_zst, _as_json],
)
def test_the_bytes_are_the_same_for_any_number_of_workers_and_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, documents: list[str]
) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 4096)
    source = write(tmp_path, documents)
    made = {
        workers: contents(prepare(tmp_path, source, name=f"w{workers}", workers=workers, shard_tokens=3000))
        for workers in (1, 3)
    }
    assert made[1] == made[3]
    assert len(made[1]) > 3
    reference = contents(prepare(tmp_path, write_jsonl(tmp_path, documents), name="reference", shard_tokens=3000))
    assert made[1] == reference


def test_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    texts = [f"text number {i % 40}" for i in range(200)]
    folder = prepare(tmp_path, write_jsonl(tmp_path, texts), val_fraction=0.3)
    train, val = ({tuple(ids) for ids in read_split(folder, split)} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert len(train | val) == 40


def test_one_document_is_cut_in_two(tmp_path: Path) -> None:
    text = "é" * 901 + "\n" * 99
    (tmp_path / "book.txt").write_text(text)
    folder = prepare(tmp_path, tmp_path / "book.txt", tokenizer="byte")
    train, val = (read_split(folder, split, end=256) for split in ("train", "val"))
    # 1,901 bytes: nine tenths are 1,710, which is where the 856th character begins.
    assert [bytes(ids).decode() for ids in train] == [text[:855]]
    assert [bytes(ids).decode() for ids in val] == [text[855:]]
    manifest = load_manifest(folder)
    assert (manifest.val_rule["kind"], manifest.val_rule["fraction"]) == ("position", 0.1)
    assert manifest.val_rule["cut_documents"] == 1
    # A document that is cut counts once, in train.
    assert [(shard.documents, shard.tails) for shard in manifest.shards] == [(1, 0), (0, 1)]
    assert [manifest.count(split, "bytes") for split in ("train", "val")] == [1710, 191]
    assert folder.name == "book"


def test_a_duplicate_is_named_with_the_document_that_it_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 60)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(f'{{"text": "{text}"}}\n' for text in ["", "one", "two", "three", "four", "five"]))
    second.write_text("".join(f'{{"text": "{text}"}}\n' for text in ["six", "", "seven", "two", "two", "one"]))
    skipped = load_manifest(prepare(tmp_path, first, second, dedup=True)).skipped
    (where, same) = ((second, 47), (first, 29))
    assert skipped["duplicate"] == {
        "count": 3,
        "example": f"{where[0]} at byte {where[1]} (line 4), the same as {same[0]} at byte {same[1]} (line 3)",
    }
    twice = write_jsonl(tmp_path, ["other", "same", "", "same", "same"])
    skipped = load_manifest(prepare(tmp_path, twice, dedup=True, name="twice")).skipped
    assert skipped["duplicate"]["example"] == f"{twice} at byte 45 (line 4), the same as {twice} at byte 17 (line 2)"


@pytest.mark.parametrize("tokenizer", ["byte", "word", "bpe:300"])
def test_one_long_file_and_two_notes_are_split_by_tokens(tmp_path: Path, tokenizer: str) -> None:
    for name, text in (("long", " ".join(map(str, range(12_000)))), ("a", "a note"), ("b", "another note")):
        (tmp_path / f"{name}.txt").write_text(text)
    folder = prepare(tmp_path, *sorted(tmp_path.glob("*.txt")), tokenizer=tokenizer, name="notes")
    manifest = load_manifest(folder)
    train, val = (manifest.count(split, "tokens") for split in ("train", "val"))
    assert 0.05 <= val / (train + val) <= 0.2
    assert sum(manifest.count(split, "documents") for split in ("train", "val")) == 3
    assert (manifest.val_rule["kind"], manifest.val_rule["cut_documents"]) == ("position", 1)
    verify(folder)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_small_corpora_have_both_splits(tmp_path: Path, count: int, fraction: float) -> None:
    source = write_jsonl(tmp_path, [f"document {i}" for i in range(count)])
    folder = prepare(tmp_path, source, val_fraction=fraction)
    splits = [read_split(folder, split) for split in ("train", "val")]
    assert sorted(map(len, splits)) == [1, count - 1]


@pytest.mark.slow
def test_a_fraction_of_zero_prepares_without_val_and_trains(tmp_path: Path, documents: list[str]) -> None:
    write_jsonl(tmp_path, documents)
    tiny = [
        "quickstart", "data.dataset=c", "run.name=r", "run.device=cpu", "train.max_steps=2", "train.tokens_per_step=64",
        "train.micro_batch_size=2", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16",
        "schedule.warmup_steps=0", "eval.sample_prompt=",
    ]  # fmt: skip
    commands: list[tuple[list[str], int, str]] = [
        (["prepare", "c.jsonl", "--val-fraction", "0", "--tokenizer", "byte"], 0, "val: 0 tokens"),
        (["verify", "c"], 0, "verified: data/c: "),
        (["inspect", "c"], 0, "val_rule"),
        (["inspect", "c", "--json"], 0, '"val": {"tokens": 0, "documents": 0'),
        (["train", *tiny], 2, "has no val split: train without evaluation (eval.every_steps=0), or prepare it again"),
        (["train", *tiny, "eval.every_steps=0"], 0, "step 2"),
        (["eval", "--ckpt", "latest"], 2, "val split has 0 token(s): expected at least 2"),
        (["eval", "--ckpt", "latest", "--split", "train"], 0, "perplexity"),
        (["sample", "--ckpt", "latest", "--prompt", "<|endoftext|>"], 0, "<|endoftext|> in a prompt is ordinary text"),
    ]
    for command, code, words in commands:
        done = run_program(*command, cwd=tmp_path)
        assert (done.returncode, words in done.stdout + done.stderr) == (code, True), (
            command,
            done.stdout,
            done.stderr,
        )
    assert load_manifest(tmp_path / "data" / "c").splits["val"] == []


def test_no_workable_split_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the same single token"):
        prepare(tmp_path, write_jsonl(tmp_path, ["same"] * 4))
    with pytest.raises(UserError, match="corpus is empty"):
        prepare(tmp_path, write_jsonl(tmp_path, ["", ""]), name="empty")
    assert not list((tmp_path / "data").rglob(MANIFEST_NAME))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 17, 199, 500])
def test_limit_docs_takes_the_first_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Path, documents: list[str], limit: int
) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)
    made = [contents(prepare(tmp_path, jsonl, name=f"w{n}", workers=n, limit_docs=limit)) for n in (1, 2)]
    alone = write_jsonl(tmp_path, documents[:limit])
    assert made[0] == made[1] == contents(prepare(tmp_path, alone, name="alone"))


@pytest.mark.parametrize("name", ["char", "word", "bpe:300"])
def test_a_vocabulary_is_learnt_from_the_documents_that_are_taken(
    tmp_path: Path, jsonl: Path, documents: list[str], name: str
) -> None:
    limited = prepare(tmp_path, jsonl, name="limited", tokenizer=name, limit_docs=20)
    alone = prepare(tmp_path, write_jsonl(tmp_path, documents[:20]), name="alone", tokenizer=name)
    assert load_manifest(limited).tokenizer == load_manifest(alone).tokenizer
    assert contents(limited) == contents(alone)


@pytest.mark.slow
def test_a_character_beyond_the_limit_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units beyond the limit are encoded ahead, by a vocabulary that was not learnt from them."""
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)
    texts = [f"plain text {i} " * 20 for i in range(30)]
    source = write_jsonl(tmp_path, [*texts, *(f"snow \u2603 {i} " * 20 for i in range(200))])
    limited = prepare(tmp_path, source, name="limited", tokenizer="char", limit_docs=28, workers=3)
    alone = prepare(tmp_path, write_jsonl(tmp_path, texts[:28]), name="alone", tokenizer="char")
    assert contents(limited) == contents(alone)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'\n{"text": "a\\nb"}\n{"text": "c"}\n', ["a\nb", "c"]),
        (b'first line\n\n{"text": "c"}\r\nlast', ["first line", '{"text": "c"}', "last"]),
        (b"[1]\n2\n", ["[1]", "2"]),
    ],
)
def test_stdin_is_json_lines_or_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, wanted: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    folder = prepare(tmp_path, "-", tokenizer="byte")
    found = [bytes(ids).decode() for split in ("train", "val") for ids in read_split(folder, split, end=256)]
    assert sorted(found) == sorted(wanted)
    assert folder.name == "stdin"
    assert load_manifest(folder).sources == [
        {"path": "-", "bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
    ]
    assert {path.suffix for path in folder.iterdir() if path.name != ".lock"} == {".bin", ".json"}


def test_a_fault_of_stdin_is_reported_with_its_position_and_the_spool_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'\n{"body": "a"}\n{"body": "b"}\n')))
    with pytest.raises(UserError, match="no field 'text' in any row, as in stdin at byte 1: its fields are: body;"):
        prepare(tmp_path, "-")
    assert {path.name for path in (tmp_path / "data" / "stdin").iterdir()} == {".lock", "unfinished"}


@pytest.mark.parametrize("name", ["char", "byte"])
def test_char_and_byte_datasets_read_back_as_text(tmp_path: Path, jsonl: Path, documents: list[str], name: str) -> None:
    folder = prepare(tmp_path, jsonl, tokenizer=name, val_fraction=0.2)
    tokenizer = from_spec(load_manifest(folder).tokenizer, folder)
    for split in ("train", "val"):
        found = [tokenizer.decode_bytes(ids).decode() for ids in read_split(folder, split, tokenizer.end_of_text)]
        assert found == [text for text in documents if is_val(text, 0.2) == (split == "val")]
    if name == "char":
        assert tokenizer.vocab_size == len(set("".join(documents))) + 1


def test_a_vocabulary_beyond_65536_is_written_as_uint32(tmp_path: Path, jsonl: Path, documents: list[str]) -> None:
    (tmp_path / "high.tiktoken").write_bytes(write_ranks({bytes([i]): i + 99_000 for i in range(256)}))
    folder = prepare(tmp_path, jsonl, tokenizer=str(tmp_path / "high.tiktoken"), val_fraction=0.2)
    assert load_manifest(folder).dtype == "uint32"
    found = [bytes(i - 99_000 for i in ids).decode() for ids in read_split(folder, "train", 99_256, np.uint32)]
    assert found == [text for text in documents if not is_val(text, 0.2)]


# ---- what is there already -------------------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(
    tmp_path: Path, jsonl: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path, jsonl)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    with caplog.at_level("INFO", "pipeline"):
        monkeypatch.setattr("pipeline.log.logger.propagate", True)
        prepare(tmp_path, jsonl, val_fraction=0.1)  # the default, said aloud
    assert "already prepared" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "byte"}, "tokenizer was 'gpt2' and is now 'byte'"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"val_fraction": 0.2}, "val_fraction was 0.1 and is now 0.2"),
        ({"limit_docs": 5}, "limit_docs was None and is now 5"),
    ],
)
def test_other_options_are_refused_and_named(tmp_path: Path, jsonl: Path, change: dict[str, Any], words: str) -> None:
    before = contents(prepare(tmp_path, jsonl))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, jsonl, **change)
    assert all(part in str(caught.value) for part in (words, "--force", "--name"))
    assert contents(tmp_path / "data" / "corpus") == before


@pytest.mark.slow
def test_changed_sources_are_refused_and_force_starts_over(tmp_path: Path, jsonl: Path) -> None:
    folder = prepare(tmp_path, jsonl, shard_tokens=1000)
    (folder / "notes.bin").write_text("the user's own")
    jsonl.write_bytes(b'{"text": "other one"}\n{"text": "other two"}\n')
    with pytest.raises(UserError, match=r"sources differ.*corpus\.jsonl.*--force"):
        prepare(tmp_path, jsonl, shard_tokens=1000)
    prepare(tmp_path, jsonl, shard_tokens=1000, force=True)
    assert sorted(contents(folder)) == ["notes.bin", "train_00000.bin", "val_00000.bin"]
    assert load_manifest(folder).sources[0]["bytes"] == jsonl.stat().st_size


def test_force_that_fails_leaves_the_earlier_dataset_whole(tmp_path: Path, jsonl: Path) -> None:
    folder = prepare(tmp_path, jsonl)
    before = contents(folder)
    jsonl.write_bytes(b'{"body": "a"}\n')
    with pytest.raises(UserError, match="no field 'text' in any row"):
        prepare(tmp_path, jsonl, force=True)
    load_manifest(folder)
    assert contents(folder) == before


def test_files_of_other_programs_are_neither_removed_nor_replaced(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "data" / "corpus"
    folder.mkdir(parents=True)
    others = ("train_00007.bin", "train.bin", "film.partial", "README.md")
    for name in others:
        (folder / name).write_text("old")
    prepare(tmp_path, jsonl)
    prepare(tmp_path, jsonl, force=True)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {MANIFEST_NAME, "train_00000.bin", "val_00000.bin", *others}
    assert all((folder / name).read_text() == "old" for name in others)


def test_a_second_prepare_of_the_same_dataset_is_refused(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "data" / "corpus"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"is being written by .*wait for it"):
            prepare(tmp_path, jsonl)
    prepare(tmp_path, jsonl)


# ---- bad options, and what the stage may load ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "gpt3"}, "unknown tokenizer 'gpt3': expected one of gpt2"),
        (
            {"val_fraction": -0.1},
            "invalid --val-fraction -0.1: expected 0 for no val split, or a fraction such as 0.01",
        ),
        ({"val_fraction": 5e-324}, "--val-fraction 5e-324"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val-fraction nan"),
        ({"name": "../up"}, "invalid --name '../up': expected"),
        ({"name": ".hidden"}, "--name '.hidden'"),
        ({"workers": 0}, "invalid --workers 0: expected at least 1"),
        ({"limit_docs": 0}, "invalid --limit-docs 0: expected at least 1"),
        ({"shard_tokens": 0}, "invalid --shard-tokens 0: expected at least 1"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_options_are_told_before_anything_is_made(
    tmp_path: Path, jsonl: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, jsonl, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_all_faults_are_told_at_once(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(UserError, match=r"gpt3.*val-fraction.*workers"):
        prepare(tmp_path, jsonl, tokenizer="gpt3", val_fraction=2, workers=0)


def test_a_missing_source_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no source"):
        prepare(tmp_path, tmp_path / "missing.txt")
    assert not (tmp_path / "data").exists()


def test_a_data_dir_that_is_a_file_is_one_line(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*choose another folder"):
        prepare(tmp_path, jsonl)


def test_importing_the_stage_loads_nothing_heavy() -> None:
    heavy = {"torch", "pyarrow", "datasets", "tiktoken", "train", "sample", "score"}
    script = f"import sys, prepare.run; print(*(sys.modules.keys() & {heavy}))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize(("file_bytes", "fraction"), [(4_000, 0.1), (10**9, 0.01), (24 * 10**9, 0.0005), (None, 0.01)])
def test_the_default_share_of_val_follows_the_corpus_size(file_bytes: int | None, fraction: float) -> None:
    assert default_fraction(file_bytes) == fraction
