"""What several test files need: small datasets on disk, a tiny config, and a way to run the program for real."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config import Config, from_dict
from pipeline.files import hash_file
from pipeline.shards import Manifest, Shard
from pipeline.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
WriteDataset = Callable[..., Path]
GPT2_END = 50256
MakeConfig = Callable[..., Config]


def write_dataset(folder: Path, train_tokens: int = 20_000, val_tokens: int = 2_000, seed: int = 0) -> Path:
    """A byte-vocabulary dataset with learnable structure: each id follows from the one before it, plus some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteTokenizer()
    random = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        ids = np.cumsum(random.integers(1, 4, size=count)) % 50 + 65
        ids[-1] = tokenizer.end_of_text
        splits[split] = [write_shard(folder, split, 0, ids)]
    manifest = Manifest(
        tokenizer=tokenizer.spec(),
        dtype="uint16",
        splits=splits,
        sources=[],
        options={},
        val_rule={},
        skipped={},
        program="test",
    )
    manifest.save(folder)
    return folder


def write_shard(folder: Path, split: str, number: int, ids: npt.ArrayLike, documents: int = 1) -> Shard:
    """A shard of 16-bit ids; its bytes of text are made up, to be told from its tokens."""
    path = folder / f"{split}_{number:05d}.bin"
    content = np.asarray(ids).astype("<u2")
    content.tofile(path)
    return Shard(path.name, len(content), documents, len(content) - 1, hash_file(path))


def write_documents(folder: Path, splits: dict[str, list[list[str]]]) -> Path:
    """A byte-vocabulary dataset of known texts: for each split its shards, for each shard its documents."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, list[Shard]] = {}
    for split, shards in splits.items():
        described[split] = []
        for number, texts in enumerate(shards):
            path = folder / f"{split}_{number:05d}.bin"
            ids = [part for text in texts for part in (tokenizer.encode(text), [tokenizer.end_of_text])]
            np.concatenate(ids).astype("<u2").tofile(path)
            text_bytes = sum(len(text.encode()) for text in texts)
            described[split].append(Shard(path.name, path.stat().st_size // 2, len(texts), text_bytes, hash_file(path)))
    Manifest(
        tokenizer=tokenizer.spec(),
        dtype="uint16",
        splits=described,
        sources=[{"path": "texts/a.jsonl", "bytes": 100}],
        options={"seed": 0},
        val_rule={"kind": "hash"},
        skipped={"empty": {"count": 2, "example": "texts/a.jsonl line 7"}},
        program="test",
        statistics={"bigram_entropy_nats": 1.25},
    ).save(folder)
    return folder


def ids_of(documents: int, length: int = 40, seed: int = 0, before: bool = False) -> npt.NDArray[np.uint16]:
    """Documents of GPT-2 ids in which each follows from the one before, end-of-text after or before each."""
    steps = np.random.default_rng(seed).integers(1, 4, size=(documents, length))
    ids = np.cumsum(steps, axis=1) % 1000
    ids[:, 0 if before else -1] = GPT2_END
    return ids.astype("<u2").ravel()


def llm_c(ids: npt.NDArray[np.uint16], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    header = struct.pack("<3i", magic, version, len(ids) if count is None else count)
    return header.ljust(1024, b"\0") + ids.tobytes()


def write_nanogpt(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ids_of(50, seed=1).tofile(folder / "train.bin")
    ids_of(5, seed=2).tofile(folder / "val.bin")
    return folder


def write_llm_c(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents, seed in (("train_000001", 30, 1), ("train_000002", 20, 2), ("val_000000", 5, 3)):
        (folder / f"fineweb_{name}.bin").write_bytes(llm_c(ids_of(documents, seed=seed, before=True)))
    return folder


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A two-layer model on `folder`/data/tiny, all runs under `folder`/runs; `sections` change single keys."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder / "runs"), "device": "cpu", "dtype": "float32"},
        "data": {"dataset": "tiny", "data_dir": str(folder / "data")},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"max_steps": 10, "tokens_per_step": 128, "micro_batch_size": 2},
        "eval": {"every_steps": 5, "batches": 4},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for section, keys in sections.items():
        document.setdefault(section, {}).update(keys)
    return from_dict(document)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with the dataset data/tiny in it."""
    write_dataset(tmp_path / "data" / "tiny")
    return tmp_path


def run_program(*arguments: str, cwd: Path, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ...` in a real process, or a real torchrun of `ranks` of them; never raises."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*launcher, "pipeline", *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def overrides(config: Config) -> list[str]:
    """`config` as the arguments of `pipeline train`, on top of a preset's name."""
    import json

    from pipeline.config import to_dict

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return [
        f"{section}.{key}={text(value)}" for section, keys in to_dict(config).items() for key, value in keys.items()
    ]
