"""The commands that make data: prepare, merge, fetch."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import PATH, Argument, Command

GROUP = "Data"


def _source_kinds() -> str:
    from prepare.sources.names import SOURCE_KINDS

    return f"{SOURCE_KINDS[0].upper()}{SOURCE_KINDS[1:]}."


@click.command(
    cls=Command, group=GROUP, options="prepare.options:PrepareOptions",
    example="pipeline prepare my-texts/ --name mine --tokenizer gpt2",
    shown={
        "sources": {"metavar": "SOURCE...", "type": click.Path(), "help": _source_kinds()},
        "name": "Name of the dataset; by default the source's.",
        "data_dir": "Folder of all datasets.",
        "tokenizer": "gpt2, cl100k_base, o200k_base, char, byte, word, bpe:N, or a tokenizer.json or .tiktoken file.",
        "text_field": "Field or column that holds the text; meta.content is the field content inside meta.",
        "document_separator": "Text between the documents of a text file, such as '<|endoftext|>'; \\n is a newline.",
        "split": "Split of a Hub dataset, or of a folder that save_to_disk wrote.",
        "val_fraction": "Fraction of the tokens for val, 0 for none; by default it depends on the corpus's size.",
        "shard_tokens": "Tokens after which a shard is closed.",
        "workers": "Processes; by default one for each core.",
        "limit_docs": "Take only the first N documents.",
        "seed": "Chooses which documents are val.",
        "bad_rows": "Broken rows, such as lines that are not JSON: skip any number, or stop at the first (skip or stop); "
        "by default up to 0.1 % of the rows are skipped.",
        "dedup": "Leave out exact duplicates of earlier documents.",
        "near_dedup": "Leave out documents nearly equal to an earlier one (MinHash).",
        "decontaminate": {
            "metavar": "TASK|FILE",
            "help": "Leave out documents that contain evaluation texts: of an lm-eval task, or a file; repeatable.",
        },
        "task_id": "Number of this job, from 0, among --tasks; by default SLURM's array index.",
        "tasks": "Jobs that share the dataset; by default the size of SLURM's array.",
        "force": "Replace a dataset of the same name, finished or not.",
    },
)  # fmt: skip
def prepare(options: Any) -> None:
    """Turn text into a dataset: shards of token ids and a manifest.

    The dataset is written to DATA_DIR/NAME. If the command is killed, the same command resumes it.
    """
    from prepare.run import run

    if options.task_id is None and options.tasks is None:
        task_id, tasks = _slurm_array()
        options = replace(options, task_id=task_id, tasks=tasks)
    run(options)


def _slurm_array() -> tuple[int | None, int | None]:
    """This job's number in its SLURM array, from 0, and the array's size; nothing outside one."""
    index, size = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if index is None or size is None:
        return None, None
    return int(index) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")), int(size)


@click.command(cls=Command, group=GROUP, example="pipeline merge data/openwebtext")
@click.argument("folder", cls=Argument, metavar="DIR", type=PATH, help="Folder of the dataset.")
@click.option("--workers", type=int, metavar="N", help="Processes; by default one for each core.")
def merge(folder: Path, workers: int | None) -> None:
    """Join what the jobs of `prepare --tasks` made into one dataset.

    The last of the jobs does that by itself; this command is for when it did not.
    """
    from prepare.run import merge as merge_tasks

    merge_tasks(folder, workers)


@click.command(cls=Command, group=GROUP, example="pipeline fetch openwebtext")
@click.argument("source", cls=Argument, help="A named corpus, or hf:ORG/NAME[:CONFIG][@REVISION].")
@click.option("--tokenizer", default="gpt2", metavar="NAME", help="Vocabulary to fetch too; gpt2 needs no fetching.")
@click.option("--split", metavar="NAME", help="Split of a Hub dataset, if not train.")
def fetch(source: str, tokenizer: str, split: str | None) -> None:
    """Download a corpus and a vocabulary for nodes without a network.

    They go to Hugging Face's cache. It prints the environment variables to set on those nodes.
    """
    from prepare.fetch import run

    for name, value in run(source, tokenizer, **({"split": split} if split else {})).items():
        click.echo(f"export {name}={shlex.quote(value)}")
