"""A plan as a page of 80 columns, or as JSON."""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from observe.plan.figures import Figure, Plan, assumptions, figures, format_seconds
from observe.tables import format_count

WIDTH = 80
NOTE_AT = 50  # columns before a figure's note: its label, value and mark
KINDS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "logits": "logits",
    "other": "other",
}  # fmt: skip
FORMATS: dict[str, Callable[[Any], str]] = {
    "step_s": format_seconds, "mfu": "{:.1%}".format, "flops": format_count, "flops_per_token": format_count,
    "tokens_per_s": format_count,
}  # fmt: skip
Comparisons = list[tuple[str, str, float, float | None]]  # of `observe.plan.measured`


def as_json(plan: Plan, comparisons: Comparisons) -> dict[str, Any]:
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
    return document | ({"measured": {key: measured for key, _, _, measured in comparisons}} if comparisons else {})


def page(plan: Plan, comparisons: Comparisons) -> Iterator[str]:
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
    for key, label, planned, measured in comparisons:
        ratio = f"{measured / planned:>8.2f}x" if measured is not None and planned else ""
        yield f"  {label:<26}{format_figure(key, planned):>14}{format_figure(key, measured):>14}{ratio}"
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
        never = f"{plan.memory.overlap / 1e9:,.2f} GB are never there together"
        yield from folded(f"total is the peak: {never}, as activations go while gradients come", "  ")


def lines_of(figure: Figure) -> Iterator[str]:
    notes = textwrap.wrap(figure.note, WIDTH - NOTE_AT) or [""]
    yield f"  {figure.label:<22}{format_figure(figure.key, figure.value):>15} {figure.mark:<9} {notes[0]}".rstrip()
    yield from (" " * NOTE_AT + note for note in notes[1:])


def format_figure(key: str, value: Any) -> str:
    """The value with its unit."""
    if value is None:
        return "unknown"
    if key in FORMATS:
        return FORMATS[key](value)
    if key.endswith("_bytes"):
        return f"{value / 1e9:,.2f} GB"
    return f"{value:,.2f}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def format_gigabytes(size: int) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:.3f}" if gigabytes < 1 else f"{gigabytes:.2f}" if gigabytes < 100 else f"{gigabytes:,.0f}"


def folded(text: str, before: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=" " * len(before))
