"""Weights in parts on real ranks (torchrun, gloo, CPU): the same training, the same checkpoint folder, less memory a rank."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config, write_dataset
from test_distributed import assert_same_training, trained
from test_train_run import renamed
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.keys import Config
from pipeline.config.load import from_dict, to_dict
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.machine import ranks as distributed
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole
from train import parallel
from train.run import assemble, autocast_type, initialise, run
from train.trainer import Trainer

TWO_NODES = "import os\nif 'RANK' in os.environ: os.environ['LOCAL_WORLD_SIZE'] = '2'\n"


def sharded_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """33 rows are cut into 17 and 16, and five batches of evaluation leave a rank without one in the last turn."""
    model = {"n_embd": 33, "n_head": 3, "dropout": 0.1}
    train = {"max_steps": 12, "tokens_per_step": 256}
    return tiny_config(folder, model=model, train=train, eval={"every_steps": 3, "tokens": 160}, **sections)


def under(config: Config, strategy: str) -> Config:
    return replace(config, parallel=replace(config.parallel, strategy=strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [({"arch": "gpt2"}, "adamw"), ({"arch": "qwen3", "head_dim": 10, "n_kv_head": 1}, "muon")],
    ids=["gpt2", "qwen3"],
)
def test_a_run_moves_between_strategies_and_rank_counts_and_stays_the_same_run(
    tiny: Path, model: dict[str, Any], optimizer: str
) -> None:
    """Losses, norms and weights are those of one undisturbed rank, with accumulation, dropout and uneven parts."""
    (tiny / "sitecustomize.py").write_text(TWO_NODES)
    config = sharded_config(tiny, checkpoint={"every_steps": 3}, optimizer={"name": optimizer})
    config = replace(config, model=replace(config.model, **model))
    straight = trained(renamed(config, "straight"), tiny, ranks=1)
    moving = renamed(config, "moving")
    for max_steps, strategy, ranks in ((3, "ddp", 1), (6, "fsdp", 2), (9, "hsdp", 4), (12, "ddp", 1)):
        part = replace(
            moving, train=replace(moving.train, max_steps=max_steps), schedule=replace(moving.schedule, decay_steps=12)
        )
        environment = {"PYTHONPATH": f"{tiny}:{ROOT}"} if ranks > 1 else {}
        moved = trained(under(part, strategy), tiny, ranks, **environment)
    assert_same_training(moved, straight)
    log = (moving.run_dir / "log.txt").read_text()
    assert "parallel fsdp: weights, gradients and optimizer state in 2 shards, 1 replica(s)" in log
    assert "parallel hsdp: weights, gradients and optimizer state in 2 shards, 2 replica(s)" in log


@pytest.mark.slow
def test_fsdp_goes_on_bit_for_bit(tiny: Path) -> None:
    config = under(sharded_config(tiny, checkpoint={"every_steps": 6}), "fsdp")
    config = replace(config, model=replace(config.model, activation_checkpointing="block"))
    straight, resumed = renamed(config, "straight"), renamed(config, "resumed")
    rows, weights = trained(straight, tiny, ranks=2)
    shutil.copytree(straight.run_dir, resumed.run_dir)
    shutil.rmtree(resumed.run_dir / "checkpoints/step_00000012")
    (resumed.run_dir / "checkpoints/latest").write_text("step_00000006\n")
    without = replace(resumed, model=replace(resumed.model, activation_checkpointing="none"))
    again, same = trained(without, tiny, ranks=2)
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in again[-6:]] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in rows[-6:]
    ]
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor), name


# ---- what each rank holds and does, told by the ranks themselves: this file is also the program that they run ----


def tell(config: Config) -> dict[str, Any]:
    """The findings of one rank."""
    world = distributed.start("cpu")
    mixture = Mixture(config)
    mesh = parallel.mesh_of("fsdp", world)
    trainer, _ = assemble(config, world, mixture, autocast_type(config, world), mesh=mesh)
    initialise(trainer)
    trainer.replicate()
    with ReductionCount() as reductions:
        trainer.train_step()
    findings: dict[str, Any] = {"reductions": reductions.calls}
    parameters = list(trainer.model.parameters())
    findings["parameters"] = [parameter.to_local().numel() for parameter in parameters]
    findings["moments"] = [
        [state.to_local().numel() for state in trainer.optimizer.state[parameter].values() if state.ndim]
        for parameter in parameters
    ]
    findings["bad_step"] = bad_step(trainer)
    findings["val_loss"] = trainer.evaluation.run(trainer.model).mean
    findings["sharded_after_evaluation"] = [parameter.to_local().numel() for parameter in trainer.model.parameters()]
    rounded, _ = assemble(config, world, mixture, (torch.bfloat16, "for once"), mesh=mesh)
    initialise(rounded)
    findings["bfloat16"] = [
        rounded.train_step().loss,
        {str(p.dtype) for p in rounded.model.parameters()} == {"torch.float32"},
    ]
    findings["copies"] = copies(config, replace(world, local_size=1))
    distributed.stop()
    return findings


class ReductionCount(TorchDispatchMode):
    """Counts the reduce-scatters of what runs inside."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def bad_step(trainer: Trainer) -> list[bool]:
    """A loss that is infinite on the last rank alone: is it finite here, and do the weights change?"""
    before = [whole(parameter.detach()).clone() for parameter in trainer.model.parameters()]
    last = trainer.world.rank == trainer.world.size - 1
    hook = trainer.model.register_forward_hook(lambda module, inputs, loss: loss * math.inf if last else loss)
    finite = math.isfinite(trainer.train_step().loss)
    hook.remove()
    after = [whole(parameter.detach()) for parameter in trainer.model.parameters()]
    return [finite, not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))]


def copies(config: Config, world: World) -> float:
    """Under hsdp with nodes of one rank: the first weight of a model that rank 0 has drawn."""
    model = LanguageModel.without_memory(config.model, vocab_size=257)
    mesh = parallel.mesh_of("hsdp", world)
    assert mesh is not None
    parallel.allocate(model, world, mesh, dtype=torch.float32, compiled=False)
    parallel.distribute(LanguageModel(config.model, vocab_size=257) if world.is_first else None, model)
    first: Any = next(model.parameters())
    return float(first.detach().to_local()[0, 0])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Config]:
    """What each of two ranks found, and the config they ran."""
    folder = tmp_path_factory.mktemp("told")
    write_dataset(folder / "data/tiny")
    config = sharded_config(folder)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(folder)], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)], config


@pytest.mark.slow
def test_each_rank_holds_its_half_of_every_parameter_and_moment(told: Any) -> None:
    ranks, config = told
    model = LanguageModel(config.model, vocab_size=257)
    sizes = [parameter.numel() for parameter in model.parameters()]
    rows = [len(parameter) for parameter in model.parameters()]
    first = [size // row * math.ceil(row / 2) for size, row in zip(sizes, rows, strict=True)]
    second = [size - part for size, part in zip(sizes, first, strict=True)]
    assert first != second, "33 rows have no equal halves"
    for rank, wanted in zip(ranks, (first, second), strict=True):
        assert rank["parameters"] == wanted
        assert rank["moments"] == [[part, part] for part in wanted]
        assert rank["sharded_after_evaluation"] == wanted


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_and_not_once_a_micro_batch(told: Any) -> None:
    """Two blocks and what is around them, whatever the accumulation, which is four here."""
    assert [rank["reductions"] for rank in told[0]] == [3, 3]


@pytest.mark.slow
def test_a_loss_that_is_infinite_on_one_rank_stops_the_step_on_all(told: Any) -> None:
    assert [rank["bad_step"] for rank in told[0]] == [[False, False]] * 2


@pytest.mark.slow
def test_all_ranks_get_one_val_loss_and_one_bfloat16_loss(told: Any) -> None:
    (first, second), config = told
    assert first["val_loss"] == second["val_loss"]
    world = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))
    alone, _ = assemble(config, world, Mixture(config), autocast_type(config, world))
    initialise(alone)
    assert first["bfloat16"] == second["bfloat16"] == [pytest.approx(alone.train_step().loss, rel=5e-3), True]


@pytest.mark.slow
def test_copies_of_a_sharded_model_start_as_rank_0s(told: Any) -> None:
    first, second = told[0]
    assert first["copies"] == second["copies"]


# ---- what is refused ----


def test_nodes_of_different_sizes_cannot_hold_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    world = World(rank=0, size=4, local_size=3, device=torch.device("cpu"))
    with pytest.raises(
        UserError, match="hsdp expects the same number of ranks on every node, got 4 ranks and nodes of 3: start"
    ):
        parallel.mesh_of("hsdp", world)


def test_float16_is_refused_in_parts(tiny: Path) -> None:
    model = LanguageModel(tiny_config(tiny).model, vocab_size=257)
    world = World(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    mesh: Any = object()  # refused before anything is done with it
    with pytest.raises(UserError, match=r"float16 needs parallel.strategy=ddp.*run.dtype=bfloat16"):
        parallel.allocate(model, world, mesh, dtype=torch.float16, compiled=False)


def test_one_rank_needs_no_shards(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    run(under(tiny_config(tiny), "fsdp"), dry_run=True)
    assert "parallel one rank holds everything" in caplog.text


if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = tell(from_dict(json.loads((place / "config.json").read_text())))
    (place / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
