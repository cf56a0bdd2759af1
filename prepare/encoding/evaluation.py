"""The texts of evaluation tasks: of EleutherAI's lm-evaluation-harness, or of files."""

import csv
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.log import logger
from prepare.documents.jsontext import each_value
from prepare.formats import Format, format_of
from prepare.sources.local import open_files
from prepare.storage.compressed import text_blocks
from prepare.units import Reading, Refused

TASK_SUFFIX = ".yaml"  # the harness's files


def evaluation_texts(name: str) -> Iterator[tuple[int, str]]:
    """Each text of a file, a folder, a glob or a task, and the number of its row, from 1.

    All strings of a row count: questions, choices and answers have a field each. Raises UserError.
    """
    try:
        is_task = name.endswith(TASK_SUFFIX) or not (format_of(name) or "/" in name or Path(name).exists())
        files = None if is_task else open_files(name, Reading())
        if not name or not (is_task or files):  # an unset shell variable is not the working folder
            raise UserError("no such file")
        rows = (row for path in files.paths for row in _file_rows(str(path))) if files else _task_rows(name)
        for number, row in enumerate(rows, start=1):
            yield from ((number, text) for text in _strings(row))
    except Exception as error:  # a task, its data and the libraries below raise anything
        raise UserError(f"--decontaminate {name}: {one_line(error) or type(error).__name__}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _file_rows(path: str) -> Iterator[Any]:
    match format := format_of(path):
        case Format.PARQUET:
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(path).iter_batches(1024):
                yield from batch.to_pylist()
        case Format.ARROW:
            from datasets import Dataset

            yield from Dataset.from_file(path)
        case Format.JSON_LINES | Format.JSON:
            # Python's parser takes NaN and lone surrogates, and there are few evaluation texts.
            for _, value in each_value(text_blocks(path)):
                if isinstance(value, Refused):
                    raise UserError(f"{value.reason} ({value.detail})")
                yield json.loads(value.decode(errors="replace"), parse_int=float)
        case Format.TEXT | Format.CSV | Format.TSV:
            text = b"".join(text_blocks(path)).decode(errors="replace")
            if format is Format.TEXT:
                # Each line is also a text by itself, such as a question of fewer words than an n-gram.
                yield from (text, *text.splitlines())
            else:
                yield from csv.reader(io.StringIO(text, newline=""), delimiter="," if format is Format.CSV else "\t")
        case _:
            raise UserError("web archives are not evaluation texts")


def _task_rows(name: str) -> Iterator[Any]:
    """The test documents of a task or of a group of them; of a task without any, the validation ones."""
    try:
        from lm_eval.tasks import TaskManager  # first: it is the one that may be missing

        import datasets.packaged_modules  # isort: skip
        import evaluate  # isort: skip
    except ImportError:
        raise UserError("tasks require EleutherAI's lm-evaluation-harness: pip install 'gpt-pipeline[eval]'") from None
    # As in scoring: no metrics fetched as scripts, and no pickles.
    evaluate.load = None
    datasets.packaged_modules._PACKAGED_DATASETS_MODULES.pop("pandas", None)
    is_file = name.endswith(TASK_SUFFIX)
    if is_file:
        logger.info("note: Python functions that %s names with !function are run", name)
    # The harness's own are 15,000 files, read in some 10 s.
    manager = TaskManager(include_path=Path(name).parent if is_file else None, include_defaults=not is_file)
    if not (Path(name).is_file() if is_file else name in manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks) or ["one that `lm-eval ls tasks` lists"]
        raise UserError(f"no such file or task: did you mean {' or '.join(near)}?")
    for task in manager.load(name)["tasks"].values():
        yield from task.test_docs() if task.has_test_docs() else task.validation_docs()
