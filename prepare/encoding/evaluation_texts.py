"""The texts of evaluation tasks: of EleutherAI's lm-evaluation-harness, or of files.

All strings of a row count, since questions, choices and answers have a field each.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from pipeline.errors import UserError, one_line
from pipeline.log import logger
from prepare.documents.jsontext import each_value
from prepare.documents.lines import each_line
from prepare.formats import Format, format_of
from prepare.sources.local import open_files
from prepare.storage.compressed import text_blocks
from prepare.units import Reading

TASK_SUFFIX = ".yaml"  # the harness's files


def evaluation_texts(name: str) -> Iterator[tuple[int, str]]:
    """Each text and the number of its row, from 1, of a file, a folder, a glob or a task.

    Raises UserError.
    """
    is_task = name.endswith(TASK_SUFFIX)
    files = None if is_task else open_files(name, Reading())
    if files is None and not is_task and (format_of(name) or "/" in name):
        raise UserError(f"--decontaminate {name}: no such file")
    try:
        rows = (row for path in files.paths for row in _file_rows(str(path))) if files else _task_rows(name)
        for number, row in enumerate(rows, start=1):
            for text in _strings(row):
                yield number, text
    except UserError:
        raise
    except Exception as error:  # a task, its data and the libraries below raise anything
        raise UserError(f"--decontaminate {name}: cannot read it ({type(error).__name__}: {one_line(error)})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _file_rows(path: str) -> Iterator[Any]:
    match format_of(path):
        case Format.TEXT:
            # Each line is also a text by itself: it may be a question of fewer words than an n-gram.
            text = b"".join(text_blocks(path)).decode(errors="replace")
            yield text
            yield from text.splitlines()
        case Format.JSON_LINES:
            yield from (orjson.loads(line) for _, line in each_line(text_blocks(path), path) if line.strip())
        case Format.JSON:
            yield from (orjson.loads(value) for _, value in each_value(text_blocks(path), path, "text"))
        case Format.PARQUET:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                yield from batch.to_pylist()


def _task_rows(name: str) -> Iterator[Any]:
    """The test documents of a task or group of tasks, or the validation ones where it has no others."""
    try:
        import datasets.packaged_modules
        import evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            f"--decontaminate {name}: no such file, and tasks require EleutherAI's lm-evaluation-harness: "
            "pip install 'gpt-pipeline[eval]'"
        ) from None
    # As in scoring: no metrics fetched as scripts, and no pickles.
    evaluate.load = None
    datasets.packaged_modules._PACKAGED_DATASETS_MODULES.pop("pandas", None)
    is_file = name.endswith(TASK_SUFFIX)
    if is_file:
        logger.info("note: Python functions that %s names with !function are run", name)
    # Of the harness's own there are 15,000 files, read in some 10 s; a task's file can include them.
    manager = TaskManager(include_path=Path(name).parent if is_file else None, include_defaults=not is_file)
    if not (Path(name).is_file() if is_file else name in manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks) or ["one that `lm-eval ls tasks` lists"]
        raise UserError(f"--decontaminate {name}: no such file or task: did you mean {' or '.join(near)}?")
    for task in manager.load(name)["tasks"].values():
        yield from task.test_docs() if task.has_test_docs() else task.validation_docs()
