"""Raw text in, a prepared dataset out: sources -> survey -> encoded units -> shards -> manifest.

The manifest is written last, so a folder that has one is whole. A preparation that was killed starts over and gives the
same bytes.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.files import hash_file, one_writer, sync, write_atomic
from pipeline.log import ProgressReport, logger
from pipeline.shards import MANIFEST_NAME, SPLITS, Manifest, Shard, ShardWriter, load_manifest
from pipeline.tokenizer import Tokenizer, token_dtype
from prepare.corpus import Corpus, default_name, open_corpus
from prepare.encode import SplitRule, encode_corpus, survey, texts
from prepare.engine import EngineFault, Gigatoken, can_be_faster
from prepare.readers import STDIN_SPOOL
from prepare.vocabulary import check_name, is_file, learn_vocabulary, learns_from_corpus, open_vocabulary

# Hashing lets go of the interpreter's lock; two threads keep up with a disk and leave the processors to the workers.
HASH_THREADS = 2
# What a preparation that was cut off leaves behind; nothing else in the folder is ever removed.
_LEFTOVER = re.compile(
    r"(train|val)_\d{5,}\.bin(\.partial)?|stdin\.partial|\.(manifest|vocabulary|tokenizer)\.\w+\.\d+\.partial"
)


@dataclass(frozen=True)
class PrepareOptions:
    sources: list[str]
    name: str = ""
    data_dir: str = "data"
    tokenizer: str = "gpt2"
    text_field: str = "text"
    val_fraction: float | None = None
    shard_tokens: int = 100_000_000
    workers: int | None = None
    limit_docs: int | None = None
    seed: int = 0
    force: bool = False


def run(options: PrepareOptions) -> Path:
    """Prepare the dataset unless it is there already; returns its folder."""
    _check(options)
    name = options.name or default_name((options.sources or [""])[0])
    folder = Path(options.data_dir) / name
    corpus = open_corpus(options.sources, options.text_field, folder)
    with one_writer(folder), _file_hashes() as hash_files:
        try:
            _prepare(options, corpus, folder, hash_files)
        finally:
            (folder / STDIN_SPOOL).unlink(missing_ok=True)
    return folder


def _check(options: PrepareOptions) -> None:
    """Raises UserError that lists every fault of the options."""
    faults = []
    try:
        check_name(options.tokenizer)
    except UserError as error:
        faults.append(str(error))
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        faults.append(f"--val-fraction {options.val_fraction} is not between 0 and 1, such as 0.01")
    if options.name and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", options.name):
        faults.append(f"--name {options.name!r} is not a plain name: use letters, digits, '.', '_' and '-'")
    for flag, value in (
        ("--workers", options.workers),
        ("--limit-docs", options.limit_docs),
        ("--shard-tokens", options.shard_tokens),
    ):
        if value is not None and value < 1:
            faults.append(f"{flag} {value} is below 1")
    if not 0 <= options.seed < 1 << 64:
        faults.append(f"--seed {options.seed} is not in 0 .. 2**64 - 1")
    if faults:
        raise UserError("; ".join(faults))


@contextmanager
def _file_hashes() -> Iterator[Callable[[list[Path]], Callable[[Path], str]]]:
    """A function that starts hashing files in the background and returns the look-up of their hashes."""
    pool = ThreadPoolExecutor(HASH_THREADS)

    def start(paths: list[Path]) -> Callable[[Path], str]:
        hashes = {path: pool.submit(hash_file, path) for path in paths}
        return lambda path: hashes[path].result()

    try:
        yield start
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare(
    options: PrepareOptions,
    corpus: Corpus,
    folder: Path,
    hash_files: Callable[[list[Path]], Callable[[Path], str]],
) -> None:
    hash_of = hash_files(corpus.files())
    fraction = options.val_fraction or _default_fraction(corpus.file_bytes())
    chosen = _choices(options, fraction)
    if (folder / MANIFEST_NAME).exists() and not options.force:
        _check_same(options, folder, chosen, corpus.record(hash_of))
        logger.info("%s is already prepared", folder)
        return
    _clear(folder)
    rule = survey(texts(corpus.units(), options.limit_docs), fraction, options.seed)
    tokenizer = _tokenizer(options, corpus)
    for name, content in tokenizer.files().items():
        write_atomic(folder / name, content)
    started = time.monotonic()
    splits, skipped = _write_fast(options, corpus, folder, tokenizer, rule)
    manifest = Manifest(
        tokenizer=tokenizer.spec(),
        dtype=token_dtype(tokenizer.vocab_size).name,
        splits=splits,
        sources=corpus.record(hash_of),
        options=chosen,
        val_rule=rule.record(),
        skipped=skipped,
        program=__version__,
    )
    manifest.save(folder)
    _summarise(folder, manifest, time.monotonic() - started)


def _choices(options: PrepareOptions, fraction: float) -> dict[str, Any]:
    """The options that determine the bytes."""
    return {
        "tokenizer": check_name(options.tokenizer),
        "text_field": options.text_field,
        "val_fraction": fraction,
        "shard_tokens": options.shard_tokens,
        "limit_docs": options.limit_docs,
        "seed": options.seed,
    }


def _default_fraction(file_bytes: int | None) -> float:
    """A few thousand validation documents are enough for a steady loss; small corpora need a larger share for that.

    OpenWebText's 24 GB of Parquet get nanoGPT's share, about 4.4 M of 9 G tokens; a small stand-in of it gets enough.
    """
    if file_bytes is None:
        return 0.01
    return 0.1 if file_bytes < 100e6 else 0.01 if file_bytes < 10e9 else 0.0005


def _check_same(options: PrepareOptions, folder: Path, chosen: dict[str, Any], sources: list[dict[str, Any]]) -> None:
    manifest = load_manifest(folder)
    differences = [
        f"{name} is {manifest.options.get(name)!r} there and {value!r} here"
        for name, value in chosen.items()
        if manifest.options.get(name) != value
    ]
    if manifest.sources != sources:
        changed = [entry for entry in sources if entry not in manifest.sources] or manifest.sources
        names = [str(entry.get("path", entry.get("repository"))) for entry in changed]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        differences.append(f"the sources differ ({', '.join(names[:3])}{more})")
    # A learnt vocabulary follows from the sources, a published one does not change; a file may have.
    name = options.tokenizer
    if not differences and is_file(name) and open_vocabulary(name).spec() != manifest.tokenizer:
        differences.append(f"the vocabulary {name} has another fingerprint")
    if differences:
        raise UserError(
            f"{folder} was prepared otherwise: {'; '.join(differences)}. "
            "Prepare under another --name, or replace it with --force"
        )


def _clear(folder: Path) -> None:
    """Remove an earlier preparation: the manifest first, so that no crash leaves one that promises lost shards."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    sync(folder)
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name) and path.name != STDIN_SPOOL:
            if not path.is_file():
                raise UserError(f"{path} is in the way of a shard of that name: move it, or choose another --name")
            path.unlink()


def _tokenizer(options: PrepareOptions, corpus: Corpus) -> Tokenizer:
    if learns_from_corpus(options.tokenizer):
        return learn_vocabulary(options.tokenizer, texts(corpus.units(), options.limit_docs))
    return open_vocabulary(options.tokenizer)


def _write_fast(
    options: PrepareOptions, corpus: Corpus, folder: Path, tokenizer: Tokenizer, rule: SplitRule
) -> tuple[dict[str, list[Shard]], dict[str, int]]:
    """The shards as `tokenizer` makes them, sooner where gigatoken is installed and does the same."""
    if can_be_faster(tokenizer):
        try:
            return _write_shards(options, corpus, folder, Gigatoken(), rule)
        except EngineFault as fault:
            logger.warning("gigatoken %s: starting over with tiktoken alone", fault)
            _clear(folder)
    return _write_shards(options, corpus, folder, tokenizer, rule)


def _write_shards(
    options: PrepareOptions, corpus: Corpus, folder: Path, tokenizer: Tokenizer, rule: SplitRule
) -> tuple[dict[str, list[Shard]], dict[str, int]]:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype, options.shard_tokens) for split in SPLITS}
    skipped: Counter[str] = Counter()
    documents = 0
    units = corpus.units()
    total = sum(unit.size for unit in units) / 1e6 if isinstance(units, list) and not options.limit_docs else None
    workers = options.workers or _available_cores()
    with ProgressReport("encode", total=total, unit="MB") as report:
        for encoded in encode_corpus(units, tokenizer, rule, workers, options.limit_docs):
            for split, part in encoded.splits.items():
                writers[split].add(part.tokens, part.lengths, part.text_bytes)
            skipped.update(encoded.skipped)
            documents += encoded.documents
            report.advance(encoded.size / 1e6, f"{documents:,} documents")
    shards = {split: writer.finish() for split, writer in writers.items()}
    for split in SPLITS:
        if not shards[split]:
            raise UserError(
                f"no document was left for {split}; skipped: {dict(skipped)}; give the corpus more documents"
            )
    return shards, dict(sorted(skipped.items()))


def _available_cores() -> int:
    """The cores this process may use, which under SLURM are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _summarise(folder: Path, manifest: Manifest, seconds: float) -> None:
    megabytes = sum(manifest.count(split, "bytes") for split in SPLITS) / 1e6
    for split in SPLITS:
        tokens, documents = manifest.count(split, "tokens"), manifest.count(split, "documents")
        logger.info("%s: %s tokens in %s documents", split, f"{tokens:,}", f"{documents:,}")
    if manifest.skipped:
        logger.info("skipped: %s", ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()))
    logger.info("%s MB of text in %s s, %s MB/s", f"{megabytes:,.1f}", f"{seconds:,.1f}", f"{megabytes / seconds:,.1f}")
    logger.info("prepared %s", folder)
