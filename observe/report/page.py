"""The page: one HTML file that needs no network, and of which no run's content can become code.

Everything from a run passes through Jinja's escaping or, as the curves' numbers and names, stands
as JSON in a block that no browser executes. The policy in the page allows our script and style by
their hashes, and no request at all.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup

import pipeline
from observe.report.figure import loss_range, loss_svg
from observe.report.read import CURVES, Column, Run
from observe.report.reduce import reduce
from observe.report.templates import fill, resource, shown
from pipeline.budget import parameters
from pipeline.config.load import toml_value

# Of all runs together: 100,000 rows of each of four runs open in half a second, in 1.7 MB.
MOST_ROWS, LEAST_ROWS_OF_RUN = 12_000, 400
MOST_LISTED, MOST_MARKS = 40, 500  # samples and steps in a list, marks of a kind on a curve
SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "data_wait")


def render(runs: Sequence[Run]) -> bytes:
    """The HTML of a report on `runs`."""
    script = f"{resource('uPlot.iife.min.js')}\n{resource('page.js')}"
    style = f"{resource('uPlot.min.css')}\n{resource('page.css')}"
    references, curves = reference_losses(runs), [curves_of(run, MOST_ROWS // len(runs)) for run in runs]
    html = fill(
        "page.html",
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=pipeline.__version__,
        policy=f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        script=Markup(script),
        style=Markup(style),
        license=resource("uPlot.LICENSE.txt"),
        data=Markup(as_json({"runs": curves, "references": references, "top": loss_range(runs)[1]})),
        figure=Markup(loss_svg(runs, references)),
        runs=runs,
        parameters=parameters,
        differences=differences(runs),
        reduced=[(run, len(curve["axes"]["step"])) for run, curve in zip(runs, curves, strict=True) if curve["means"]],
        samples=spread(sorted({step for run in runs for step in run.samples})),
        datasets={name: found for run in runs for name, found in run.datasets.items()},
        references=references,
        spread=spread,
    )
    # Half a surrogate pair has no bytes in UTF-8.
    return html.encode("utf-8", "replace")


def source(content: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def as_json(document: Any) -> str:
    """JSON that no text inside it can end: ASCII, without the characters of HTML."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def curves_of(run: Run, most_rows: int) -> dict[str, Any]:
    """What the script draws of a run: the columns of few enough rows, as long as each of `axes`."""
    reduction = reduce(run.rows, max(LEAST_ROWS_OF_RUN, most_rows))
    columns = {name: column for name, column in run.rows.columns.items() if name in CURVES}
    smoothed = [name for name in SMOOTHED if name in columns and reduction.bucket > 1]
    skipped = [row["step"] + 1 for row in run.skips]  # a row has the number of steps before it
    marks = {"restart": run.restarts, "save": run.saves, "skip": skipped}
    return {
        "label": shown(run.label),
        "color": run.color,
        "axes": {name: compact(axis[reduction.kept], 12) for name, axis in run.axes.items()},
        "columns": {name: compact(column[reduction.kept]) for name, column in columns.items()},
        "means": {name: compact(reduction.means(columns[name])) for name in smoothed},
        "evals": {
            "axes": run.positions(run.evals.steps.tolist()),
            "columns": {shown(name): compact(column) for name, column in run.evals.columns.items()},
        },
        "marks": {kind: run.positions(spread(steps, MOST_MARKS)) for kind, steps in marks.items()},
    }


def compact(column: Column, digits: int = 6) -> list[float | None]:
    """With as many digits as can be seen; None for NaN."""
    return [None if math.isnan(value) else float(f"{value:.{digits}g}") for value in column.tolist()]


def spread(values: Sequence[Any], most: int = MOST_LISTED) -> list[Any]:
    """At most `most` of the values, evenly spaced, the first and the last among them."""
    positions = np.linspace(0, len(values) - 1, min(most, len(values)))
    return [values[position] for position in positions.round().astype(int).tolist()]


def reference_losses(runs: Sequence[Run]) -> dict[str, float]:
    """Losses that a reader may compare with. Runs of the same data have the same ones; of others each has
    its run's name.
    """
    same = all(run.references == runs[0].references for run in runs)
    losses = [(run, name, value) for run in runs for name, value in run.references.items()]
    return {shown(name if same else f"{name}, {run.label}"): value for run, name, value in losses}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Of each config key that is not the same in all runs, the value in each; "–" where it is not set."""
    configs = [run.values for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "run.name")
    values = {key: [toml_value(config[key]) if key in config else "–" for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}
