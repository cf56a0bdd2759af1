"""Shards: what is written is what is read, documents stay whole, and a damaged dataset is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from conftest import write_shard

from pipeline.dataset.shards import MANIFEST_NAME, Manifest, Shard, TokenReader, load_manifest
from pipeline.errors import UserError
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.tokenizer import TokenIds

END = ByteTokenizer.end_of_text
LENGTHS = [3, 1, 7, 25, 2, 9, 10, 1, 4]
Document = tuple[TokenIds, int]  # ids with their end-of-text, bytes of text


def documents(lengths: list[int] = LENGTHS, seed: int = 0) -> list[Document]:
    """Documents of random ids; their byte counts are made up, to be told from token counts."""
    rng = np.random.default_rng(seed)
    return [(np.append(rng.integers(0, 256, length - 1), END).astype(np.uint16), 10 + length) for length in lengths]


def write(folder: Path, docs: list[Document], split: str = "train", shard_tokens: int = 10) -> list[Shard]:
    """Shards that each hold documents up to the one that fills them."""
    shards: list[list[Document]] = [[]]
    for document in docs:
        if sum(len(ids) for ids, _ in shards[-1]) >= shard_tokens:
            shards.append([])
        shards[-1].append(document)
    return [write_shard(folder, split, i, tokens_of(each), len(each)) for i, each in enumerate(shards)]


def tokens_of(docs: list[Document]) -> npt.NDArray[np.int64]:
    return np.concatenate([ids for ids, _ in docs]).astype(np.int64)


def dataset(folder: Path, docs: list[Document] | None = None) -> Manifest:
    """A whole dataset in `folder`: a train split of several shards, a val split of one."""
    manifest = Manifest(
        tokenizer=ByteTokenizer().spec(),
        dtype="uint16",
        splits={
            "train": write(folder, docs or documents()),
            "val": write(folder, documents([5, 5]), split="val"),
        },
        sources=[{"path": "a.txt", "bytes": 5}],
        options={"seed": 0},
        val_rule={"kind": "hash"},
        skipped={"empty": {"count": 2, "example": "a.txt line 3"}},
        program="0.0.0",
    )
    manifest.save(folder)
    return manifest


# ---- reading ----


def test_reading_is_slicing_across_shard_borders(tmp_path: Path) -> None:
    docs = documents()
    reader, tokens = TokenReader(tmp_path, dataset(tmp_path, docs), "train"), tokens_of(docs)
    assert len(reader) == len(tokens) == sum(LENGTHS)
    for start in range(len(tokens)):
        for stop in range(start + 1, len(tokens) + 1):
            found = reader.read(start, stop)
            assert found.dtype == np.int64
            assert np.array_equal(found, tokens[start:stop]), (start, stop)


@pytest.mark.parametrize(
    ("position", "file"), [(0, "train_00000.bin"), (10, "train_00000.bin"), (11, "train_00001.bin")]
)
def test_an_id_outside_the_vocabulary_is_refused_with_its_file(tmp_path: Path, position: int, file: str) -> None:
    docs = documents()
    flat = tokens_of(docs)
    flat[position] = 257
    ends = np.cumsum(LENGTHS)[:-1]
    damaged = [(ids.astype(np.uint16), 1) for ids in np.split(flat, ends)]
    reader = TokenReader(tmp_path, dataset(tmp_path, damaged), "train")
    assert reader.read(position + 1, len(flat)).size == len(flat) - position - 1
    with pytest.raises(UserError, match=f"{tmp_path / file} holds id 257, but its vocabulary has 257: "):
        reader.read(0, len(flat))


def test_a_shard_that_is_truncated_or_removed_while_it_is_read(tmp_path: Path) -> None:
    """Not by a signal, as with a memory map; and what is still there can be read."""
    docs = documents()
    reader, tokens = TokenReader(tmp_path, dataset(tmp_path, docs), "train"), tokens_of(docs)
    (tmp_path / "train_00001.bin").unlink()
    with (tmp_path / "train_00000.bin").open("r+b") as file:
        file.truncate(8)
    assert np.array_equal(reader.read(0, 4), tokens[:4])
    assert np.array_equal(reader.read(11, len(tokens)), tokens[11:])
    with pytest.raises(UserError, match=r"train_00000\.bin was truncated while it was in use, to 8 bytes: restore it"):
        reader.read(3, 5)


# ---- the manifest ----


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    manifest = dataset(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert manifest.count("train", "tokens") == sum(LENGTHS)
    assert manifest.count("train", "documents") == len(LENGTHS)
    assert manifest.count("val", "bytes") == 9


def test_the_manifest_tells_where_end_of_text_stands(tmp_path: Path) -> None:
    dataset(tmp_path)
    document = orjson.loads((tmp_path / MANIFEST_NAME).read_bytes())
    assert document["format"] == 2
    assert document["end_of_text"] == "after each document"
    assert document["tokenizer"]["end_of_text"] == END


def test_the_fingerprint_names_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    manifest = dataset(tmp_path / "a")
    docs = documents()
    docs[0][0][0] ^= 1
    same = replace(manifest, sources=[], skipped={}, options={"seed": 1}, val_rule={}, program="9")
    others = [
        dataset(tmp_path / "b", docs),
        replace(manifest, tokenizer=manifest.tokenizer | {"fingerprint": "other"}),
        replace(manifest, splits={"train": manifest.splits["train"][::-1], "val": manifest.splits["val"]}),
        replace(manifest, splits={"train": manifest.splits["val"], "val": manifest.splits["train"]}),
    ]
    assert same.fingerprint == manifest.fingerprint
    assert len({manifest.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_missing_dataset_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_manifest(tmp_path / "mine")
    assert str(caught.value) == (
        f"no dataset at {tmp_path / 'mine'}: prepare one with `pipeline prepare SOURCE --name mine`"
    )


def test_a_folder_without_a_manifest_is_not_a_dataset(tmp_path: Path) -> None:
    dataset(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match=f"{tmp_path} is not a complete dataset: it has no {MANIFEST_NAME}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"format": 2', b"[]", b"null", b"\xff"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    dataset(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / MANIFEST_NAME} is damaged"):
        load_manifest(tmp_path)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    document = orjson.loads(path.read_bytes())
    edit(document)
    path.write_bytes(orjson.dumps(document))


def refusal(folder: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    """What `load_manifest` says of a dataset whose manifest was edited."""
    dataset(folder)
    change(folder, edit)
    with pytest.raises(UserError) as caught:
        load_manifest(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("format"), "is damaged (KeyError: 'format'): prepare the dataset again with --force"),
        (lambda d: d.pop("dtype"), "is damaged (TypeError: "),
        (lambda d: d.pop("splits"), "is damaged (KeyError: 'splits')"),
        (lambda d: d["splits"].pop("val"), "is damaged (KeyError: 'val')"),
        (lambda d: d["splits"]["val"][0].pop("hash"), "is damaged (TypeError: "),
        (lambda d: d["tokenizer"].pop("vocab_size"), "is damaged (KeyError: 'vocab_size')"),
        (lambda d: d["tokenizer"].pop("end_of_text"), "is damaged (KeyError: 'end_of_text')"),
        (lambda d: d.update(surplus=1), "is damaged (TypeError: "),
        (lambda d: d.update(tokenizer=[1]), "is damaged (TypeError: tokenizer has the type list)"),
        (lambda d: d["tokenizer"].update(end_of_text="256"), "is damaged (TypeError: end_of_text has the type str)"),
        (lambda d: d["splits"]["val"][0].update(tokens="100"), "is damaged (TypeError: tokens has the type str)"),
        (lambda d: d["splits"]["val"][0].update(tokens=0), "is damaged (TypeError: val_00000.bin has 0 tokens)"),
        (lambda d: d.update(end_of_text="nowhere"), "is damaged (TypeError: end_of_text is 'nowhere')"),
        (lambda d: d.update(format=1), "has format 1, this program reads 2: prepare it again"),
    ],
    ids=[
        "format",
        "dtype",
        "splits",
        "a split",
        "a shard's hash",
        "vocab_size",
        "end_of_text",
        "a surplus key",
        "a list for a tokenizer",
        "a text for an id",
        "a text for a number",
        "an empty shard",
        "end of text nowhere",
        "another format",
    ],
)
def test_a_manifest_of_another_form_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert refusal(tmp_path, edit).startswith(f"{tmp_path / MANIFEST_NAME} {message}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda d: d.update(dtype="uint32"),
            "holds uint32 ids, but a vocabulary of 257 needs uint16: prepare it again",
        ),
        (
            lambda d: d["tokenizer"].update(vocab_size=65_537),
            "holds uint16 ids, but a vocabulary of 65537 needs uint32",
        ),
        (lambda d: d["splits"]["val"][0].update(file="../val_00000.bin"), "lists a shard outside its folder"),
        (lambda d: d["splits"]["val"][0].update(file="/etc/passwd"), "lists a shard outside its folder"),
        (lambda d: d["splits"]["val"][0].update(file=".."), "lists a shard outside its folder"),
        (lambda d: d["splits"]["val"][0].update(tokens=11), "val_00000.bin has 20 bytes, expected 22 bytes"),
    ],
    ids=[
        "a wider dtype",
        "a wider vocabulary",
        "a path upwards",
        "an absolute path",
        "the folder above",
        "more tokens",
    ],
)
def test_a_manifest_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert message in refusal(tmp_path, edit)


@pytest.mark.parametrize("file", ["train_00001.bin", "val_00000.bin"])
def test_a_missing_or_truncated_shard_is_named(tmp_path: Path, file: str) -> None:
    dataset(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1])
    found = f"{tmp_path / file} has {len(content) - 1} bytes, expected {len(content)} bytes: "
    with pytest.raises(UserError, match=found):
        load_manifest(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{tmp_path / file} is missing, expected {len(content)} bytes: "):
        load_manifest(tmp_path)
