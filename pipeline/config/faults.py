"""What can be wrong with the values of a config, one at a time and together."""

from dataclasses import fields

from pipeline.config.keys import CHECKPOINT_NAME, Config

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


def inconsistencies(config: Config) -> list[str]:
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
