"""torch.compile block by block: how many graphs it makes, and that DDP averages gradients while the backward pass goes on."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config
from functorch.compile import make_boxed_func
from test_trainer import evaluate, trained, trainer_of
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from train import parallel

COMPILED = {"run": {"compile": "on"}}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):  # set back afterwards
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Of everything that is compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"n_layer": 3}},
        {"model": {"dropout": 0.1}},
        {"model": {"activation_checkpointing": "block"}},
        {"data": {"document_mask": True}},
        {"model": {"arch": "qwen3", "n_head": 4, "n_kv_head": 2}},
    ],
    ids=["plain", "dropout", "recompute", "documents", "qwen3"],
)
def test_all_blocks_are_one_graph_in_training_and_one_in_evaluation(
    tiny: Path, graphs: CompileCounterWithBackend, sections: dict[str, Any]
) -> None:
    """And the loss is one. Neither accumulation nor a short last batch of an evaluation makes another one."""
    config = tiny_config(tiny, **COMPILED, **sections, eval={"tokens": 16 * 5}, train={"micro_batch_size": 4})
    trainer, _ = trained(config, steps=2)
    assert len(trainer.model.blocks) > 1 and graphs.frame_count == 2
    assert [len(starts) % 4 for starts in trainer.evaluation.starts] == [1]
    found = evaluate(trainer)
    assert graphs.frame_count == 3
    trainer.train_step()
    assert evaluate(trainer) != found and graphs.frame_count == 3


def test_the_rows_that_fill_up_an_evaluation_do_not_count(tiny: Path, graphs: CompileCounterWithBackend) -> None:
    sizes = {"eval": {"tokens": 16 * 5}, "train": {"micro_batch_size": 4}}
    assert evaluate(trainer_of(tiny_config(tiny, **COMPILED, **sizes))) == pytest.approx(
        evaluate(trainer_of(tiny_config(tiny, **sizes))), rel=1e-6
    )


def recorded(events: list[str], name: str) -> Callable[..., Any]:
    """A compiler whose code notes in `events` that it runs."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            events.append(name)
            return graph(*inputs)

        return make_boxed_func(run)

    return compiler


def test_ddp_averages_gradients_while_the_backward_pass_goes_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    backend = aot_autograd(fw_compiler=recorded(events, "forward"), bw_compiler=recorded(events, "backward"))
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    trainer = trainer_of(tiny_config(tiny, **COMPILED, model={"n_layer": 4}, train={"tokens_per_step": 32}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # A bucket holds one block here; otherwise 25 MB.
        block_bytes = sum(parameter.nbytes for parameter in trainer.model.blocks[0].parameters())
        wrapped = trainer.wrapped = DistributedDataParallel(trainer.model, bucket_cap_mb=block_bytes / 2**20)

        def average(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            events.append(f"bucket {bucket.index()}")
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, average)
        parallel.settle_buckets(wrapped, lambda: trainer.loss_of(trainer.blank_windows()), torch.device("cpu"))
        events.clear()
        trainer.train_step()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 2
    assert [event for event in events if not event.startswith("bucket")] == ["forward"] * 5 + ["backward"] * 4
    buckets = [event for event in events if event.startswith("bucket")]
    assert len(buckets) >= 4 and buckets == [f"bucket {number}" for number in range(len(buckets))]
    # The first blocks whose gradients come are averaged before the backward pass of the first layer begins.
    last_backward = len(events) - 1 - events[::-1].index("backward")
    assert len([event for event in events[:last_backward] if event.startswith("bucket")]) >= 2, events
