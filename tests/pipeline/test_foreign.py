"""Shards of nanoGPT and llm.c: read as what their first bytes say, trained on where they lie, refused when in doubt."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ids_of, llm_c, tiny_config, write_dataset, write_llm_c, write_nanogpt

from pipeline.dataset.foreign import sample_hash
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from train.run import run

WRITERS = pytest.mark.parametrize("write", [write_nanogpt, write_llm_c])


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_manifest(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nanogpts_files_are_read_as_bare_ids_of_gpt2(tmp_path: Path) -> None:
    manifest = load_manifest(write_nanogpt(tmp_path))
    reader = TokenReader(tmp_path, manifest, "train")
    assert np.array_equal(reader.read(0, len(reader)), np.fromfile(tmp_path / "train.bin", "<u2"))
    assert manifest.tokenizer == BytePairTokenizer("gpt2").spec()
    assert manifest.end_of_text == "after each document" and manifest.splits["val"][0].documents is None


def test_llm_cs_shards_are_read_in_order_without_their_headers(tmp_path: Path) -> None:
    manifest = load_manifest(write_llm_c(tmp_path))
    reader = TokenReader(tmp_path, manifest, "train")
    wanted = np.concatenate([ids_of(30, seed=1, before=True), ids_of(20, seed=2, before=True)])
    assert np.array_equal(reader.read(0, len(reader)), wanted)
    assert manifest.end_of_text == "before each document"


@pytest.mark.parametrize("stem", ["", "tiny_shakespeare_", "edu_fineweb_"])
def test_the_first_bytes_decide_and_not_the_name(tmp_path: Path, stem: str) -> None:
    """Read as nanoGPT's, the header would be 512 ids to train on."""
    ids = ids_of(5, before=True)
    for split in ("train", "val"):
        (tmp_path / f"{stem}{split}.bin").write_bytes(llm_c(ids))
    manifest = load_manifest(tmp_path)
    assert manifest.program == "llm.c" and manifest.count("train", "tokens") == len(ids)
    assert np.array_equal(TokenReader(tmp_path, manifest, "val").read(0, 10), ids[:10])


def test_a_manifest_of_ours_wins_over_shards_of_others(tmp_path: Path) -> None:
    write_nanogpt(write_dataset(tmp_path))
    assert load_manifest(tmp_path).tokenizer["name"] == "byte"


# ---- refusals ----


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


TRAIN = "fineweb_train_000001.bin"
IDS = ids_of(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(TRAIN, llm_c(IDS)[:-2]), f"{TRAIN} has 1182 bytes, expected 1184 (its header says 80 ids): truncated or damaged"),
        (put(TRAIN, llm_c(IDS) + b"1"), f"{TRAIN} has 1185 bytes, expected 1184 (its header says 80 ids)"),
        (put(TRAIN, llm_c(IDS)[:700]), f"{TRAIN} has 700 bytes, expected 1184 (its header says 80 ids)"),
        (put(TRAIN, llm_c(IDS[:0])), f"{TRAIN} holds no ids"),
        (put(TRAIN, llm_c(IDS, version=2)), f"{TRAIN} has version 2 of llm.c's format, expected 1"),
        (put(TRAIN, llm_c(IDS, 20240801, 7)), "llm.c's format for Llama 3, whose vocabulary is not supported"),
        (put(TRAIN, llm_c(IDS, 20240522)), "llm.c's format for multiple-choice questions"),
        (put("train.bin", IDS.tobytes()), f"mixes formats: {TRAIN} has llm.c's header, train.bin has none"),
        (put("other_val_000000.bin", llm_c(IDS)), "holds several datasets (fineweb_, other_): give each its own folder"),
        (lambda folder: (folder / "fineweb_val_000000.bin").unlink(), "nothing for val: expected a file such as fineweb_val_0"),
    ],
)  # fmt: skip
def test_llm_cs_shards_that_are_not_whole_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_llm_c(tmp_path))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("train.bin", IDS.tobytes()[:-1]), "train.bin has 159 bytes, expected 158 (2 an id): truncated or damaged"),
        (put("val.bin", b""), "val.bin holds no ids"),
        (put("val.bin", llm_c(IDS)), "mixes formats: val.bin has llm.c's header, train.bin has none"),
        (put("val.bin", b"\x93NUMPY\x01\x00 more"), "val.bin is a NumPy .npy file, expected bare uint16 ids"),
        (lambda folder: (folder / "val.bin").unlink(), "has train.bin but nothing for val: expected a file such as val.bin"),
    ],
)  # fmt: skip
def test_nanogpts_files_that_are_not_whole_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_nanogpt(tmp_path))
    assert message in refusal(tmp_path)


def test_a_folder_of_npy_files_is_told_how_to_become_readable(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_train_000001.npy", IDS)
    assert "edufineweb_train_000001.npy is a NumPy .npy file" in refusal(tmp_path)


def test_what_an_unfinished_prepare_left_is_not_taken_for_nanogpts(tmp_path: Path) -> None:
    (write_dataset(tmp_path) / "manifest.json").unlink()
    assert "is not a complete dataset" in refusal(tmp_path)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_vocabulary_is_refused_and_never_opened(tmp_path: Path) -> None:
    write_nanogpt(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "keeps its vocabulary in meta.pkl, a pickle, which is never opened: prepare the text again" in refusal(
        tmp_path
    )
    assert not (tmp_path / "sprung").exists()


def test_an_id_outside_gpt2s_vocabulary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    ids = ids_of(50)
    ids[17] = 60_000
    ids.tofile(write_nanogpt(tmp_path) / "train.bin")
    reader = TokenReader(tmp_path, load_manifest(tmp_path), "train")
    with pytest.raises(
        UserError, match=r"train.bin holds id 60000, but its vocabulary has 50257: .* fetch or write it"
    ):
        reader.read(0, 100)


# ---- the fingerprint ----


@WRITERS
def test_the_fingerprint_names_the_content_and_not_the_place(write: Callable[[Path], Path], tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path / "a"))
    assert load_manifest(write(tmp_path / "b")).fingerprint == manifest.fingerprint
    path = tmp_path / "b" / manifest.splits["train"][0].file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert load_manifest(tmp_path / "b").fingerprint != manifest.fingerprint
    swapped = replace(manifest, splits={"train": manifest.splits["val"], "val": manifest.splits["train"]})
    assert swapped.fingerprint != manifest.fingerprint


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_files_up_to_a_megabyte_are_hashed_whole(tmp_path: Path, size: int) -> None:
    content = bytearray(size)
    path = tmp_path / "shard"
    hashes = set()
    for position in sorted({0, size // 3, size // 2, size - 1}):
        content[position] ^= 1
        path.write_bytes(content)
        hashes.add(sample_hash(path))
    assert len(hashes) == len({0, size // 3, size // 2, size - 1})


def test_a_large_file_is_named_by_its_size_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    content = np.random.default_rng(0).bytes(3 << 20)
    hashes = set()
    for version in (content, content[:-1], content[1 << 20 :] + content[: 1 << 20]):
        path.write_bytes(version)
        hashes.add(sample_hash(path))
    assert len(hashes) == 3 and hash_file(path) not in hashes


# ---- training ----


@pytest.mark.slow
@WRITERS
def test_train_takes_such_a_folder_and_resumes_only_on_the_same(
    write: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    folder = write(tmp_path / "elsewhere")
    config = tiny_config(tmp_path, data={"dataset": str(folder)})
    run(config)
    assert "2,000 train tokens" in caplog.text and "vocabulary 50,257 (gpt2)" in caplog.text
    assert f"{folder} has no manifest: assumed to be" in caplog.text
    path = folder / load_manifest(folder).splits["train"][0].file
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(UserError, match="was trained on another dataset"):
        run(replace(config, train=replace(config.train, max_steps=12)))
