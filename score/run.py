"""A checkpoint -> its loss on whole splits and its marks on the harness's tasks, on stdout."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import DESCRIPTION, Description, read_description
from pipeline.checkpoint.load import load_model
from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.shards import SPLITS, Manifest, TokenReader, load_manifest
from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.machine import ranks as distributed
from pipeline.machine.device import DTYPES, pick_dtype, share_threads
from pipeline.machine.ranks import World
from pipeline.vocabulary.huggingface_files import fingerprints
from pipeline.vocabulary.tokenizer import Tokenizer
from score.loss import Score, Scorer, mean_score, split_loss
from score.options import EvalOptions


@dataclass(frozen=True)
class Dataset:
    """A dataset to be scored. `share`: its part in the mean."""

    name: str
    share: float
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Subject:
    """What is scored. `description`: of a checkpoint of ours."""

    folder: Path
    scorer: Scorer
    tokenizer: Tokenizer
    description: Description | None

    @property
    def config(self) -> Config | None:
        return from_dict(self.description.config) if self.description else None


def run(options: EvalOptions) -> None:
    """Score a checkpoint and write the result to stdout. Raises UserError."""
    world = distributed.start(options.device)
    try:
        report = score(options, world)
        if world.is_first:
            sys.stdout.write(orjson.dumps(report).decode() + "\n" if options.json else in_words(report))
            sys.stdout.flush()
        world.barrier()  # none leaves while another still writes: its connections would break
    finally:
        distributed.stop()


def score(options: EvalOptions, world: World) -> dict[str, Any]:
    """`run` on ranks that have found each other: what --json prints, on every rank."""
    with world.fail_together():
        check(options)
        found = find_checkpoint(options.ckpt, options.run_dir) if world.is_first else Path()
    folder = world.gather(found)[0]  # training may move `latest` while the ranks start
    with world.fail_together():
        subject = load(folder, options, world)
        block_size = subject.scorer.block_size
        stride = block_size if options.stride is None else options.stride
        if not 1 <= stride <= block_size:
            raise UserError(f"--stride {stride} is out of range: wanted 1 to {block_size}, the model's block_size")
        datasets = [] if options.tasks and not options.data else datasets_of(subject, options)
        tasks = tasks_of(options)
    step = subject.description.step if subject.description else None
    report: dict[str, Any] = {"ckpt": str(folder), "step": step, "block_size": block_size}
    report |= losses(subject, datasets, options.split, stride)
    if tasks:
        report["tasks"] = marks(subject, tasks, options.limit)
    return report


def check(options: EvalOptions) -> None:
    """Raises UserError for an option that no checkpoint could make good."""
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split!r} is not one of {', '.join(SPLITS)}")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    for name, value in (("--batch-size", options.batch_size), ("--limit", options.limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} is out of range: wanted 1 or more")
    if not options.tasks and (options.task_dir is not None or options.limit is not None):
        raise UserError("--task-dir and --limit speak of tasks: name some with --tasks")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs EleutherAI's lm-evaluation-harness: pip install 'gpt-pipeline[eval]'")


def load(folder: Path, options: EvalOptions, world: World) -> Subject:
    """The model on this rank's device, its weights in float32 as they were trained."""
    share_threads(world.local_size)
    description = read_description(folder) if (folder / DESCRIPTION).is_file() else None
    model, tokenizer = load_model(folder)
    dtype, why = pick_dtype(options.dtype, world.device, model.config.n_embd)
    logger.info(
        "%s: %d rank(s) on %s, dtype %s: %s",
        folder, world.size, world.device.type, str(dtype).removeprefix("torch."), why,
    )  # fmt: skip
    return Subject(
        folder, Scorer(model.to(world.device).eval(), dtype, options.batch_size, world), tokenizer, description
    )


def datasets_of(subject: Subject, options: EvalOptions) -> list[Dataset]:
    """The dataset asked for, or those the checkpoint was trained on with their shares."""
    if not options.data and subject.config is None:
        raise UserError(f"{subject.folder} does not say what it was trained on: name a dataset with --data NAME")
    config = subject.config or Config()
    data = replace(config.data, dataset=options.data, mixture=()) if options.data else config.data
    config = replace(config, data=replace(data, data_dir=options.data_dir) if options.data_dir else data)
    weights = sum(entry.weight for entry in config.datasets)
    datasets = []
    for entry in config.datasets:
        folder = config.dataset_dir(entry.dataset)
        manifest = load_manifest(folder)
        check_vocabulary(subject, folder, manifest)
        datasets.append(Dataset(entry.dataset, entry.weight / weights, folder, manifest))
        if manifest.is_foreign:
            logger.info("note: %s's shards do not tell their bytes of text: no bits per byte", manifest.program)
    trained_on = "" if options.data or subject.description is None else subject.description.dataset
    if len(datasets) == 1 and trained_on not in ("", datasets[0].manifest.fingerprint):
        logger.info(
            "note: %s is no longer what the checkpoint was trained on: its content has changed", datasets[0].folder
        )
    return datasets


def check_vocabulary(subject: Subject, folder: Path, manifest: Manifest) -> None:
    """Raises UserError unless the same id is the same token in dataset and checkpoint."""
    ours, theirs = subject.tokenizer.spec(), manifest.tokenizer
    if theirs["fingerprint"] not in fingerprints(subject.folder, subject.tokenizer):
        raise UserError(
            f"{folder} has the vocabulary {theirs['name']} of {theirs['vocab_size']:,} tokens, of which "
            f"{theirs['end_of_text']} ends a text, {subject.folder} another one ({ours['name']}, {ours['vocab_size']:,}, "
            f"{ours['end_of_text']}): prepare the text with the checkpoint's tokenizer"
        )


def losses(subject: Subject, datasets: list[Dataset], split: str, stride: int) -> dict[str, Any]:
    """Each dataset's figures, and at the top those of their mean, null where there is no dataset."""
    masked = subject.config is not None and subject.config.data.document_mask
    scores = []
    for dataset in datasets:
        reader = TokenReader(dataset.folder, dataset.manifest, split)
        loss = split_loss(subject.scorer, reader, stride, subject.tokenizer.end_of_text if masked else None)
        tokens, told = len(reader) - 1, not dataset.manifest.is_foreign
        scores.append(
            Score(
                loss,
                tokens,
                dataset.manifest.count(split, "documents") if told else None,
                dataset.manifest.count(split, "bytes") / tokens if told else None,
            )
        )
    mean = mean_score(scores, [dataset.share for dataset in datasets]) if scores else None
    return {
        "dataset": " + ".join(dataset.name for dataset in datasets) or None,
        "split": split,
        "stride": stride,
        **figures(mean),
        "datasets": [
            {"dataset": dataset.name, "share": dataset.share, **figures(score)}
            for dataset, score in zip(datasets, scores, strict=True)
        ],
    }


def figures(score: Score | None) -> dict[str, Any]:
    """What is told of one dataset, or of the mean."""
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "documents")
    return {name: getattr(score, name, None) for name in names}


def tasks_of(options: EvalOptions) -> dict[str, Any] | None:
    """The tasks asked for, with their data."""
    if not options.tasks:
        return None
    from score.tasks import load_tasks

    return load_tasks(options.tasks, options.task_dir)


def marks(subject: Subject, loaded_tasks: dict[str, Any], limit: int | None) -> dict[str, dict[str, Any]]:
    """The metrics of every task. What a task cannot have of this model, all ranks find at once: rank 0 says it."""
    from score.harness import HarnessModel
    from score.tasks import run_tasks

    try:
        return run_tasks(HarnessModel(subject.scorer, subject.tokenizer), loaded_tasks, limit)
    except UserError:
        subject.scorer.world.leave_to(0)
        raise


def in_words(report: dict[str, Any]) -> str:
    """The report as plain tables."""
    step = "" if report["step"] is None else f", step {report['step']:,}"
    lines = [f"{report['ckpt']}{step}, block_size {report['block_size']:,}"]
    if rows := report["datasets"]:
        mean = [report | {"dataset": "mean by share"}] if len(rows) > 1 else []
        lines += ["", f"{report['split']} split, stride {report['stride']:,}"]
        lines += table(["dataset", "tokens", "documents", "loss", "perplexity", "bits per byte"], [
            [row["dataset"], number(row["tokens"]), number(row["documents"]), number(row["loss"]),
             number(row["perplexity"]), number(row["bits_per_byte"])]
            for row in (*rows, *mean)
        ])  # fmt: skip
    if "tasks" in report:
        lines += ["", *table(["task", "metric", "value", "stderr"], list(task_rows(report["tasks"])), names=2)]
    return "\n".join(lines) + "\n"


def task_rows(tasks: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each metric; its standard error stands beside it."""
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if "_stderr" not in metric and metric not in ("n_shot", "documents"):
                name, comma, chosen = metric.partition(",")
                error = metrics.get(f"{name}_stderr{comma}{chosen}")
                yield [task, metric, number(value), number(error)]


def number(value: float | int | None) -> str:
    """Whole numbers with commas, others with four decimals, what is not known as a dash."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def table(titles: list[str], rows: list[list[str]], names: int = 1) -> list[str]:
    """Lines of columns: the first ones are `names` and stand to the left, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if at < names else '>'}{widths[at]}}" for at, cell in enumerate(row)).rstrip()
        for row in (titles, *rows)
    ]
