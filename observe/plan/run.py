"""`pipeline plan`: from arguments to a page."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from observe.plan.figures import MOST_EPOCHS, Plan, figures
from observe.plan.measured import comparisons, measure
from observe.plan.page import as_json, page
from pipeline.checkpoint.pointers import pointed_folder, step_of
from pipeline.config.keys import Config
from pipeline.config.load import DEFAULT_CONFIG, config_from_arguments, find_config
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.files import dump_json
from pipeline.log import logger, printable
from pipeline.machine.gpus import hardware, hardware_here
from pipeline.runs import RunFolder, find_run, is_run


def run(arguments: Sequence[str], *, on: str | None, measured: bool, json: bool, **asked: Any) -> None:
    """Print the plan of a config, or of a run next to what it measured. `asked`: price_per_gpu_hour and
    time_limit_s of the plan. Raises UserError.
    """
    config, folder = read(list(arguments))
    machine = hardware(on) if on else hardware_here()
    warnings: list[str] = []
    mixture = open_mixture(config, warnings)
    first = first_step(config, warnings)
    plan = Plan(config, machine, mixture=mixture, first_step=first, warnings=warnings, **asked)
    if measured:
        plan = replace(plan, measured=measure(plan))
    warn(plan)
    beside = comparisons(plan, folder) if folder is not None else []
    if json:
        sys.stdout.write(dump_json(as_json(plan, beside), indent=2).decode() + "\n")
        for line in plan.warnings:
            logger.warning("warning: %s", line)
    else:
        sys.stdout.write(printable("\n".join(page(plan, beside)), keep="\n") + "\n")


def read(arguments: list[str]) -> tuple[Config, RunFolder | None]:
    """The config to plan, and the run that was trained with it, if there is one. The name of a run
    stands for its config, unless a preset or a file has that name.
    """
    named = arguments[0] if arguments and "=" not in arguments[0] else ""
    try:
        find_config(named or DEFAULT_CONFIG)
    except UserError:
        with suppress(UserError):  # the error of a config's name says more
            found = find_run(named)
            return config_from_arguments([str(found.config), *arguments[1:]]), found
    config = config_from_arguments(arguments)
    folder = RunFolder(config.run_dir)
    with suppress(UserError):  # a folder without a config that can be read
        trained = config_from_arguments([str(folder.config)]) if is_run(folder.path) else None
        # What was trained with another model or batch is no measurement of this one.
        if trained and (trained.model, trained.train.tokens_per_step) == (config.model, config.train.tokens_per_step):
            return config, folder
    return config, None


def open_mixture(config: Config, warnings: list[str]) -> Mixture | None:
    """The datasets; None, with the reason, where they are missing, unfinished or damaged."""
    try:
        return Mixture(config)
    except UserError as error:
        warnings.append(f"planned without the dataset: {error}")
        return None


def first_step(config: Config, warnings: list[str]) -> int:
    """The step at which a branch begins; 0 for another run, or where it is not known."""
    if not (branch := config.run.branch_from):
        return 0
    for path in (Path(config.run.dir) / branch, Path(branch)):
        folder = pointed_folder(path / "checkpoints", "latest") or path
        if folder.is_dir() and folder.name.startswith("step_"):
            return step_of(folder)
    warnings.append(f"no checkpoint at run.branch_from={branch}: planned as if it began at step 0")
    return 0


def warn(plan: Plan) -> None:
    """What should be known before such a run is started."""
    wanted, train, hardware = plan.wanted.train, plan.config.train, plan.hardware
    if train != wanted:
        plan.warnings.append(
            f"train.tokens_per_step={wanted.tokens_per_step} micro_batch_size={wanted.micro_batch_size} does not divide over "
            f"{hardware.ranks} rank(s): planned with train.tokens_per_step={train.tokens_per_step} "
            f"train.micro_batch_size={train.micro_batch_size}"
        )
    found = {figure.key: figure.value for section in figures(plan).values() for figure in section}
    if (epochs := found["epochs"]) and epochs > MOST_EPOCHS:
        plan.warnings.append(
            f"{epochs:,.0f} epochs: past {MOST_EPOCHS} a dataset teaches little that is new, and the model learns it by "
            "heart (Muennighoff et al. 2023); lower train.max_steps or prepare more text"
        )
    if not plan.fits:
        fits = [way for way in plan.ways() if way.largest]
        remedy = "no strategy and no micro-batch fits: use more or larger GPUs, or a smaller model"
        if largest := found["largest_micro_batch_size"]:
            remedy = f"set train.micro_batch_size={largest} or less"
        elif fits:
            how = f"parallel.strategy={fits[0].strategy} train.micro_batch_size={fits[0].largest}"
            remedy = f"set {how}{' model.activation_checkpointing=block' if fits[0].recomputes else ''}"
        plan.warnings.append(
            f"a rank needs {plan.memory.total / 1e9:,.1f} GB, which does not fit {hardware.device.kind}: {remedy}"
        )
