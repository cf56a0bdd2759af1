"""Every config key, with its default, its bounds and its line of help. No torch.

A new key needs a reader outside this package, bounds where it is a number, and a line in
docs/train.md: tests/pipeline/test_config.py says which is missing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

CHECKPOINT_NAME = re.compile(r"step_\d{8,}")
TRACKERS = ("wandb", "trackio", "mlflow")  # of log.also
DTYPES = ("float32", "bfloat16", "float16")  # of autocast; pipeline/machine/device.py has torch's
T = TypeVar("T")


def key(
    default: T, text: str, choices: tuple[T, ...] = (), *,
    at_least: float | None = None, above: float | None = None, below: float | None = None,
) -> T:  # fmt: skip
    """A config key: its default, its line for `--help`, and the values it may take: a short list,
    or an interval.

    The bounds of a pair of numbers hold for both. A number is finite in any case.
    """
    bounds = {sign: bound for sign, bound in ((">=", at_least), (">", above), ("<", below)) if bound is not None}
    return field(default=default, metadata={"text": text, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class RunConfig:
    name: str = key("", "folder under run.dir; by default the config's name")
    dir: str = key("runs", "where runs are written")
    seed: int = key(1337, "of initial weights, data order and dropout", at_least=0, below=1 << 63)
    device: str = key("auto", "auto (the fastest there is), cpu, cuda, cuda:N or mps")
    # Weights stay float32; auto takes bfloat16 where the hardware multiplies it.
    dtype: str = key("auto", "autocast type", ("auto", *DTYPES))
    compile: str = key("auto", "torch.compile; auto: with Triton", ("auto", "on", "off"))
    branch_from: str = key("", "new run from a checkpoint, or a run's latest")


@dataclass(frozen=True)
class WeightedDataset:
    """One entry of `data.mixture`. Weights are relative: 7 and 3 are 0.7 and 0.3."""

    dataset: str
    weight: float


@dataclass(frozen=True)
class DataConfig:
    dataset: str = key("openwebtext", "a name under data.data_dir, or a path")
    data_dir: str = key("data", "where prepared datasets are")
    # TOML: mixture = [{dataset = "a", weight = 0.7}, {dataset = "b", weight = 0.3}]
    mixture: tuple[WeightedDataset, ...] = key((), "several datasets: [{dataset='a', weight=0.7}, ...]")
    # Slower on a CPU, or with dropout: there no flash attention kernel takes documents.
    document_mask: bool = key(False, "attention and positions restart with each document")


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are GPT-2 124M (Radford et al. 2019)."""

    arch: str = key("gpt2", "architecture", ("gpt2", "qwen3"))
    n_layer: int = key(12, "transformer blocks", at_least=1)
    n_head: int = key(12, "attention heads; must divide n_embd", at_least=1)
    # The four are for arch="qwen3"; 0 stands for what follows from n_head and n_embd.
    n_kv_head: int = key(0, "qwen3: heads of keys and values; 0: n_head", at_least=0)
    head_dim: int = key(0, "qwen3: width of a head; 0: n_embd / n_head", at_least=0)
    n_inner: int = key(0, "qwen3: width of the MLP; 0: 8/3 n_embd", at_least=0)
    rope_theta: float = key(10_000.0, "qwen3: base of the rotary positions", above=0)
    n_embd: int = key(768, "width of the residual stream", at_least=1)
    block_size: int = key(1024, "context length in tokens", at_least=1)
    dropout: float = key(0.0, "probability; 0 is usual for pretraining", at_least=0, below=1)
    bias: bool = key(True, "gpt2: biases in linear layers and layer norms")
    tie_weights: bool = key(True, "share the token embedding with the output head")
    # "block" keeps each block's input and recomputes the rest in the backward pass: about a third
    # more work.
    activation_checkpointing: str = key("none", "save memory, recompute activations", ("none", "block"))
    # 7 % of a step of GPT-2 124M on a GPU goes into moving float32 ones. Additions round to 8 bits.
    residual_dtype: str = key("float32", "of the residual stream", ("float32", "autocast"))
    init_from: str = key("", "start from these weights: a folder or hf:ORG/NAME")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = key("adamw", "muon: for the blocks' matrices", ("adamw", "muon"))
    lr: float = key(6e-4, "peak learning rate, after schedule.warmup_steps", above=0)
    min_lr: float = key(6e-5, "learning rate from schedule.decay_steps on", at_least=0)
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's decay rates of the two moments", at_least=0, below=1)
    weight_decay: float = key(0.1, "for matrices; biases and gains have none", at_least=0)
    grad_clip: float = key(1.0, "largest global gradient norm; 0: no clipping", at_least=0)


@dataclass(frozen=True)
class ScheduleConfig:
    kind: str = key("cosine", "after the warmup", ("cosine", "wsd"))
    warmup_steps: int = key(2000, "steps of linear warmup", at_least=0)
    decay_steps: int = key(0, "step that reaches min_lr; 0: train.max_steps", at_least=0)
    cooldown_steps: int = key(0, "linear end of wsd; 0: a fifth of max_steps", at_least=0)


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = key(600_000, "optimizer steps of the whole run", at_least=1)
    # Without evaluations and saves; of what was lost by a kill, nothing counts.
    max_minutes: float = key(0.0, "minutes of training, all starts together; 0: no limit", at_least=0)
    tokens_per_step: int = key(524_288, "tokens of one optimizer step, all ranks", at_least=1)
    # Set by memory, not by learning: accumulation makes up the rest of tokens_per_step.
    micro_batch_size: int = key(16, "sequences of one forward pass, each rank", at_least=1)
    # Steps that are skipped: a loss or gradient that is not finite, or a spike.
    max_bad_steps: int = key(20, "skipped steps in a row before the run gives up", at_least=1)
    # Standard deviations above the mean of the last gradient norms; until there are spike_window,
    # none is skipped.
    spike_z_score: float = key(0.0, "skip gradients so many deviations above; 0: off", at_least=0)
    spike_window: int = key(128, "last gradient norms that a new one is compared with", at_least=2)


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = key(1000, "steps between evaluations; 0: none", at_least=0)
    # For each dataset of a mixture, over all ranks, spread over the split in whole windows.
    # Not in micro-batches: the loss must not depend on what the memory has room for.
    tokens: int = key(2_621_440, "tokens of an evaluation; 0: the whole split", at_least=0)
    sample_prompt: str = key("", "text to continue at each evaluation")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = key(1000, "steps between checkpoints; the last step has one", at_least=1)
    keep: int = key(3, "newest checkpoints kept, besides the best", at_least=1)
    # Saved at these steps too where every_steps does not divide them.
    keep_every_steps: int = key(0, "steps between checkpoints kept for good", at_least=0)
    # auto resumes where there is a checkpoint; must refuses to start from scratch, never refuses to
    # resume.
    resume: str = key("auto", "auto, must, never, or a name such as step_00001000")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = key(10, "steps between rows of metrics.jsonl", at_least=1)
    tensorboard: bool = key(True, "write TensorBoard files to the run's tb/")
    # Each gets its rows through a process that a run does not wait for.
    also: tuple[str, ...] = key((), "more places for rows: ['wandb', 'trackio', 'mlflow']")
    # A trace grows by megabytes a step.
    profile_steps: int = key(0, "steps to trace, from a start's third on; 0: none", at_least=0, below=101)


@dataclass(frozen=True)
class ParallelConfig:
    # ddp: every rank holds the whole model; fsdp shards weights, gradients and optimizer state over
    # all ranks, hsdp over those of a node.
    strategy: str = key("ddp", "how ranks share the model", ("ddp", "fsdp", "hsdp"))
    # From the second step on; start-up and the first one, which may compile, have half an hour at least.
    timeout_s: float = key(300.0, "seconds that ranks wait for a late one", above=0)
    check_every_steps: int = key(1000, "steps between comparing weights; 0: at start", at_least=0)


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def datasets(self) -> tuple[WeightedDataset, ...]:
        """What the run trains on: `data.mixture`, or `data.dataset` alone."""
        return self.data.mixture or (WeightedDataset(self.data.dataset, 1.0),)

    def dataset_dir(self, dataset: str) -> Path:
        """A name under data.data_dir wins over a path, so that a stray folder cannot take a
        dataset's place.
        """
        named = Path(self.data.data_dir) / dataset
        return Path(dataset) if not named.is_dir() and Path(dataset).is_dir() else named

    @property
    def decay_steps(self) -> int:
        return self.schedule.decay_steps or self.train.max_steps

    @property
    def cooldown_steps(self) -> int:
        """Of wsd: at most all that the warmup leaves, so that a run may be shortened by its steps alone."""
        wanted = self.schedule.cooldown_steps or self.train.max_steps // 5
        return max(0, min(wanted, self.decay_steps - self.schedule.warmup_steps))


SECTIONS: dict[str, type] = {section.name: section.type for section in fields(Config)}  # type: ignore[misc]
KEYS: dict[str, Any] = {f"{name}.{entry.name}": entry for name, kind in SECTIONS.items() for entry in fields(kind)}


def help_rows(section: str) -> Iterator[tuple[str, str]]:
    """For `pipeline train --help`: `name=default` of each key of a section, as it is typed, and its
    line.
    """
    for entry in fields(SECTIONS[section]):
        default = entry.default if isinstance(entry.default, str) else json.dumps(entry.default)
        choices = ", ".join(entry.metadata["choices"])
        yield f"{entry.name}={default}", entry.metadata["text"] + (f" ({choices})" if choices else "")
