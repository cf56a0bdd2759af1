"""`pipeline inspect RUN --step N`: the texts of which a step's batch is made, such as one that was
skipped or whose loss jumps. Which sample is where follows from the seed and the step, on any number of
ranks.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from observe.inspect import BEGINNING_CHARACTERS, decode
from observe.tables import cell, open_console, print_json
from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import Config
from pipeline.config.load import load_config
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.runs import Position, RunFolder, find_run
from pipeline.vocabulary.specs import from_spec

RECORDED = ("loss", "grad_norm", "reason")


def run(name: Path, step: int, as_json: bool) -> None:
    """Write the batch of a step to stdout. Raises UserError where the run or its data cannot be read."""
    description = describe_step(find_run(str(name)), step)
    (print_json if as_json else show)(description)


def describe_step(folder: RunFolder, step: int) -> dict[str, Any]:
    """The batch that is trained on when `step` steps are complete, and what is recorded about it."""
    config = load_config(str(folder.config), [])
    mixture = Mixture(config)
    first = began_at(folder, config, mixture).at(step, config).sample
    samples = np.arange(first, first + config.train.tokens_per_step // config.model.block_size)
    tokenizer = from_spec(mixture.tokenizer, mixture.sources[0].folder)
    described = []
    for sample, number, within in zip(samples.tolist(), *mixture.locate(samples), strict=True):
        source = mixture.sources[number]
        ids = source.loader.batch(np.array([within]))[0]
        # Where few ids make up a whole window, it is a table, a list, or damage.
        found = {"sample": sample, "dataset": source.name, "position": source.loader.starts(np.array([within]))[0]}
        described.append(found | {"distinct_ids": len(np.unique(ids)), "text": decode(tokenizer, ids.tolist())})
    # A row counts the step that it is about as complete; a skipped step never was.
    rows = [row for row in folder.rows(folder.metrics, sys.maxsize) if row["step"] == step + 1]
    bad = [row for row in folder.rows(folder.bad_steps, sys.maxsize) if row["step"] == step]
    recorded: dict[str, Any] = {name: row[name] for row in rows + bad for name in RECORDED if name in row}
    return {"run": str(folder.path), "step": step, "first_sample": first, **recorded, "samples": described}


def began_at(folder: RunFolder, config: Config, mixture: Mixture) -> Position:
    """Where the run began: at zero, unless it is a branch. Raises UserError where that is unknown, or the
    data is not what the run was trained on.
    """
    newest = pointed_folder(folder.checkpoints, "latest")
    if newest is None:
        if config.run.branch_from:
            raise UserError(f"{folder.path} is a branch without a checkpoint, which would say at which sample it began")
        return Position()
    from pipeline.checkpoint.folder import read_description  # it imports torch

    description = read_description(newest)
    if description.dataset != mixture.fingerprint:
        raise UserError(
            f"{mixture} is not the dataset that {folder.path} was trained on (fingerprint {mixture.fingerprint[:12]}, "
            f"expected {description.dataset[:12]}): restore that one"
        )
    return Position(**description.began_at)


def show(description: dict[str, Any]) -> None:
    """What is recorded about the step, then how each text begins."""
    console, samples = open_console(), description["samples"]
    recorded = "".join(f", {name} {description[name]}" for name in RECORDED if name in description)
    console.print(cell(f"{description['run']}, step {description['step']:,}: {len(samples):,} samples{recorded}"))
    for each in samples:
        where = f"sample {each['sample']:,}: {each['dataset']} from token {each['position']:,}"
        console.print("", cell(f"{where}, {each['distinct_ids']:,} distinct ids"), sep="\n", style="bold")
        text = each["text"]
        console.print(cell("(ids outside the vocabulary)" if text is None else text[:BEGINNING_CHARACTERS]))
    console.print(cell(f"Each text's first {BEGINNING_CHARACTERS} characters; --json has them complete."), style="dim")
