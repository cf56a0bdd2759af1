"""The parts of all tasks -> the dataset: duplicates, split rule, shards, statistics, manifest."""

from pathlib import Path

from pipeline import __version__
from pipeline.dataset.shards import LISTING_NAME, SPLITS, Manifest, Shard
from pipeline.errors import UserError
from pipeline.files import hash_file, publish
from pipeline.log import ProgressReport, logger
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import token_dtype
from prepare.assembly.duplicates import locate, locate_duplicate, mark_duplicates
from prepare.assembly.near_duplicates import mark_near_duplicates
from prepare.assembly.shards import Assembly, ShardLayout, lay_out_shards, statistics, write_shard, written_shard
from prepare.assembly.splits import SplitFinder, dropped
from prepare.sources.corpus import Corpus
from prepare.unfinished.journal import Journal, Plan
from prepare.unfinished.parts import Part, merge_reports, read_summary, report
from prepare.workers import Workers

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"


def finish(journal: Journal, plan: Plan, corpus: Corpus, workers: Workers) -> None:
    """Make the dataset from its parts, which must all exist, and publish it."""
    tokenizer = from_spec(plan.tokenizer, journal.staged)
    dtype = token_dtype(tokenizer.vocab_size)
    parts = journal.parts(plan.options["limit_docs"])
    summaries = [read_summary(path) for path in parts]
    documents = sum(summary.documents for summary in summaries)
    skipped = merge_reports(summary.skipped for summary in summaries)
    duplicates = None
    if plan.options["dedup"]:
        duplicates = mark_duplicates((Part(path, dtype).hashes for path in parts), documents, journal.folder)
        if (marks := dropped(duplicates, 0, documents)).any():
            example = locate_duplicate(int(marks.argmax()), parts, dtype, corpus.items())
            report(skipped, DUPLICATE, example, count=int(marks.sum()))
    near: list[list[str]] = []
    if plan.options["near_dedup"] and documents:
        duplicates, count, clusters = mark_near_duplicates(parts, dtype, journal.folder, duplicates)
        near = [[locate(number, parts, dtype, corpus.items()) for number in cluster] for cluster in clusters]
        if near:
            report(skipped, NEAR_DUPLICATE, f"{near[0][1]}, near {near[0][0]}", count=count)
    if plan.options["decontaminate"]:
        partial = journal.staged / f"{LISTING_NAME}.partial"
        with partial.open("wb") as listing:
            listing.writelines(Part(path, dtype).listed.tobytes() for path in parts)
        publish(partial, journal.staged / LISTING_NAME)
    if documents == 0:
        reasons = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in skipped.items())
        raise UserError(
            "the corpus is empty: no source has a document with text in it" + (f" ({reasons})" if reasons else "")
        )
    rule = SplitFinder(parts, tokenizer, plan.options["val_fraction"], duplicates).find(journal.folder / "heads")
    assembly = Assembly(journal.folder, journal.staged, tokenizer.vocab_size, rule=rule, duplicates=duplicates)
    layouts = lay_out_shards(parts, assembly, plan.options["shard_tokens"])
    shards = _write_shards(assembly, layouts, workers)
    # The last moment at which a change of a source would make the dataset differ from what its
    # manifest says.
    if changed := changed_sources(plan, corpus, journal):
        raise UserError(
            f"{changed[0]} changed while {journal.dataset} was prepared from it: start over with --force once it no longer "
            "changes"
        )
    known = journal.known_hashes()
    manifest = Manifest(
        tokenizer=plan.tokenizer,
        dtype=dtype.name,
        splits={split: [shards[each.name] for each in layouts if each.split == split] for split in SPLITS},
        sources=corpus.record(lambda path: known[str(path)][1] if str(path) in known else hash_file(path)),
        options=plan.options,
        val_rule=rule.record(),
        skipped=skipped,
        unusual=merge_reports(summary.unusual for summary in summaries),
        statistics=statistics(assembly, layouts, list(shards.values())) | ({"near_duplicates": near} if near else {}),
        program=__version__,
    )
    journal.publish(manifest)
    _summarise(journal.dataset, manifest)


def changed_sources(plan: Plan, corpus: Corpus, journal: Journal) -> list[str]:
    """The sources that changed since the plan was made.

    A file with a new time but the same content has not.
    """
    known = journal.known_hashes()
    stamps = corpus.stamps()

    def only_touched(name: str) -> bool:
        stamp, digest = known.get(name, (None, ""))
        return name in stamps and stamp == plan.stamps.get(name) and hash_file(Path(name)) == digest

    # A stamp is size and time, cheap to compare; only where they differ is a file read, to compare
    # its hash.
    names = sorted({*stamps, *plan.stamps})
    return [name for name in names if stamps.get(name) != plan.stamps.get(name) and not only_touched(name)]


def _write_shards(assembly: Assembly, layouts: list[ShardLayout], workers: Workers) -> dict[str, Shard]:
    """Every shard, by the name of its layout."""
    # Shards of an earlier run that was killed while it wrote them; the layout is the same, so their
    # content is too.
    found = {each.name: shard for each in layouts if (shard := written_shard(assembly, each))}
    missing = [each for each in layouts if each.name not in found]
    with ProgressReport("write shards", len(layouts), "shards", done=len(found)) as progress:
        for shard in workers.map(write_shard, [(assembly, each) for each in missing]):
            found[shard.file.removesuffix(".bin")] = shard
            progress.advance(1)
    return found


def _summarise(dataset: Path, manifest: Manifest) -> None:
    for split in SPLITS:
        tokens, documents, tails = (manifest.count(split, what) for what in ("tokens", "documents", "tails"))
        ends = f" and the ends of {tails:,} others" if tails else ""
        logger.info("%s: %s tokens in %s documents%s", split, f"{tokens:,}", f"{documents:,}", ends)
    for what, reports in (("skipped", manifest.skipped), ("kept, but unusual", manifest.unusual)):
        for reason, entry in reports.items():
            count = f"{entry['count']:,} documents"
            logger.info("%s: %s: %s (such as %s)", what, count, reason, entry["example"])
    logger.info("prepared %s", dataset)
