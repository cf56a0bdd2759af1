"""Verify: what is whole passes, and each kind of damage is named with its shard and position, all of it at once."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from conftest import (
    GPT2_END,
    ids_of,
    llm_c,
    run_program,
    tiny_config,
    write_documents,
    write_jsonl,
    write_llm_c,
    write_nanogpt,
)

from observe.verify import Verification, run
from pipeline.dataset.shards import read_path
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from prepare.options import PrepareOptions
from prepare.run import run as prepare

END = ByteTokenizer.end_of_text
SPLITS = {
    "train": [["one document", "another one, twice as long"], ["the second shard's", "zwölf Zeichen"]],
    "val": [["held out", "and this"]],
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data", SPLITS)


def faults(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The faults that are listed, without the folder's name."""
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        run(path)
    lines = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("fault: ") for line in lines if line.startswith("fault: ")]
    assert f"has {len(found)} fault(s), listed above: " in str(caught.value)
    return [line.replace(f"{path}/", "") for line in found]


def edit_ids(path: Path, position: int, value: int) -> None:
    ids = np.fromfile(path, "<u2")
    ids[position] = value
    ids.tofile(path)


def edit_manifest(folder: Path, split: str, number: int, **changes: object) -> None:
    """Change what the manifest says of a shard; its hash is made right again."""
    document = orjson.loads((folder / "manifest.json").read_bytes())
    shard = document["splits"][split][number]
    shard |= {"hash": hash_file(folder / shard["file"])} | changes
    (folder / "manifest.json").write_bytes(orjson.dumps(document))


def test_a_whole_dataset_passes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in dataset.iterdir()}
    run(dataset)
    out = capsys.readouterr().out
    tokens = sum(len(text.encode()) + 1 for shards in SPLITS.values() for shard in shards for text in shard)
    assert out.startswith(f"verified: {dataset}: {tokens} tokens, 6 documents in 3 shard(s); ")
    assert out.count("\n") == 1 and "no document is in both splits" in out
    assert {path: path.read_bytes() for path in dataset.iterdir()} == before


def test_a_flipped_bit_breaks_the_hash(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = hash_file(dataset / "train_00001.bin")
    edit_ids(dataset / "train_00001.bin", 3, ord("E"))
    found = hash_file(dataset / "train_00001.bin")
    assert faults(dataset, capsys) == [f"train_00001.bin has the hash {found}, but the manifest records {recorded}"]


def test_every_fault_of_every_shard_is_listed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_ids(dataset / "train_00000.bin", 5, END)
    (dataset / "train_00001.bin").unlink()
    (dataset / "val_00000.bin").write_bytes(b"123")
    first, *others = faults(dataset, capsys)
    assert first.startswith("train_00000.bin has the hash ")
    assert others == [
        "train_00000.bin has 3 documents, but the manifest records 2",
        "train_00000.bin has 37 bytes of text, but the manifest records 38",
        "train_00001.bin is missing, expected 68 bytes",
        "val_00000.bin has 3 bytes, expected 36 bytes",
    ]


def test_swapped_shards_are_told_from_damaged_ones(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = dataset / "train_00000.bin", dataset / "train_00001.bin"
    first.rename(dataset / "aside")
    second.rename(first)
    (dataset / "aside").rename(second)
    assert faults(dataset, capsys) == [
        "train_00000.bin has the content of train_00001.bin: renamed",
        "train_00001.bin has the content of train_00000.bin: renamed",
    ]


def test_ids_outside_the_vocabulary_are_counted_and_the_first_is_placed(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for position, value in ((9, 300), (17, 65_535)):
        edit_ids(dataset / "train_00000.bin", position, value)
    edit_manifest(dataset, "train", 0, bytes=36)
    assert faults(dataset, capsys) == [
        "train_00000.bin has 2 id(s) outside the vocabulary of 257: the first is 300 at position 9"
    ]


def test_counts_of_the_manifest_are_counted_again(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(dataset, "train", 1, documents=3, bytes=30)
    assert faults(dataset, capsys) == [
        "train_00001.bin has 2 documents, but the manifest records 3",
        "train_00001.bin has 32 bytes of text, but the manifest records 30",
    ]


@pytest.mark.parametrize(
    ("read", "skipped", "words"),
    [
        ([], {}, []),
        ([{"rows": 6, "documents": 6, "text_bytes": 86}], {}, []),
        ([{"rows": 5, "documents": 4, "text_bytes": 55}, {"rows": 4, "documents": 3, "text_bytes": 35}],
         {"empty": {"count": 2}, "duplicate": {"count": 1}}, []),
        ([{"rows": 7, "documents": 6, "text_bytes": 86}], {}, ["have 7 documents, but the manifest records 6 in the shards"]),
        ([{"rows": 6, "documents": 6, "text_bytes": 87}], {}, ["have 87 bytes of text, but the manifest records 86"]),
        ([{"rows": 7, "documents": 7, "text_bytes": 85}], {"duplicate": {"count": 1}}, ["have 85 bytes of text"]),
    ],
)  # fmt: skip
def test_the_shards_hold_what_the_sources_were_counted_to_have(
    dataset: Path, capsys: pytest.CaptureFixture[str], read: list[dict[str, int]], skipped: object, words: list[str]
) -> None:
    document = orjson.loads((dataset / "manifest.json").read_bytes()) | {"read": read, "skipped": skipped}
    assert sum(shard["bytes"] for shards in document["splits"].values() for shard in shards) == 86
    (dataset / "manifest.json").write_bytes(orjson.dumps(document))
    if not words:
        run(dataset)
        run(dataset / "val_00000.bin")
    for found, wanted in zip(faults(dataset, capsys) if words else [], words, strict=True):
        assert wanted in found


def test_a_shard_ends_with_end_of_text(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_ids(dataset / "train_00001.bin", -1, ord("x"))
    edit_manifest(dataset, "train", 1, documents=1, bytes=33)
    assert faults(dataset, capsys) == [
        "train_00001.bin does not end with end-of-text: its last id is 120 at position 33"
    ]


def test_a_document_in_both_splits_is_placed_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = {
        "train": [["alone"], ["first", "shared by both", "x", "shared by both"], ["x", "x"]],
        "val": [["only here"], ["also here", "x", "shared by both"]],
    }
    assert faults(write_documents(tmp_path, splits), capsys) == [
        "train_00001.bin has documents that are in both splits: one of 14 tokens at position 6, in val_00001.bin at 12, "
        "and 2 more of this shard",
        "train_00002.bin has documents that are in both splits: one of 1 tokens at position 0, in val_00001.bin at 10, "
        "and 1 more of this shard",
    ]


def test_equal_ids_of_a_vocabulary_that_joins_texts_are_a_remark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`word` gives texts that differ in their spaces alone, or in rare words, the same ids."""
    texts = [f"{'a' * (i % 7 + 1)}{' ' * (i % 5 + 1)}b" for i in range(200)]
    source = write_jsonl(tmp_path, texts)
    folder = prepare(PrepareOptions([str(source)], data_dir=str(tmp_path / "data"), tokenizer="word", workers=1))
    capsys.readouterr()
    run(folder)
    remark, verdict = capsys.readouterr().out.splitlines()
    assert remark.startswith("remark: ") and "documents that are in both splits" in remark
    assert remark.endswith("; the vocabulary word may give different texts the same ids")
    assert verdict.startswith("verified: ") and "both splits" not in verdict


def test_the_halves_of_a_lone_document_may_be_equal(tmp_path: Path) -> None:
    write_documents(tmp_path, {"train": [["ha"]], "val": [["ha"]]})
    document = orjson.loads((tmp_path / "manifest.json").read_bytes())
    document["val_rule"] = {"kind": "position", "fraction": 0.5}
    (tmp_path / "manifest.json").write_bytes(orjson.dumps(document))
    run(tmp_path)


def test_the_vocabulary_is_the_one_that_was_recorded(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = orjson.loads((dataset / "manifest.json").read_bytes())
    document["tokenizer"]["fingerprint"] = "other"
    (dataset / "manifest.json").write_bytes(orjson.dumps(document))
    (found,) = faults(dataset, capsys)
    assert found.startswith(f"{dataset}: the byte vocabulary does not match its description")


def test_other_files_in_the_folder_are_a_remark(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "train_00002.bin.partial").touch()
    (dataset / ".lock").touch()
    run(dataset)
    assert capsys.readouterr().out.startswith("remark: not in the manifest: train_00002.bin.partial\nverified: ")


def test_a_files_name_cannot_command_the_terminal(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "a\x1b[2Jb").touch()
    run(dataset)
    assert "remark: not in the manifest: a\\x1b[2Jb\n" in capsys.readouterr().out


def test_a_single_shard_is_held_against_its_line_of_the_manifest(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_ids(dataset / "train_00001.bin", 3, ord("E"))
    run(dataset / "train_00000.bin")
    assert "2 documents in 1 shard(s)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train_00001.bin has 1 fault\(s\)"):
        run(dataset / "train_00001.bin")
    (dataset / "train_00007.bin").touch()
    with pytest.raises(UserError, match="train_00007.bin is not listed in the manifest.json next to it"):
        run(dataset / "train_00007.bin")


def test_shards_larger_than_a_block_are_counted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, and ids of two bytes, that lie across the border of two blocks."""
    monkeypatch.setattr("pipeline.dataset.scan.BLOCK_BYTES", 14)
    run(write_documents(tmp_path / "whole", SPLITS))
    with pytest.raises(UserError):
        run(write_documents(tmp_path / "shared", {"train": [["long enough to be cut", "b"]], "val": [["c"], ["b"]]}))


# ---- shards of others ----


@pytest.mark.parametrize("write", [write_nanogpt, write_llm_c])
def test_shards_of_others_are_checked_as_far_as_they_tell(
    write: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path))
    out = capsys.readouterr().out
    assert "records no hashes: damage is found only if it gives ids outside the vocabulary" in out
    assert "every id is below 50,257, no document is in both splits" in out and "2,200 tokens, 55 documents" in out


def test_a_document_in_both_of_nanogpts_files_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nanogpt(tmp_path)
    np.concatenate([ids_of(50, seed=1), ids_of(5, seed=2)[40:80]]).tofile(tmp_path / "train.bin")
    assert faults(tmp_path, capsys) == [
        "train.bin has documents that are in both splits: one of 39 tokens at position 2000, in val.bin at 40"
    ]


def test_a_document_that_a_border_of_llm_cs_shards_cuts_is_left_out(tmp_path: Path) -> None:
    """fineweb's val ends in the middle of the document that train goes on with; such halves prove nothing."""
    cut = ids_of(4, before=True)
    (tmp_path / "x_val_000000.bin").write_bytes(llm_c(np.append(cut, [GPT2_END, 7]).astype("<u2")))
    (tmp_path / "x_train_000001.bin").write_bytes(llm_c(np.append([7], ids_of(4, seed=1, before=True)).astype("<u2")))
    run(tmp_path)


def test_an_id_that_gpt2_does_not_have_is_placed_behind_the_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ids_of(3, before=True)
    ids[50] = 50_257
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(llm_c(ids))
    assert faults(path, capsys) == [
        f"{path} has 1 id(s) outside the vocabulary of 50,257: the first is 50257 at position 50"
    ]


# ---- documents by content ----


def test_twins_are_those_of_a_plain_set(tmp_path: Path) -> None:
    rng = random.Random(0)
    train, val = (["".join(rng.choice("ab") for _ in range(rng.randint(0, 6))) for _ in range(200)] for _ in range(2))
    verification = Verification(
        *read_path(write_documents(tmp_path, {"train": [train], "val": [val[:100], val[100:]]}))
    )
    verification.run()
    (fault,) = (fault for fault in verification.faults if "both splits" in fault)
    shared = [text for text in train if text and text in val]
    assert f"one of {len(shared[0])} tokens" in fault and fault.endswith(f", and {len(shared) - 1} more of this shard")


# ---- the command ----


def test_the_exit_code_tells_and_torch_stays_out(dataset: Path) -> None:
    done = run_program("verify", "data", cwd=dataset.parent)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("verified: data: ")
    edit_ids(dataset / "train_00001.bin", 3, ord("E"))
    done = run_program("verify", "data", cwd=dataset.parent)
    assert done.returncode == 2 and done.stdout.startswith("fault: data/train_00001.bin has the hash")
    assert done.stderr == "error: data has 1 fault(s), listed above: restore it, or prepare again with --force\n"


@pytest.mark.slow
def test_a_checkpoint_is_held_against_its_hashes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.run import run as train

    config = tiny_config(tiny, train={"max_steps": 2}, eval={"every_steps": 0})
    train(config)
    folder = config.run_dir / "checkpoints" / "step_00000002"
    run(folder)
    assert capsys.readouterr().out.startswith(f"verified: {folder}: step 2, ")
    (folder / "mine").touch()
    run(folder)
    assert capsys.readouterr().out.startswith(f"remark: not in checkpoint.json: mine\nverified: {folder}: step 2, ")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="model.safetensors does not match its hash"):
        run(folder)
    with pytest.raises(UserError, match="is a run: give one of the folders in"):
        run(config.run_dir)
