"""Tasks of EleutherAI's lm-evaluation-harness, by its model for Hugging Face folders.

Of code in data only --task-dir's `!function` runs: never remote model code, dataset scripts (which
datasets 4 dropped), pickles, metrics fetched as scripts, or programs that a model wrote.
"""

import contextlib
import difflib
import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import datasets.packaged_modules
import evaluate
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError, one_line
from pipeline.log import logger
from score.loss import Scorer
from score.options import EvalOptions


@cache
def find_tasks(options: EvalOptions) -> TaskManager:
    """The tasks of --task-dir, which take precedence, and the harness's. Raises UserError for an
    unknown name.
    """
    if options.task_dir is not None:
        logger.info("note: Python functions that the tasks in %s name with !function are run", options.task_dir)
    manager = TaskManager(include_path=options.task_dir, include_defaults=options.task_dir is None)
    if not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=options.task_dir)  # reads the harness's 15,000 files, which takes some 10 s
    for name in sorted(set(options.tasks) - set(manager.all_tasks)):
        near = difflib.get_close_matches(name, manager.all_tasks) or ["one that `lm-eval ls tasks` lists"]
        raise UserError(f"unknown task {name!r}: did you mean {' or '.join(near)}?")
    return manager


def open_model(folder: Path, scorer: Scorer) -> HFLM:
    """The checkpoint on the rank's device, with float32 weights as in training."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises against a model given as an object
    # Given a name, the harness has accelerate connect the ranks, of which only the first is here.
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=scorer.world.device, dtype="float32", use_safetensors=True, trust_remote_code=False
    )
    dtype = scorer.dtype if scorer.dtype.itemsize == 2 else None
    return HFLM(pretrained=model, batch_size=scorer.batch_size, mixed_precision_dtype=dtype)


def score_tasks(manager: TaskManager, folder: Path, scorer: Scorer, options: EvalOptions) -> dict[str, dict[str, Any]]:
    """Metrics by task or group; one of a filter of the harness is `metric,filter`."""
    # The harness would compare NaNs and call the first choice the likeliest.
    if not all(parameter.isfinite().all() for parameter in scorer.model.parameters()):
        raise UserError(f"{folder} has weights that are not finite, so it is damaged: use another checkpoint")
    os.environ["DISABLE_MULTIPROC"] = "1"  # resampling takes seconds, as starting a process for every core would
    evaluate.load = None  # it fetches metrics as scripts
    datasets.packaged_modules._PACKAGED_DATASETS_MODULES.pop("pandas", None)  # it reads pickles
    settings = {"limit": options.limit, "bootstrap_iters": 1000, "log_samples": False}  # standard errors known to 2 %
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness prints too, and stdout carries the result alone
            model = open_model(folder, scorer)
            results = simple_evaluate(model=model, tasks=list(options.tasks), task_manager=manager, **settings)
    except Exception as error:  # a task, its data and the libraries below raise anything
        names, reason = ", ".join(options.tasks), f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"cannot score {names} ({reason}); data without a network: see HF_HOME, --task-dir") from None
    return {
        name: {
            key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
            for key, value in metrics.items()
            if "," in key
        }
        | {"n_shot": results["n-shot"].get(name), "documents": results["n-samples"].get(name, {}).get("effective")}
        for name, metrics in results["results"].items()
    }
