"""Tasks of EleutherAI's lm-evaluation-harness: its own, or those of a folder, with their data -> a model's marks.

A folder of tasks is data, and data runs no code here: a YAML file with a tag such as !function is refused, its templates are
rendered in Jinja's sandbox, only local files of formats that hold no pickle are read, and metrics that would have to be
fetched as code do not exist. What the harness brings along is a package, and may.
"""

import contextlib
import difflib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate as metric_library
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from pipeline.errors import UserError
from score.harness import HarnessModel

LOCAL_FORMATS = ("csv", "json", "parquet", "text")
# Only perplexities and their like are resampled; of 1,000 resamples the standard error is known to 2 %.
BOOTSTRAP_RESAMPLES = 1000


def load_tasks(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """The tasks, groups and tags of these names with their data. Raises UserError for the first that cannot be had.

    Those in `folder` win over the harness's own.
    """
    _confine()
    if folder is not None:
        check_task_files(folder)
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folder)  # reads 15,000 files, for some 10 s
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5))
            raise UserError(
                f"the harness has no task {name!r}: " + (f"did you mean {near}?" if near else "see its list")
            )
        for kind, entries in _load(manager, name).items():
            loaded[kind] |= entries
    return loaded


def run_tasks(
    model: HarnessModel, loaded: dict[str, Any], limit: int | None
) -> dict[str, dict[str, float | int | None]]:
    """Every task's and group's metrics by name, those with a filter of the harness as `metric,filter`; on every rank."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # resampling takes seconds: not worth a process for every core
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    resamples = BOOTSTRAP_RESAMPLES if model.world.is_first else 0
    with contextlib.redirect_stdout(sys.stderr):  # where the harness prints, too
        results = evaluate(model, loaded, limit=limit, log_samples=False, bootstrap_iters=resamples)
    return {
        name: {
            metric.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
            for metric, value in metrics.items()
            if "," in metric
        }
        | {"n_shot": results["n-shot"].get(name), "documents": results["n-samples"].get(name, {}).get("effective")}
        for name, metrics in results["results"].items()
    }


def check_task_files(folder: Path) -> None:
    """Raises UserError for a YAML file under `folder`, or included by one, that could run code or is no YAML."""
    if not folder.is_dir():
        raise UserError(f"--task-dir {folder} is no folder: wanted one with the YAML files of tasks")
    brought_along = Path(lm_eval.tasks.__file__).parent
    waiting, seen = sorted(folder.glob("**/*.yaml")), set[Path]()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or path.is_relative_to(brought_along):
            continue
        seen.add(path)
        for key, value in _entries(_read_plain_yaml(path)):
            if key == "dataset_path" and value not in LOCAL_FORMATS:
                raise UserError(
                    f"{path} reads dataset_path {value!r}: a task of --task-dir reads {', '.join(LOCAL_FORMATS)}, "
                    "with dataset_kwargs.data_files naming the files"
                )
            if key == "data_files" and any(mark in str(value) for mark in ("://", "::")):
                raise UserError(f"{path} reads data_files {value!r}: a task of --task-dir reads local files only")
            if key == "include":
                waiting += [path.parent / name for name in (value if isinstance(value, list) else [value])]


def _read_plain_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path} {error.problem}: it could run code, so a task of --task-dir has plain YAML only"
        ) from None
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None


def _entries(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every key and its value, at any depth."""
    if isinstance(document, dict):
        yield from document.items()
    if isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from _entries(part)


def _confine() -> None:
    """Take from the harness what runs code out of data: templates see no Python, and metrics are those it has itself."""
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters = lm_eval.utils.env.filters
    lm_eval.utils.env = sandbox
    metric_library.load = _no_metric


def _no_metric(name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"the metric {name} is fetched as code, which is never run")


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # the harness, its tasks and the libraries of their data raise what they like
        raise UserError(
            f"task {name} cannot be had ({type(error).__name__}: {error}): without a network its data has to be in the "
            "Hugging Face cache (HF_HOME) or in files that a task of --task-dir names"
        ) from None
    for task in loaded["tasks"].values():
        if task.get_config("unsafe_code") or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {task.task_name} runs code that a model wrote, or shows it pictures: leave it out")
        metrics = getattr(task, "_metric_fn_list", {})
        if None in metrics.values() and task.get_config("process_results") is None:
            missing = next(name for name, function in metrics.items() if function is None)
            raise UserError(
                f"task {task.task_name} has the metric {missing}, which is not in the harness: leave it out"
            )
    return loaded
