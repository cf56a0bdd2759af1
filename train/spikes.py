"""The optional guard against spikes: a gradient norm far above the last ones sends the run back past the samples at fault.

Going on from the last checkpoint with the same samples would only meet the spike again. So everything between that
checkpoint and the spike is left out, as PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1): spikes come
from certain data in a certain state of the weights. What was left out stands in the run folder, and with the norms that
a checkpoint carries every later start takes the same samples.
"""

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import write_atomic


class SpikeGuard:
    """Compares gradient norms with those of the last `window` steps that reached the weights."""

    def __init__(self, z_score: float, window: int) -> None:
        self.z_score = z_score
        self._norms: deque[float] = deque(maxlen=window)

    @property
    def norms(self) -> list[float]:
        """The state of the guard, empty where it is off."""
        return list(self._norms)

    def restore(self, norms: Iterable[float]) -> None:
        self._norms.clear()
        self._norms.extend(norms if self.z_score else ())

    def is_spike(self, norm: float) -> bool:
        """Whether `norm` is out of line; before the window is full there is nothing to compare with."""
        if not self.z_score or len(self._norms) < (self._norms.maxlen or 0):
            return False
        return bool(norm > np.mean(self._norms) + self.z_score * np.std(self._norms))

    def observe(self, norm: float) -> None:
        if self.z_score:
            self._norms.append(norm)


class SkippedSamples:
    """`skipped_samples.jsonl`: from which step on how many samples of the run's order are left out."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "skipped_samples.jsonl"
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
            self.before(0)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is damaged ({type(error).__name__}: {error}): without it the run cannot tell which samples come "
                "next; bring it back, or choose another run.name"
            ) from None

    def before(self, step: int) -> int:
        """The samples left out up to the batch of `step`."""
        return sum(row["samples"] for row in self.rows if row["step"] <= step)

    def rewinds_to(self, step: int) -> int:
        return sum(row["step"] == step for row in self.rows)

    def add(self, row: dict[str, Any], on_disk: bool) -> None:
        """Leave out `row["samples"]` samples from `row["step"]` on, durably before anything follows from it."""
        self.rows.append(row)
        if on_disk:
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
