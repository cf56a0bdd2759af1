"""What a run will need, as figures: each with how it is known and what it rests on. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from observe.tables import format_count
from pipeline import budget
from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import KEYS, Config
from pipeline.dataset.mixture import Mixture
from pipeline.machine.gpus import Hardware
from pipeline.model.footprint import Memory

GPT2_VOCABULARY = 50_257
MOST_EPOCHS = 10
# Tokens a parameter where a budget of FLOPs gives the lowest loss (Hoffmann et al. 2022, table 3).
OPTIMAL_TOKENS = 20
# Host memory of a process beside its tensors, with torch and CUDA's libraries: assumed.
PROCESS_BYTES, CPU_PROCESS_BYTES = 3.0e9, 0.5e9
START_S = 300  # of each SLURM job: start-up, compiling, the last save


class Mark(StrEnum):
    """How a figure is known."""

    COUNTED = "counted"
    FORMULA = "formula"
    ASSUMED = "assumed"
    MEASURED = "measured"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Figure:
    """`key` in --json, where the value stands as it is; `note`: what it is made of, or rests on."""

    key: str
    label: str
    value: Any
    mark: Mark
    note: str = ""


@dataclass(frozen=True)
class Way:
    """One way to share the model's memory, and what it takes of a rank."""

    strategy: str
    recomputes: bool
    memory: Memory
    largest: int


@dataclass
class Plan:
    """A run on some hardware. `config` has the nearest batch that divides; `first_step` is above 0
    in a branch; `micro_s` was measured, for all of a step's micro-batches, with `update_s`.
    """

    wanted: Config
    hardware: Hardware
    mixture: Mixture | None = None
    price_per_gpu_hour: float | None = None
    time_limit_s: int | None = None
    first_step: int = 0
    measured: tuple[float, float] | None = None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = budget.nearest_batch(self.wanted, self.hardware.ranks)
        self.vocab_size = GPT2_VOCABULARY if self.mixture is None else self.mixture.tokenizer["vocab_size"]
        self.footprint = budget.footprint(self.config, self.vocab_size, budget.setting(self.config, self.hardware))
        self.memory = self.footprint.memory()
        self.time = budget.step_time(self.footprint, self.hardware, self.vocab_size)
        if self.measured:
            compute_s, update_s = self.measured
            self.time = replace(self.time, compute_s=compute_s, traffic_s=0.0, launch_s=0.0, update_s=update_s)

    @property
    def steps(self) -> int:
        return max(0, self.config.train.max_steps - self.first_step)

    @property
    def tokens(self) -> int:
        return self.steps * self.config.train.tokens_per_step

    @property
    def fits(self) -> bool:
        return self.memory.total <= budget.usable_bytes(self.hardware)

    def way(self, strategy: str, recomputes: bool) -> Way:
        """The same run with another strategy, with or without recomputing blocks."""
        config = replace(
            self.config,
            parallel=replace(self.config.parallel, strategy=strategy),
            model=replace(self.config.model, activation_checkpointing="block" if recomputes else "none"),
        )
        memory = budget.footprint(config, self.vocab_size, budget.setting(config, self.hardware)).memory()
        return Way(strategy, recomputes, memory, self.largest_micro_batch(config))

    def ways(self) -> Iterator[Way]:
        """Every one of them; a single rank shares with nobody, so the configured strategy stands for all."""
        strategies = KEYS["parallel.strategy"].metadata["choices"]
        for strategy in strategies if self.hardware.ranks > 1 else [self.config.parallel.strategy]:
            for recomputes in (False, True):
                yield self.way(strategy, recomputes)

    def largest_micro_batch(self, config: Config) -> int:
        """The most sequences that fit, up to a rank's part of a step; 0 if not even one does."""
        most = config.train.tokens_per_step // config.model.block_size // self.hardware.ranks
        shared = budget.setting(config, self.hardware)

        def total(size: int) -> int:
            of_size = replace(config, train=replace(config.train, micro_batch_size=size))
            step = budget.footprint(of_size, self.vocab_size, replace(shared, accumulation=max(1, most // size)))
            return step.memory().total

        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle) <= budget.usable_bytes(self.hardware) else (low, middle - 1)
        return low


def of_model(plan: Plan) -> Iterator[Figure]:
    model, vocab_size = plan.config.model, plan.vocab_size
    total, flops = budget.parameters(model, vocab_size), budget.flops_per_token(model, vocab_size)
    rows = vocab_size + len(layout_of(model).position_rows) * model.block_size
    shape = f"{model.n_layer} layers of width {model.n_embd}, {model.n_head} heads, vocabulary {vocab_size:,}"
    yield Figure("parameters", "parameters", total, Mark.COUNTED, note=shape)
    without = total - rows * model.n_embd
    yield Figure("parameters_without_embeddings", "  without embeddings", without, Mark.COUNTED)
    note = "forward and backward: 6 for each multiplied weight, 12 L C T for attention (Chowdhery et al. 2022)"
    yield Figure("flops_per_token", "FLOPs a token", flops, Mark.FORMULA, note=note)
    yield Figure("flops", "FLOPs in all", flops * plan.tokens, Mark.FORMULA, note="without recomputation")


def of_batch(plan: Plan) -> Iterator[Figure]:
    train, ranks = plan.config.train, plan.hardware.ranks
    factors = (
        f"{train.micro_batch_size} sequences x {plan.config.model.block_size} x "
        f"{budget.accumulation_steps(plan.config, ranks)} accumulated x {ranks} rank(s)"
    )
    yield Figure("tokens_per_step", "tokens a step", train.tokens_per_step, Mark.COUNTED, note=factors)
    begun = f"from step {plan.first_step:,}, where it branches" if plan.first_step else ""
    yield Figure("steps", "steps", plan.steps, Mark.COUNTED, note=begun)
    yield Figure("tokens", "tokens", plan.tokens, Mark.COUNTED)
    if plan.mixture is None:
        yield Figure("epochs", "epochs", None, Mark.UNKNOWN, note="no dataset")
    else:
        progress = plan.mixture.progress(plan.tokens // plan.config.model.block_size)
        each = {name: epochs for name, (_, epochs) in progress.items()}
        note = ", ".join(f"{epochs:,.2f} of {name}" for name, epochs in each.items())
        yield Figure("epochs", "epochs", round(max(each.values()), 4), Mark.COUNTED, note=note)
    total = budget.parameters(plan.config.model, plan.vocab_size)
    flops = budget.flops_per_token(plan.config.model, plan.vocab_size)
    note = f"about {OPTIMAL_TOKENS} are compute-optimal (Hoffmann et al. 2022)"
    yield Figure("tokens_per_parameter", "tokens a parameter", round(plan.tokens / total, 4), Mark.COUNTED, note=note)
    # C = 6 N D with D = 20 N; the FLOPs of attention go with those of the weights.
    optimal = math.sqrt(flops * plan.tokens / 6 / OPTIMAL_TOKENS)
    note = f"these FLOPs' best model, by that rule, on {format_count(OPTIMAL_TOKENS * optimal)} tokens"
    yield Figure("compute_optimal_parameters", "  optimal parameters", round(optimal), Mark.FORMULA, note=note)


def of_memory(plan: Plan) -> Iterator[Figure]:
    device, wanted = plan.hardware.device, plan.config
    recomputing = replace(wanted, model=replace(wanted.model, activation_checkpointing="block"))
    fits, more = plan.largest_micro_batch(wanted), plan.largest_micro_batch(recomputing)
    note = f"sequences, at {budget.USABLE:.0%} of {device.memory_bytes / 1e9:,.0f} GB"
    yield Figure("largest_micro_batch_size", "largest micro-batch", fits, Mark.FORMULA, note=note)
    saved = plan.memory.total - plan.way(wanted.parallel.strategy, recomputes=True).memory.total
    note = f"saves {saved / 1e9:,.2f} GB as configured, for a third more compute"
    label = "  with recomputation"
    yield Figure("largest_micro_batch_size_with_recomputation", label, more, Mark.FORMULA, note=note)
    here = plan.hardware.per_node
    copy = budget.checkpoint_bytes(wanted, plan.vocab_size)
    process = CPU_PROCESS_BYTES + plan.memory.total if device.is_cpu else PROCESS_BYTES
    note = f"of the first node: {here} process(es), and a copy of the checkpoint being saved"
    yield Figure("host_memory_bytes", "host memory", round(here * process + copy), Mark.ASSUMED, note=note)
    yield Figure("checkpoint_bytes", "checkpoint", copy, Mark.COUNTED, note="float32 weights and moments")
    kept = budget.most_checkpoints(wanted)
    yield Figure("disk_bytes", "disk", kept * copy, Mark.COUNTED, note=f"{kept} checkpoints at a time, at most")


def of_time(plan: Plan) -> Iterator[Figure]:
    config, hardware, time = plan.config, plan.hardware, plan.time
    known = Mark.MEASURED if plan.measured else Mark.ASSUMED
    step_s, tokens = time.total_s, config.train.tokens_per_step
    parts = {"FLOPs": time.compute_s, "memory traffic": time.traffic_s}
    if plan.measured:
        parts = {"forward and backward": time.compute_s}
    elif time.launch_s > time.compute_s + time.traffic_s:
        parts = {"launching kernels": time.launch_s}
    parts |= {"update": time.update_s, "exchange": time.exposed_s}
    note = " + ".join(f"{name} {format_seconds(part)}" for name, part in parts.items())
    yield Figure("step_s", "step", step_s, known, note=note)
    yield Figure("tokens_per_s", "tokens a second", round(tokens / step_s), known)
    flops = budget.flops_per_token(config.model, plan.vocab_size)
    mfu = tokens * flops / step_s / (hardware.ranks * hardware.device.flops)
    peak = f"of {hardware.device.flops / 1e12:,.4g} TFLOP/s a rank: {hardware.device.source}"
    yield Figure("mfu", "MFU", round(mfu, 4), known, note=peak)
    evaluations = plan.steps // config.eval.every_steps if config.eval.every_steps else 0
    split = sum(source.manifest.count("val", "tokens") for source in plan.mixture.sources) if plan.mixture else 0
    evaluation_s = (config.eval.tokens or split) / tokens * time.forward_backward_s / 3
    hours = (plan.steps * step_s + evaluations * evaluation_s) / 3600
    note = f"{evaluations:,} evaluations included, a third of the work a token"
    yield Figure("hours", "hours", hours, known, note=note)
    on_gpus = 0.0 if hardware.device.is_cpu else hours * hardware.ranks
    yield Figure("gpu_hours", "GPU-hours", on_gpus, known)
    if (price := plan.price_per_gpu_hour) is None:
        yield Figure("price", "price", None, Mark.UNKNOWN, note="state a rate with --price-per-gpu-hour")
    else:
        yield Figure("price", "price", on_gpus * price, known, note=f"at {price:g} a GPU-hour")
    limit_s = plan.time_limit_s or 24 * 3600
    jobs = math.ceil(hours * 3600 / max(limit_s - START_S, 1))
    note = f"of {limit_s / 3600:g} hours each, {START_S // 60} minutes of them to start and to save"
    yield Figure("jobs", "SLURM jobs", jobs, known, note=note)


def figures(plan: Plan) -> dict[str, list[Figure]]:
    """All of them, by section."""
    parts = {"Model": of_model, "Batch": of_batch, "Memory": of_memory, "Time": of_time}
    return {title: list(part(plan)) for title, part in parts.items()}


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on that nobody has counted."""
    device, step = plan.hardware.device, plan.footprint.setting
    lines = [
        f"{device.kind}: {device.flops / 1e12:,.4g} TFLOP/s, {device.bandwidth / 1e12:.3g} TB/s, "
        f"{device.memory_bytes / 1e9:,.0f} GB ({device.source})",
        f"{1 - budget.USABLE:.0%} of the memory is not for tensors: context, NCCL, gaps between blocks",
        "memory: PyTorch's peak of allocated bytes, in steps after the first one",
    ]
    if plan.measured:
        lines.append("time: measured here on one rank, without others; the exchange between ranks is by formula")
    else:
        parts = f"products reach {budget.MATRICES_REACH:.0%} of the peak, attention {budget.ATTENTION_REACHES:.0%}"
        moved = f"memory {budget.BANDWIDTH_REACHED:.0%}, links {budget.LINK_REACHED:.0%}"
        known = "the peak of a CPU is a guess: --measure measures"
        if not device.is_cpu:
            known = "so public runs of GPT-2 124M on 8 H100 and 8 A100 take what they took, within a tenth"
        lines.append(f"time: {parts}, {moved}; {known}")
    if plan.hardware.ranks > 1 and not device.is_cpu:
        lines.append(
            f"links: {device.link / 1e9:,.0f} GB/s a GPU in a node of {device.node}, {device.net / 1e9:g} GB/s between nodes"
        )
    if step.compiled:
        lines.append("torch.compile works, and keeps what Inductor kept for GPT-2 in a trace")
    if plan.mixture is None:
        lines.append(f"vocabulary of GPT-2, {GPT2_VOCABULARY:,} tokens, as there is no dataset")
    return lines


def format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:,.3g} ms"
    return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
