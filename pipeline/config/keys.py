"""Every config key, with its default and its sentence of help. No torch."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

CHECKPOINT_NAME = re.compile(r"step_\d{8,}")
T = TypeVar("T")


def key(default: T, text: str, choices: tuple[T, ...] = ()) -> T:
    """A config key: its default, its one sentence for `--help`, and the values it may take where that is a short list."""
    return field(default=default, metadata={"text": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    name: str = key("", "the run's folder under run.dir; the config's own name when empty")
    dir: str = key("runs", "where runs live")
    seed: int = key(1337, "initial weights, order of the data, dropout: all follow from it")
    device: str = key("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    dtype: str = key(
        "auto",
        "the autocast type; weights stay float32. auto: bfloat16 where the hardware multiplies it",
        ("auto", "float32", "bfloat16", "float16"),
    )
    compile: str = key("auto", "torch.compile: auto (CUDA with Triton), on or off", ("auto", "on", "off"))


@dataclass(frozen=True)
class WeightedDataset:
    """One entry of `data.mixture`. Weights count against each other: 7 and 3 are 0.7 and 0.3."""

    dataset: str
    weight: float


@dataclass(frozen=True)
class DataConfig:
    dataset: str = key("openwebtext", "a name under data.data_dir, or a path to a prepared dataset")
    data_dir: str = key("data", "where prepared datasets live")
    mixture: tuple[WeightedDataset, ...] = key(
        (),
        'several datasets in the place of data.dataset: [{dataset = "a", weight = 0.7}, {dataset = "b", weight = 0.3}]',
    )
    document_mask: bool = key(
        False,
        "attention stays inside a document, and positions restart with it; slower, as no flash kernel takes a mask",
    )


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are GPT-2 124M (Radford et al. 2019)."""

    arch: str = key("gpt2", "the architecture", ("gpt2",))
    n_layer: int = key(12, "transformer blocks")
    n_head: int = key(12, "attention heads; divides n_embd")
    n_embd: int = key(768, "width of the residual stream")
    block_size: int = key(1024, "context length in tokens")
    dropout: float = key(0.0, "probability, on embeddings, attention and residual branches; 0 for pretraining")
    bias: bool = key(True, "biases in the linear layers and layer norms, as GPT-2 has them")
    tie_weights: bool = key(True, "one matrix for the token embedding and the output head")
    activation_checkpointing: str = key(
        "none",
        "block: keep each block's input only, and compute it again in the backward pass: less memory, a third more work",
        ("none", "block"),
    )
    init_from: str = key(
        "", "start from the weights of this checkpoint, Hugging Face GPT-2 folder or hf:ORG/NAME[@REVISION]"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = key("adamw", "the optimizer", ("adamw",))
    lr: float = key(6e-4, "peak learning rate, reached after schedule.warmup_steps")
    min_lr: float = key(6e-5, "learning rate from schedule.decay_steps on")
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's averaging factors")
    weight_decay: float = key(0.1, "on matrices only: biases, gains are left alone")
    grad_clip: float = key(1.0, "largest global gradient norm; 0 turns clipping off")


@dataclass(frozen=True)
class ScheduleConfig:
    kind: str = key("cosine", "linear warmup, then cosine decay", ("cosine",))
    warmup_steps: int = key(2000, "steps of linear warmup")
    decay_steps: int = key(0, "the step at which min_lr is reached; 0 stands for train.max_steps")


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = key(600_000, "optimizer steps in the whole run")
    tokens_per_step: int = key(524_288, "tokens of one optimizer step over all ranks")
    micro_batch_size: int = key(
        16, "sequences one rank takes through the model at once: set by memory, not by learning"
    )
    max_bad_steps: int = key(
        20,
        "skipped steps in a row, for a loss or gradient that is not finite or for a spike, before the run gives up",
    )
    spike_z_score: float = key(
        0.0,
        "skip a step whose gradient norm is more than this many standard deviations above the mean of the last ones; "
        "0 turns that off",
    )
    spike_window: int = key(
        128,
        "how many of the last gradient norms a new one is compared with; until there are that many, none is skipped",
    )


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = key(1000, "steps between evaluations on the val split; 0 turns them off")
    batches: int = key(
        160,
        "micro-batches of one evaluation over all ranks, spread over the split, for each dataset of a mixture; "
        "0 takes the whole split",
    )
    sample_prompt: str = key(
        "", "at each evaluation, go on from this text for some tokens, in the log and TensorBoard; off when empty"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = key(1000, "steps between checkpoints; the last step is saved in any case")
    keep: int = key(3, "newest checkpoints kept, besides the best one")
    resume: str = key(
        "auto",
        "auto: go on from the newest whole checkpoint; must: and refuse to start anew; never: refuse to go on; "
        "or a folder's name, such as step_00001000: go on from exactly that one",
    )


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = key(10, "steps between rows of metrics.jsonl")
    tensorboard: bool = key(True, "write TensorBoard files to the run's tb/")


@dataclass(frozen=True)
class ParallelConfig:
    strategy: str = key(
        "ddp",
        "ddp: every rank holds the whole model; fsdp: weights, gradients and optimizer state are cut up over the ranks; "
        "hsdp: cut up inside a node, copied over the nodes",
        ("ddp", "fsdp", "hsdp"),
    )
    check_every_steps: int = key(
        1000, "steps between checks that all ranks hold the same weights; 0: at the start only"
    )


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
        """A name under data.data_dir wins over a path, so that a stray folder cannot take a dataset's place."""
        named = Path(self.data.data_dir) / dataset
        return Path(dataset) if not named.is_dir() and Path(dataset).is_dir() else named

    @property
    def decay_steps(self) -> int:
        return self.schedule.decay_steps or self.train.max_steps


SECTIONS: dict[str, type] = {section.name: section.type for section in fields(Config)}  # type: ignore[misc]


def help_text() -> str:
    """Every key with its default and its sentence, for `pipeline train --help`."""
    lines = ["Keys:"]
    for section, kind in SECTIONS.items():
        for entry in fields(kind):
            lines.append(f"{section}.{entry.name}={json.dumps(entry.default)}  {entry.metadata['text']}")
    return "\n\n".join(lines)
