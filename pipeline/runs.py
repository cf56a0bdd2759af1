"""A run's folder: the files a run keeps up to date while it trains, and how to find the newest run.
No torch.

runs/<name>/config.toml           the resolved config
            version.txt           the code that trained it last: release, commit, hash of the sources
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
    # The batch scripts look for this word, to tell a run that will resume from one that is over.
    STOPPED = "stopped"  # on request, with everything saved
    FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """status.json. `step_s`, `last_save_s`: seconds that the last step and the last checkpoint
    took, None before the first.
    """

    state: State
    step: int
    reason: str = ""
    step_s: float | None = None
    last_save_s: float | None = None


class RunFolder:
    """The files in the folder of one run; none needs to exist."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.config, self.status = path / "config.toml", path / "status.json"
        self.metrics, self.bad_steps = path / "metrics.jsonl", path / "bad_steps.jsonl"
        self.log, self.tensorboard = path / "log.txt", path / "tb"
        self.save_now, self.version = path / "save-now", path / "version.txt"

    def write_status(self, status: Status) -> None:
        write_atomic(self.status, json.dumps(asdict(status)).encode() + b"\n")

    def read_status(self) -> Status | None:
        """status.json; None where it is missing or damaged."""
        try:
            found = json.loads(self.status.read_bytes())
            # Runs of earlier versions did not record these.
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
    # By the pointer's time: a folder's own changes with whatever is created in it.
    pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    return pointers[-1].parents[1] if pointers else None


def _drop_rows_after(path: Path, step: int) -> None:
    if path.is_file():
        content = path.read_bytes()
        kept = b"".join(row + b"\n" for row in content.splitlines() if _step_of(row) <= step)
        if kept != content:
            write_atomic(path, kept)


def _step_of(row: bytes) -> float:
    """The step of a row; infinity for what a crash left of one, so that it is dropped."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # not JSON, or not even UTF-8
        return float("inf")
