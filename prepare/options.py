"""What the user chose for a preparation, and whether it makes sense."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from prepare.encoding.vocabulary import check_name
from prepare.unfinished.journal import Share


@dataclass(frozen=True)
class PrepareOptions:
    sources: list[str]
    name: str = ""
    data_dir: str = "data"
    tokenizer: str = "gpt2"
    text_field: str = "text"
    val_fraction: float | None = None
    shard_tokens: int = 100_000_000
    workers: int | None = None
    limit_docs: int | None = None
    seed: int = 0
    dedup: bool = False
    task_id: int | None = None
    tasks: int | None = None
    force: bool = False


def check(options: PrepareOptions) -> Share:
    """Raises UserError that lists every fault of the options; returns which part of the work is this program's."""
    faults = []
    try:
        check_name(options.tokenizer)
    except UserError as error:
        faults.append(str(error))
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        faults.append(f"--val-fraction {options.val_fraction} is not between 0 and 1, such as 0.01")
    if options.name and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", options.name):
        faults.append(f"--name {options.name!r} is not a plain name: use letters, digits, '.', '_' and '-'")
    for flag, value in (
        ("--workers", options.workers),
        ("--limit-docs", options.limit_docs),
        ("--shard-tokens", options.shard_tokens),
    ):
        if value is not None and value < 1:
            faults.append(f"{flag} {value} is below 1")
    if not 0 <= options.seed < 1 << 64:
        faults.append(f"--seed {options.seed} is not in 0 .. 2**64 - 1")
    task, tasks = options.task_id or 0, options.tasks or 1
    if (options.task_id is None) != (options.tasks is None) or not 0 <= task < tasks:
        faults.append(
            f"--task-id {options.task_id} --tasks {options.tasks}: wanted both, the first in 0 .. tasks - 1 "
            "(an array of jobs numbered from 0: sbatch --array=0-7)"
        )
    if tasks > 1:
        faults += [
            f"{flag} does not go with --tasks: {why}"
            for flag, given, why in (
                ("--limit-docs", options.limit_docs, "no task knows which documents are the first; limit the sources"),
                ("--force", options.force, "a late task would undo the others' work; remove the dataset first"),
                ("stdin", "-" in options.sources, "it can be read by one task only; put it in a file"),
            )
            if given
        ]
    if faults:
        raise UserError("; ".join(faults))
    return Share(task, tasks)


def choices(options: PrepareOptions, fraction: float) -> dict[str, Any]:
    """The options that determine the bytes."""
    return {
        "tokenizer": check_name(options.tokenizer),
        "text_field": options.text_field,
        "val_fraction": fraction,
        "shard_tokens": options.shard_tokens,
        "limit_docs": options.limit_docs,
        "seed": options.seed,
        "dedup": options.dedup,
    }


def default_fraction(file_bytes: int | None) -> float:
    """A few thousand validation documents are enough for a steady loss; small corpora need a larger share for that.

    OpenWebText's 24 GB of Parquet get nanoGPT's share, about 4.4 M of 9 G tokens; a small stand-in of it gets enough.
    """
    if file_bytes is None:
        return 0.01
    return 0.1 if file_bytes < 100e6 else 0.01 if file_bytes < 10e9 else 0.0005
