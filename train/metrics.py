"""What a run writes about itself: metrics.jsonl, TensorBoard, status.json. Only rank 0 has one of these."""

import json
import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from pipeline.log import logger


class Metrics:
    """Rows of numbers by step. On resume, rows past the resumed step are dropped: one curve, no step twice."""

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool) -> None:
        self.run_dir, self.tensorboard = run_dir, tensorboard
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        _drop_rows_after(path, first_step)
        _drop_rows_after(self.run_dir / "bad_steps.jsonl", first_step - 1)  # a bad step's row has the steps before it
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(self.run_dir / "tb", first_step) if self.tensorboard else None

    def rewind(self, step: int) -> None:
        """Forget what is past `step`, from where the run takes another way."""
        self.close()
        self._open(step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has a `step`, and every other number becomes a TensorBoard scalar. NaN and inf become null."""
        row = {name: value if math.isfinite(value or 0) else None for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()  # or a kill would take up to two minutes of rows that metrics.jsonl has

    def write_text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard, as it is: to Markdown it is code. metrics.jsonl has numbers only."""
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)
            self._tensorboard.flush()

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Replace status.json. `state` is running, done, stopped or failed."""
        content = {"state": state, "step": step, "reason": reason}
        write_atomic(self.run_dir / "status.json", json.dumps(content).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Throughput:
    """Tokens per second of training alone, since the last `restart`: evaluations and saves do not count."""

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak_flops: float | None) -> None:
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.last_step_s = 0.0
        self.restart()

    def restart(self) -> None:
        self._steps, self.seconds = 0, 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times one step. A step ends by reading its loss, so the device's work is in it."""
        started = time.perf_counter()
        yield
        self.last_step_s = time.perf_counter() - started
        self._steps += 1
        self.seconds += self.last_step_s

    @property
    def tokens_per_s(self) -> float:
        return self._steps * self.tokens_per_step / max(self.seconds, 1e-9)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022), 0 to 1 of the peak of all ranks; None where it is unknown."""
        return self.tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None


def _drop_rows_after(path: Path, step: int) -> None:
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        kept = [row for row in text.splitlines() if _step_of(row) <= step]
        if "".join(row + "\n" for row in kept) != text:
            write_atomic(path, "".join(row + "\n" for row in kept).encode())


def _step_of(row: str) -> float:
    """The step of a row; infinity for a line that a crash cut short, so that it is dropped."""
    try:
        return float(json.loads(row)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "tensorboard is not installed: no files in %s; pip install tensorboard, or log.tensorboard=false", folder
        )
        return None
    return SummaryWriter(folder, purge_step=first_step + 1)
