"""A report on a checkpoint as plain tables."""

from collections.abc import Iterator
from typing import Any


def format_report(report: dict[str, Any]) -> str:
    """The report of `score.run` in the order of its parts: the checkpoint, its losses, its scores
    on tasks.
    """
    step = "" if report["step"] is None else f", step {report['step']:,}"
    lines = [f"{report['ckpt']}{step}, block_size {report['block_size']:,}"]
    if rows := report["datasets"]:
        mean = [report | {"dataset": "weighted mean"}] if len(rows) > 1 else []
        lines += ["", f"{report['split']} split, stride {report['stride']:,}"]
        columns = ("tokens", "documents", "loss", "perplexity", "bits_per_byte")
        lines += format_table(
            ["dataset", *(column.replace("_", " ") for column in columns)],
            [[row["dataset"], *(format_number(row[column]) for column in columns)] for row in (*rows, *mean)],
        )
    if "tasks" in report:
        lines += ["", *format_table(["task", "metric", "value", "stderr"], list(task_rows(report["tasks"])), names=2)]
    return "\n".join(lines) + "\n"


def task_rows(tasks: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each metric, with its standard error."""
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if "_stderr" not in metric and metric not in ("n_shot", "documents"):
                name, comma, chosen = metric.partition(",")
                error = metrics.get(f"{name}_stderr{comma}{chosen}")
                yield [task, metric, format_number(value), format_number(error)]


def format_number(value: float | int | None) -> str:
    """Integers with commas, floats with four decimals, a dash for what is unknown."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def format_table(titles: list[str], rows: list[list[str]], names: int = 1) -> list[str]:
    """Aligned columns: the first `names` to the left, the numbers behind them to the right."""
    # Widths fit the longest cell: nothing is truncated, since the table may be read from a file.
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if at < names else '>'}{widths[at]}}" for at, cell in enumerate(row)).rstrip()
        for row in (titles, *rows)
    ]
