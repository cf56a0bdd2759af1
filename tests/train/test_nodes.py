"""The check of a job's nodes before training: each fault is named, with its node, on every rank."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_config, write_dataset

from pipeline import launch
from pipeline.config.load import to_toml
from pipeline.errors import NodeFailed
from pipeline.launch import Placement
from pipeline.machine import fitness
from pipeline.machine.ranks import World
from train.checks import nodes
from train.run import run

ALONE = World(**vars(Placement()), device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")


def refused(world: World = ALONE) -> str:
    with pytest.raises(NodeFailed) as error:
        nodes.check_nodes(world)
    return str(error.value)


def test_a_fit_node_passes_and_outside_slurm_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.check_nodes(ALONE)
    monkeypatch.setattr(nodes, "faults_here", lambda _: pytest.fail("looked"))
    monkeypatch.delenv("SLURM_STEP_ID")
    nodes.check_nodes(ALONE)


def test_a_wrong_matrix_product_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: right(a + 1, b))
    assert refused() == "node n7 failed its check: a matrix product on cpu is wrong"


def test_too_little_memory_and_a_full_disk_are_told_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fitness, "available_bytes", lambda: 100 << 20)

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    assert refused() == (
        "node n7 failed its check: 100 MiB of host memory available, expected 512 at least; "
        f"cannot write to {tempfile.gettempdir()}: No space left on device"
    )


class Memory(NamedTuple):
    free: int
    total: int


@pytest.mark.parametrize(
    ("seen", "free", "told"),
    [
        (7, 79, "7 GPU(s) where SLURM allocated 8"),
        (8, 20, "cuda:0 has 20,480 of 81,920 MiB free: another process uses it"),
        (8, 79, ""),
        (1, 79, ""),
    ],
    ids=["one is gone", "occupied", "fit", "bound to its own"],
)
def test_gpus_are_as_asked_and_free(monkeypatch: pytest.MonkeyPatch, seen: int, free: int, told: str) -> None:
    """Stand-ins: there is no GPU here."""
    monkeypatch.setattr(launch, "gpus_here", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: Memory(free << 30, 80 << 30))
    monkeypatch.setitem(fitness.ROWS, "cuda", 64)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    world = World(**vars(Placement()), device=torch.device("cuda", 0))
    found: Iterator[str] = nodes.faults_here(world)
    assert "; ".join(found) == told


def test_the_version_of_the_code_is_in_the_run_folder_and_another_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "tiny")
    config = tiny_config(tmp_path)
    (tmp_path / "tiny.toml").write_text(to_toml(config))
    run(config)
    version = (config.run_dir / "version.txt").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+ commit \w+ sources [0-9a-f]{12}\n", version)
    run(config)
    assert "trained until now" not in caplog.text
    (config.run_dir / "version.txt").write_text("0.0.9 commit abc sources 0123\n")
    run(config)
    assert (
        f"note: trained until now by code 0.0.9 commit abc sources 0123, from here on by {version.strip()}"
        in caplog.text
    )
    assert (config.run_dir / "version.txt").read_text() == version
