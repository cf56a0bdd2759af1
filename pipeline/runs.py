"""A run's folder: the files a run keeps up to date while it trains, and how to find the newest run.
No torch.

runs/<name>/config.toml           the resolved config
            version.txt           the code that trained it last: release, commit, hash of the sources
            status.json           running, done, stopped or failed; step; why it ended
            metrics.jsonl         one row of numbers per logged step
            bad_steps.jsonl       one row per step that did not reach the weights
            log.txt, tb/          the log with timestamps; TensorBoard
            checkpoints/          step_NNNNNNNN/ folders, and `latest` and `best`, which name one of them
            left_behind_*.jsonl   rows past the checkpoint to which the run went back
            save-now              created by the user: a checkpoint is saved after the current step, and it is removed
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from os import SEEK_END
from pathlib import Path
from typing import Any, Self

from pipeline.config.keys import Config, RunConfig
from pipeline.errors import UserError
from pipeline.files import write_atomic

# status.json is rewritten at least every 15 s. Four times that, as a network disk may show it late.
DEAD_AFTER_S = 60.0
TAIL_BYTES = 1 << 18  # of metrics.jsonl: about a thousand rows, in a few milliseconds
Row = dict[str, Any]  # of metrics.jsonl
_VAL_LOSS = re.compile(rb'"val_loss": ?([0-9][0-9.e+-]*)[,}]')  # not half a number, at the end of the file


class State(StrEnum):
    """What a run is doing, or how it ended. A killed process leaves RUNNING behind."""

    RUNNING = "running"
    DEAD = "dead"  # only read: its status.json says running, and has not been rewritten for DEAD_AFTER_S
    DONE = "done"
    # The batch scripts look for this word, to tell a run that will resume from one that is over.
    STOPPED = "stopped"  # on request, with everything saved
    FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """status.json. `step_s`, `first_step_s`, `eval_s`, `last_save_s`: seconds that the last step, this
    start's first one (with compiling), the last evaluation and the last checkpoint took. None is unknown.
    """

    state: State
    step: int
    reason: str = ""
    updated_at: str = field(default="", compare=False)  # UTC, ISO 8601
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    lr: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    max_steps: int | None = None
    peak_flops: float | None = None  # of all ranks: what mfu is measured against
    exit_code: int | None = None  # once it has ended
    step_s: float | None = None
    first_step_s: float | None = None
    eval_s: float | None = None
    last_save_s: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance, from status.json and the last rows of metrics.jsonl. None is unknown."""

    name: str
    folder: Path
    state: State | None
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    lr: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    updated_at: str = ""
    age_s: float | None = None  # since updated_at
    reason: str = ""
    grad_norm: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None
    data_wait: float | None = None
    memory_bytes: int | None = None
    losses: tuple[float, ...] = ()  # of the last rows

    def as_json(self) -> dict[str, Any]:
        """Everything but the curve."""
        return {name: value for name, value in asdict(self).items() if name != "losses"} | {"folder": str(self.folder)}


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

    def last_rows(self) -> list[Row]:
        """The last rows of metrics.jsonl, at most TAIL_BYTES of them, without those that are half-written
        or damaged.
        """
        try:
            with self.metrics.open("rb") as file:
                size = file.seek(0, SEEK_END)
                file.seek(max(0, size - TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return []
        # The first of them may have lost its beginning.
        return [row for line in lines[size > TAIL_BYTES :] if (row := _row(line)) is not None]

    def val_losses(self) -> list[float]:
        """Of all rows, in their order. No row is parsed: 25 MB take 30 ms."""
        try:
            return [float(value) for value in _VAL_LOSS.findall(self.metrics.read_bytes())]
        except (OSError, ValueError):
            return []

    def summary(self) -> RunSummary:
        """Raises nothing: what is missing or damaged is None."""
        found = summarize(self.path, self.read_status(), self.last_rows())
        if found.best_val_loss is None and (losses := self.val_losses()):  # a run of an earlier version
            found = replace(found, val_loss=losses[-1], best_val_loss=min(losses))
        return found


def summarize(path: Path, status: Status | None, rows: Sequence[Row]) -> RunSummary:
    """The run in the folder `path`, from what its files hold: `rows` are the last of metrics.jsonl."""
    found: Row = {}
    # Null, and what another program wrote: NaN is a number to Python, but not to JSON.
    rows = [{n: v for n, v in row.items() if isinstance(v, int | float) and math.isfinite(v)} for row in rows]
    for row in rows:
        found |= row
    written = {name: value for name, value in asdict(status).items() if value is not None} if status else {}
    # Whichever is newer: rows come every few steps, and status.json every few seconds.
    found = found | written if status and status.step >= found.get("step", 0) else written | found
    state, age_s = found.get("state"), _age_s(found.get("updated_at"))
    if state is State.RUNNING and age_s is not None and age_s > DEAD_AFTER_S:
        state = State.DEAD
    if state is not State.RUNNING:
        found.pop("eta_s", None)
    known = {entry.name: found[entry.name] for entry in fields(RunSummary) if entry.name in found}
    losses = tuple(row["loss"] for row in rows if "loss" in row)
    identity = {"name": path.resolve().name, "folder": path, "state": state, "age_s": age_s, "losses": losses}
    return RunSummary(**known | identity)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _age_s(updated_at: Any) -> float | None:
    """Seconds since an ISO 8601 time, UTC unless it names a zone; None for anything else."""
    try:
        then = datetime.fromisoformat(updated_at)
    except (ValueError, TypeError):
        return None
    return (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def all_runs(runs: Path = Path(RunConfig.dir)) -> list[RunFolder]:
    """Every run under `runs`, by name."""
    return [RunFolder(path) for path in sorted(runs.glob("*")) if is_run(path)]


def is_run(path: Path) -> bool:
    """Whether the folder has the files of a run."""
    return RunFolder(path).status.is_file() or RunFolder(path).metrics.is_file()


def find_runs(names: Iterable[str], runs: Path = Path(RunConfig.dir)) -> list[RunFolder]:
    """The run of each name: one under `runs`, or a folder; a folder of runs stands for them all. Raises
    UserError for what is none.
    """
    found: dict[Path, RunFolder] = {}
    for name in names:
        here = [folder for folder in (runs / name, Path(name)) if is_run(folder)][:1]
        folders = [RunFolder(path) for path in here] or all_runs(Path(name))
        if not folders:
            known = [run.path.name for run in all_runs(runs)]
            near = difflib.get_close_matches(name, known, n=1) or known[:3]
            hint = f"did you mean {' or '.join(near)}?" if near else f"there is no run under {runs}"
            raise UserError(f"no run {name!r}: expected a name under {runs} or a run's folder; {hint}")
        found |= {folder.path.resolve(): folder for folder in folders}
    return list(found.values())


def newest_run(runs: Path) -> Path | None:
    """The run under `runs` that saved a checkpoint last; None where none has one."""
    # By the pointer's time: a folder's own changes with whatever is created in it.
    pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    return pointers[-1].parents[1] if pointers else None
