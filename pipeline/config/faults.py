"""What can be wrong with the values of a config, one at a time and together."""

import math
import operator
import re
from dataclasses import Field
from typing import Any

from pipeline.config.keys import CHECKPOINT_NAME, KEYS, TRACKERS, Config, ModelConfig, WeightedDataset

RUN_NAME = re.compile(r"[\w-][\w.-]{0,63}")  # becomes a folder: "." would hide it, ".." lead elsewhere
COMPARE = {">=": operator.ge, ">": operator.gt, "<": operator.lt}
TYPE_NAMES: dict[Any, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", tuple[float, float]: "two numbers",
    tuple[str, ...]: f"a list of any of {', '.join(TRACKERS)}",
    tuple[WeightedDataset, ...]: 'datasets with weights, such as [{dataset = "a", weight = 0.7}]',
}  # fmt: skip


def expected(entry: "Field[Any]") -> str:
    """What a key's value has to be: one of a few, or a type and its bounds."""
    if choices := entry.metadata["choices"]:
        return f"one of {', '.join(choices)}"
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in entry.metadata["bounds"].items())
    return f"{TYPE_NAMES[entry.type]} {bounds}".rstrip()


def fits(entry: "Field[Any]", value: Any) -> bool:
    """Whether a value of the right type is one that the key may take."""
    choices, bounds = entry.metadata["choices"], entry.metadata["bounds"]
    if choices:
        return value in choices
    numbers = value if isinstance(value, tuple) else (value,)
    # NaN compares false with everything; neither TOML nor JSON has a form for infinity that the
    # other one reads.
    return not bounds or all(
        number < math.inf and all(COMPARE[sign](number, bound) for sign, bound in bounds.items()) for number in numbers
    )


def inconsistencies(config: Config) -> list[str]:
    """Faults of single values, then of values that do not go together."""
    faults = []
    for name, entry in KEYS.items():
        value = operator.attrgetter(name)(config)
        if not fits(entry, value):
            faults.append(f"{name}={shown(value)}: expected {expected(entry)}")
    return [*faults, *_contradictions(config)]


def shown(value: Any) -> str:
    """A value as it stands in an error."""
    return repr(list(value) if isinstance(value, tuple) else value)


def _contradictions(config: Config) -> list[str]:
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    faults = [
        f"data.mixture gives {source.dataset!r} the weight {source.weight}: expected a number > 0"
        for source in config.data.mixture
        if not 0 < source.weight < math.inf
    ]
    # Each only where the single values are valid: one mistake is reported once.
    if model.n_head > 0 and not model.head_dim and model.n_embd % model.n_head:
        faults.append(f"model.n_embd={model.n_embd} is not a multiple of model.n_head={model.n_head}")
    elif model.n_head > 0 and min(model.n_kv_head, model.head_dim, model.n_inner) >= 0:
        faults += _unfit_heads(model)
    if 0 < optimizer.lr < optimizer.min_lr:
        faults.append(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if 0 < schedule.decay_steps < schedule.warmup_steps:
        warmup, decay = schedule.warmup_steps, schedule.decay_steps
        faults.append(f"schedule.warmup_steps={warmup} is above schedule.decay_steps={decay}")
    if set(config.log.also).difference(TRACKERS):
        faults.append(f"log.also={shown(config.log.also)}: expected {expected(KEYS['log.also'])}")
    if config.eval.sample_prompt and not config.eval.every_steps:
        faults.append("eval.sample_prompt needs evaluations, and eval.every_steps=0 turns them off")
    resume = config.checkpoint.resume
    if resume not in ("auto", "must", "never") and not CHECKPOINT_NAME.fullmatch(resume):
        faults.append(f"checkpoint.resume={resume!r}: expected auto, must, never or a name such as step_00001000")
    if (name := config.run.name) and not RUN_NAME.fullmatch(name):
        faults.append(f"run.name={name!r}: expected letters, digits, '.', '_' and '-', at most 64 characters")
    return faults


def _unfit_heads(model: ModelConfig) -> list[str]:
    if model.arch == "gpt2":
        # GPT-2's folder has no room for them.
        derived = {"n_kv_head": model.n_head, "head_dim": model.n_embd // model.n_head, "n_inner": 4 * model.n_embd}
        given = {name: getattr(model, name) for name in derived}
        return [
            f"model.{name}={value} needs model.arch=qwen3: gpt2 expects {derived[name]}, or 0 for it"
            for name, value in given.items()
            if value not in (0, derived[name])
        ]
    if model.n_head % model.kv_heads:
        return [f"model.n_head={model.n_head} is not a multiple of model.n_kv_head={model.n_kv_head}"]
    if model.head_width % 2:
        return [
            f"rotary positions expect heads of an even width, got {model.head_width}: change model.head_dim, n_head or n_embd"
        ]
    return []
