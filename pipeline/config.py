"""Every knob of training, on one page and without torch.

A config is TOML, parsed into frozen dataclasses. Precedence, told by example: `lr` is 6e-4 here; a file that says
`lr = 3e-4` under `[optimizer]` wins over that; `optimizer.lr=1e-4` on the command line wins over both. Unknown keys are
refused with the nearest name, and all faults are reported at once.

What a run learns from elsewhere has no key: the vocabulary comes with the dataset, the number of accumulated
micro-batches follows from `train.tokens_per_step` and the number of ranks.
"""

import difflib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pipeline.errors import UserError

DEFAULT_CONFIG = "gpt2-124m"
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
        "consecutive steps with a loss or gradient that is not finite, or rewinds to one checkpoint, before the run gives up",
    )
    spike_z_score: float = key(
        0.0,
        "a gradient norm this many standard deviations above the mean of the last ones sends the run back to its "
        "latest checkpoint, past the samples taken since then; 0 turns that off",
    )
    spike_window: int = key(
        128, "the last gradient norms that a new one is compared with; before there are so many, none is"
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

# The lower bound of each number. Zero has a meaning of its own where it is allowed; the key's sentence says which.
_AT_LEAST = {
    "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 1, "model.block_size": 1, "model.dropout": 0,
    "optimizer.min_lr": 0, "optimizer.weight_decay": 0, "optimizer.grad_clip": 0,
    "schedule.warmup_steps": 0, "schedule.decay_steps": 0,
    "train.max_steps": 1, "train.tokens_per_step": 1, "train.micro_batch_size": 1, "train.max_bad_steps": 1,
    "train.spike_z_score": 0, "train.spike_window": 2, "parallel.check_every_steps": 0,
    "eval.every_steps": 0, "eval.batches": 0, "checkpoint.every_steps": 1, "checkpoint.keep": 1, "log.every_steps": 1,
    "run.seed": 0,
}  # fmt: skip


def from_arguments(arguments: list[str]) -> Config:
    """The config of `[CONFIG] [section.key=value]...`, as every command that trains takes it."""
    name, overrides = DEFAULT_CONFIG, arguments
    if arguments and "=" not in arguments[0]:
        name, *overrides = arguments
    return load(name, overrides)


def load(name_or_path: str, overrides: list[str]) -> Config:
    """The config of a preset's name or a file's path, with `section.key=value` overrides on top.

    Raises UserError that lists every fault found.
    """
    path = find(name_or_path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    faults: list[str] = []
    for override in overrides:
        _apply_override(document, override, faults)
    run = document.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = path.stem
    return from_dict(document, faults)


def from_dict(document: dict[str, Any], faults: list[str] | None = None) -> Config:
    """A checked Config from nested dictionaries. Raises UserError with every fault, those passed in first."""
    faults = [] if faults is None else faults
    sections = {}
    for section, keys in document.items():
        if section not in SECTIONS:
            faults.append(f"unknown section [{section}]{_nearest(section, SECTIONS)}")
        elif not isinstance(keys, dict):
            faults.append(f"{section} is a section, found the value {keys!r}: write [{section}] and keys under it")
        else:
            sections[section] = _section_from_dict(section, keys, faults)
    config = Config(**sections)
    faults += _inconsistencies(config)
    if faults:
        raise UserError("; ".join(faults))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries that JSON can hold; `from_dict` turns them back into an equal Config."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return document


def to_toml(config: Config) -> str:
    """The resolved config as TOML text, every key present."""
    sections = to_dict(config).items()
    return "\n".join(
        f"[{section}]\n" + "".join(f"{name} = {toml_value(value)}\n" for name, value in keys.items())
        for section, keys in sections
    )


def toml_value(value: Any) -> str:
    """What JSON can hold as TOML on one line: the scalars are the same."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # Of what JSON leaves as it is, only the delete character is refused by TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def find(name_or_path: str) -> Path:
    """The file of a config given as a path, or as the name of a preset. Raises UserError with the names there are."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    presets = {preset.stem: preset for preset in sorted(presets_dir().glob("*.toml"))}
    if name_or_path.removesuffix(".toml") in presets:
        return presets[name_or_path.removesuffix(".toml")]
    raise UserError(f"no config {name_or_path!r}: it is neither a file nor one of the presets {', '.join(presets)}")


def presets_dir() -> Path:
    """`configs/` beside the packages in a checkout; inside the package where the wheel is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "configs"


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches each rank accumulates for one optimizer step. Raises UserError with the nearest values that divide."""
    train, block_size = config.train, config.model.block_size
    wanted = train.tokens_per_step
    at_once = train.micro_batch_size * block_size * world_size
    if wanted % at_once == 0:
        return wanted // at_once
    below = wanted // at_once * at_once
    nearest = [str(value) for value in (below, below + at_once) if value]
    per_rank, remainder = divmod(wanted, block_size * world_size)
    micro = [size for size in range(1, per_rank + 1) if per_rank % size == 0] if remainder == 0 else []
    fitting = sorted(micro, key=lambda size: abs(size - train.micro_batch_size))[:2]
    hint = f", or train.micro_batch_size={' or '.join(map(str, sorted(fitting)))}" if fitting else ""
    raise UserError(
        f"train.tokens_per_step={wanted} does not divide: one micro-batch of every rank is micro_batch_size "
        f"{train.micro_batch_size} x block_size {block_size} x {world_size} rank(s) = {at_once} tokens; "
        f"set train.tokens_per_step={' or '.join(nearest)}{hint}"
    )


def _apply_override(document: dict[str, Any], override: str, faults: list[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key_name = name.partition(".")
    if not (equals and dot and key_name):
        faults.append(f"override {override!r} is not of the form section.key=value, such as optimizer.lr=3e-4")
        return
    keys = document.setdefault(section, {})
    if isinstance(keys, dict):
        is_text = section in SECTIONS and get_type_hints(SECTIONS[section]).get(key_name) is str
        keys[key_name] = text if is_text else _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _section_from_dict(section: str, keys: dict[str, Any], faults: list[str]) -> Any:
    kind = SECTIONS[section]
    types = get_type_hints(kind)
    values = {}
    for name, value in keys.items():
        if name not in types:
            faults.append(
                f"unknown key {section}.{name}{_nearest(f'{section}.{name}', [f'{section}.{key}' for key in types])}"
            )
            continue
        try:
            values[name] = _coerce(value, types[name])
        except TypeError:
            faults.append(f"{section}.{name} wants {_type_name(types[name])}, found {value!r}")
    return kind(**values)


def _coerce(value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, without guessing: a bool is no number, text is no number, but 1 is a float."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted in (bool, str, float) and isinstance(value, wanted):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_coerce(part, float) for part in value)
    if wanted == tuple[WeightedDataset, ...] and isinstance(value, list | tuple):
        return tuple(_weighted_dataset(entry) for entry in value)
    raise TypeError


def _weighted_dataset(entry: Any) -> WeightedDataset:
    types = get_type_hints(WeightedDataset)
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise TypeError
    return WeightedDataset(**{name: _coerce(value, types[name]) for name, value in entry.items()})


def _type_name(wanted: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text",
        tuple[float, float]: "two numbers, such as [0.9, 0.95]",
        tuple[WeightedDataset, ...]: 'datasets with weights, such as [{dataset = "a", weight = 0.7}]',
    }  # fmt: skip
    return names[wanted]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else f" (there are: {', '.join(known)})"


def _inconsistencies(config: Config) -> list[str]:
    """Faults of single values, then of values that do not go together."""
    faults = []
    for section in fields(config):
        values = getattr(config, section.name)
        for entry in fields(values):
            name, value = f"{section.name}.{entry.name}", getattr(values, entry.name)
            choices = entry.metadata["choices"]
            if choices and value not in choices:
                faults.append(f"{name}={value!r} is not one of {', '.join(choices)}")
            if name in _AT_LEAST and not value >= _AT_LEAST[name]:
                faults.append(f"{name}={value} is below {_AT_LEAST[name]}")
            elif name in _AT_LEAST and value == float("inf"):
                faults.append(f"{name}=inf is not finite")
    model, optimizer = config.model, config.optimizer
    if model.n_head > 0 and model.n_embd % model.n_head:
        faults.append(f"model.n_embd={model.n_embd} is not a multiple of model.n_head={model.n_head}")
    if not model.dropout < 1:
        faults.append(f"model.dropout={model.dropout} is not below 1")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        faults.append(f"optimizer.betas={list(optimizer.betas)} are not in [0, 1)")
    faults += [
        f"data.mixture gives {source.dataset!r} the weight {source.weight}, which is not a positive number"
        for source in config.data.mixture
        if not 0 < source.weight < float("inf")
    ]
    if not 0 < optimizer.lr < float("inf"):
        faults.append(f"optimizer.lr={optimizer.lr} is not a positive number")
    elif optimizer.min_lr > optimizer.lr:
        faults.append(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if config.schedule.decay_steps and config.schedule.warmup_steps > config.schedule.decay_steps:
        faults.append(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is above schedule.decay_steps={config.schedule.decay_steps}"
        )
    if config.run.seed >= 1 << 63:
        faults.append(f"run.seed={config.run.seed} is above 2**63 - 1")
    if config.eval.sample_prompt and not config.eval.every_steps:
        faults.append("eval.sample_prompt waits for evaluations, and eval.every_steps=0 turns them off")
    resume = config.checkpoint.resume
    if resume not in ("auto", "must", "never") and not CHECKPOINT_NAME.fullmatch(resume):
        faults.append(f"checkpoint.resume={resume!r} is not one of auto, must, never, nor a name such as step_00001000")
    if config.run.name and not _is_plain_name(config.run.name):
        faults.append(f"run.name={config.run.name!r} is not a folder's name: use letters, digits, '.', '_' and '-'")
    return faults


def _is_plain_name(name: str) -> bool:
    return len(name) <= 64 and not name.startswith(".") and all(c.isalnum() or c in "._-" for c in name)


def help_text() -> str:
    """Every key with its default and its sentence, for `pipeline train --help`."""
    lines = ["Keys:"]
    for section, kind in SECTIONS.items():
        for entry in fields(kind):
            lines.append(f"{section}.{entry.name}={json.dumps(entry.default)}  {entry.metadata['text']}")
    return "\n\n".join(lines)
