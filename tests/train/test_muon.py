"""Muon against torch's own and against the iteration written out."""

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.budget import checkpoint_bytes, footprint
from pipeline.config.keys import Config, ModelConfig, OptimizerConfig
from pipeline.machine import ranks as distributed
from pipeline.model.footprint import Setting
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole
from train import parallel
from train.optimizer.adamw import AdamW
from train.optimizer.groups import build_optimizer
from train.optimizer.muon import Muon, orthogonalised

SHAPES = [(24, 24), (64, 16), (16, 64), (33, 20), (1, 8)]
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(5)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def muon_of(parameters: list[nn.Parameter], blocks: int = 1, weight_decay: float = 0.1) -> Muon:
    """Each matrix in a stack of its own; nothing is left for AdamW but a scalar."""
    rest = AdamW([nn.Parameter(torch.zeros(()))], lr=0.02, fused=True)
    return Muon([([parameter], blocks) for parameter in parameters], weight_decay, rest)


def draw_gradients(*models: list[nn.Parameter]) -> None:
    for together in zip(*models, strict=True):
        gradient = torch.randn_like(together[0])
        for parameter in together:
            parameter.grad = gradient.clone()


def newton_schulz(matrix: Tensor) -> Tensor:
    """Jordan 2024, one matrix, in float64."""
    x = matrix.double() / max(float(matrix.double().norm()), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.slow
def test_one_rank_does_not_import_sharded_tensors() -> None:
    """They take half of a second of each start."""
    code = "import sys, train.run; print('torch.distributed.tensor' in sys.modules)"
    printed = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert printed == "False\n"


def test_steps_equal_torchs_muon_within_bfloat16_rounding() -> None:
    """torch computes Newton-Schulz in bfloat16, so an entry of an update is off by a few of its roundings."""
    ours, theirs = matrices(*SHAPES), matrices(*SHAPES)
    optimizer = muon_of(ours)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        draw_gradients(ours, theirs)
        optimizer.step_unless(torch.tensor(False))
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        largest_update = 3 * 0.02 * 0.2 * math.sqrt(max(mine.shape))
        assert (mine - other).abs().max() < 0.02 * largest_update, mine.shape
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (36, 12)])
def test_steps_equal_the_update_written_out(shape: tuple[int, int], blocks: int) -> None:
    if shape[0] % blocks:
        shape = (shape[0] * blocks, shape[1])
    (parameter,) = matrices(shape)
    optimizer, expected = muon_of([parameter], blocks), parameter.detach().double()
    momentum = torch.zeros_like(expected)
    for _ in range(3):
        draw_gradients([parameter])
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        parts = (0.05 * gradient + 0.95 * momentum).chunk(blocks)
        scale = 0.2 * math.sqrt(max(parts[0].shape))
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * scale * torch.cat([newton_schulz(part) for part in parts])
        optimizer.step_unless(torch.tensor(False))
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 40), (40, 160), (160, 40)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-8])
def test_singular_values_far_apart_are_no_harm(shape: tuple[int, int], smallest: float) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.double), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.double)
    matrix = left * values @ right
    found, expected = orthogonalised(matrix.float()[None])[0].double(), newton_schulz(matrix)
    assert (found - expected).norm() < 5e-4 * expected.norm()


def test_singular_values_come_near_1_and_matrices_of_a_stack_do_not_mix() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 40, 20)
    found = orthogonalised(stack)
    assert ((torch.linalg.svdvals(found) - 0.95).abs() < 0.3).all()
    for one, matrix in zip(found, stack, strict=True):
        torch.testing.assert_close(orthogonalised(matrix[None])[0], one)
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_matrices_of_the_blocks_are_muons_and_the_rest_is_adamws() -> None:
    model = LanguageModel(MODEL, 100)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [({names[p] for p in group["params"]}, group) for group in optimizer.param_groups]
    stacked = {name: group["blocks"] for found, group in groups if "blocks" in group for name in found}
    in_blocks = {name for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name}
    assert stacked == {name: 3 if "c_attn" in name else 1 for name in in_blocks} and len(in_blocks) == 8
    assert sum(len(found) for found, _ in groups) == len(names), "each in one group"
    assert {group["lr"] for _, group in groups} == {0.02}
    decayed = set[str]().union(*(found for found, group in groups if group["weight_decay"]))
    assert decayed == {name for name, p in model.named_parameters() if p.ndim == 2}


def test_the_initial_state_is_named_and_shaped_as_a_step_makes_it() -> None:
    model = LanguageModel(MODEL, 100)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids, ids).backward()
    optimizer.step_unless(torch.tensor(False))
    for name, parameter in model.named_parameters():
        initial, made = optimizer.initial_state(parameter), optimizer.state[parameter]
        assert initial.keys() == made.keys()
        assert ("momentum_buffer" in made) == (".h." in name and parameter.ndim == 2)
        for kind, value in made.items():
            assert (initial[kind].shape, initial[kind].dtype) == (value.shape, value.dtype)


def test_the_plan_counts_the_bytes_of_its_state() -> None:
    config = Config(model=MODEL, optimizer=OptimizerConfig(name="muon"))
    model = LanguageModel(MODEL, 128)
    optimizer = build_optimizer(model, config.optimizer)
    states = [state for p in model.parameters() for state in optimizer.initial_state(p).values() if state.ndim]
    assert footprint(config, 128, Setting()).memory().optimizer == sum(state.nbytes for state in states)
    weights = sum(p.nbytes for p in model.parameters())
    assert checkpoint_bytes(config, 128) == weights + sum(state.nbytes for state in states)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
@pytest.mark.parametrize("first", [True, False])
def test_a_rejected_update_changes_nothing(first: bool, value: float) -> None:
    model = LanguageModel(MODEL, 100)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.1))
    parameters = list(model.parameters())
    if first:
        draw_gradients(parameters)
        optimizer.step_unless(torch.tensor(False))
    before = [p.detach().clone() for p in parameters]
    states = [deepcopy(optimizer.state[p] or optimizer.initial_state(p)) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step_unless(torch.tensor(True))
    for parameter, weight, state in zip(parameters, before, states, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(optimizer.state[parameter][kind], kept) for kind, kept in state.items())
    draw_gradients(parameters)
    optimizer.step_unless(torch.tensor(False))
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_the_sizes_of_updates_are_adamws() -> None:
    """So that one learning rate serves both: the RMS of an update is 0.2 of it."""
    model = LanguageModel(MODEL, 100)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw_gradients(list(model.parameters()))
    optimizer.step_unless(torch.tensor(False))
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.ndim == 2:
            rms = float((parameter.detach() - before[name]).square().mean().sqrt())
            assert rms == pytest.approx(0.02, rel=0.25), name


# ---- over ranks: this file is also the program that they run ----

# Stacks of two matrices leave two of four ranks without one; 33 rows and 99 have no equal quarters.
RANKS, UNEVEN = 4, ModelConfig(n_layer=2, n_head=3, n_embd=33, block_size=16)


def trained(model: LanguageModel) -> list[Tensor]:
    """The weights after three steps, one of them rejected."""
    torch.manual_seed(7)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1))
    for step in range(4):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient * math.nan if step == 2 else gradient
        optimizer.step_unless(torch.tensor(step == 2))
    return [whole(parameter.detach()).clone() for parameter in model.parameters()]


def replica() -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(UNEVEN, 100)


def differences(folder: Path) -> None:
    """The largest one of this rank's replica, and of shards, to weights that one process has trained."""
    alone = trained(replica())
    world = distributed.start("cpu")
    found = {"ddp": trained(replica())}
    for strategy in ("fsdp", "hsdp"):
        sharded = LanguageModel.without_memory(UNEVEN, 100)
        mesh = parallel.mesh_of(strategy, world)
        parallel.allocate(sharded, world, mesh, dtype=torch.float32, compiled=False)
        parallel.distribute(replica() if world.is_first else None, sharded)
        found[strategy] = trained(sharded)
    distributed.stop()
    largest = {
        strategy: max(float((a - b).abs().max()) for a, b in zip(weights, alone, strict=True))
        for strategy, weights in found.items()
    }
    (folder / f"rank_{world.rank}.json").write_text(json.dumps(largest))


@pytest.mark.slow
def test_ranks_that_share_the_work_get_what_one_has_computed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'RANK' in os.environ: os.environ['LOCAL_WORLD_SIZE'] = '2'\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert found["ddp"] == 0.0, rank
        # Parts of other lengths are rounded differently by AdamW's vector instructions.
        assert max(found["fsdp"], found["hsdp"]) < 1e-7, rank


if __name__ == "__main__":
    differences(Path(sys.argv[1]))
