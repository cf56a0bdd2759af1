"""The loss curve as a figure for papers: SVG, which the page shows where there is no JavaScript,
and PNG.
"""

import io
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np

from observe.report.read import Column, Run, Table
from observe.report.reduce import reduce
from observe.report.templates import fill

# Told apart by people with any colour vision, on white and on black (after Okabe and Ito, 2008).
COLORS = ("#0a7fd0", "#d55e00", "#00956a", "#c0609c", "#8a6fd1", "#8c7a00", "#7f7f7f", "#c23b3b")
WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 22, 44  # margins around the plot
# The first steps fall from the loss of random weights, and would flatten all others: the axis ends
# at this quantile of the train loss, or the highest val loss.
TOP_QUANTILE = 0.99
PNG_SCALE, OVERSAMPLING = 3, 2  # pixels a unit; lines are drawn finer and averaged

ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # SVG's words in Pillow's


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


class Scale:
    """From a value, or an array of them, to a position between two others."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, low + 0.5)
        self.first, self.last = first, last

    def __call__(self, value: Any) -> Any:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self, most: int) -> list[float]:
        """Round values, evenly spaced."""
        power = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(power * times for times in (1, 2, 5, 10) if (self.high - self.low) / (power * times) <= most)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def loss_range(runs: Sequence[Run]) -> tuple[float, float]:
    """The lowest loss, and the highest that is shown."""
    columns = [run.rows.columns[name] for run in runs for name in ("loss", "val_loss") if name in run.rows.columns]
    low = min((np.nanmin(column) for column in columns), default=0)
    return float(low), float(max((np.nanquantile(column, TOP_QUANTILE) for column in columns), default=1))


def loss_svg(runs: Sequence[Run], references: dict[str, float]) -> str:
    """Train loss (thin) and val loss (dots) of each run against steps. Text without a colour takes
    that of the page around it, black in a file.
    """
    drawn = [run for run in runs if {"loss", "val_loss"} & run.rows.columns.keys()]
    x = Scale(0, max((run.rows.steps[-1] for run in drawn), default=1), LEFT, WIDTH - RIGHT)
    y = Scale(*loss_range(runs), HEIGHT - BOTTOM, TOP)
    curves = {run: [list(polylines(run.rows, name, x, y)) for name in ("loss", "val_loss")] for run in drawn}
    return fill("loss.svg", width=WIDTH, height=HEIGHT, x=x, y=y, curves=curves, references=references)


def polylines(rows: Table, name: str, x: Scale, y: Scale) -> Iterator[str]:
    """The pieces of a curve, as the attribute `points` has them: a train loss that is not finite
    interrupts it, as does what is above the plot.
    """
    if name not in rows.columns:
        return
    table = rows.measured(name) if name == "val_loss" else Table(rows.steps, {name: rows.columns[name]})
    kept = reduce(table, 2 * WIDTH).kept
    steps, values = cut_above(table.steps[kept].astype(float), table.columns[name][kept], y.high)
    points = [f"{px:.1f},{py:.1f}" for px, py in zip(x(steps).tolist(), y(values).tolist(), strict=True)]
    for before, after in pairwise([-1, *np.flatnonzero(np.isnan(values)).tolist(), len(points)]):
        if after - before > 1:
            yield " ".join(points[before + 1 : after])


def cut_above(steps: Column, values: Column, top: float) -> tuple[Column, Column]:
    """The curve with a row where it crosses `top`, and NaN for the rows above."""
    change, is_above = np.diff(values), values > top
    crossing = np.flatnonzero((is_above[:-1] != is_above[1:]) & np.isfinite(change))
    at = steps[crossing] + (top - values[crossing]) / change[crossing] * np.diff(steps)[crossing]
    values = np.where(is_above, np.nan, values)
    return np.insert(steps, crossing + 1, at), np.insert(values, crossing + 1, top)


def to_png(svg: str) -> bytes:
    """What `loss_svg` draws, on white, PNG_SCALE pixels a unit."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    scale = PNG_SCALE * OVERSAMPLING
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), "white")
    draw, root = ImageDraw.Draw(image), ElementTree.fromstring(svg)
    # Pillow brings a font: a node without a desktop has none.
    font = ImageFont.load_default(float(root.attrib["font-size"]) * scale)
    for element in root:
        of = element.attrib
        match element.tag.rpartition("}")[2]:
            case "text":
                at, color = (
                    (float(of["x"]) * scale, float(of["y"]) * scale),
                    of["fill"].replace("currentColor", "black"),
                )
                draw.text(at, element.text or "", fill=color, font=font, anchor=ANCHORS[of["text-anchor"]])
            case "circle":
                draw.circle((float(of["cx"]) * scale, float(of["cy"]) * scale), float(of["r"]) * scale, fill=of["fill"])
            case "polyline":
                points = [float(value) * scale for value in of["points"].replace(",", " ").split()]
                # Pillow draws no transparent line: on white it has this colour.
                opacity = float(of["stroke-opacity"])
                mixed = tuple(round(255 - (255 - c) * opacity) for c in ImageColor.getrgb(of["stroke"]))
                draw.line(points, fill=mixed, width=round(float(of["stroke-width"]) * scale), joint="curve")
    file = io.BytesIO()
    image.resize((WIDTH * PNG_SCALE, HEIGHT * PNG_SCALE), Image.Resampling.LANCZOS).save(file, "PNG", dpi=(300, 300))
    return file.getvalue()
