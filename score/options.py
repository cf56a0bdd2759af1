"""What the user of `pipeline eval` chose."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.keys import DTYPES
from pipeline.dataset.shards import SPLITS
from pipeline.errors import UserError


@dataclass(frozen=True)
class EvalOptions:
    """The options of `pipeline eval`. Without `data`, the loss is measured on the datasets that the
    checkpoint was trained on, or not at all if there are `tasks`; with `follow`, a run, in any case.
    """

    ckpt: str = "latest"
    data: str = ""
    data_dir: str = ""
    split: str = "val"
    stride: int | None = None
    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    task_dir: Path | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    json: bool = False
    run_dir: Path | None = None
    follow: str = ""


def check_options(options: EvalOptions) -> None:
    """Raises UserError for an option that is invalid whatever the checkpoint."""
    if options.split not in SPLITS:
        raise UserError(f"invalid --split {options.split!r}: expected {' or '.join(SPLITS)}")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UserError(f"invalid --dtype {options.dtype!r}: expected auto, {', '.join(DTYPES)}")
    for name, value in (("--batch-size", options.batch_size), ("--limit", options.limit)):
        if value is not None and value < 1:
            raise UserError(f"invalid {name} {value}: expected 1 or more")
    if options.follow and (options.ckpt != EvalOptions.ckpt or options.run_dir is not None):
        raise UserError("--follow evaluates every checkpoint of its run: leave out --ckpt and --run-dir")
    if not options.tasks and (options.task_dir is not None or options.limit is not None):
        raise UserError("--task-dir and --limit apply to tasks only: name tasks with --tasks")
    if options.task_dir is not None and not options.task_dir.is_dir():
        raise UserError(f"invalid --task-dir {options.task_dir}: not a folder; expected one with YAML files of tasks")
    # lm-eval's model for Hugging Face folders imports transformers and accelerate, its extras.
    if options.tasks and not all(map(importlib.util.find_spec, ("lm_eval", "transformers", "accelerate"))):
        raise UserError("--tasks requires EleutherAI's lm-evaluation-harness: pip install 'gpt-pipeline[eval]'")
