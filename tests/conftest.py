"""What several test files need: small datasets on disk, a tiny config, and a way to run the program for real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, from_dict
from pipeline.files import hash_bytes
from pipeline.shards import Manifest, Shard
from pipeline.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
WriteDataset = Callable[..., Path]
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
        content = ids.astype("<u2").tobytes()
        (folder / f"{split}_00000.bin").write_bytes(content)
        splits[split] = [Shard(f"{split}_00000.bin", count, 1, count - 1, hash_bytes(content))]
    manifest = Manifest(
        tokenizer=tokenizer.spec(),
        dtype="uint16",
        splits=splits,
        sources=[],
        options={},
        val_rule={},
        skipped={},
        unusual={},
        statistics={},
        program="test",
    )
    manifest.save(folder)
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
