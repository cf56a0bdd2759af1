"""A run as its files tell it: curves, marks on them, samples, config, datasets. No torch.

Any file may be missing, half-written or damaged: then its part is empty, and `damaged` counts the
lines that were skipped.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pipeline.budget import flops_per_token
from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.shards import Manifest, read_manifest
from pipeline.errors import UserError
from pipeline.files import finite
from pipeline.runs import Row, RunFolder, RunSummary, parse_row

Column = npt.NDArray[np.float64]
CURVES = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "data_wait")


@dataclass(frozen=True)
class Table:
    """Numbers by step: `steps` (n,) ascending, each column (n,), NaN where a row has no finite
    number.
    """

    steps: npt.NDArray[np.int64]
    columns: dict[str, Column]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Self:
        """All columns that have a number. Of several rows of a step the last one counts."""
        by_step = {row["step"]: row for row in rows}
        ordered = [by_step[step] for step in sorted(by_step)]
        names = dict.fromkeys(name for row in ordered for name in row if name != "step")
        # None becomes NaN.
        columns = {name: np.array([finite(row.get(name)) for row in ordered], float) for name in names}
        steps = np.array(sorted(by_step), np.int64)
        return cls(steps, {name: column for name, column in columns.items() if np.isfinite(column).any()})

    def measured(self, name: str) -> "Table":
        """The rows that have a number in this column, and the column alone."""
        there = np.isfinite(self.columns[name])
        return Table(self.steps[there], {name: self.columns[name][there]})


def read_text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class Run:
    """One run of a report; `label` is unique in it."""

    def __init__(self, label: str, folder: RunFolder, color: str) -> None:
        self.label, self.color, self.damaged = label, color, 0
        self.summary: RunSummary = folder.summary()
        self.rows = Table.of(self._read(folder.metrics))
        # What the task's scores are, without the position of the row and the scores' own errors.
        evals = self._read(folder.evals)
        self.evals = Table.of([{n: v for n, v in row.items() if n != "tokens" and "_stderr" not in n} for row in evals])
        self.references_text = read_text(folder.references)
        self.skips, events = self._read(folder.bad_steps), self._read(folder.events)
        starts, saves = ([row["step"] for row in events if row.get("event") == kind] for kind in ("start", "save"))
        self.saves, self.restarts, self.began = saves, starts[1:], min(starts, default=0)
        # The last of each step: one that is repeated after a resume replaces it.
        self.samples = {row["step"]: row["text"] for row in events if isinstance(row.get("text"), str)}
        self.values = folder.read_config()  # by section.key, of whichever version
        self.config_text, self.version = read_text(folder.config), read_text(folder.version).strip()

    def _read(self, path: Path) -> list[Row]:
        """The rows of a file of JSON lines that have a step."""
        try:
            # What follows the last line's end is being written.
            lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        except OSError:
            return []
        rows = [row for line in lines if (row := parse_row(line)) is not None]
        self.damaged += len(lines) - len(rows)
        return rows

    @cached_property
    def config(self) -> Config | None:
        """None where it is missing or damaged, or this version does not know one of its keys or values."""
        with suppress(UserError, ValueError, RecursionError):
            return from_dict(tomllib.loads(self.config_text)) if self.config_text else None
        return None

    @cached_property
    def datasets(self) -> dict[str, Manifest | str]:
        """The manifest of each dataset by its name, or why there is none."""
        found: dict[str, Manifest | str] = {}
        if (config := self.config) is None:
            return found
        for source in config.datasets:
            try:
                found[source.dataset] = read_manifest(config.dataset_dir(source.dataset))
            except (UserError, OSError) as error:
                found[source.dataset] = str(error)
        return found

    @property
    def references(self) -> dict[str, float]:
        """Losses of trivial models of the run's data, in nats a token, by their names; empty where there
        is no references.json.
        """
        try:
            found = json.loads(self.references_text).items()
        except (ValueError, AttributeError, RecursionError):
            return {}
        return {name.replace("_", " "): value for name, number in found if (value := finite(number)) is not None}

    def of_model(self, count: Callable[..., int]) -> int | None:
        """`parameters` or `flops_per_token` of the model; None where its vocabulary is unknown."""
        sizes = [found.tokenizer["vocab_size"] for found in self.datasets.values() if isinstance(found, Manifest)]
        return count(self.config.model, sizes[0]) if self.config and sizes else None

    @cached_property
    def axes(self) -> dict[str, Column]:
        """What a curve may be drawn against, (rows,) each: steps, and tokens, hours and FLOPs as far
        as they are known.

        Hours are of training alone: a row's tokens_per_s is the mean since the row before.
        """
        steps, columns = self.rows.steps.astype(float), self.rows.columns
        if "tokens" not in columns:
            return {"step": steps}
        known = self.rows.measured("tokens")
        tokens = np.interp(steps, known.steps, known.columns["tokens"])
        axes = {"step": steps, "tokens": tokens}
        if "tokens_per_s" in columns and self.config:
            before = tokens[0] - (steps[0] - self.began) * self.config.train.tokens_per_step
            with np.errstate(divide="ignore", invalid="ignore"):
                hours = np.diff(tokens, prepend=before) / columns["tokens_per_s"] / 3600
            axes["hours"] = np.cumsum(np.where(np.isfinite(hours) & (hours > 0), hours, 0))
        flops = self.of_model(flops_per_token)
        return axes | ({"flops": tokens * flops} if flops else {})

    def positions(self, steps: Sequence[int]) -> dict[str, list[float]]:
        """Steps on each axis."""
        known = {name: axis for name, axis in self.axes.items() if len(axis)}
        between = {name: np.interp(steps, self.rows.steps, axis).tolist() for name, axis in known.items()}
        return between | {"step": list(map(float, steps))}

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest val loss and its step."""
        if "val_loss" not in self.rows.columns:
            return None
        at = int(np.nanargmin(self.rows.columns["val_loss"]))
        return float(self.rows.columns["val_loss"][at]), int(self.rows.steps[at])
