"""A plan as a page of 80 columns, or as JSON."""

import textwrap
from collections.abc import Iterator
from typing import Any

from observe.plan.figures import Figure, Plan, assumptions, figures, format_count, format_seconds
from observe.plan.measured import Comparison

WIDTH = 80
NOTE_AT = 50  # columns before a figure's note: its label, value and mark
KINDS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "logits": "logits",
    "other": "other",
}  # fmt: skip
BYTES, LARGE = ("checkpoint_bytes", "disk_bytes", "host_memory_bytes"), ("flops", "flops_per_token", "tokens_per_s")


def as_json(plan: Plan, comparisons: list[Comparison]) -> dict[str, Any]:
    """Every figure under its key, and `marks`: how each of them is known."""
    found = [figure for section in figures(plan).values() for figure in section]
    document: dict[str, Any] = {"on": str(plan.hardware), "strategy": plan.config.parallel.strategy}
    document |= {"micro_batch_size": plan.config.train.micro_batch_size, "fits": plan.fits}
    document |= {figure.key: figure.value for figure in found}
    document |= {"memory_per_rank": plan.memory.as_json(), "memory_by_strategy": [
        {"strategy": way.strategy, "activation_checkpointing": "block" if way.recomputes else "none",
         "largest_micro_batch_size": way.largest, **way.memory.as_json()}
        for way in plan.ways()
    ]}  # fmt: skip
    marks = {figure.key: figure.mark.value for figure in found} | {"memory_per_rank": "formula"}
    document |= {"marks": marks, "assumptions": assumptions(plan), "warnings": plan.warnings}
    return document | ({"measured": {row.key: row.measured for row in comparisons}} if comparisons else {})


def page(plan: Plan, comparisons: list[Comparison]) -> Iterator[str]:
    """The lines for people."""
    hardware, step = plan.hardware, plan.footprint.setting
    nodes = f"{hardware.nodes} node{'s' if hardware.nodes > 1 else ''}"
    how = f"{plan.config.parallel.strategy}, {step.dtype}{', compiled' if step.compiled else ''}"
    yield f"{plan.config.run.name} on {hardware.ranks} x {hardware.device.kind} ({nodes}; {how})"
    for title, section in figures(plan).items():
        yield ""
        yield title
        if title == "Memory":
            yield from memory_table(plan)
        for figure in section:
            yield from lines_of(figure)
    if comparisons:
        yield ""
        yield f"{'Planned and measured':<28}{'planned':>14}{'measured':>14}{'ratio':>9}"
        yield from (row.line() for row in comparisons)
    yield ""
    yield "Assumed"
    for line in assumptions(plan):
        yield from folded(line, "  - ")
    for line in plan.warnings:
        yield from folded(line, "warning: ")


def memory_table(plan: Plan) -> Iterator[str]:
    """GB a rank under each strategy, as formula; the configured one is marked."""
    yield f"  {'GB a rank (formula)':<20}" + "".join(f"{title:>8}" for title in ("total", *KINDS.values()))
    for way in plan.ways():
        model, strategy = plan.config.model, plan.config.parallel.strategy
        configured = (way.strategy, way.recomputes) == (strategy, model.activation_checkpointing == "block")
        kinds = way.memory.as_json()
        name = f"{'*' if configured else ' '} {way.strategy}{', recompute' if way.recomputes else ''}"
        yield f"{name:<22}" + "".join(f"{format_gigabytes(kinds[kind]):>8}" for kind in ("total", *KINDS))
    if plan.hardware.ranks > 1 and plan.footprint.setting.accumulation > 1:
        yield "  Each rank of fsdp and hsdp has all gradients until a step's last micro-batch."
    if plan.memory.overlap:
        note = (
            f"total is the peak: {plan.memory.overlap / 1e9:,.2f} GB are never there together, as activations go while "
        )
        yield from folded(note + "gradients come", "  ")


def lines_of(figure: Figure) -> Iterator[str]:
    notes = textwrap.wrap(figure.note, WIDTH - NOTE_AT) or [""]
    yield f"  {figure.label:<22}{format_figure(figure):>15} {figure.mark:<9} {notes[0]}".rstrip()
    yield from (" " * NOTE_AT + note for note in notes[1:])


def format_figure(figure: Figure) -> str:
    """The value with its unit."""
    match figure.value:
        case None:
            return "unknown"
        case value if figure.key in BYTES:
            return f"{value / 1e9:,.2f} GB"
        case value if figure.key in LARGE:
            return format_count(value)
        case value if figure.key == "step_s":
            return format_seconds(value)
        case value if figure.key == "mfu":
            return f"{value:.1%}"
        case int() as value:
            return f"{value:,}"
        case value:
            return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def format_gigabytes(size: int) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:.3f}" if gigabytes < 1 else f"{gigabytes:.2f}" if gigabytes < 100 else f"{gigabytes:,.0f}"


def folded(text: str, before: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=" " * len(before))
