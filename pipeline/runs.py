"""A run's folder: the files a run keeps up to date while it trains, and how to find the newest run.
No torch.

runs/<name>/config.toml           the resolved config
            version.txt           the code that trained it last: release, commit, hash of the sources
            status.json           running, done, stopped or failed; step; why it ended
            metrics.jsonl         one row of numbers per logged step
            evals.jsonl           what `eval --follow` measured: one row per checkpoint
            bad_steps.jsonl       one row per step that did not reach the weights
            log.txt, tb/          the log with timestamps; TensorBoard
            checkpoints/          step_NNNNNNNN/ folders, and `latest` and `best`, which name one of them
            left_behind_*.jsonl   rows past the checkpoint to which the run went back
            save-now              created by the user: a checkpoint is saved after the current step, and it is removed
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Self

from pipeline.config.keys import Config
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
    """status.json. `step_s`, `first_step_s`, `eval_s`, `last_save_s`: seconds that the last step, this
    start's first one (with compiling), the last evaluation and the last checkpoint took; `trained_s`:
    of all steps, what train.max_minutes limits. `tokens` were seen; `bits_per_byte` is of the val
    loss. None is unknown.
    """

    state: State
    step: int
    reason: str = ""
    updated_at: str = field(default="", compare=False)  # UTC, ISO 8601
    loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    exit_code: int | None = None  # once it has ended
    step_s: float | None = None
    first_step_s: float | None = None
    eval_s: float | None = None
    last_save_s: float | None = None
    tokens: int | None = None
    trained_s: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Position:
    """How far a run is: completed steps, the next global sample of its data, tokens seen. With the
    seed, all that the data order and the counts need.
    """

    step: int = 0
    sample: int = 0
    tokens: int = 0

    def at(self, step: int, config: Config) -> Self:
        """Where a run that begins here is at `step`."""
        tokens = (step - self.step) * config.train.tokens_per_step
        return type(self)(step, self.sample + tokens // config.model.block_size, self.tokens + tokens)


class RunFolder:
    """The files in the folder of one run; none needs to exist."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.config, self.status = path / "config.toml", path / "status.json"
        self.metrics, self.bad_steps = path / "metrics.jsonl", path / "bad_steps.jsonl"
        self.evals = path / "evals.jsonl"
        self.log, self.tensorboard = path / "log.txt", path / "tb"
        self.save_now, self.version = path / "save-now", path / "version.txt"

    def write_status(self, status: Status) -> None:
        """Dated now. On a full disk the old file is overwritten: a reader finds how the run ended."""
        document = asdict(status) | {"updated_at": datetime.now(UTC).isoformat(timespec="seconds")}
        # NaN is not JSON.
        finite = {
            name: None if value in (math.inf, -math.inf) or value != value else value
            for name, value in document.items()
        }
        content = json.dumps(finite).encode() + b"\n"
        try:
            write_atomic(self.status, content)
        except OSError:
            if status.state is State.RUNNING or not self.status.is_file():
                raise
            with self.status.open("r+b") as file:
                file.write(content)
                file.truncate()

    def read_status(self) -> Status | None:
        """status.json; None where it is missing or damaged."""
        try:
            found = json.loads(self.status.read_bytes())
            # Earlier versions recorded less, and later ones may record more.
            known = {entry.name: found[entry.name] for entry in fields(Status) if entry.name in found}
            return Status(**known | {"state": State(found["state"]), "step": int(found["step"])})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None


def newest_run(runs: Path) -> Path | None:
    """The run under `runs` that saved a checkpoint last; None where none has one."""
    # By the pointer's time: a folder's own changes with whatever is created in it.
    pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    return pointers[-1].parents[1] if pointers else None
