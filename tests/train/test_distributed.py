"""Real torchrun, gloo, on the CPU: N ranks do what one does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, overrides, run_program, tiny_config, write_dataset, write_documents
from safetensors.torch import load_file
from test_train_run import renamed

from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import Config
from train.run import run

pytestmark = pytest.mark.slow
# By the time that this rank says why all of them end, torchrun would have ended it, as soon as another one had left.
SLOW_TO_SAY = """
import os, time
if os.environ.get("RANK") == "{rank}":
    from pipeline.machine import ranks
    stop, gather = ranks.stop, ranks.World.gather
    ranks.stop = lambda: (time.sleep(5), stop())
"""
NOISE = "attn.c_attn.bias"  # see test_trainer.py: its gradient is rounding alone, and Adam blows that up


Result = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def trained(config: Config, folder: Path, ranks: int, **environment: str) -> Result:
    """Rows and final weights of a run on `ranks` real processes; a single one needs no process of its own."""
    if ranks == 1 and not environment:
        run(config)
    else:
        result = run_program("train", "quickstart", *overrides(config), cwd=folder, ranks=ranks, **environment)
        assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    latest = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert latest is not None
    return rows, load_file(latest / "model.safetensors")


def assert_same_training(found: Any, wanted: Any) -> None:
    """The same steps, losses and norms within float32 rounding; the same weights."""
    (rows, weights), (wanted_rows, wanted_weights) = found, wanted
    for key in ("step", "tokens", "loss", "grad_norm", "lr"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in wanted_rows], rel=2e-4), key
    val_losses, wanted_val_losses = (
        [row["val_loss"] for row in each if "val_loss" in row] for each in (rows, wanted_rows)
    )
    assert val_losses == pytest.approx(wanted_val_losses, rel=2e-4)
    for name, tensor in wanted_weights.items():
        if not name.endswith(NOISE):
            torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


COUNT_NO_SYNC = """
import os, pathlib
from torch.nn.parallel import DistributedDataParallel as DDP
real = DDP.no_sync
def counted(self):
    with pathlib.Path("no_sync." + os.environ["RANK"]).open("a") as file: file.write("x")
    return real(self)
DDP.no_sync = counted
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Result]:
    """A run on two ranks. Evaluation has an odd number of batches, so the ranks share it unevenly."""
    folder = tmp_path_factory.mktemp("two")
    write_dataset(folder / "data" / "tiny")
    (folder / "sitecustomize.py").write_text(COUNT_NO_SYNC)
    config = tiny_config(folder, model={"dropout": 0.1}, eval={"tokens": 160})
    return config, folder, trained(renamed(config, "two"), folder, ranks=2, PYTHONPATH=f"{folder}:{ROOT}")


def test_two_ranks_equal_one_with_accumulation_and_dropout(two: tuple[Config, Path, Result]) -> None:
    config, folder, result = two
    assert_same_training(result, trained(renamed(config, "one"), folder, ranks=1))


def test_gradients_travel_once_a_step_and_not_once_a_micro_batch(two: tuple[Config, Path, Result]) -> None:
    """Four micro-batches on two ranks: two for each, and the first of them inside no_sync."""
    assert [(two[1] / f"no_sync.{rank}").read_text() for rank in (0, 1)] == ["x" * 10] * 2


def test_two_ranks_stopped_and_resumed_equal_straight_through_bit_for_bit(two: tuple[Config, Path, Result]) -> None:
    config, folder, straight = two
    (folder / "stop").touch()
    chopped = renamed(config, "chopped")
    stop = {"PIPELINE_STOP_FILE": str(folder / "stop")}
    run_program("train", "quickstart", *overrides(chopped), cwd=folder, ranks=2, **stop)
    assert json.loads((chopped.run_dir / "status.json").read_text())["step"] == 1
    weights = trained(chopped, folder, ranks=2)[1]
    for name, tensor in straight[1].items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("ranks", "strategy", "optimizer"),
    [
        (4, "ddp", "adamw"),
        pytest.param(3, "fsdp", "muon", marks=pytest.mark.campaign),
        pytest.param(4, "ddp", "muon", marks=pytest.mark.campaign),
        pytest.param(3, "ddp", "adamw", marks=pytest.mark.campaign),
        pytest.param(3, "fsdp", "adamw", marks=pytest.mark.campaign),
        pytest.param(4, "fsdp", "adamw", marks=pytest.mark.campaign),
    ],
)
def test_more_ranks_resume_bit_for_bit(tiny: Path, ranks: int, strategy: str, optimizer: str) -> None:
    """With accumulation: four micro-batches each on three ranks, three on four. DDP's buckets are others after its first
    backward pass, and sums of three or more numbers depend on their order."""
    config = tiny_config(
        tiny, model={"dropout": 0.1, "n_layer": 4}, train={"tokens_per_step": 384}, parallel={"strategy": strategy},
        optimizer={"name": optimizer},
    )  # fmt: skip
    straight, resumed = renamed(config, "straight"), renamed(config, "resumed")
    rows, weights = trained(straight, tiny, ranks)
    shutil.copytree(straight.run_dir, resumed.run_dir)
    shutil.rmtree(resumed.run_dir / "checkpoints/step_00000010")
    (resumed.run_dir / "checkpoints/latest").write_text("step_00000005\n")
    again, same = trained(resumed, tiny, ranks)
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in again] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in rows
    ]
    assert [name for name, tensor in weights.items() if not torch.equal(same[name], tensor)] == []


def test_two_ranks_share_a_mixture_with_document_mask_as_one_has_it(tiny: Path) -> None:
    """Nine batches of evaluation for each source, so that no rank has as many of one as the other."""
    for number in range(2):
        texts = [chr(97 + (i * 7 + number) % 26) * (3 + i % 20) for i in range(300)]
        write_documents(tiny / "data" / f"s{number}", {"train": [texts], "val": [texts[::-1]]})
    mixture = [{"dataset": "s0", "weight": 2}, {"dataset": "s1", "weight": 1}]
    config = tiny_config(tiny, data={"mixture": mixture, "document_mask": True}, eval={"tokens": 288})
    one = trained(renamed(config, "one"), tiny, ranks=1)
    two = trained(renamed(config, "two"), tiny, ranks=2)
    assert_same_training(two, one)


@pytest.mark.campaign
def test_a_run_moves_from_one_rank_to_two_to_four_and_back(tiny: Path) -> None:
    """The same samples, so the same losses within rounding; each rank writes down what it takes."""
    (tiny / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "from train.data.batches import Prefetcher\n"
        "real = Prefetcher.batch\n"
        "def batch(self, first):\n"
        "    with pathlib.Path('samples.' + os.environ.get('RUN', '')).open('a') as file:\n"
        "        file.write(''.join(f'{sample}\\n' for sample in range(first, first + self.size)))\n"
        "    return real(self, first)\n"
        "Prefetcher.batch = batch\n"
    )
    environment = {"PYTHONPATH": f"{tiny}:{ROOT}"}
    config = tiny_config(
        tiny, train={"max_steps": 12}, checkpoint={"every_steps": 3}, eval={"every_steps": 3}, model={"dropout": 0.1}
    )
    straight = trained(renamed(config, "straight"), tiny, ranks=1, RUN="straight", **environment)
    moving = renamed(config, "moving")
    for max_steps, ranks in ((3, 1), (6, 2), (9, 4), (12, 1)):
        part = replace(
            moving, train=replace(moving.train, max_steps=max_steps), schedule=replace(moving.schedule, decay_steps=12)
        )
        result = trained(part, tiny, ranks, RUN="moving", **environment)
    assert_same_training(result, straight)
    taken = [sorted(map(int, (tiny / f"samples.{run}").read_text().split())) for run in ("straight", "moving")]
    assert taken[0] == taken[1] == list(range(96))


def test_a_fault_of_one_rank_ends_both_with_one_line(tiny: Path) -> None:
    (tiny / "sitecustomize.py").write_text(
        SLOW_TO_SAY.format(rank=1)
        + "    os.chdir('/')\n    ranks.World.gather = lambda *a: (gather(*a), time.sleep(2))[0]\n"
    )
    config = tiny_config(tiny)
    config = replace(config, data=replace(config.data, data_dir="data"), run=replace(config.run, dir="runs"))
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2, PYTHONPATH=f"{tiny}:{ROOT}")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error: " in line and "ChildFailed" not in line]
    assert [line for line in lines if "no dataset at data/tiny" in line] == [lines[0]], result.stderr
    assert "[rank 1] error:" in lines[0]


def test_a_divergence_is_told(tiny: Path) -> None:
    (tiny / "sitecustomize.py").write_text(SLOW_TO_SAY.format(rank=0))
    config = tiny_config(tiny, optimizer={"lr": 1e30}, train={"max_bad_steps": 2})
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2, PYTHONPATH=f"{tiny}:{ROOT}")
    assert result.returncode != 0
    assert result.stderr.count("error: 2 steps in a row") == 1, result.stderr


@pytest.mark.campaign  # the text is that of tests/pipeline/test_budget.py, said once as any error of all ranks
def test_ranks_that_do_not_divide_the_batch_are_told_what_does_once(tiny: Path) -> None:
    config = tiny_config(tiny, train={"tokens_per_step": 96, "micro_batch_size": 2})
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2)
    assert result.returncode != 0
    assert "x 2 rank(s) = 64 tokens; set train.tokens_per_step=64 or 128" in result.stderr
    assert result.stderr.count("does not divide") == 1


ONLY_RANK_0_READS = """
import os
if os.environ.get("RANK", "0") != "0":
    from pipeline.checkpoint import load
    from pipeline.model.language_model import LanguageModel
    make = LanguageModel.__init__
    def made(self, *arguments):
        make(self, *arguments)
        assert all(parameter.is_meta for parameter in self.parameters()), "a complete model in host memory"
    def never(*arguments):
        raise AssertionError("this rank reads a checkpoint")
    LanguageModel.__init__, load.open_weights, load.open_tensors = made, never, never
"""


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.campaign), "fsdp"])
def test_one_rank_holds_a_complete_model_and_reads_the_checkpoint(tiny: Path, strategy: str) -> None:
    (tiny / "sitecustomize.py").write_text(ONLY_RANK_0_READS)
    config = tiny_config(tiny, parallel={"strategy": strategy})
    for max_steps in (5, 10):
        part = replace(config, train=replace(config.train, max_steps=max_steps))
        rows, _ = trained(part, tiny, ranks=2, PYTHONPATH=f"{tiny}:{ROOT}")
    assert rows[-1]["step"] == 10
