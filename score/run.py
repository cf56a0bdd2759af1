"""A checkpoint -> its loss on complete splits and its scores on the harness's tasks, on stdout."""

import datetime
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import Description
from pipeline.checkpoint.load import read_model
from pipeline.checkpoint.open import open_model
from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.shards import Manifest, TokenReader, load_manifest
from pipeline.errors import UserError
from pipeline.files import dump_json
from pipeline.log import logger
from pipeline.machine import ranks as distributed
from pipeline.machine.device import pick_dtype, share_threads
from pipeline.machine.ranks import World
from pipeline.vocabulary.huggingface_files import fingerprints
from pipeline.vocabulary.specs import check_same_vocabulary
from pipeline.vocabulary.tokenizer import Tokenizer
from score.loss import Score, Scorer, mean_score, split_loss
from score.options import EvalOptions, check_options
from score.tables import format_report

# Of the other ranks while the first scores tasks: collectives would give up after half an hour.
PATIENCE = datetime.timedelta(days=30)
FIGURES = ("loss", "perplexity", "bits_per_byte", "tokens", "documents")


@dataclass(frozen=True)
class Dataset:
    """A dataset to score, and its weight in the mean: weights add up to 1."""

    name: str
    weight: float
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Subject:
    """What is scored. `description` is None for a model of another program."""

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
            sys.stdout.write(dump_json(report).decode() + "\n" if options.json else format_report(report))
            sys.stdout.flush()
        world.barrier()  # a rank that exits while another still writes would break its connections
    finally:
        distributed.stop()


def score(options: EvalOptions, world: World) -> dict[str, Any]:
    """What --json prints, on every rank."""
    with world.fail_together():
        check_options(options)
        found = find_checkpoint(options.ckpt, options.run_dir) if world.is_first else Path()
    folder = world.gather(found)[0]  # training may move `latest` while the ranks start
    with world.fail_together():
        subject = load(folder, options, world)
        block_size = subject.scorer.block_size
        stride = block_size if options.stride is None else options.stride
        if not 1 <= stride <= block_size:
            raise UserError(f"invalid --stride {stride}: expected 1 to {block_size}, the model's block_size")
        # All that can be wrong is found before the first of the hours that scoring may take.
        datasets = [] if options.tasks and not options.data else open_datasets(subject, options)
        tasks = None
        if options.tasks and world.is_first:
            from score.harness import find_tasks  # it takes seconds to import

            tasks = find_tasks(options)
    step = subject.description.step if subject.description else None
    report: dict[str, Any] = {"ckpt": str(folder), "step": step, "block_size": block_size}
    report |= score_datasets(subject, datasets, options.split, stride)
    if options.tasks:
        report["tasks"] = score_tasks(subject, tasks, options)
    return report


def load(folder: Path, options: EvalOptions, world: World) -> Subject:
    """The model on this rank's device, with float32 weights as in training."""
    share_threads(world.local_size)
    opened = open_model(folder)
    model = read_model(opened)
    dtype, why = pick_dtype(options.dtype, world.device, model.config.n_embd)
    named = str(dtype).removeprefix("torch.")
    logger.info(f"{folder}: {world.size} rank(s) on {world.device.type}, dtype {named}: {why}")
    scorer = Scorer(model.to(world.device).eval(), dtype, options.batch_size, world)
    return Subject(folder, scorer, opened.tokenizer, opened.description)


def open_datasets(subject: Subject, options: EvalOptions) -> list[Dataset]:
    """The dataset of --data, or those that the checkpoint was trained on."""
    if not options.data and subject.config is None:
        raise UserError(f"{subject.folder} does not record what it was trained on: name a dataset with --data NAME")
    config = subject.config or Config()
    data = replace(config.data, dataset=options.data, mixture=()) if options.data else config.data
    config = replace(config, data=replace(data, data_dir=options.data_dir) if options.data_dir else data)
    total_weight = sum(entry.weight for entry in config.datasets)
    datasets = []
    for entry in config.datasets:
        folder = config.dataset_dir(entry.dataset)
        manifest = load_manifest(folder)
        expected, known = subject.tokenizer.spec(), fingerprints(subject.folder, subject.tokenizer)
        check_same_vocabulary(folder, manifest.tokenizer, of=subject.folder, expected=expected, fingerprints=known)
        datasets.append(Dataset(entry.dataset, entry.weight / total_weight, folder, manifest))
        if manifest.is_foreign:
            logger.info("note: %s's shards do not record the bytes of their text: no bits per byte", manifest.program)
    trained_on = "" if options.data or subject.description is None else subject.description.dataset
    if len(datasets) == 1 and trained_on not in ("", datasets[0].manifest.fingerprint):
        logger.info("note: %s has changed since the checkpoint was trained on it", datasets[0].folder)
    return datasets


def score_datasets(subject: Subject, datasets: list[Dataset], split: str, stride: int) -> dict[str, Any]:
    """The figures of their mean, null without a dataset, then those of each dataset."""
    scores = [score_dataset(subject, dataset, split, stride) for dataset in datasets]
    mean = mean_score(scores, [dataset.weight for dataset in datasets]) if scores else None
    names = " + ".join(dataset.name for dataset in datasets) or None
    scored = zip(datasets, scores, strict=True)
    rows = [{"dataset": dataset.name, "share": dataset.weight, **figures(score)} for dataset, score in scored]
    return {"dataset": names, "split": split, "stride": stride, **figures(mean), "datasets": rows}


def score_dataset(subject: Subject, dataset: Dataset, split: str, stride: int) -> Score:
    masked = subject.config is not None and subject.config.data.document_mask
    reader = TokenReader(dataset.folder, dataset.manifest, split)
    loss = split_loss(subject.scorer, reader, stride, subject.tokenizer.end_of_text if masked else None)
    tokens = len(reader) - 1
    if dataset.manifest.is_foreign:
        return Score(loss, tokens)
    documents, text_bytes = (dataset.manifest.count(split, what) for what in ("documents", "bytes"))
    return Score(loss, tokens, documents, bytes_per_token=text_bytes / tokens)


def figures(score: Score | None) -> dict[str, Any]:
    return {name: getattr(score, name, None) for name in FIGURES}


def score_tasks(subject: Subject, tasks: Any, options: EvalOptions) -> Any:
    """The metrics of every task, on every rank; the first one computes them while the others wait.

    The harness could share requests among GPUs of one machine, but neither among CPU processes nor
    among machines.
    """
    world = subject.scorer.world
    scores = None
    with world.fail_together(PATIENCE):
        if world.is_first:
            from score.harness import score_tasks

            scores = score_tasks(tasks, subject.folder, subject.scorer, options)
    return world.gather(scores)[0]
