"""The memory of a step by formula, against what is really allocated on this CPU.

Run as a program, this file takes real steps as one rank and prints what they allocated, in a process
group that only pretends the others.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.budget import footprint
from pipeline.config.keys import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.model.constants import CHUNK_LOGITS
from pipeline.model.footprint import Footprint, Setting

VOCABULARY = 1000
SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 56}
# Names of cases, what of the model is different, sequences, accumulation, autocast type.
SHAPES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "small": (SMALL, 4, 2, "float32"),
    "one micro-batch": (SMALL, 4, 1, "float32"),
    "recomputed": (SMALL | {"activation_checkpointing": "block"}, 6, 2, "float32"),
    "recomputed, one micro-batch": (SMALL | {"activation_checkpointing": "block", "n_layer": 6}, 6, 1, "float32"),
    "bfloat16": (SMALL | {"n_embd": 160}, 4, 2, "bfloat16"),
    "bfloat16, recomputed": (SMALL | {"n_embd": 160, "activation_checkpointing": "block"}, 7, 1, "bfloat16"),
    "bfloat16 residual stream": (SMALL | {"n_embd": 160, "residual_dtype": "autocast"}, 4, 2, "bfloat16"),
    "wide": ({"n_layer": 2, "n_head": 6, "n_embd": 288, "block_size": 40}, 2, 1, "float32"),
    "deep": ({"n_layer": 12, "n_head": 2, "n_embd": 64, "block_size": 72}, 3, 2, "float32"),
    "long": ({"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 500}, 2, 1, "float32"),
    "untied, without biases": (SMALL | {"tie_weights": False, "bias": False}, 4, 2, "float32"),
    "untied, one micro-batch": (SMALL | {"tie_weights": False, "n_embd": 160}, 3, 1, "float32"),
    "dropout": (SMALL | {"dropout": 0.1}, 4, 2, "float32"),
    "qwen3": (SMALL | {"arch": "qwen3"}, 4, 2, "float32"),
    "qwen3, grouped, one micro-batch": (
        SMALL | {"arch": "qwen3", "n_kv_head": 2, "n_embd": 160, "tie_weights": False},
        4,
        1,
        "float32",
    ),
    "qwen3, recomputed": (SMALL | {"arch": "qwen3", "activation_checkpointing": "block"}, 6, 1, "float32"),
    "qwen3 in bfloat16": (SMALL | {"arch": "qwen3", "n_embd": 160}, 4, 2, "bfloat16"),
    "muon, few tokens": (SMALL | {"block_size": 20}, 2, 1, "float32"),
    "dropout in bfloat16": (SMALL | {"dropout": 0.1}, 4, 2, "bfloat16"),
}
RANKS = {"one": 1, "ddp": 2, "fsdp": 4}
# What of a model is different changes little of what ranks add.
SHARED = ("small", "one micro-batch", "recomputed, one micro-batch", "bfloat16", "wide", "untied, one micro-batch",
          "muon, few tokens")  # fmt: skip
CASES = [(strategy, name) for strategy in RANKS for name in (SHAPES if strategy == "one" else SHARED)]


def case(name: str, documents: bool = False) -> tuple[Config, Setting]:
    model, sequences, accumulation, dtype = SHAPES[name]
    config = Config(
        model=ModelConfig(**model),
        optimizer=OptimizerConfig(name="muon" if "muon" in name else "adamw"),
        train=TrainConfig(micro_batch_size=sequences),
        data=DataConfig(document_mask=documents),
    )
    return config, Setting(accumulation=accumulation, dtype=dtype)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """What this file prints as a program."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], capture_output=True, env=environment, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, dict[str, dict[str, int]]] = json.loads(result.stdout.splitlines()[-1])
    return found


def planned(name: str, strategy: str) -> Footprint:
    config, setting = case(name)
    ranks = RANKS[strategy]
    return footprint(config, VOCABULARY, replace(setting, ranks=ranks, shards=ranks if strategy == "fsdp" else 1))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_the_peak_is_what_is_allocated(measured: Any, name: str, strategy: str) -> None:
    step, found = planned(name, strategy), measured[strategy][name]
    memory = step.memory()
    assert memory.weights + memory.optimizer == found["states"], "exactly"
    # Without what is there anyway: that would hide a wrong formula behind the weights.
    states = memory.weights + memory.optimizer
    assert memory.total - states == pytest.approx(found["peak"], rel=0.12)
    assert memory.total == pytest.approx(states + found["peak"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_what_the_backward_pass_needs_is_what_autograd_keeps(measured: Any, name: str) -> None:
    step, found = planned(name, "one"), measured["one"][name]
    assert step.activations == pytest.approx(found["activations"], rel=0.02)
    assert step.logits == pytest.approx(found["logits"], rel=0.05)


def test_a_document_mask_is_kept_in_each_block() -> None:
    config, setting = case("small", documents=True)
    with_mask = footprint(config, VOCABULARY, setting)
    found = Measurement(config, setting).measure()
    assert with_mask.activations == pytest.approx(found["activations"], rel=0.02)


def test_logits_are_those_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    config, setting = case("small")
    at_full_size = footprint(config, VOCABULARY, setting).logits
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", at_full_size // 64)
    step = footprint(config, VOCABULARY, setting)
    assert step.logits == at_full_size // 8
    # Besides them the gradient of what was there before.
    found = Measurement(config, setting).kept()["logits"] - 4 * step.tokens * config.model.n_embd
    assert step.logits == pytest.approx(found, rel=0.2)


def test_gradients_of_shards_are_complete_while_they_accumulate() -> None:
    step = planned("small", "fsdp")
    assert step.gradients == 4 * step.sizes.all
    once = replace(step, setting=replace(step.setting, accumulation=1))
    assert once.gradients == 4 * step.sizes.shard


def test_kinds_add_up_to_the_peak_but_for_what_is_never_there_together() -> None:
    for name in SHAPES:
        for strategy in ("one", "ddp", "fsdp"):
            found = planned(name, strategy).memory().as_json()
            total, overlap = found.pop("total"), found.pop("overlap")
            assert total == sum(found.values()) - overlap and min(found.values()) >= 0 <= overlap


class Measurement:
    """A real model, optimizer and strategy, and the bytes that PyTorch's CPU allocator gave out."""

    def __init__(self, config: Config, setting: Setting, strategy: str = "one") -> None:
        import torch
        from torch.distributed.device_mesh import init_device_mesh

        from pipeline.machine.ranks import World
        from pipeline.model.language_model import LanguageModel
        from train import parallel
        from train.optimizer.groups import build_optimizer

        torch.set_num_threads(1)
        self.config, self.setting, self.dtype = config, setting, getattr(torch, setting.dtype)
        ranks = RANKS[strategy]
        world = World(device=torch.device("cpu"), rank=0, size=ranks, local_rank=0, local_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",)) if strategy == "fsdp" else None
        self.model = LanguageModel.without_memory(config.model, VOCABULARY)
        parallel.allocate(self.model, world, mesh, dtype=self.dtype, compiled=False)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter.detach(), std=0.02)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.wrapped: Any = parallel.replicate(self.model, world)
        if strategy == "ddp":  # what the pretended ranks would return is there already
            self.wrapped.register_comm_hook(None, lambda _, bucket: resolved(bucket.buffer()))
        sequences, length = config.train.micro_batch_size, config.model.block_size
        windows = torch.randint(VOCABULARY, (sequences, length + 1))
        documents = torch.arange(length).div(16, rounding_mode="floor").expand(sequences, -1)
        self.inputs = windows[:, :-1], windows[:, 1:], documents if config.data.document_mask else None

    def step(self) -> None:
        import torch

        from pipeline.machine.device import autocast
        from train.parallel import reduce_gradients

        for number in range(self.setting.accumulation):
            with reduce_gradients(self.wrapped, now=number == self.setting.accumulation - 1):
                with autocast(self.inputs[0].device, self.dtype):
                    loss = self.wrapped(*self.inputs)
                loss.backward()
        self.optimizer.step_unless(torch.tensor(False))
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self) -> dict[str, int]:
        from torch.distributed.tensor import DTensor

        for _ in range(1 + (self.wrapped is not self.model)):  # DDP sorts its buckets anew after the first one
            self.step()
        found = {"peak": peak_of(self.step)}
        tensors = [
            *self.model.parameters(),
            *(t for state in self.optimizer.state.values() for t in state.values() if t.ndim),
        ]
        # Of a shard the storage, which has FSDP2's padding.
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        found["states"] = 4 * sum(t.numel() for t in local)
        if self.wrapped is not self.model:
            found["peak"] += 4 * sum(p.numel() for p in self.model.parameters())  # DDP's buckets, which stay
        if not isinstance(tensors[0], DTensor):
            found |= self.kept()
        return found

    def kept(self) -> dict[str, int]:
        """Bytes that autograd keeps between the two passes, without weights; and the logits' peak."""
        import torch

        from pipeline.machine.device import autocast
        from pipeline.model.loss import mean_loss

        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        device, rows = self.inputs[0].device, self.inputs[0].numel()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, self.dtype):
            loss = self.model(*self.inputs)
        states = (*self.model.parameters(), *self.model.buffers())  # rotary tables are no activations
        weights = {tensor.untyped_storage().data_ptr() for tensor in states}
        shapes = {tuple(parameter.shape) for parameter in self.model.parameters()}
        shapes |= {shape[::-1] for shape in shapes}  # autocast's copies are no activations, and transposed
        shapes.add((rows, self.model.padded_vocab_size))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in kept
            if tuple(tensor.shape) not in shapes and tensor.untyped_storage().data_ptr() not in weights
        }
        del loss
        hidden = torch.randn(rows, self.model.config.n_embd, dtype=self.dtype).requires_grad_()
        weight, targets = self.model.lm_head.weight.detach().to(self.dtype), self.inputs[1].flatten()
        of_loss = peak_of(lambda: mean_loss(hidden, weight, self.model.logit_bias, targets))
        return {"activations": sum(storages.values()), "logits": of_loss}


def resolved(value: Any) -> Any:
    import torch

    future: Any = torch.futures.Future()
    future.set_result(value)
    return future


def peak_of(work: Any) -> int:
    """Bytes that were allocated at a time, beyond those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = {}
    for strategy, ranks in RANKS.items():
        # Without the other ranks: what they would send changes no size.
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        names = [name for ranked, name in CASES if ranked == strategy]
        found[strategy] = {name: Measurement(*case(name), strategy=strategy).measure() for name in names}
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
