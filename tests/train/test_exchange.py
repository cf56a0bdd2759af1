"""What ranks send each other in a step: counted on real ranks (torchrun, gloo, CPU), equal to `pipeline.budget.exchanges`.

Run as a program, this file is one rank: it takes a step under each strategy and prints its collectives.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config, write_dataset
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import budget
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.machine import ranks
from pipeline.machine.gpus import hardware_named
from pipeline.model.footprint import Setting
from train import parallel
from train.run import assemble, autocast_type, initialise

PER_NODE = 2
VOCABULARY = 257
# Torch's operators by our names, and which of their arguments is the complete tensor, or an all-reduce's own.
COLLECTIVES = {"allgather_base_": ("all_gather", 0), "reduce_scatter_base_": ("reduce_scatter", 1),
               "allreduce_": ("all_reduce", 0), "all_reduce": ("all_reduce", 0),
               "alltoall_base_": ("all_to_all", 0)}  # fmt: skip


def cases(folder: Path, count: int) -> dict[str, Config]:
    """Rows that do not divide among ranks, accumulation, recomputation, narrow shards; `wide` fills three buckets of DDP."""
    small = tiny_config(folder, model={"n_embd": 33, "n_head": 3, "n_layer": 3}, train={"tokens_per_step": 256})
    wide = replace(small, model=replace(small.model, n_embd=576, n_layer=2))
    found = {"ddp": small, "fsdp": small}
    if count == 2:
        found["ddp wide"] = wide
        found["fsdp bfloat16"] = replace(small, run=replace(small.run, dtype="bfloat16"))
        found["fsdp recomputed"] = replace(small, model=replace(small.model, activation_checkpointing="block"))
    else:  # two nodes; of one, each rank would be its own replica
        found["hsdp"] = small
    muon = replace(small, optimizer=replace(small.optimizer, name="muon"))
    found |= {f"{name} muon": muon for name in ("ddp", "fsdp" if count == 2 else "hsdp")}
    return {
        name: replace(config, parallel=replace(config.parallel, strategy=name.split()[0]))
        for name, config in found.items()
    }


class Recorder(TorchDispatchMode):
    """Counts the collectives of what runs inside, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that the operators it is made of come by
        kind, at = COLLECTIVES.get(func.__name__.partition(".")[0].removeprefix("_"), ("", 0))
        if kind and "c10d" in str(func):
            tensors = [args[at]] if isinstance(args[at], torch.Tensor) else args[at]
            self.counts[kind] += 1
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def record(folder: Path) -> dict[str, Any]:
    """The collectives of a rank's step in each case."""
    world = replace(ranks.start("cpu"), local_size=PER_NODE)
    found = {}
    for name, config in cases(folder, world.size).items():
        mesh = parallel.mesh_of(config.parallel.strategy, world)
        trainer, _ = assemble(config, world, Mixture(config), autocast_type(config, world), mesh=mesh)
        initialise(trainer)
        trainer.replicate()
        # As `fit` does: DDP's buckets are those of all further steps only after it.
        parallel.settle_buckets(trainer.wrapped, lambda: trainer.loss_of(trainer.blank_windows()), world.device)  # noqa: B023
        with Recorder() as recorder:
            trainer.train_step()
        trainer.batches.close()
        found[name] = [recorder.counts, recorder.bytes]
    ranks.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_collectives_of_a_step_are_those_of_the_plan(tmp_path: Path, count: int) -> None:
    write_dataset(tmp_path / "data/tiny")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in range(count):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        for name, config in cases(tmp_path, count).items():
            assert found[name] == planned(config, count), f"{name}, rank {rank}"


def planned(config: Config, count: int) -> list[dict[str, int]]:
    shards = {"ddp": 1, "fsdp": count, "hsdp": PER_NODE}[config.parallel.strategy]
    dtype = "bfloat16" if config.run.dtype == "bfloat16" else "float32"
    setting = Setting(count, shards, budget.accumulation_steps(config, count), dtype=dtype)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for each in budget.exchanges(budget.footprint(config, VOCABULARY, setting)):
        counts[each.collective] += each.count
        sizes[each.collective] += each.size
    return [counts, sizes]


def test_the_time_of_an_exchange_is_that_of_its_bytes_over_the_links(tmp_path: Path) -> None:
    hardware = hardware_named("h100", 16)
    assert hardware is not None
    config = tiny_config(tmp_path, train={"tokens_per_step": 16 * 32})
    step = budget.footprint(config, VOCABULARY, budget.setting(config, hardware))
    size = sum(each.size for each in budget.exchanges(step))
    link, net = hardware.device.link, hardware.device.net
    wanted = 2 * size * (7 / 8 / link + 1 / 2 / 8 / net) / budget.LINK_REACHED
    assert budget.step_time(step, hardware, VOCABULARY).exchange_s == pytest.approx(wanted)


def test_one_rank_exchanges_nothing(tmp_path: Path) -> None:
    assert budget.exchanges(budget.footprint(tiny_config(tmp_path), VOCABULARY, Setting())) == []


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(record(place)))
