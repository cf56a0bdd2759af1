"""What was measured: a few steps on this machine, and a run that has been trained."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from observe.plan.figures import Plan
from pipeline.budget import checkpoint_bytes, flops_per_token, most_checkpoints, newton_schulz_flops
from pipeline.checkpoint.pointers import checkpoint_folders
from pipeline.errors import UserError
from pipeline.machine.gpus import CPU, cores_here, kind_of
from pipeline.runs import RunFolder

BUDGET_S = 10.0


def comparisons(plan: Plan, run: RunFolder) -> list[tuple[str, str, float, float | None]]:
    """Key and label of a figure, planned and measured, None where the run did not record it."""
    found, tokens, step_s = run.summary(), plan.config.train.tokens_per_step, plan.time.total_s
    took_s = tokens / found.tokens_per_s if found.tokens_per_s else None
    steps = max(0, found.step - plan.first_step)
    trained_s = found.trained_s or (took_s and took_s * steps)
    sizes = [_size_of(folder) for folder in checkpoint_folders(run.checkpoints)]
    size, most = checkpoint_bytes(plan.config, plan.vocab_size), most_checkpoints(plan.config)
    return [
        ("step_s", "step", step_s, took_s),
        ("tokens_per_s", "tokens a second", tokens / step_s, found.tokens_per_s),
        ("hours", f"hours of {steps:,} steps", steps * step_s / 3600, trained_s and trained_s / 3600),
        ("memory_bytes", "memory a rank", plan.memory.total, found.memory_bytes),
        ("checkpoint_bytes", "checkpoint", size, sizes[-1] if sizes else None),
        ("disk_bytes", "disk", most * size, sum(sizes)),
    ]


def _size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files; 0 where the run removes it meanwhile."""
    with suppress(OSError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def measure(plan: Plan) -> tuple[float, float]:
    """Seconds that the micro-batches of a step, and its update, take one rank here, in about ten
    seconds. Raises UserError unless this machine is what the plan is for.
    """
    import torch

    from pipeline.machine.device import DTYPES, autocast, device_name, pick_device

    device = pick_device(plan.config.run.device)
    here = kind_of(device_name(device)) if device.type == "cuda" else device.type
    if here != plan.hardware.device.kind:
        raise UserError(
            f"--measure measures this machine, {here or device_name(device)}, not {plan.hardware}: set --on to it"
        )
    if here == CPU:
        torch.set_num_threads(max(1, cores_here() // plan.hardware.ranks))
    (model, optimizer), setting = _model(plan, device), plan.footprint.setting
    dtype = DTYPES[setting.dtype]

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def micro_batch() -> None:
        ids = torch.randint(plan.vocab_size, (size, plan.config.model.block_size), device=device)
        with autocast(device, dtype):
            loss = model(ids, ids)
        loss.backward()

    size, began = 1, time.perf_counter()
    one_s = min(seconds(micro_batch) for _ in range(2))  # the first one compiles, or warms up
    # As many sequences as take a fifth of the time: that of a micro-batch grows with its size.
    size = max(1, min(plan.config.train.micro_batch_size, int(BUDGET_S / 5 / one_s)))
    for work in (micro_batch, optimizer.step):  # both allocate
        seconds(work)
    update_s, times = seconds(optimizer.step), [seconds(micro_batch)]
    while time.perf_counter() - began < BUDGET_S:
        times.append(seconds(micro_batch))
    typical_s = sorted(times)[len(times) // 2]
    # Measured with AdamW: the products that Muon adds take as long as the micro-batch's.
    flops = size * plan.config.model.block_size * flops_per_token(plan.config.model, plan.vocab_size)
    update_s += newton_schulz_flops(plan.config) / plan.hardware.ranks / flops * typical_s
    return setting.accumulation * typical_s * plan.config.train.micro_batch_size / size, update_s


def _model(plan: Plan, device: Any) -> tuple[Any, Any]:
    """Random weights and their optimizer, as training has them on one rank."""
    import torch

    from pipeline.machine.device import check_memory
    from pipeline.model.language_model import LanguageModel

    check_memory(device, plan.memory.weights * 4, "weights, gradients and optimizer state", "measure a smaller model")
    with torch.device(device):
        model = LanguageModel(plan.config.model, plan.vocab_size)
    if plan.footprint.setting.compiled:
        model.compile_blocks()
    return model, torch.optim.AdamW(model.parameters(), fused=True)
