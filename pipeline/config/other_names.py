"""What other programs call our keys, presets and models: for "did you mean", and for the table in
README.md.

Only names that differ from ours are listed: `n_layer` is `model.n_layer`, and is found without a
table.
"""

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.keys import KEYS

NANOGPT = {
    "out_dir": "run.dir", "wandb_run_name": "run.name", "eval_interval": "eval.every_steps",
    "eval_iters": "eval.batches", "log_interval": "log.every_steps", "batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.tokens_per_step", "max_iters": "train.max_steps",
    "learning_rate": "optimizer.lr", "beta1": "optimizer.betas", "beta2": "optimizer.betas",
    "warmup_iters": "schedule.warmup_steps", "lr_decay_iters": "schedule.decay_steps", "decay_lr": "optimizer.min_lr",
}  # fmt: skip
# Of Hugging Face's TrainingArguments and model configs, and of LitGPT.
OTHERS = {
    "output_dir": "run.dir", "run_name": "run.name", "per_device_train_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.tokens_per_step", "num_train_epochs": "train.max_steps", "steps": "train.max_steps",
    "optim": "optimizer.name", "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas",
    "max_grad_norm": "optimizer.grad_clip", "max_norm": "optimizer.grad_clip", "lr_scheduler_type": "schedule.kind",
    "lr_warmup_steps": "schedule.warmup_steps", "eval_steps": "eval.every_steps",
    "save_steps": "checkpoint.every_steps", "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep", "resume_from_checkpoint": "checkpoint.resume",
    "logging_steps": "log.every_steps", "bf16": "run.dtype", "fp16": "run.dtype", "precision": "run.dtype",
    "torch_compile": "run.compile", "gradient_checkpointing": "model.activation_checkpointing",
    "num_hidden_layers": "model.n_layer", "num_attention_heads": "model.n_head", "hidden_size": "model.n_embd",
    "n_positions": "model.block_size", "n_ctx": "model.block_size", "max_position_embeddings": "model.block_size",
    "context_length": "model.block_size", "resid_pdrop": "model.dropout", "tie_word_embeddings": "model.tie_weights",
    "model_name_or_path": "model.init_from", "initial_checkpoint_dir": "model.init_from",
}  # fmt: skip
OTHER_NAMES = NANOGPT | OTHERS
# What the value has to become, where it cannot be taken over.
NOTES = {
    **dict.fromkeys(("beta1", "beta2", "adam_beta1", "adam_beta2"), "[beta1, beta2]"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "global_batch_size"), "sequences of a step over all ranks x block_size"
    ),
    **dict.fromkeys(("bf16", "fp16", "precision"), "float32, bfloat16 or float16"),
    "decay_lr": "equal to optimizer.lr for a constant rate",
    "num_train_epochs": "epochs x tokens of the dataset / train.tokens_per_step",
    "torch_compile": "on", "gradient_checkpointing": "block",
}  # fmt: skip
PRESETS = {
    "gpt2": "gpt2-124m", "gpt2-small": "gpt2-124m", "gpt2-medium": "gpt2-350m", "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m", "train-gpt2": "gpt2-124m", "train-shakespeare-char": "shakespeare-char",
    "shakespeare": "shakespeare-char",
}  # fmt: skip
HUB_MODELS = {name: f"hf:openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def keys_for(name: str) -> list[str]:
    """Our keys for a name without a section, as any program writes it: `learning_rate`,
    `--max-steps`, `n_layer`.
    """
    if _plain(name) in OTHER_NAMES:
        return [OTHER_NAMES[_plain(name)]]
    return [key for key in KEYS if key.partition(".")[2] == _plain(name)]


def did_you_mean(name: str, value: str = "") -> str:
    """For an unknown `section.key`, or a key without a section: what was meant, with `value` where
    that can stay; else what there is.
    """
    section, dot, key = name.partition(".") if "." in name else ("", "", name)
    meant = keys_for(key) or difflib.get_close_matches(name, KEYS, n=1)
    if not meant:
        known = [known for known in KEYS if known.startswith(section + dot)] if dot else []
        return f" (expected one of {', '.join(known)})" if known else " (see pipeline train --help)"
    note = NOTES.get(_plain(key), "")
    return f" (did you mean {' or '.join(key + (value if not note else '') for key in meant)}{note and f': {note}'}?)"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def preset_for(name: str, presets: Iterable[str]) -> str:
    """The preset that is meant by a CONFIG that does not exist, empty where none is near."""
    plain = Path(name).stem.lower().replace("_", "-").replace("gpt-2", "gpt2")
    close = [PRESETS[plain]] if plain in PRESETS else difflib.get_close_matches(plain, presets, n=1, cutoff=0.75)
    return close[0] if close else ""


def hub_hint(name: str) -> str:
    """For a checkpoint that does not exist: the Hub's model of that name."""
    return f" (did you mean {HUB_MODELS[name]}?)" if name in HUB_MODELS else ""


def translated(source: str) -> str:
    """The names that a Python config of nanoGPT assigns, each with our key. The file is parsed and
    never run.
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):
        statements = []
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name) and keys_for(target.id)]
    return ", ".join(f"{name} -> {keys_for(name)[0]}" for name in names or NANOGPT)
