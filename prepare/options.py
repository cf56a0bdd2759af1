"""The options of a preparation, and what is checked about them before anything starts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.encoding.contamination import evaluation_record
from prepare.encoding.vocabulary import check_name
from prepare.storage.files import shown
from prepare.unfinished.journal import Share
from prepare.units import Reading

# Recorded in the manifest: a dataset prepared with others of these is another dataset.
DETERMINE_BYTES = (
    "tokenizer", "text_field", "document_separator", "split", "val_fraction", "shard_tokens", "limit_docs", "seed", "dedup",
)  # fmt: skip

# `bad_rows`: count and skip any number of broken rows, or end at the first; by default they are
# skipped up to a small fraction.
SKIP, STOP = BAD_ROWS = ("skip", "stop")


@dataclass(frozen=True)
class PrepareOptions:
    sources: list[str]
    name: str = ""
    data_dir: str = "data"
    tokenizer: str = "gpt2"
    text_field: str = Reading.text_field
    document_separator: str | None = None
    split: str = Reading.split
    val_fraction: float | None = None
    shard_tokens: int = 100_000_000
    workers: int | None = None
    limit_docs: int | None = None
    seed: int = 0
    dedup: bool = False
    bad_rows: str | None = None
    near_dedup: bool = False
    decontaminate: tuple[str, ...] = ()
    task_id: int | None = None
    tasks: int | None = None
    force: bool = False

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.document_separator, split=self.split)


def check(options: PrepareOptions) -> Share:
    """Which share of the work falls to this program.

    Raises UserError with every fault of the options.
    """
    if faults := [*_faults(options), *_task_faults(options)]:
        raise UserError("; ".join(faults))
    return Share(options.task_id or 0, options.tasks or 1)


def _faults(options: PrepareOptions) -> Iterator[str]:
    try:
        check_name(options.tokenizer)
    except UserError as error:
        yield str(error)
    try:
        if options.document_separator is not None and not options.reading.separator:
            yield "invalid --document-separator '': expected a text such as '<|endoftext|>'"
    except ValueError as error:
        yield f"invalid --document-separator {options.document_separator!r}: {one_line(error)}"
    if options.val_fraction and not 1e-9 <= options.val_fraction < 1:
        yield f"invalid --val-fraction {options.val_fraction}: expected 0 for no val split, or a fraction such as 0.01"
    # The name becomes a folder: one that begins with "." would be hidden, and "/" or ".." would
    # lead elsewhere.
    if options.name and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", options.name):
        yield f"invalid --name {options.name!r}: expected up to 64 letters, digits, '.', '_' and '-', not '.' first"
    for name in ("workers", "limit_docs", "shard_tokens"):
        if (count := getattr(options, name)) is not None and count < 1:
            yield f"invalid --{name.replace('_', '-')} {count}: expected at least 1"
    if options.near_dedup and find_spec("rensa") is None:
        yield "--near-dedup requires the package rensa: pip install 'gpt-pipeline[dedup]'"
    if options.near_dedup and options.limit_docs:
        # Unlike of exact ones, of near duplicates too little is known while texts are encoded.
        yield "--limit-docs cannot be combined with --near-dedup: which documents are near is known at the end; limit the sources"
    if options.bad_rows not in (None, *BAD_ROWS):
        yield f"invalid --bad-rows {options.bad_rows!r}: expected {' or '.join(BAD_ROWS)}"
    if not 0 <= options.seed < 1 << 64:
        yield f"invalid --seed {options.seed}: expected 0 .. 2**64 - 1"


def _task_faults(options: PrepareOptions) -> Iterator[str]:
    task, tasks = options.task_id, options.tasks
    if (task is None) != (tasks is None) or (task is not None and tasks is not None and not 0 <= task < tasks):
        yield (
            f"invalid --task-id {task} with --tasks {tasks}: expected both, with --task-id in "
            "0 .. tasks - 1 (a job array numbered from 0: sbatch --array=0-7)"
        )
    if (tasks or 1) > 1:
        # Tasks do not communicate, so what needs to know about the others' work is refused.
        conflicts = (
            ("--limit-docs", options.limit_docs, "no task knows which documents come first; limit the sources"),
            ("--force", options.force, "a late task would undo the work of the others; remove the dataset first"),
            ("stdin", "-" in options.sources, "only one task can read it; write it to a file"),
        )
        yield from (f"{flag} cannot be combined with --tasks: {why}" for flag, given, why in conflicts if given)


def choices(options: PrepareOptions) -> dict[str, Any]:
    """The options that determine the bytes of the dataset, as they were given."""
    chosen = replace(options, tokenizer=shown(check_name(options.tokenizer)))
    # Of evaluation texts the content counts: a task, or a file, may change under its name. What is
    # off is null, as in a dataset from before it could be on.
    new = {"near_dedup": options.near_dedup or None, "decontaminate": evaluation_record(options.decontaminate) or None}
    return {name: getattr(chosen, name) for name in DETERMINE_BYTES} | new


def settled(chosen: dict[str, Any], file_bytes: int | None) -> dict[str, Any]:
    """With the fraction of val that follows from the size of the corpus, where none was given."""
    given = chosen["val_fraction"]
    return chosen | {"val_fraction": default_fraction(file_bytes) if given is None else given}


def default_fraction(file_bytes: int | None) -> float:
    """The fraction of val: a few thousand documents, for a steady loss, are more of a small corpus.

    OpenWebText's 24 GB of Parquet get nanoGPT's fraction, about 4.4 M of 9 G tokens.
    """
    if file_bytes is None:
        return 0.01
    return 0.1 if file_bytes < 100e6 else 0.01 if file_bytes < 10e9 else 0.0005
