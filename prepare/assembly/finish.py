"""From the parts of all tasks to the dataset: duplicates, splits, shards, statistics, manifest."""

from pathlib import Path

from pipeline import __version__
from pipeline.dataset.shards import SPLITS, Manifest, Shard
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.log import ProgressReport, logger
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import token_dtype
from prepare.assembly.duplicates import mark_duplicates
from prepare.assembly.shards import Assembly, ShardPlan, plan_shards, statistics, write_shard, written_shard
from prepare.assembly.splits import dropped, find_rule
from prepare.sources.corpus import Corpus
from prepare.unfinished.journal import Journal, Plan
from prepare.unfinished.parts import Part, Reports, add_reports, read_summary, report
from prepare.workers import Workers

DUPLICATE = "duplicate"


def finish(journal: Journal, plan: Plan, corpus: Corpus, workers: Workers) -> None:
    """Make the dataset of the parts, which all have to be there, and put it in its place."""
    tokenizer = from_spec(plan.tokenizer, journal.staged)
    dtype = token_dtype(tokenizer.vocab_size)
    parts = journal.parts(len(plan.sizes), plan.options["limit_docs"])
    skipped, unusual, documents = _reports(parts)
    duplicates = None
    if plan.options["dedup"]:
        duplicates = mark_duplicates((Part(path, dtype).hashes for path in parts), documents, journal.folder)
        marks = dropped(duplicates, 0, documents)
        if marks.any():
            report(skipped, DUPLICATE, f"document {int(marks.argmax())} of the corpus, from 0", int(marks.sum()))
    if documents == 0:
        left_out = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in skipped.items())
        raise UserError(
            "the corpus is empty: no source holds a document with text in it" + (f" ({left_out})" if left_out else "")
        )
    rule = find_rule(parts, tokenizer, plan.options["val_fraction"], duplicates)
    assembly = Assembly(journal.folder, journal.staged, tokenizer.vocab_size, tokenizer.end_of_text, rule, duplicates)
    plans = plan_shards(parts, assembly, plan.options["shard_tokens"])
    shards = _write_shards(assembly, plans, workers)
    if changed := changed_sources(plan, corpus, journal):
        raise UserError(
            f"{changed[0]} changed while {journal.dataset} was prepared from it: start over with --force once it stays as it is"
        )
    known = journal.known_hashes()
    manifest = Manifest(
        tokenizer=plan.tokenizer,
        dtype=dtype.name,
        splits={split: [shards[each.name] for each in plans if each.split == split] for split in SPLITS},
        sources=corpus.record(lambda path: known[str(path)][1] if str(path) in known else hash_file(path)),
        options=plan.options,
        val_rule=rule.record(),
        skipped=skipped,
        unusual=unusual,
        statistics=statistics(assembly, plans, list(shards.values())),
        program=__version__,
    )
    journal.publish(manifest)
    _summarise(journal.dataset, manifest)


def changed_sources(plan: Plan, corpus: Corpus, journal: Journal) -> list[str]:
    """The sources that are not as they were when the plan was made; a file that was only touched is the same."""
    known = journal.known_hashes()
    stamps = corpus.stamps()

    def only_touched(name: str) -> bool:
        stamp, digest = known.get(name, (None, ""))
        return name in stamps and stamp == plan.stamps.get(name) and hash_file(Path(name)) == digest

    names = sorted({*stamps, *plan.stamps})
    return [name for name in names if stamps.get(name) != plan.stamps.get(name) and not only_touched(name)]


def _reports(parts: list[Path]) -> tuple[Reports, Reports, int]:
    """What was left out and what was unusual, with counts and examples; and how many documents there are."""
    skipped: Reports = {}
    unusual: Reports = {}
    documents = 0
    for path in parts:
        summary = read_summary(path)
        add_reports(skipped, summary.skipped)
        add_reports(unusual, summary.unusual)
        documents += summary.documents
    return dict(sorted(skipped.items())), dict(sorted(unusual.items())), documents


def _write_shards(assembly: Assembly, plans: list[ShardPlan], workers: Workers) -> dict[str, Shard]:
    """Every shard, by its plan's name."""
    found = {each.name: shard for each in plans if (shard := written_shard(assembly, each))}
    missing = [each for each in plans if each.name not in found]
    with ProgressReport("write shards", len(plans), "shards", done=len(found)) as progress:
        for shard in workers.map(write_shard, [(assembly, each) for each in missing]):
            found[shard.file.removesuffix(".bin")] = shard
            progress.advance(1)
    return found


def _summarise(dataset: Path, manifest: Manifest) -> None:
    for split in SPLITS:
        tokens, documents = manifest.count(split, "tokens"), manifest.count(split, "documents")
        logger.info("%s: %s tokens in %s documents", split, f"{tokens:,}", f"{documents:,}")
    for what, reports in (("left out", manifest.skipped), ("kept, but unusual", manifest.unusual)):
        for reason, entry in reports.items():
            logger.info("%s: %s documents: %s (such as %s)", what, f"{entry['count']:,}", reason, entry["example"])
    logger.info("prepared %s", dataset)
