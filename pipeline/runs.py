"""A run's folder: the files a run keeps up to date while it trains, and how to find the newest run. No torch.

runs/<name>/config.toml           the resolved config
            status.json           running, done, stopped or failed; step; why it ended
            metrics.jsonl         one row of numbers per logged step
            bad_steps.jsonl       one row per step that did not reach the weights
            log.txt, tb/          the log with timestamps; TensorBoard
            checkpoints/          step_NNNNNNNN/ folders, and `latest` and `best`, which name one of them
            save-now              created by the user: a checkpoint is saved after the current step, and it is removed
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.files import write_atomic


class State(StrEnum):
    """What a run is doing, or how it ended. A killed process leaves RUNNING behind."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # on request, with everything saved
    FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """status.json. `step_s`, `last_save_s`: seconds that the last step and the last checkpoint took, None before the first."""

    state: State
    step: int
    reason: str = ""
    step_s: float | None = None
    last_save_s: float | None = None


@dataclass(frozen=True)
class RunFolder:
    """The files in the folder of one run; none needs to exist."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_steps(self) -> Path:
        return self.path / "bad_steps.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def save_now(self) -> Path:
        return self.path / "save-now"

    def write_status(self, status: Status) -> None:
        write_atomic(self.path / "status.json", json.dumps(asdict(status)).encode() + b"\n")

    def read_status(self) -> Status | None:
        """status.json; None where it is missing or damaged."""
        try:
            found = json.loads((self.path / "status.json").read_bytes())
            timing = found.get("step_s"), found.get("last_save_s")
            return Status(State(found["state"]), int(found["step"]), str(found["reason"]), *timing)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def drop_rows_after(self, step: int) -> None:
        """Forget what was recorded past `step`, where a run resumes: one curve, no step twice."""
        _drop_rows_after(self.metrics, step)
        _drop_rows_after(self.bad_steps, step - 1)  # a bad step's row has the number of steps before it


def newest_run(runs: Path) -> Path | None:
    """The run under `runs` that saved a checkpoint last; None where none has one."""
    pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    return pointers[-1].parents[1] if pointers else None


def _drop_rows_after(path: Path, step: int) -> None:
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        kept = "".join(row + "\n" for row in text.splitlines() if _step_of(row) <= step)
        if kept != text:
            write_atomic(path, kept.encode())


def _step_of(row: str) -> float:
    """The step of a row; infinity for a line truncated by a crash, so that it is dropped."""
    try:
        return float(json.loads(row)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
