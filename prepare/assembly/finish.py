"""The parts of all tasks -> the dataset: duplicates, split rule, shards, statistics, manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.dataset.shards import LISTING_NAME, SPLITS, Manifest, Shard
from pipeline.errors import UserError
from pipeline.files import hash_file, write_atomic
from pipeline.log import ProgressReport, logger
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import token_dtype
from prepare.assembly.duplicates import Marked, locate, mark_duplicates
from prepare.assembly.near_duplicates import mark_near_duplicates
from prepare.assembly.shards import Assembly, ShardLayout, lay_out_shards, statistics, write_shard, written_shard
from prepare.assembly.splits import SplitFinder
from prepare.sources.corpus import Corpus, Snapshot
from prepare.storage.files import local_file, shown
from prepare.unfinished.journal import Journal, ListedPart, Plan
from prepare.unfinished.parts import Part, Reports, Summary, merge_reports, read_summary, report
from prepare.unfinished.publishing import publish
from prepare.units import MISSING
from prepare.workers import Workers

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
# Of the rows that were read: one truncated line or one odd encoding in a crawl is usual, one in a
# hundred is a fault of the file or of the options.
MOST_BROKEN = 0.001


def finish(
    journal: Journal, plan: Plan, snapshot: Snapshot, workers: Workers, *,
    bad_rows: str | None, is_current: Callable[[], bool],
) -> bool:  # fmt: skip
    """Make the dataset from its parts, which must all exist, and publish it.

    False if the sources have changed meanwhile: then nothing is published.
    """
    tokenizer = from_spec(plan.tokenizer, journal.staged)
    dtype = token_dtype(tokenizer.vocab_size)
    listed = journal.parts(snapshot.keys, plan.wanted())
    parts = [each.path for each in listed]
    summaries = [read_summary(path) for path in parts]
    documents = sum(summary.documents for summary in summaries)
    skipped = merge_reports(summary.skipped for summary in summaries)
    if MISSING in skipped:
        snapshot.corpus.check_field()
    if documents == 0:
        reasons = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in skipped.items())
        raise UserError(
            "the corpus is empty: no source has a document with text in it" + (f" ({reasons})" if reasons else "")
        )
    _check_broken(skipped, sum(summary.rows for summary in summaries), bad_rows)
    journal.assemble(parts, plan.options)
    duplicates, near = _leave_out(parts, plan, snapshot, journal=journal, skipped=skipped)
    if plan.options["decontaminate"]:
        write_atomic(journal.staged / LISTING_NAME, b"".join(Part(path, dtype).listed.tobytes() for path in parts))
    rule = SplitFinder(parts, tokenizer, plan.options["val_fraction"], duplicates).find(journal.folder / "heads")
    assembly = Assembly(journal.folder, journal.staged, tokenizer.vocab_size, rule=rule, duplicates=duplicates)
    layouts = lay_out_shards(parts, assembly, plan.options["shard_tokens"])
    shards = _write_shards(assembly, layouts, workers)
    known = journal.known_hashes()
    hashes = {file: known.get(file) or hash_file(Path(file.path)) for file in map(local_file, snapshot.corpus.files())}
    by_path = {file.path: digest for file, digest in hashes.items()}
    manifest = Manifest(
        tokenizer=plan.tokenizer,
        dtype=dtype.name,
        splits={split: [shards[each.name] for each in layouts if each.split == split] for split in SPLITS},
        sources=snapshot.corpus.record(lambda path: by_path[str(path)]),
        read=_read(snapshot.corpus, listed, summaries),
        passed_over=merge_reports(source.passed_over for source in snapshot.corpus.sources),
        options=plan.options,
        val_rule=rule.record(),
        skipped=skipped,
        unusual=merge_reports(summary.unusual for summary in summaries),
        statistics=statistics(assembly, layouts, list(shards.values())) | ({"near_duplicates": near} if near else {}),
        program=__version__,
    )
    # The last moment at which a change of a source would make the dataset differ from what its
    # manifest says.
    if not is_current():
        return False
    publish(journal, manifest, hashes)
    _summarise(journal.dataset, manifest)
    return True


def _leave_out(
    parts: list[Path], plan: Plan, snapshot: Snapshot, *, journal: Journal, skipped: Reports
) -> tuple[Path | None, list[list[str]]]:
    """The file that marks duplicates, which are counted in `skipped`; and for some documents with
    near ones where they are, each followed by those left out for it.
    """
    dtype = token_dtype(plan.tokenizer["vocab_size"])

    def located(marked: Marked, reason: str, relation: str) -> list[list[str]]:
        clusters = locate(marked.clusters, parts, dtype, snapshot)
        if clusters:
            report(skipped, reason, f"{clusters[0][1]}, {relation} {clusters[0][0]}", count=marked.count)
        return clusters

    exact = None
    if plan.options["dedup"]:
        documents = sum(read_summary(path).documents for path in parts)
        exact = mark_duplicates((Part(path, dtype).hashes for path in parts), documents, journal.folder)
        located(exact, DUPLICATE, "the same as")
    if not plan.options["near_dedup"]:
        return exact.path if exact else None, []
    near = mark_near_duplicates(parts, dtype, journal.folder, exact.count if exact else None)
    return near.path, located(near, NEAR_DUPLICATE, "near")


def _check_broken(skipped: Reports, rows: int, bad_rows: str | None) -> None:
    """Raises UserError for more broken rows than `bad_rows` allows."""
    broken = {reason: entry for reason, entry in skipped.items() if entry.get("broken")}
    count = sum(entry["count"] for entry in broken.values())
    if bad_rows is None and count > MOST_BROKEN * rows:
        reasons = "; ".join(
            f"{entry['count']:,} {reason} (such as {', '.join(entry['first'])})" for reason, entry in broken.items()
        )
        raise UserError(
            f"{count:,} of {rows:,} rows are broken, more than {MOST_BROKEN:.1%}: {reasons}; correct them, or pass "
            "--bad-rows skip to leave them out"
        )


def _read(corpus: Corpus, listed: list[ListedPart], summaries: list[Summary]) -> list[dict[str, Any]]:
    """What was counted while each source was read."""
    counts = [{"source": shown(name), "rows": 0, "documents": 0, "text_bytes": 0} for name in corpus.typed]
    for each, summary in zip(listed, summaries, strict=True):
        entry: dict[str, Any] = counts[each.source]
        entry["rows"] += summary.rows
        entry["documents"] += summary.documents
        entry["text_bytes"] += summary.bytes
    return counts


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
