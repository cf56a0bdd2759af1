"""A run's folder: the files a run keeps up to date while it trains, and how to find the newest run.
No torch.

runs/<name>/config.toml           the resolved config
            version.txt           the code that trained it last: release, commit, hash of the sources
            status.json           running, done, stopped or failed; step; why it ended
            metrics.jsonl         one row of numbers per logged step
            evals.jsonl           what `eval --follow` measured: one row per checkpoint
            bad_steps.jsonl       one row per step that did not reach the weights
            events.jsonl          one row per start, save and sample
            references.json       unigram and bigram entropy of the dataset, which losses compare with
            log.txt, tb/          the log with timestamps; TensorBoard
            profile/              traces of log.profile_steps
            checkpoints/          step_NNNNNNNN/ folders, and `latest` and `best`, which name one of them
            left_behind_*.jsonl   rows past the checkpoint to which the run went back
            save-now              created by the user: a checkpoint is saved after the current step, and it is removed
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from os import SEEK_END
from pathlib import Path
from typing import Any, Self

from pipeline.config.keys import Config, RunConfig
from pipeline.errors import UserError
from pipeline.files import dump_json, finite, write_atomic

# status.json is rewritten at least every 15 s. Four times that, as a network disk may show it late.
DEAD_AFTER_S = 60.0
MOST_LEVELS = 4  # of folders between runs/ and a run
TAIL_BYTES = 1 << 18  # of metrics.jsonl: about a thousand rows, in a few milliseconds
LAST_BYTES = 1 << 12  # about ten rows, where many runs are looked at and their curves are not
MOST_STEPS = 1 << 53  # exact as a float
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
    UNKNOWN = "unknown"  # only read: there is no status.json, or it is damaged


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
    best_val_loss: float | None = None
    lr: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    max_steps: int | None = None
    peak_flops: float | None = None  # of all ranks: what mfu is measured against
    parameters: int | None = None
    exit_code: int | None = None  # once it has ended
    step_s: float | None = None
    first_step_s: float | None = None
    eval_s: float | None = None
    last_save_s: float | None = None
    trained_s: float | None = None
    bits_per_byte: float | None = None
    dtype: str | None = None  # autocast's, in which a run on a CPU stays


@dataclass(frozen=True)
class RunSummary(Status):
    """A run at a glance: its status, and the last rows of metrics.jsonl where those are newer."""

    name: str = ""
    folder: str = ""
    age_s: float | None = None  # since updated_at
    grad_norm: float | None = None
    mfu: float | None = None
    data_wait: float | None = None
    memory_bytes: int | None = None
    losses: tuple[float, ...] = ()  # of the last rows
    scores: Row = field(default_factory=dict)  # of each task of `eval --follow`, at the last checkpoint

    def as_json(self) -> Row:
        """Everything but the curve; what is unknown is null."""
        state = None if self.state is State.UNKNOWN else self.state
        return {name: value for name, value in asdict(self).items() if name != "losses"} | {"state": state}


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
        self.events = path / "events.jsonl"
        self.evals = path / "evals.jsonl"
        self.log, self.tensorboard = path / "log.txt", path / "tb"
        self.save_now, self.version = path / "save-now", path / "version.txt"
        self.references, self.profile = path / "references.json", path / "profile"

    def write_status(self, status: Status) -> None:
        """Dated now. On a full disk the old file is overwritten: a reader finds how the run ended."""
        document = asdict(status) | {"updated_at": datetime.now(UTC).isoformat(timespec="seconds")}
        content = dump_json(document) + b"\n"
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
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            return None

    def read_config(self) -> dict[str, Any]:
        """The values of config.toml by section.key, of whichever version; empty where it is damaged."""
        try:
            sections = tomllib.loads(self.config.read_text(encoding="utf-8")).items()
            return {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def rows(self, path: Path, last_bytes: int = TAIL_BYTES) -> list[Row]:
        """Those in the last bytes of a file of rows, without what is half-written or damaged."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, SEEK_END)
                file.seek(max(0, size - last_bytes))
                lines = file.read().splitlines()
        except OSError:
            return []
        # The first of them may have lost its beginning.
        return [row for line in lines[size > last_bytes :] if (row := parse_row(line)) is not None]

    def val_losses(self) -> list[float]:
        """Of all rows, in their order. No row is parsed: 25 MB take 30 ms."""
        try:
            return [float(value) for value in _VAL_LOSS.findall(self.metrics.read_bytes())]
        except (OSError, ValueError):
            return []

    def summary(self, last_bytes: int = TAIL_BYTES) -> RunSummary:
        """Raises nothing: what is missing or damaged is None."""
        found = summarize(self.path, self.read_status(), self.rows(self.metrics, last_bytes))
        if found.best_val_loss is None and (losses := self.val_losses()):  # a run of an earlier version
            found = replace(found, val_loss=losses[-1], best_val_loss=min(losses))
        last = self.rows(self.evals)[-1:]
        scores = {name: value for row in last for name, value in row.items() if "/" in name and "_stderr" not in name}
        return replace(found, scores=scores)


def summarize(path: Path, status: Status | None, rows: Iterable[Row]) -> RunSummary:
    """The run in the folder `path`, from what its files hold: `rows` are the last of metrics.jsonl."""
    found: Row = {}
    # Null, and what another program wrote: NaN is a number to Python, but not to JSON.
    rows = [{n: v for n, v in row.items() if finite(v) is not None} for row in rows]
    for row in rows:
        found |= row
    written = {name: value for name, value in asdict(status).items() if value is not None} if status else {}
    # Whichever is newer: rows come every few steps, and status.json every few seconds.
    found = found | written if status and status.step >= found.get("step", 0) else written | found
    state, age_s = State(found.get("state", State.UNKNOWN)), _age_s(found.get("updated_at"))
    if state is State.RUNNING and age_s is not None and age_s > DEAD_AFTER_S:
        state = State.DEAD
    if state is not State.RUNNING:
        found.pop("eta_s", None)
    known = {entry.name: found[entry.name] for entry in fields(RunSummary) if entry.name in found}
    losses = tuple(row["loss"] for row in rows if "loss" in row)
    identity = {"name": path.resolve().name, "folder": str(path), "age_s": age_s, "losses": losses}
    return RunSummary(**{"step": 0} | known | identity | {"state": state})


def parse_row(line: bytes) -> Row | None:
    """A JSON object with a step, a line of any of a run's .jsonl files; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    has_step = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
    return row if has_step else None


def _age_s(updated_at: Any) -> float | None:
    """Seconds since an ISO 8601 time, UTC unless it names a zone; None for anything else."""
    try:
        then = datetime.fromisoformat(updated_at)
    except (ValueError, TypeError):
        return None
    return (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def all_runs(runs: Path = Path(RunConfig.dir), levels: int = MOST_LEVELS) -> list[RunFolder]:
    """Every run under `runs`, by name; also in folders there, as run.dir may be runs/ablations."""
    found: dict[Path, RunFolder] = {}  # by where it is, as links may lead back
    with suppress(OSError):  # a folder of others
        for path in sorted(path for path in runs.glob("*") if path.is_dir() and not path.name.startswith(".")):
            below = [RunFolder(path)] if is_run(path) else all_runs(path, levels - 1) if levels > 1 else []
            found = {run.path.resolve(): run for run in below} | found
    return sorted(found.values(), key=lambda run: run.path)


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
            near = difflib.get_close_matches(name, known, n=1)
            there = f"there {'are ' + ', '.join(known[:3]) if known else 'is none'}"
            hint = f"did you mean {near[0]}?" if near else there
            raise UserError(f"no run {name!r}: expected a name under {runs} or a run's folder; {hint}")
        found |= {folder.path.resolve(): folder for folder in folders}
    return list(found.values())


def find_run(name: str, runs: Path = Path(RunConfig.dir)) -> RunFolder:
    """The one run of that name. Raises UserError."""
    folder, *more = find_runs([name], runs)
    if more:
        raise UserError(f"{name} is a folder of {1 + len(more)} runs: name one of them, such as {folder.path}")
    return folder


def newest_run(runs: Path) -> Path | None:
    """The run under `runs`, or in folders there, that saved a checkpoint last; None where none has one."""
    found = [pointer for level in range(MOST_LEVELS) for pointer in runs.glob("*/" * level + "*/checkpoints/latest")]
    # By the pointer's time: a folder's own changes with whatever is created in it.
    return max(found, key=lambda pointer: pointer.stat().st_mtime).parents[1] if found else None
